"""The passes: one file a pass, each a frozen dataclass whose body only transforms.

Lint, dead code, verification, timing and the walk over sub-graphs belong to the frame in ``qpass.pipeline``.
"""

from qpass.passes.frame import Pass

__all__ = ["Pass"]
