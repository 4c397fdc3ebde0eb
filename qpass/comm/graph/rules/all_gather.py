"""Gathering from all ranks: payloads instead of values, narrow values instead of wide ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from qpass.arithmetic.numerics import dtype_name
from qpass.comm.graph.coded import decoded
from qpass.comm.graph.collective import WAIT, c10d, ops
from qpass.comm.graph.transfer import issued_by, payload_of, result_shape, send, wait_for, world_of
from qpass.ir.constants import Constants
from qpass.ir.editor import Editor
from qpass.ir.expression import Expr
from qpass.ir.match import Match
from qpass.ir.rule import Rule, require

aten, prims = torch.ops.aten, torch.ops.prims

SENT_AS_THEY_ARE = {torch.int8, torch.uint8, torch.float16, torch.bfloat16}
"""Narrow dtypes that every transport carries. Other dtypes of one byte are sent as uint8."""


class GatherPayloads(Rule):
    """wait(all_gather(decode(p)))  ->  decode(wait(all_gather(p)))

    Exact: a payload holds its own scales, so what it decodes to does not depend on who decodes it.
    """

    def pattern(self, x: Any, world: Any, group: Any) -> Expr:
        return c10d.wait_tensor(c10d.all_gather_into_tensor(x, world, group))

    def check(self, m: Match, constants: Constants) -> None:
        payload_of(issued_by(m.root), 1)

    def rewrite(self, m: Match, edit: Editor) -> fx.Node:
        collective = issued_by(m.root)
        coded, place = payload_of(collective, 1), {"like": m.root, "before": m.root}
        how = f"all_gather of {coded.wire}"
        issue = send(edit, collective, coded.payload, how, ops.all_gather_into_tensor.default, m.world)
        payloads = wait_for(edit, issue, **place)
        shape, dtype = result_shape(edit, collective, **place), m.root.meta["val"].dtype
        return decoded(edit, payloads, coded.wire, world_of(collective), shape, dtype, **place)


class CastBeforeGather(Rule):
    """cast(wait(all_gather(x)), narrower)  ->  wait(all_gather(cast(x, narrower)))

    Exact: a cast rounds every element by itself.
    """

    def pattern(self, x: Any, world: Any, group: Any, dtype: Any) -> Iterable[Expr]:
        gathered = c10d.wait_tensor(c10d.all_gather_into_tensor(x, world, group))
        yield Expr(prims.convert_element_type.default, (gathered, dtype), {})
        yield Expr(aten.to.dtype, (gathered, dtype), {})

    def check(self, m: Match, constants: Constants) -> None:
        x = m.x.meta["val"]
        wide, narrow = dtype_name(x.dtype), dtype_name(m.dtype)
        require(x.dtype.is_floating_point, f"what is gathered is {wide}")
        require(m.dtype.itemsize < x.dtype.itemsize, f"{narrow} is not narrower than {wide}")
        require(m.dtype in SENT_AS_THEY_ARE or m.dtype.itemsize == 1, f"{narrow} does not travel")
        require(m.dtype is not torch.bool and x.dim() > 0, "truth values and single numbers are left as they are")

    def rewrite(self, m: Match, edit: Editor) -> fx.Node:
        (wait,) = (node for node in m.nodes if node.target is WAIT)
        collective = issued_by(wait)
        issue, as_bytes = collective.node, m.dtype not in SENT_AS_THEY_ARE
        place = {"like": m.root, "before": issue}
        cast: Any = m.root.target
        narrow = edit.call(cast, m.x, m.dtype, **place)
        if as_bytes:
            narrow = edit.call(aten.view.dtype, narrow, torch.uint8, **place)
        how = f"all_gather of {dtype_name(m.dtype)}"
        started = send(edit, collective, narrow, how, ops.all_gather_into_tensor.default, m.world)
        gathered = wait_for(edit, started, like=wait, before=wait)
        return edit.call(aten.view.dtype, gathered, m.dtype, like=wait, before=wait) if as_bytes else gathered
