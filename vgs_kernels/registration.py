"""What the registered operators share: their arguments as sources and sinks take them, and their registration.

Registered with ``torch.library`` so that ``torch.compile`` of a caller sees one opaque node. An operator's outputs are
(loss, terms [K, N], unit, d_*): d_x are gradients in float32 for unit-sized token weights (so that 16-bit logit
gradients keep their range) and ``unit`` is what they are to be multiplied with. A gradient that is not asked for is an
empty tensor.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .rows import LogitTransform, accumulation_dtype
from .sweep import Head


def head(weight: Tensor, bias: Tensor | None, vocab: int, scale: float, softcap: float, temperature: float) -> Head:
    transform = LogitTransform(scale, softcap or None, 1.0 / temperature)
    return Head(weight[:vocab], None if bias is None else bias[:vocab], transform)


def cast(dtype: torch.dtype, tensors: list[Tensor | None]) -> list[Tensor | None]:
    """What autocast does to a linear layer's inputs, but inside the operator: gradients keep the parameters' dtype."""
    return [None if x is None else x.to(dtype) for x in tensors]


def empty_gradients(needs: list[bool], like: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    first = next(x for x in like if x is not None)
    return [
        x.new_zeros(x.shape, dtype=dtype) if need else first.new_empty(0, dtype=dtype)
        for need, x in zip(needs, like, strict=True)
    ]


def head_gradient(need: bool, weight: Tensor, vocab: int, n: int, dtype: torch.dtype) -> Tensor:
    """Like weight [V, D]; its first ``vocab`` rows are left to the sweep, which overwrites them if there is a token."""
    gradient = weight.new_empty(weight.shape if need else 0, dtype=dtype)
    gradient[vocab if n else 0 :].zero_()
    return gradient


def logit_gradient(need: bool, logits: Tensor, vocab: int, written: bool) -> Tensor:
    """Like logits [N, V]; its first ``vocab`` columns are left to the sweep if that writes them."""
    gradient = logits.new_empty(logits.shape if need else 0)
    gradient[..., vocab if written else 0 :].zero_()
    return gradient


def wanted(gradient: Tensor, need: bool) -> Tensor | None:
    return gradient if need else None


def _multiply(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, rounded once; in place where nobody needs the gradient again.

    The factor is of shape [1]: one without dimensions would be rounded to a 16-bit gradient's dtype first.
    """
    last = not torch.compiler.is_compiling() and not torch._C._autograd._get_current_graph_task_keep_graph()
    out = gradient if last and gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=out)


def _differentiable_once(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"vgs_kernels.{name} is differentiable once: its gradients have no graph. Call backward without "
            "create_graph=True."
        )


def _no_gradients(inputs: tuple) -> list[list[None] | None]:
    """What a backward returns for no gradient: of a list of tensors a list, of any other argument None."""
    return [
        [None] * len(x) if isinstance(x, (list, tuple)) and all(isinstance(y, Tensor) for y in x) else None
        for x in inputs
    ]


def register(
    name: str, implementation: Callable, differentiable: tuple[str, ...], n_terms: int, *, dense: bool = False
):
    """Register an operator whose outputs are (loss, terms, unit, one gradient for each differentiable argument).

    Its terms are ``n_terms``, and one more each where ``target_ids`` and ``advantages`` are given. Gradients of a
    ``dense`` one, of logits, are of the logits' dtype.
    """
    operator = torch.library.custom_op(f"vgs_kernels::{name}", implementation, mutates_args=())
    names = [argument.name for argument in operator._opoverload._schema.arguments]
    positions = [names.index(argument) for argument in differentiable]

    @operator.register_fake
    def _(*arguments):
        first = arguments[0]
        values = dict(zip(names, arguments, strict=True))
        dtype = accumulation_dtype(first)
        count = n_terms + sum(values[optional] is not None for optional in ("target_ids", "advantages"))
        outputs = [first.new_empty((), dtype=dtype), first.new_empty((count, first.shape[0]), dtype=dtype)]
        outputs.append(first.new_empty((), dtype=dtype))
        gradient_type = first.dtype if dense else dtype
        for need, position in zip(values["needs"], positions, strict=True):
            shape = arguments[position].shape if need else (0,)
            outputs.append(first.new_empty(shape, dtype=gradient_type))
        return tuple(outputs)

    def setup_context(ctx, inputs, output):
        ctx.no_gradients = _no_gradients(inputs)
        ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in positions]
        ctx.needs = inputs[names.index("needs")]
        ctx.set_materialize_grads(False)  # the other outputs' gradients would be zeros of their size
        ctx.save_for_backward(*output[2:])

    def backward(ctx, d_loss, *_):
        _differentiable_once(name)
        # Detached: saved outputs are part of the graph, and what is scaled in place would stay so.
        unit, *gradients = (x.detach() for x in ctx.saved_tensors)
        result = list(ctx.no_gradients)
        if d_loss is None:
            return tuple(result)
        for position, need, dtype, gradient in zip(positions, ctx.needs, ctx.dtypes, gradients, strict=True):
            if need:
                result[position] = _multiply(gradient, (d_loss * unit).reshape(1), dtype)
        return tuple(result)

    operator.register_autograd(backward, setup_context=setup_context)
    return operator


def register_values(name: str, reduced, implementation: Callable, differentiable: tuple[str, ...]):
    """Register (values [N], terms) of a registered operator with the gradient of any upstream gradient of the values.

    The head's gradient is a sum over tokens that no later factor can reach. So the gradients are not computed ahead:
    the backward runs the operator again, with the upstream gradient as its token weights.
    """

    @functools.wraps(implementation)
    def values(*arguments, **keywords):
        bound = signature.bind(*arguments, **keywords)
        bound.arguments["needs"] = [False] * len(differentiable)
        terms = implementation(**bound.arguments)[1]
        return terms[0].clone(), terms

    signature = inspect.signature(implementation).replace(return_annotation=tuple[Tensor, Tensor])
    values.__signature__ = signature
    operator = torch.library.custom_op(f"vgs_kernels::{name}", values, mutates_args=())
    names = list(signature.parameters)

    @operator.register_fake
    def _(*arguments):
        terms = reduced._opoverload(*arguments)[1]
        return terms.new_empty(terms.shape[1]), torch.empty_like(terms)

    def setup_context(ctx, inputs, output):
        leaves, ctx.structure = pytree.tree_flatten(list(inputs))
        ctx.tensors = [isinstance(leaf, Tensor) for leaf in leaves]
        ctx.others = [None if known else leaf for leaf, known in zip(leaves, ctx.tensors, strict=True)]
        ctx.no_gradients = _no_gradients(inputs)
        ctx.save_for_backward(*(leaf for leaf, known in zip(leaves, ctx.tensors, strict=True) if known))
        ctx.set_materialize_grads(False)

    def backward(ctx, d_values, _):
        _differentiable_once(name)
        result = list(ctx.no_gradients)
        if d_values is None:
            return tuple(result)
        saved = iter(ctx.saved_tensors)
        leaves = [next(saved) if known else other for other, known in zip(ctx.others, ctx.tensors, strict=True)]
        arguments = dict(zip(names, pytree.tree_unflatten(leaves, ctx.structure), strict=True))
        originals = {argument: arguments[argument] for argument in differentiable}
        arguments |= {argument: value if value is None else value.detach() for argument, value in originals.items()}
        _, _, unit, *gradients = reduced(**{**arguments, "token_weights": d_values})
        for argument, need, gradient in zip(differentiable, arguments["needs"], gradients, strict=True):
            if need:
                result[names.index(argument)] = _multiply(gradient, unit.reshape(1), originals[argument].dtype)
        return tuple(result)

    operator.register_autograd(backward, setup_context=setup_context)
    return operator
