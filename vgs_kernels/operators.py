"""The one operator layer: a loss and its gradients in one forward, scaled in the backward.

Registered with ``torch.library``, so that ``torch.compile`` of a caller sees one opaque node. An operator takes the
student's tensors, all others, numbers and a specification (see arguments.py), and returns loss, terms [T, N], unit, and
one gradient for each of the student's tensors, empty where it is not wanted. Gradients are of unit-sized token weights
(so that 16-bit logit gradients keep their range); ``unit`` is what they are to be multiplied with.

With ``reduction=none`` the loss is [N], and the backward runs the operator again with the upstream gradient in the
token weights: a head's gradient is a sum over tokens that no later factor can reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import divergence_loss, steering
from .arguments import Call, listed, numbers_tensor, specify
from .driver import guard
from .rows.layout import accumulation_dtype

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
    first, n = student[0], student[0].shape[0]
    models = listed(spec, "student") + listed(spec, "fixed")
    kinds = ("hidden", "weight", "bias", "logits")
    dtype = accumulation_dtype(*(x for name, x in zip(models, student + fixed, strict=True) if name.endswith(kinds)))
    loss = first.new_empty(n if "reduction=none" in spec else (), dtype=dtype)
    outputs = [loss, first.new_empty((len(listed(spec, "terms")), n), dtype=dtype), first.new_empty((), dtype=dtype)]
    needs = listed(spec, "needs")
    for name, x in zip(listed(spec, "student"), student, strict=True):
        shape = x.shape if name in needs else (0,)
        outputs.append(x.new_empty(shape, dtype=x.dtype if name.endswith("logits") else dtype))
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
    return loss(student, fixed, numbers, spec)[2:]


def _multiply(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, rounded once; in place where nobody needs or holds the gradient any more.

    The factor is of shape [1]: one without dimensions would be rounded to a 16-bit gradient's dtype first.
    """
    if torch.compiler.is_compiling() or type(gradient) is not Tensor:  # traced
        return (gradient * factor).to(dtype)
    # Three owners: what autograd has saved, its copy for this backward, and the storage asked for here.
    owners = torch._C._storage_Use_Count(gradient.untyped_storage()._cdata)
    last = owners <= 3 and not torch._C._autograd._get_current_graph_task_keep_graph()
    out = gradient if last and gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=out)


def _register(name: str, **options: Any) -> Any:
    operator = torch.library.custom_op(f"vgs_kernels::{name}", run, mutates_args=(), **options)
    operator.register_fake(_fake)
    operator.register_autograd(_backward, setup_context=_setup_context)
    return operator


loss = _register("loss")
#: The same where the host waits for the device: not to be captured in a CUDA graph.
synchronising_loss = _register("synchronising_loss", tags=(torch.Tag.cudagraph_unsafe,))


def call(
    kind: str,
    student: Mapping[str, Tensor | None],
    fixed: Mapping[str, Tensor | None],
    numbers: Mapping[str, float | None],
    *,
    terms: list[str],
    reduction: str,
    synchronises: bool = False,
    **options: object,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a loss: its value, and its detached terms [N] by name.

    Args:
        kind: a key of the losses.
        student: tensors that may receive gradient. None is left out, here and below.
        fixed: tensors that receive none.
        numbers: everything that may change without another compilation.
        terms: names of the rows of terms.
        reduction: ``"none"`` or ``"sum"``.
        synchronises: whether the host may have to wait for the device.
        **options: further lines of the specification.
    """
    student, fixed = ({k: v for k, v in x.items() if v is not None} for x in (student, fixed))
    numbers = {k: v for k, v in numbers.items() if v is not None}
    wanted = [name for name, x in student.items() if x.requires_grad and torch.is_grad_enabled()]
    spec = specify(
        loss=kind, reduction=reduction, needs=[] if reduction == "none" else wanted, wanted=wanted,
        student=list(student), fixed=list(fixed), numbers=list(numbers), terms=terms,
        **{name: value for name, value in options.items() if value is not None},
    )  # fmt: skip
    operator = synchronising_loss if synchronises else loss
    fixed_tensors = [x.detach() for x in fixed.values()]
    value, found, *_ = operator(list(student.values()), fixed_tensors, numbers_tensor(list(numbers.values())), spec)
    return value, dict(zip(terms, found.detach(), strict=True))
