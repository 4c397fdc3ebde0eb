"""Every private name of torch that qpass uses, each with its home: torch may move any of them in any version.

Checked on the versions in `CHECKED`. A name is looked up when it is first read, so that those of Inductor and Dynamo,
which take seconds to import, cost nothing before. A test fails where another file uses a private name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pkgutil import resolve_name
from types import CodeType
from typing import TYPE_CHECKING, Any, TypeVar

from qpass.errors import VersionError

if TYPE_CHECKING:
    from torch import _foreach_copy_ as foreach_copy_
    from torch import _mkldnn as mkldnn_layout  # type: ignore[attr-defined]
    from torch._C import _current_graph_task_id as current_graph_task_id
    from torch._C import _dispatch_has_kernel as dispatch_has_kernel
    from torch._C import _len_torch_dispatch_stack as len_torch_dispatch_stack
    from torch._C import _set_grad_enabled as set_grad_enabled
    from torch._C._distributed_c10d import PrefixStore as PrefixStore
    from torch._C._distributed_c10d import _resolve_process_group as resolve_process_group
    from torch._C._dynamo.eval_frame import _FrameAction as FrameAction
    from torch._C._dynamo.eval_frame import _FrameExecStrategy as FrameExecStrategy
    from torch._C._dynamo.eval_frame import set_code_exec_strategy as set_code_exec_strategy
    from torch._C._functorch import is_functorch_wrapped_tensor as is_functorch_wrapped_tensor
    from torch._C._functorch import peek_interpreter_stack as peek_interpreter_stack
    from torch._dispatch.python import enable_python_dispatcher as enable_python_dispatcher
    from torch._dynamo import compiled_autograd as compiled_autograd
    from torch._dynamo import config as dynamo_config
    from torch._dynamo.eval_frame import OptimizedModule as OptimizedModule
    from torch._dynamo.utils import counters as counters
    from torch._dynamo.utils import get_traced_code as get_traced_code
    from torch._functorch import config as functorch_config
    from torch._guards import CompileContext as CompileContext
    from torch._guards import TracingContext as TracingContext
    from torch._guards import tracing as tracing
    from torch._higher_order_ops import auto_functionalize as auto_functionalize
    from torch._inductor import config as inductor_config
    from torch._inductor import exc as inductor_exc
    from torch._inductor import list_mode_options as list_mode_options
    from torch._inductor.compile_fx import compile_fx as compile_fx
    from torch._inductor.compile_fx import compile_fx_inner as compile_fx_inner
    from torch._inductor.cpp_builder import get_cpp_compiler as get_cpp_compiler
    from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
    from torch._inductor.custom_graph_pass import get_hash_for_files as get_hash_for_files
    from torch._inductor.decomposition import select_decomp_table as select_decomp_table
    from torch._inductor.inductor_prims import force_stride_order as force_stride_order
    from torch._inductor.lowering import lowerings as lowerings
    from torch._inductor.lowering import register_lowering as register_lowering
    from torch._inductor.pattern_matcher import stable_topological_sort as stable_topological_sort
    from torch._inductor.virtualized import V as V
    from torch._logging._internal import trace_log as trace_log
    from torch._logging._internal import trace_structured as trace_structured
    from torch._ops import HigherOrderOperator as HigherOrderOperator
    from torch._ops import OperatorBase as OperatorBase
    from torch._ops import OpOverload as OpOverload
    from torch._prims_common import is_contiguous_or_false as is_contiguous_or_false
    from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
    from torch._subclasses.fake_tensor import is_fake as is_fake
    from torch.cpu import _is_amx_tile_supported as is_amx_tile_supported
    from torch.cpu import _is_avx512_bf16_supported as is_avx512_bf16_supported
    from torch.cpu import _is_vnni_supported as is_vnni_supported
    from torch.distributed import _functional_collectives as functional_collectives
    from torch.distributed.distributed_c10d import _get_group_size_by_name as get_group_size_by_name
    from torch.fx._pytree import tree_flatten_spec as tree_flatten_spec
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
    from torch.nn.modules.batchnorm import _NormBase as NormBase
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
    from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass
    from torch.utils._pytree import keystr as keystr
    from torch.utils._pytree import tree_flatten as tree_flatten
    from torch.utils._pytree import tree_flatten_with_path as tree_flatten_with_path
    from torch.utils._pytree import tree_leaves as tree_leaves
    from torch.utils._pytree import tree_map_only as tree_map_only
    from torch.utils._pytree import tree_unflatten as tree_unflatten
    from torch.utils._sympy.interp import sympy_interp as sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis as PythonReferenceAnalysis

Function = TypeVar("Function", bound=Callable[..., Any])

CHECKED = ("2.13.0", "2.15.0")
"""The versions of torch that have every name. ARCHITECTURE.md lists what else differs between them."""

HOMES = {
    "BatchNorm": "torch.nn.modules.batchnorm._BatchNorm",
    "CompileContext": "torch._guards.CompileContext",
    "CustomGraphPass": "torch._inductor.custom_graph_pass.CustomGraphPass",
    "FakeTensor": "torch._subclasses.fake_tensor.FakeTensor",
    "FakeTensorMode": "torch._subclasses.fake_tensor.FakeTensorMode",
    "FrameAction": "torch._C._dynamo.eval_frame._FrameAction",
    "FrameExecStrategy": "torch._C._dynamo.eval_frame._FrameExecStrategy",
    "HigherOrderOperator": "torch._ops.HigherOrderOperator",
    "NormBase": "torch.nn.modules.batchnorm._NormBase",
    "OpOverload": "torch._ops.OpOverload",
    "OperatorBase": "torch._ops.OperatorBase",
    "OptimizedModule": "torch._dynamo.eval_frame.OptimizedModule",
    "PrefixStore": "torch._C._distributed_c10d.PrefixStore",
    "PythonReferenceAnalysis": "torch.utils._sympy.reference.PythonReferenceAnalysis",
    "TorchDispatchMode": "torch.utils._python_dispatch.TorchDispatchMode",
    "TracingContext": "torch._guards.TracingContext",
    "V": "torch._inductor.virtualized.V",
    "auto_functionalize": "torch._higher_order_ops.auto_functionalize",
    "compile_fx": "torch._inductor.compile_fx.compile_fx",
    "compile_fx_inner": "torch._inductor.compile_fx.compile_fx_inner",
    "compiled_autograd": "torch._dynamo.compiled_autograd",
    "counters": "torch._dynamo.utils.counters",
    "current_graph_task_id": "torch._C._current_graph_task_id",
    "disable_current_modes": "torch.utils._python_dispatch._disable_current_modes",
    "dispatch_has_kernel": "torch._C._dispatch_has_kernel",
    "dynamo_config": "torch._dynamo.config",
    "enable_python_dispatcher": "torch._dispatch.python.enable_python_dispatcher",
    "force_stride_order": "torch._inductor.inductor_prims.force_stride_order",
    "foreach_copy_": "torch._foreach_copy_",
    "functional_collectives": "torch.distributed._functional_collectives",
    "functorch_config": "torch._functorch.config",
    "get_cpp_compiler": "torch._inductor.cpp_builder.get_cpp_compiler",
    "get_group_size_by_name": "torch.distributed.distributed_c10d._get_group_size_by_name",
    "get_hash_for_files": "torch._inductor.custom_graph_pass.get_hash_for_files",
    "get_traced_code": "torch._dynamo.utils.get_traced_code",
    "inductor_config": "torch._inductor.config",
    "inductor_exc": "torch._inductor.exc",
    "is_amx_tile_supported": "torch.cpu._is_amx_tile_supported",
    "is_avx512_bf16_supported": "torch.cpu._is_avx512_bf16_supported",
    "is_contiguous_or_false": "torch._prims_common.is_contiguous_or_false",
    "is_fake": "torch._subclasses.fake_tensor.is_fake",
    "is_functorch_wrapped_tensor": "torch._C._functorch.is_functorch_wrapped_tensor",
    "is_mkldnn_bf16_supported": "torch.ops.mkldnn._is_mkldnn_bf16_supported",
    "is_traceable_wrapper_subclass": "torch.utils._python_dispatch.is_traceable_wrapper_subclass",
    "is_vnni_supported": "torch.cpu._is_vnni_supported",
    "keystr": "torch.utils._pytree.keystr",
    "len_torch_dispatch_stack": "torch._C._len_torch_dispatch_stack",
    "list_mode_options": "torch._inductor.list_mode_options",
    "lowerings": "torch._inductor.lowering.lowerings",
    "mkldnn_layout": "torch._mkldnn",
    "peek_interpreter_stack": "torch._C._functorch.peek_interpreter_stack",
    "register_lowering": "torch._inductor.lowering.register_lowering",
    "resolve_process_group": "torch._C._distributed_c10d._resolve_process_group",
    "select_decomp_table": "torch._inductor.decomposition.select_decomp_table",
    "set_code_exec_strategy": "torch._C._dynamo.eval_frame.set_code_exec_strategy",
    "set_grad_enabled": "torch._C._set_grad_enabled",
    "stable_topological_sort": "torch._inductor.pattern_matcher.stable_topological_sort",
    "sympy_interp": "torch.utils._sympy.interp.sympy_interp",
    "trace_log": "torch._logging._internal.trace_log",
    "trace_structured": "torch._logging._internal.trace_structured",
    "tracing": "torch._guards.tracing",
    "tree_flatten": "torch.utils._pytree.tree_flatten",
    "tree_flatten_spec": "torch.fx._pytree.tree_flatten_spec",
    "tree_flatten_with_path": "torch.utils._pytree.tree_flatten_with_path",
    "tree_leaves": "torch.utils._pytree.tree_leaves",
    "tree_map_only": "torch.utils._pytree.tree_map_only",
    "tree_unflatten": "torch.utils._pytree.tree_unflatten",
}
"""Name here -> its name in torch."""


def __getattr__(name: str) -> Any:
    """The private object of torch that this file lists as ``name``.

    Raises:
        AttributeError: it is not listed.
        VersionError: this torch has it no longer.
    """
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        found = resolve_name(HOMES[name])
    except (ImportError, AttributeError) as error:
        import torch

        raise VersionError(
            f"torch {torch.__version__} has no {HOMES[name]}, which qpass uses",
            hint=f"install a version that qpass was checked on: torch=={CHECKED[-1]}",
        ) from error
    globals()[name] = found
    return found


def assume_constant_result(function: Function) -> Function:
    """What ``torch.compiler.assume_constant_result`` does, which imports Dynamo to do it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def skip_code(code: CodeType) -> None:
    """Have Dynamo leave the frames of ``code`` to Python, but not what they call, without importing Dynamo."""
    this = sys.modules[__name__]  # this file's own names are looked up, too
    this.set_code_exec_strategy(code, this.FrameExecStrategy(this.FrameAction.SKIP, this.FrameAction.DEFAULT))
