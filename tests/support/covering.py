"""Covering designs: few cases in which every pair of choices still meets.

A cross product of many options has far more cases than bugs: most bugs need one option, or two together. So the tests
that are run by default take a small part of the product, in which every value of one option occurs with every value of
every other one. The rest is marked slow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pytest

Case = TypeVar("Case")


def covering(cases: Sequence[Case], factors: Callable[[Case], Mapping[str, Hashable]]) -> list[Case]:
    """Some of ``cases``, in their order: every pair of factor values that occurs in all of them occurs in these."""
    pairs = [set(itertools.combinations(sorted(factors(case).items(), key=repr), 2)) for case in cases]
    missing = set().union(*pairs)
    chosen = set()
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))  # the first of equals: the same each time
        chosen.add(best)
        missing -= pairs[best]
    return [case for i, case in enumerate(cases) if i in chosen]


def slow_beyond(quick: Collection[Hashable], cases: Iterable[Hashable]) -> list[Any]:
    """Parameters of a test, in their order; those that are not ``quick`` are marked slow."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def pairwise(**factors: Sequence[Any]) -> pytest.MarkDecorator:
    """``parametrize`` with the product of all factors; what a covering design leaves out is marked slow.

    A value may be a ``pytest.param`` with an id.
    """
    return pytest.mark.parametrize(tuple(factors), _params(factors))


def on_backends(**factors: Sequence[Any]) -> pytest.MarkDecorator:
    """``parametrize`` with ``backend`` and the product of all factors.

    On the PyTorch rows all of it is run; on the others, of which Triton's interpreter is slow, what ``pairwise`` takes.
    """
    params = [
        pytest.param(backend, *x.values, id=f"{backend}-{x.id}", marks=() if backend == "torch" else x.marks)
        for backend in ("torch", "loops", "triton")
        for x in _params(factors)
    ]
    return pytest.mark.parametrize(("backend", *factors), params, indirect=["backend"])


def _params(factors: Mapping[str, Sequence[Any]]) -> list[Any]:
    values = {
        name: [x if hasattr(x, "marks") else pytest.param(x) for x in choices] for name, choices in factors.items()
    }
    cases = list(itertools.product(*(range(len(choices)) for choices in values.values())))
    chosen = set(covering(cases, lambda case: dict(zip(values, case, strict=True))))
    params = []
    for case in cases:
        picked = [choices[i] for choices, i in zip(values.values(), case, strict=True)]
        name = "-".join(x.id or str(x.values[0]).removeprefix("torch.") for x in picked)
        marks = () if case in chosen else pytest.mark.slow
        params.append(pytest.param(*(x.values[0] for x in picked), id=name, marks=marks))
    return params
