"""The one operator layer: a loss and its gradients in one forward, scaled in the backward.

Registered with ``torch.library``, so that ``torch.compile`` of a caller sees one opaque node. An operator takes the
student's tensors, all others, numbers and a specification (see arguments.py), and returns loss, terms [T, N], unit, and
one gradient for each of the student's tensors, empty where it is not wanted. Gradients are of unit-sized token weights
(so that 16-bit logit gradients keep their range); ``unit`` is what they are to be multiplied with.

With ``reduction=none`` the loss is [N], and the backward runs the operator again with the upstream gradient in the
token weights: a head's gradient is a sum over tokens that no later factor can reach.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import divergence_loss, steering
from .arguments import Call, listed
from .driver import guard
from .workspace import large_empty

_LOSSES = {
    "vgs": steering.linear,
    "vgs_logits": steering.dense,
    "divergence": divergence_loss.linear,
    "divergence_logits": divergence_loss.dense,
}


def run(student: list[Tensor], fixed: list[Tensor], numbers: Tensor, spec: str) -> list[Tensor]:
    """The operators' body."""
    call = Call(student, fixed, numbers, spec)
    with guard(student[0].device):
        losses, terms, unit, gradients = _LOSSES[call.options["loss"]](call)
        value = losses if call.options["reduction"] == "none" else losses.sum()
    return [value.to(call.dtype), terms, unit, *(gradients[name] for name in listed(spec, "student"))]


def _fake(student: list[Tensor], fixed: list[Tensor], numbers: Tensor, spec: str) -> list[Tensor]:
    call, n = Call(student, fixed, numbers, spec), student[0].shape[0]
    shapes = [(n,) if call.options["reduction"] == "none" else (), (len(listed(spec, "terms")), n), ()]
    outputs = [student[0].new_empty(shape, dtype=call.dtype) for shape in shapes]
    for name, x in zip(listed(spec, "student"), student, strict=True):
        dtype = x.dtype if name.endswith("logits") else call.dtype
        outputs.append(x.new_empty(x.shape if name in call.needs else 0, dtype=dtype))
    return outputs


def _setup_context(ctx: Any, inputs: tuple[list[Tensor], list[Tensor], Tensor, str], output: list[Tensor]) -> None:
    student, fixed, numbers, ctx.spec = inputs
    ctx.dtypes, ctx.n_fixed = [x.dtype for x in student], len(fixed)
    ctx.set_materialize_grads(False)  # the other outputs' gradients would be zeros of their size
    if "reduction=none" in ctx.spec:
        ctx.save_for_backward(*student)
        ctx.fixed = fixed, numbers  # not saved: a target may come from inference mode
    else:
        ctx.save_for_backward(*output[2:])


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[list[Tensor | None], list[None], None, None]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "The losses of vgs_kernels are differentiable once: their gradients have no graph. Call backward without "
            "create_graph=True."
        )
    upstream, names, needs = gradients[0], listed(ctx.spec, "student"), listed(ctx.spec, "wanted")
    result: list[Tensor | None] = [None] * len(names)
    if upstream is not None:
        # Detached: saved outputs are part of the graph, and what is scaled in place would stay so.
        saved = [x.detach() for x in ctx.saved_tensors]
        unit, *found = _weighted(saved, *ctx.fixed, ctx.spec, upstream) if hasattr(ctx, "fixed") else saved
        factor = unit if hasattr(ctx, "fixed") else upstream * unit
        for i, (name, gradient, dtype) in enumerate(zip(names, found, ctx.dtypes, strict=True)):
            if name in needs:
                result[i] = _multiply(gradient, factor.reshape(1), dtype)
    return result, [None] * ctx.n_fixed, None, None


def _weighted(student: list[Tensor], fixed: list[Tensor], numbers: Tensor, spec: str, upstream: Tensor) -> list[Tensor]:
    """Unit and gradients of sum_n upstream_n * loss_n."""
    at = listed(spec, "fixed").index("token_weights")
    fixed = [*fixed[:at], fixed[at] * upstream, *fixed[at + 1 :]]
    spec = spec.replace("reduction=none", "reduction=sum").replace(
        "needs=\n", f"needs={','.join(listed(spec, 'wanted'))}\n"
    )
    return (synchronising_loss if "synchronises=True" in spec else loss)(student, fixed, numbers, spec)[2:]


def _multiply(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, rounded once; in place where nobody needs or holds the gradient any more.

    The factor is of shape [1]: one without dimensions would be rounded to a 16-bit gradient's dtype first.
    """
    if torch.compiler.is_compiling() or type(gradient) is not Tensor:  # traced
        return (gradient * factor).to(dtype)
    # Three owners: what autograd has saved, its copy for this backward, and the storage asked for here.
    owners = torch._C._storage_Use_Count(gradient.untyped_storage()._cdata)
    last = owners <= 3 and not torch._C._autograd._get_current_graph_task_keep_graph()
    if last and gradient.dtype == dtype:
        return gradient if factor.device.type == "cpu" and factor.item() == 1 else gradient.mul_(factor)
    return torch.mul(gradient, factor, out=large_empty(gradient, *gradient.shape, dtype=dtype))


@functools.cache
def _untraced() -> Callable[..., list[Tensor]]:
    return torch.compiler.disable(run)


def _outside_dynamo(*inputs: Any) -> list[Tensor]:
    """``run``, which a compiled caller's Dynamo must not trace. Loading Dynamo takes a second: where nobody has, nobody
    traces."""
    return (_untraced() if "torch._dynamo" in sys.modules else run)(*inputs)


_LIBRARY = torch.library.Library("vgs_kernels", "FRAGMENT")
_SCHEMA = torch.library.infer_schema(run, mutates_args=())


def _register(name: str, *tags: torch.Tag) -> Any:
    """As ``torch.library.custom_op`` does it, but for its import of Dynamo with the first call."""
    _LIBRARY.define(name + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _LIBRARY.impl(name, _outside_dynamo, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vgs_kernels::{name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"vgs_kernels::{name}", _backward, setup_context=_setup_context, lib=_LIBRARY)
    return getattr(torch.ops.vgs_kernels, name).default


loss = _register("loss")
#: The same where the host waits for the device: not to be captured in a CUDA graph.
synchronising_loss = _register("synchronising_loss", torch.Tag.cudagraph_unsafe)
