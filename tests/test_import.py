"""`import qpass` adds little to `import torch`."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from qpass import torch_private

HEAVY = [
    "torch._dynamo", "torch._inductor", "torch._numpy", "torch.distributed.fsdp", "torch.distributed.tensor",
    "torch.fx.experimental.symbolic_shapes", "torch.onnx", "sympy", "mpmath", "numpy.random", "triton",
]  # fmt: skip


def test_importing_qpass_imports_nothing_heavy() -> None:
    """Each of these takes longer to import than the rest together, and what needs one imports it when it runs."""
    script = f"""
import json, sys
import torch
before = set(sys.modules)
import qpass
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules and name not in before]))
"""
    assert json.loads(subprocess.check_output([sys.executable, "-c", script], text=True)) == []


def test_what_stands_in_for_dynamo_does_what_dynamo_does() -> None:
    def function() -> None: ...

    def other() -> None: ...

    torch_private.assume_constant_result(function)
    assert vars(function) == vars(torch.compiler.assume_constant_result(other)) != {}
