"""Time of matching and of a whole diff against graph size: `python tests/benchmarks/diff.py --json F`.

The graphs are transformer blocks put together by hand, so that 50,000 nodes cost no export. Cases: one graph and its
copy (the record decides), another one with q/dq pairs that has no record, names or fake values in common with it (the
structure decides), and the latter without module names (one sequence of 50,000 operators).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import fx, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "support"))

from benchmarks.measure import Row, pin_threads, print_table, write_json

aten = torch.ops.aten
quantized = torch.ops.quantized_decomposed


def transformer(nodes: int, *, pairs: bool, modules: bool = True, prefix: str = "") -> fx.GraphModule:
    """About ``nodes`` nodes (without q/dq); ``pairs`` puts q/dq in front of every linear."""
    import qpass.ops  # noqa: F401

    root, graph = nn.Module(), fx.Graph()

    def add(op: str, target: object, args: tuple[object, ...], path: str, name: str) -> fx.Node:
        node = graph.create_node(op, target, args, {}, name=prefix + name)
        node.meta["stack_trace"] = f'  File "model.py", line {len(name)}, in forward\n    {name}'
        if modules:
            node.meta["nn_module_stack"] = {path: (path, "torch.nn.Linear")}
        return node

    x = graph.placeholder("x")
    for block in range(max(1, nodes // 30)):
        at = f"layers.{block}"
        holder = nn.Module()
        root.add_module(f"layers_{block}", holder)

        def linear(source: fx.Node, name: str, at: str = at, holder: nn.Module = holder, block: int = block) -> fx.Node:
            holder.register_buffer(name, torch.zeros(1))
            weight = add("get_attr", f"layers_{block}.{name}", (), f"{at}.{name}", f"{name}_weight")
            if pairs:
                q, dq = quantized.quantize_per_tensor.default, quantized.dequantize_per_tensor.default
                rest = (0.1, 0, 0, 255, torch.uint8)
                source = add("call_function", q, (source, *rest), f"{at}.{name}", "quantize")
                source = add("call_function", dq, (source, *rest), f"{at}.{name}", "dequantize")
            return add("call_function", aten.linear.default, (source, weight), f"{at}.{name}", "linear")

        def call(target: object, *args: object, at: str = at) -> fx.Node:
            return add("call_function", target, args, at, str(target).split(".")[1])

        h = call(aten.layer_norm.default, x, [8])
        q, k, v = (
            call(aten.transpose.int, call(aten.unflatten.int, linear(h, name), -1, [2, -1]), 1, 2)
            for name in ("query", "key", "value")
        )
        attended = call(aten.scaled_dot_product_attention.default, q, k, v)
        x = call(aten.add.Tensor, x, linear(call(aten.flatten.using_ints, attended, 2), "out"))
        h = call(aten.layer_norm.default, x, [8])
        up = call(aten.gelu.default, linear(h, "up"))
        x = call(aten.add.Tensor, x, linear(call(aten.mul.Tensor, up, linear(h, "gate")), "down"))
    graph.output(x)
    return fx.GraphModule(root, graph)


def measure(nodes: int) -> list[Row]:
    from qpass.inspect.diff import diff
    from qpass.inspect.matching.match import match
    from qpass.inspect.snapshot import snapshot
    from qpass.ir.module import copy_graph_module

    plain = transformer(nodes, pairs=False)
    cases = {
        "a copy": (plain, copy_graph_module(plain)),
        "q/dq, another export": (plain, transformer(nodes, pairs=True, prefix="b_")),
        "q/dq, another export, no modules": (
            transformer(nodes, pairs=False, modules=False), transformer(nodes, pairs=True, modules=False, prefix="b_"),
        ),
    }  # fmt: skip
    rows = []
    for case, (a, b) in cases.items():
        one, other = snapshot(a), snapshot(b)
        start = time.perf_counter()
        found = match(one, other)
        matched = time.perf_counter() - start
        start = time.perf_counter()
        text = str(diff(a, b))
        whole = time.perf_counter() - start
        name = f"{len(a.graph.nodes)} nodes, {case}"
        rows += [
            Row(name, "qpass", "match", round(matched, 3), "s"),
            Row(name, "qpass", "diff and text", round(whole, 3), "s"),
            Row(name, "qpass", "paired", round(100 * len(found) / len(one), 2), "%"),
            Row(name, "qpass", "text", len(text.splitlines()), "lines"),
        ]  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--sizes", default="6000,50000", help="graph nodes")
    options = parser.parse_args(arguments)
    pin_threads(1)
    rows: list[Row] = []
    for nodes in map(int, options.sizes.split(",")):
        rows += measure(nodes)
        write_json(options.json, rows)
    print_table(rows, ratio_of="match", ratio_to="qpass")


if __name__ == "__main__":
    main()
