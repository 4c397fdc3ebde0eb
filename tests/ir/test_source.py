from __future__ import annotations

import linecache

import pytest
import torch
from torch import fx, nn

from qpass.ir.source import clean_path, module_path, module_stack, source_line, user_line, where


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).relu()


def exported() -> dict[str, fx.Node]:
    gm = torch.export.export(nn.Sequential(Block()), (torch.randn(2, 4),)).module(check_guards=False)
    return {node.name: node for node in gm.graph.nodes}


@pytest.mark.parametrize(
    ("spelled", "path"),
    [
        ("", ""),
        ("encoder.layers.0", "encoder.layers.0"),
        ("self_attn.out_proj", "self_attn.out_proj"),
        ("L['self']", ""),
        ("L['self'].encoder.layers.0", "encoder.layers.0"),
        ("L['fn'].0", "0"),
        ("L['self']._modules['encoder'].layers[0]", "encoder.layers.0"),
        ("L['self']._modules['fc']._parameters['weight']", "fc.weight"),
        ("G['model'].head", "head"),
        ("getattr(L['self'].body, 'conv')", "body.conv"),
        ("getattr(getattr(L['self'], 'body'), '0')", "body.0"),
    ],
)
def test_a_path_reads_the_same_however_it_was_spelled(spelled: str, path: str) -> None:
    assert clean_path(spelled) == path


def test_the_stack_goes_from_the_root_to_the_innermost_module() -> None:
    nodes = exported()
    assert module_stack(nodes["linear"]) == (
        ("", "torch.nn.modules.container.Sequential"),
        ("0", f"{Block.__module__}.Block"),
        ("0.fc", "torch.nn.modules.linear.Linear"),
    )
    assert (module_path(nodes["linear"]), module_path(nodes["relu"])) == ("0.fc", "0")


def test_the_line_is_the_users_although_torch_has_frames_below_it() -> None:
    nodes = exported()
    line = Block.forward.__code__.co_firstlineno + 1
    code = linecache.getline(__file__, line).strip()
    assert source_line(nodes["linear"]) == source_line(nodes["relu"]) == f"test_source.py:{line}: {code}"
    assert where(nodes["linear"]) == f"0.fc (linear), test_source.py:{line}: {code}"


def test_generated_frames_are_nobodys_line() -> None:
    generated = '  File "<eval_with_key>.3", line 7, in forward\n    relu = linear.relu()'
    assert user_line(generated) == ""
    assert (
        user_line(f'  File "/models/net.py", line 4, in forward\n    y = cond(x)\n{generated}')
        == "net.py:4: y = cond(x)"
    )


def test_a_node_without_provenance_is_named_alone() -> None:
    node = fx.Graph().placeholder("x")
    assert (module_path(node), module_stack(node), source_line(node), where(node)) == ("", (), "", "x")
