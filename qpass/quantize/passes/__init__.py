"""The passes that quantize and lower: one file a pass, each a frozen dataclass whose body only transforms."""
