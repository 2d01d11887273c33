"""One call of the fused divergence against the oracle, on the rows of a ``Problem``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from divergence_oracle import family_oracle
from problems import (
    Evaluation,
    Problem,
    assert_gradients_close,
    evaluate,
    float32_bars,
    relative_error,
    value_floor,
)

from vgs_kernels import fused_linear_divergence

TRAINED = ("student_hidden", "student_weight", "student_bias")
TEACHER = {"t": 1.0}
STEERED = {"t": 1.0, "a": 2 / 3, "w": -2 / 3}
CONTRASTIVE = {"t": 2.0, "w": -1.0}
VALUES = ("divergence", "entropy", "target_logps", "policy")
TINY = 2**12  # bytes of workspace that cut 257 columns, and few tokens


def each(values: Iterable[Any], *interpreted: Any, name: str = "kind") -> pytest.MarkDecorator:
    """Every value on the PyTorch rows and in loops, a few on Triton's, whose interpreter is slow."""
    values = list(values)
    pairs = [(backend, value) for backend in ("torch", "loops") for value in values]
    pairs += [("triton", value) for value in interpreted]
    return pytest.mark.parametrize(("backend", name), pairs, indirect=["backend"])


def on_rows(function: Callable[..., Any], compose: dict[str, Any]) -> Callable[..., Any]:
    """Adapts a divergence to ``evaluate``: the target is composed of the problem's rows.

    ``compose`` gives the coefficient of each row (s, a: the student's two views; t, w: the teacher's), or coefficient,
    logit scale and soft-cap.
    """

    def run(s, a, student, t, w, teacher, *, student_bias=None, teacher_bias=None, **options):
        heads = {"s": (s, student, student_bias), "a": (a, student, student_bias)}
        heads |= {"t": (t, teacher, teacher_bias), "w": (w, teacher, teacher_bias)}
        target = []
        for name, given in compose.items():
            coefficient, *transform = given if isinstance(given, tuple) else (given,)
            target.append((coefficient, *heads[name], *transform))
        return function(s, student, target, student_bias=student_bias, **options)

    return run


def size(compose: dict[str, Any]) -> float:
    """How much larger the composed logits are than those of a row."""
    coefficients = [given[0] if isinstance(given, tuple) else given for given in compose.values()]
    return sum(float(torch.as_tensor(c).abs().max()) for c in coefficients)


def floor_of(problem: Problem, compose: dict[str, Any], options: dict[str, Any]) -> float:
    """Absolute error that float32 logits force upon a value."""
    temperature = options.get("temperature", 1.0)
    scale = temperature**2 if options.get("temperature_squared") else 1.0
    alone = 2 if options.get("divergence") == "sampled_reverse_kl" else 1  # no sum evens out the roundings of one entry
    return alone * (1 + size(compose)) / 2 * scale * value_floor(problem, temperature)


def bars_of(problem: Problem, exact: Evaluation, compose: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    """Allowed relative errors of gradients: those of plain PyTorch with a margin, as in test_loss_half."""
    plain = on_rows(family_oracle, compose)
    if problem.student_hidden.dtype == torch.float32:
        return float32_bars(problem, exact, plain, **options)
    half = evaluate(plain, problem, requires_grad=list(exact.gradients), **options)
    return {name: 2 * relative_error(gradient, exact.gradients[name]) for name, gradient in half.gradients.items()}


def compare(
    problem: Problem,
    compose: dict[str, Any],
    *,
    backend: str = "torch",
    workspace_bytes: int = 2**30,
    requires_grad: Sequence[str] = TRAINED,
    function: Callable[..., Any] = fused_linear_divergence,
    **options: Any,
) -> Evaluation:
    """Values and gradients, as close as the problem's dtype allows: in float64 to 1e-9."""
    double = problem.student_hidden.dtype == torch.float64
    rtol, floor = (1e-9, 1e-11) if double else (1e-5, floor_of(problem, compose, options))
    required = [name for name in requires_grad if getattr(problem, name) is not None]
    exact = evaluate(on_rows(family_oracle, compose), problem, dtype=torch.float64, requires_grad=required, **options)
    ours = evaluate(
        on_rows(function, compose),
        problem,
        requires_grad=required,
        backend=backend,
        workspace_bytes=workspace_bytes,
        **options,
    )
    assert ours.loss.shape == exact.loss.shape
    weights = options.get("token_weights")
    larger = 1.0 if weights is None else float(weights.abs().sum().clamp_min(1.0))
    if options.get("policy") is not None:
        larger += float((options["policy"].weights * options["policy"].advantages).abs().sum())
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=rtol, atol=larger * floor)
    for name in VALUES:
        actual, expected = getattr(ours.output, name), getattr(exact.output, name)
        if expected is None:
            assert actual is None, name
            continue
        assert actual.shape == expected.shape and not actual.requires_grad, name
        atol = floor
        if name == "policy":
            atol *= float(options["policy"].advantages.abs().max()) * 2
        torch.testing.assert_close(
            actual.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    bars = rtol if double else bars_of(problem, exact, compose, options)
    assert_gradients_close(ours, exact, rtol=bars)
    return ours
