"""What a pass is: derive from `Pass` to write your own."""

from qpass.ir.frame import Pass

__all__ = ["Pass"]
