# pyright: reportMissingImports=false
"""What torch is doing around a call, on which it depends whether JAX may compute it."""

from __future__ import annotations

import threading

import torch
from torch.autograd import forward_ad

exporting = threading.RLock()  # torch.export patches globals
# What torch.func.vmap and others are doing, or None.
_transforms = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)
_is_tracing, _is_exporting = torch.jit.is_tracing, torch.compiler.is_exporting
# Where it is on a GPU: JAX's stream, which waits for torch's, would become part of the graph.
CAPTURED = "torch is capturing a CUDA graph, which cannot hold what JAX computes"


def runs_in_torch() -> str:
    """Why a call at this time has to run torch's operators, whatever its arguments; empty where it has not."""
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are being computed, of which JAX's results would know nothing"
    if _transforms() is not None:
        return "a transform of torch.func is at work, whose tensors have no memory of their own"
    if _is_tracing() or (_is_exporting() and _is_exported()):
        return "its operators are being recorded, by torch.export or torch.jit.trace"
    return ""


def _is_exported() -> bool:
    """Whether this call is: torch knows of the process only, in which another thread may export a module of ours."""
    with exporting:
        return _is_exporting()


# The same for the native module, which need not call Python for it: (where torch keeps it, its name, what it is in
# usual times), and functions that return something true in others.
_FLAGS = ((vars(forward_ad), "_current_level", -1), (vars(torch.compiler), "_is_exporting_flag", False))
if all(type(holder.get(name)) is type(usual) for holder, name, usual in _FLAGS):
    FLAGS, REFUSALS = _FLAGS, (getattr(torch._C, "_is_tracing", _is_tracing), _transforms)
else:  # a torch that keeps them elsewhere
    FLAGS, REFUSALS = (), (runs_in_torch,)


def is_usual() -> bool:
    """Whether the flags are as in usual times, also in other threads."""
    return all(holder.get(name) is usual for holder, name, usual in FLAGS)
