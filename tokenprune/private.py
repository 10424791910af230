"""The names of torch that are imported and are not public; seen in torch 2.8 and 2.14.

A trace runs on torch's fake tensors, steps aside from its modes and reads its switches, for which
torch has no public names. `tracing/modes.py` and `tracing/functions.py` look some more up by name:
switches that not every version has, and functions that are patched during a trace.
"""

import torch
from torch._C import DisableTorchFunction, TensorBase
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C import _get_sdp_priority_order as attention_order
from torch._C import _get_tracing_state as jit_tracing
from torch._C import _VariableFunctions as built_in_functions
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn.functional import _canonical_mask as canonical_mask
from torch.overrides import _get_current_function_mode as function_mode
from torch.overrides import _pop_mode_temporarily as without_function_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    register_constant,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

__all__ = [
    "DataDependentOutputException",
    "DisableTorchFunction",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "TensorBase",
    "TorchDispatchMode",
    "TreeSpec",
    "active_fake_mode",
    "attention_order",
    "built_in_functions",
    "canonical_mask",
    "exporting",
    "flash_attention",
    "function_mode",
    "is_functorch_wrapped_tensor",
    "jit_tracing",
    "keystr",
    "register_constant",
    "temporarily_clear_interpreter_stack",
    "transforms_active",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "without_function_mode",
    "without_modes",
]


flash_attention = torch.ops.aten._flash_attention_forward
"""What `torch.nn.attention.varlen.varlen_attn` runs on a card; that is in torch 2.10 and newer, and
takes as long in Python as the kernel on the card."""


def exporting() -> bool:
    """Whether torch.export runs. `torch.compiler.is_exporting` says so while torch.compile runs
    too, before torch 2.14."""
    return torch.compiler._is_exporting_flag
