"""Policies and their overrides as values: what they take, what they refuse, and what they resolve to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qpass.comm import Feedback, Override, Policy, codec
from qpass.comm.policy.collective_override import OverrideMatches, Place
from qpass.comm.policy.policy import policy
from qpass.errors import ConfigError


def test_a_dict_says_what_the_arguments_say() -> None:
    assert policy({"codec": "int8", "kinds": "all_gather"}) == Policy("int8", "all_gather")
    overrides = [{"codec": "int4", "backward": True}, {"codec": None, "module": "head"}]
    same = Policy("int8", min_bytes=0).override("int4", backward=True).keep_plain(module="head")
    assert policy({"codec": "int8", "min_bytes": 0, "overrides": overrides}) == same
    assert hash(same) == hash(policy(same))


def test_policies_are_equal_where_they_share_their_feedback() -> None:
    feedback = Feedback()
    same = policy({"codec": "bf16", "feedback": feedback})
    assert same == Policy("bf16", feedback=feedback)
    assert hash(same) == hash(Policy("bf16", feedback=feedback))
    assert same not in (Policy("bf16"), Policy("bf16", feedback=Feedback()))


WRONG: list[tuple[Any, str]] = [
    ({"codecs": "int8"}, r"comm: Policy has no argument 'codecs' \(did you mean 'codec'\?\)"),
    ({"kinds": "all_gather"}, "comm: the policy .* names no codec"),
    ({"codec": "int8", "overrides": [{"codec": "int4", "modul": "x"}]}, r"Override has no argument 'modul' .*'module'"),
    ({"codec": "int8", "overrides": [{"module": "x"}]}, "comm: the override .* names no codec"),
    ({"codec": "int8", "overrides": [{"codec": "int4"}]}, "names no kind, group, module, backward or min_bytes"),
    ({"codec": "int8", "overrides": ["int4"]}, r"must be qpass\.comm\.Override objects, not 'int4'"),
    ({"codec": "int8", "overrides": [{"codec": "int4", "kind": "all_gathr"}]}, "No collective is named 'all_gathr'"),
    ({"codec": "int8", "overrides": [{"codec": "int9", "kind": "all_gather"}]}, "no codec 'int9'"),
    ({"codec": "int8", "overrides": [{"codec": "int8:128:bf16:stochastic", "kind": "all_gather"}]}, "one seed for all"),
    ({"codec": "int8", "feedback": True}, r"feedback is a qpass\.comm\.Feedback, not bool\.\n  to do: make one"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[case[1] for case in WRONG])
def test_what_is_wrong_is_said(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy(given)


def test_the_first_override_that_matches_wins() -> None:
    given = Policy("int8", min_bytes=100).override("int4", module="a.*", min_bytes=1000).override("bf16", module="a*")

    def resolved(numel: int, *modules: str) -> Any:
        return given.resolve(Place("all_reduce", modules=modules), numel, torch.float32)

    assert resolved(250, "a", "a.b") == Policy("int4", ("all_reduce",), 1000)
    assert resolved(249, "a", "a.b") == Policy("bf16", ("all_reduce",), 100)  # too small for the first
    assert resolved(250, "a") == Policy("bf16", ("all_reduce",), 100)
    assert resolved(250, "b") == resolved(24, "a") == Policy("int8", min_bytes=100)


def test_an_override_inside_a_module_and_by_a_groups_description() -> None:
    override = Override("int4", module="layers.*", group="mesh_tp")
    assert override.codec == codec("int4")
    assert override.matches(Place("all_gather", ("3", "mesh_tp"), ("layers", "layers.0", "layers.0.mlp")))
    assert not override.matches(Place("all_gather", ("3", "mesh_tp"), ("layers",)))
    assert not override.matches(Place("all_gather", ("3", "mesh_dp"), ("layers.0",)))


def test_names_near_to_what_was_meant() -> None:
    seen = OverrideMatches()
    overrides = Policy("int8").override("int4", module="heda").override("int4", group="mesh_pt").overrides
    seen.note(Place("all_gather", ("3", "mesh_tp"), ("head",)), overrides)
    assert [hint for _, _, hint in seen.looked_for(overrides)] == [
        " (did you mean 'head'?)",
        " (did you mean 'mesh_tp'?)",
    ]
