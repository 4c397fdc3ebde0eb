"""Scripts of examples/, started as their first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def torchrun(script: str, *options: str, **environment: str) -> str:
    """What the script prints on 2 ranks; both must succeed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / f"{script}.py"), *options]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert ran.returncode == 0, ran.stderr
    print(ran.stdout)
    return ran.stdout
