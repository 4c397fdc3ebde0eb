"""qpass, torch.ao, torchao and the first compilation, in every order and from eight threads at once."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import pytest

STEPS = {
    "qpass": "import qpass.ops",
    "torch.ao": "import torch.ao.quantization.fx._decomposed",
    "torchao": "import torchao.quantization.pt2e",
    "compile": "import torch; assert torch.compile(lambda x: x + 1)(torch.ones(3)).tolist() == [2, 2, 2]",
}
PEERLESS = importlib.util.find_spec("torchao") is None

WORKS = """
import torch
from qpass.ops import graph_ops, quantized_decomposed
x, qparams = torch.tensor([0.5, 1.5, -9.0]), (0.1, 3, -8, 7, torch.int8)

def function(x):
    return [ops.quantize_per_tensor(x, *qparams) for ops in (graph_ops, quantized_decomposed)]

for codes in (*function(x), *torch.compile(function, backend="aot_eager")(x)):
    assert codes.tolist() == [7, 7, -8]
assert graph_ops is torch.ops.quantized_decomposed and quantized_decomposed is torch.ops.qpass_decomposed
"""


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{code}\n{result.stderr}"


def run_orders(orders: list[tuple[str, ...]]) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda order: run("\n".join(STEPS[step] for step in order) + WORKS), orders))


def test_qpass_before_the_first_compilation() -> None:
    """The order in which defining torch's operators too early would show; then the peers."""
    run_orders([("qpass", "compile", *(() if PEERLESS else ("torchao",)), "torch.ao")])


@pytest.mark.slow
@pytest.mark.skipif(PEERLESS, reason="torchao is not installed, and half of the orders are about it")
def test_every_order() -> None:
    run_orders(list(permutations(STEPS)))


def test_eight_threads_at_once() -> None:
    names = ["qpass", "torch.ao", "qpass", "qpass", "torch.ao", "qpass", "qpass", "qpass"]
    if not PEERLESS:
        names[1] = "torchao"
    run(f"""
import threading
import torch
start, failed = threading.Barrier(8), []

def work(step):
    start.wait()
    try:
        exec(step)
    except BaseException as error:
        failed.append(repr(error))

threads = [threading.Thread(target=work, args=(step,)) for step in {[STEPS[name] for name in names]!r}]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed, failed
{WORKS}""")
