"""The passes that compress the collectives of a graph: one file a pass."""
