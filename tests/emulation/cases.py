"""Calls of the public functions that lead through every kernel and its options, on both backends.

Heads are identities, or the logits are given: then the gradient of a hidden state is that of a row of logits, entry by
entry, and no sum hides a wrong one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from covering import covering
from torch import Tensor

from vgs_kernels import (
    PolicyTerm,
    VGSObjective,
    divergence_loss,
    fused_linear_divergence,
    fused_linear_vgs_loss,
    vgs_loss,
)

from . import adapter, direct_cases

TOKENS = 3


class Layout(NamedTuple):
    """Columns that count, columns of the tensors, dtype."""

    columns: int
    width: int
    dtype: torch.dtype = torch.float32


#: Of given logits: 16-byte loads or not, with and without room behind the last column, several blocks of columns, fewer
#: columns than a block has, and rows that are cut into two stretches.
LAYOUTS = {
    "aligned": Layout(2064, 2064),
    "pitched": Layout(2061, 2112),
    "odd": Layout(1037, 1037, torch.bfloat16),
    "pitched bfloat16": Layout(2060, 2112, torch.bfloat16),
    "float16": Layout(520, 520, torch.float16),
    "short": Layout(37, 64),
    "stretches": Layout(16_400, 16_400),
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "constant": {"objective": VGSObjective(lam=0.1)},
    "adaptive": {"objective": VGSObjective(lam=0.1, schedule="adaptive")},
    "live prior": {"objective": VGSObjective(lam=0.1, detach_prior=False)},
    "no language": {"objective": VGSObjective(lam=0.0, temperature=0.8)},
    "threshold": {"objective": VGSObjective(lam=0.1), "vds_threshold": 3.0},
}
DIVERGENCES: dict[str, dict[str, Any]] = {
    "reverse KL": {"divergence": "reverse_kl"},
    "forward KL": {"divergence": "forward_kl"},
    "JSD": {"divergence": "jsd", "beta": 0.3},
    "reverse KL, clipped top-k": {"divergence": "reverse_kl", "support": "student_top_k", "top_k": 8, "clip": 0.05},
    "forward KL, clipped top-k": {"divergence": "forward_kl", "support": "student_top_k", "top_k": 8, "clip": 0.05},
    "JSD, clipped top-k": {"divergence": "jsd", "support": "student_top_k", "top_k": 8, "clip": 0.05},
    "JSD, clipped": {"divergence": "jsd", "clip": 0.05},
    "forward KL, plausible": {"divergence": "forward_kl", "support": "plausible", "plausibility": 0.1},
    "reverse KL, clipped tokens": {"divergence": "reverse_kl", "token_clip": 3.0},
    "sampled": {"divergence": "sampled_reverse_kl"},
    "sampled, clipped": {"divergence": "sampled_reverse_kl", "token_clip": 2.0},
}
#: The last one: without log-probabilities of before, and with a token that is ignored.
POLICIES = (False, True, "policy on some tokens")


@dataclass(frozen=True)
class Case:
    """One call: ``run(backend)`` returns its loss, its terms and the gradients, by name."""

    name: str
    factors: Mapping[str, Any]
    run: Callable[[str], dict[str, Tensor]]


def _rows(count: int, layout: Layout, masked: bool) -> list[Tensor]:
    """Peaked rows [tokens, width], the last one so wide that exp overflows beside a wrong maximum; what stands behind
    the columns that count is as large as nothing that does."""
    generator = torch.Generator().manual_seed(layout.columns)
    rows = []
    for _ in range(count):
        row = 3 * torch.randn(TOKENS, layout.width, generator=generator)
        row[:, layout.columns // 3] += 12
        row[-1, ::3] -= 120
        row[:, layout.columns :] = 1e4
        if masked:
            row[:, layout.columns // 2 : layout.columns // 2 + 3] = -torch.inf
        rows.append(row.to(layout.dtype))
    return rows


def _sampled(columns: int, policy: bool | str, needed: bool = False) -> dict[str, Any]:
    """A likely token and others in each block of columns, and the term on them; nothing without one, unless they are
    needed."""
    ids = torch.tensor([-100 if isinstance(policy, str) else columns // 3, columns // 2 + 4, columns - 1])
    if not policy:
        return {"target_ids": ids} if needed else {}
    advantages, weights = torch.tensor([0.5, -0.5, -0.2]), torch.linspace(0.5, 1.5, TOKENS)
    old = torch.tensor([-0.1, -12.0, -14.0]) if policy is True else None
    return {"target_ids": ids, "policy": PolicyTerm(advantages, weights, old)}


def _evaluate(call: Callable[..., Any], leaves: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Loss, terms and gradients of a call; ``leaves`` that require grad are copied first."""
    leaves = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in leaves.items()}
    out = call(leaves, backend)
    out.loss.backward()
    found = {field.name: getattr(out, field.name) for field in dataclasses.fields(out)}
    found = {name: x.detach() for name, x in found.items() if isinstance(x, Tensor)}
    return found | {f"gradient of {name}": x.grad for name, x in leaves.items() if x.requires_grad}


_ROWS = ("student", "student text", "teacher", "teacher text")


def _given_vgs(layout: str, objective: str, masked: bool, policy: bool | str) -> Callable[[str], dict[str, Tensor]]:
    def run(backend: str) -> dict[str, Tensor]:
        columns = LAYOUTS[layout].columns
        rows = [x.requires_grad_(i < 2) for i, x in enumerate(_rows(4, LAYOUTS[layout], masked))]
        options = {**OBJECTIVES[objective], "vocab_size": columns, **_sampled(columns, policy)}
        return _evaluate(
            lambda x, b: vgs_loss(*x.values(), **options, backend=b), dict(zip(_ROWS, rows, strict=True)), backend
        )

    return run


def _given_divergence(
    layout: str, divergence: str, masked: bool, policy: bool | str
) -> Callable[[str], dict[str, Tensor]]:
    def run(backend: str) -> dict[str, Tensor]:
        columns = LAYOUTS[layout].columns
        s, t = _rows(2, LAYOUTS[layout], masked)
        if divergence.endswith("KL"):  # a certain token and a nearly equal one: their entries are summed
            s[0, columns // 3] += 30
            noise = torch.randn(s.shape, generator=torch.Generator().manual_seed(1)).to(s.dtype)
            t[1] = s[1] + 0.05 * noise[1]
        options = {"vocab_size": columns, **DIVERGENCES[divergence]}
        options |= _sampled(columns, policy, needed="sampled" in divergence)
        return _evaluate(
            lambda x, b: divergence_loss(x["student"], [(1.0, x["teacher"])], **options, backend=b),
            {"student": s.requires_grad_(), "teacher": t},
            backend,
        )

    return run


def _identity(layout: Layout, masked: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Hidden states that are logits, and biases that mask columns."""
    rows = _rows(4, layout._replace(width=layout.columns), False)
    heads = {name: torch.eye(layout.columns, dtype=layout.dtype) for name in ("student head", "teacher head")}
    bias = torch.linspace(-1, 1, layout.columns)
    bias[layout.columns // 2 : layout.columns // 2 + 3] = -torch.inf
    return {**dict(zip(_ROWS, rows, strict=True)), **heads}, {"bias": bias.to(layout.dtype)} if masked else {}


#: Sizes of projected rows: aligned and odd; and scratch memory that holds neither all columns nor all tokens.
PROJECTED = {"float32": Layout(528, 528), "bfloat16": Layout(523, 523, torch.bfloat16)}
WORKSPACES = {"whole": 2**28, "cut": 2**13}


def _fused_vgs(
    dtype: str, objective: str, softcap: float | None, masked: bool, frozen: bool, workspace: str, policy: bool | str
) -> Callable[[str], dict[str, Tensor]]:
    def run(backend: str) -> dict[str, Tensor]:
        inputs, bias = _identity(PROJECTED[dtype], masked)
        for name in ("student", "student text") if frozen else ("student", "student text", "student head"):
            inputs[name].requires_grad_()
        options: dict[str, Any] = {"student_softcap": softcap, "teacher_softcap": softcap and 2 * softcap}
        options |= {f"{model}_bias": x for x in bias.values() for model in ("student", "teacher")}
        options |= {**OBJECTIVES[objective], "workspace_bytes": WORKSPACES[workspace]}
        options |= _sampled(PROJECTED[dtype].columns, policy)

        def call(x: Mapping[str, Tensor], b: str) -> Any:
            s, a, t, w, student, teacher = x.values()
            return fused_linear_vgs_loss(s, a, student, t, w, teacher, **options, backend=b)

        return _evaluate(call, inputs, backend)

    return run


#: lam as a power of two: then it makes no difference whether it is multiplied before or after 16-bit rounding.
_SLOTS: dict[str, dict[str, Any]] = {
    "guessed": {"objective": VGSObjective(lam=0.125)},
    "adaptive": {"objective": VGSObjective(lam=0.125, schedule="adaptive")},
    "threshold": {"objective": VGSObjective(lam=0.125), "vds_threshold": 3.0},
}


def _slots(gate: str, softcap: float | None, masked: bool, ignored: bool, frozen: bool) -> Callable[[str], Any]:
    def run(backend: str) -> dict[str, Tensor]:
        inputs, bias = _identity(PROJECTED["bfloat16"], masked)
        inputs["student text"][1, 100] += 40  # certain: its entries are summed
        for name in ("student", "student text") if frozen else ("student", "student text", "student head"):
            inputs[name].requires_grad_()
        options: dict[str, Any] = {"student_softcap": softcap, "teacher_softcap": softcap and 2 * softcap}
        options |= {f"{model}_bias": x for x in bias.values() for model in ("student", "teacher")}
        options |= {"target_ids": torch.tensor([3, -100, 5])} if ignored else {}

        def call(x: Mapping[str, Tensor], b: str) -> Any:
            s, a, t, w, student, teacher = x.values()
            return fused_linear_vgs_loss(s, a, student, t, w, teacher, **options, **_SLOTS[gate], backend=b)

        with adapter.blocks_beside_slots():
            return _evaluate(call, inputs, backend)

    return run


def _tolerant(dtype: str, frozen: bool, bold: bool, workspace: str) -> Callable[[str], dict[str, Tensor]]:
    def run(backend: str) -> dict[str, Tensor]:
        inputs, _ = _identity(PROJECTED[dtype], False)
        for name in ("student", "student text") if frozen else ("student", "student text", "student head"):
            inputs[name].requires_grad_()
        options = {"gradient_tolerance": 0.02, "workspace_bytes": WORKSPACES[workspace]}
        options |= {"objective": VGSObjective(lam=0.0)}

        def call(x: Mapping[str, Tensor], b: str) -> Any:
            s, a, t, w, student, teacher = x.values()
            return fused_linear_vgs_loss(s, a, student, t, w, teacher, **options, backend=b)

        with adapter.blocks_beside_slots(), adapter.bold_guesses(bold):
            return _evaluate(call, inputs, backend)

    return run


def _fused_divergence(
    dtype: str, divergence: str, softcap: float | None, masked: bool, workspace: str, policy: bool | str
) -> Callable[[str], dict[str, Tensor]]:
    def run(backend: str) -> dict[str, Tensor]:
        inputs, bias = _identity(PROJECTED[dtype], masked)
        inputs["student"].requires_grad_()
        bias = bias.get("bias")
        options = {**DIVERGENCES[divergence], "student_softcap": softcap, "student_bias": bias}
        options |= {"workspace_bytes": WORKSPACES[workspace]}
        options |= _sampled(PROJECTED[dtype].columns, policy, needed="sampled" in divergence)

        def call(x: Mapping[str, Tensor], b: str) -> Any:
            target = [(1.0, x["teacher"], x["teacher head"], *([] if bias is None else [bias]))]
            return fused_linear_divergence(x["student"], x["student head"], target, **options, backend=b)

        return _evaluate(call, inputs, backend)

    return run


_FLAG = (False, True)
_GROUPS: list[tuple[str, Callable[..., Callable[[str], dict[str, Tensor]]], dict[str, Any]]] = [
    ("given VGS", _given_vgs, {"layout": LAYOUTS, "objective": OBJECTIVES, "masked": _FLAG, "policy": POLICIES}),
    ("given", _given_divergence, {"layout": LAYOUTS, "divergence": DIVERGENCES, "masked": _FLAG, "policy": POLICIES}),
    (
        "fused VGS",
        _fused_vgs,
        {
            **{"dtype": PROJECTED, "objective": OBJECTIVES, "softcap": (None, 9.0), "masked": _FLAG, "frozen": _FLAG},
            **{"workspace": WORKSPACES, "policy": POLICIES},
        },
    ),
    (
        "VGS in slots",
        _slots,
        {"gate": _SLOTS, "softcap": (None, 9.0), "masked": _FLAG, "ignored": _FLAG, "frozen": _FLAG},
    ),
    (
        "VGS with a tolerance",
        _tolerant,
        {"dtype": PROJECTED, "frozen": _FLAG, "bold": _FLAG, "workspace": WORKSPACES},
    ),
    (
        "fused",
        _fused_divergence,
        {
            "dtype": PROJECTED,
            "divergence": DIVERGENCES,
            "softcap": (None, 9.0),
            "masked": _FLAG,
            "workspace": WORKSPACES,
            "policy": POLICIES,
        },
    ),
    *direct_cases.GROUPS,
]


def _named(group: str, factors: Mapping[str, Any]) -> str:
    flags = (name if x is True else x for name, x in factors.items() if x is not False and x is not None)
    return ", ".join(str(x) for x in (group, *flags))


def all_cases() -> Iterator[Case]:
    """The product of all factors of each group."""
    for group, make, factors in _GROUPS:
        for values in itertools.product(*factors.values()):
            chosen = dict(zip(factors, values, strict=True))
            if "top_k" in DIVERGENCES.get(chosen.get("divergence"), {}).get("support", ""):
                chosen["policy"] = False
            yield Case(_named(group, chosen), {"group": group, **chosen}, make(**chosen))


def covering_cases() -> list[Case]:
    """Few of them, in which every pair of factor values of a group meets."""
    cases = list({case.name: case for case in all_cases()}.values())
    return covering(cases, lambda case: {f"{case.factors['group']} {name}": x for name, x in case.factors.items()})


def _allowed(name: str, expected: Tensor, approximate: bool) -> tuple[Tensor, float]:
    """Greatest error of each element, and of the norm. Approximate instructions are off by twice as much in sums of
    logarithms far from 0."""
    size = expected.double().nan_to_num(0.0, 0.0, 0.0).abs()
    if not name.startswith("gradient of"):
        return 2e-6 + 2e-5 * size, 1e-4 * size.norm()
    if expected.dtype == torch.float32:
        return (4e-5 if approximate else 2e-5) * size.max() + 0 * size, 1e-5 * size.norm()
    # Nearly equal numbers are rounded to neighbours now and then: an ulp, in few entries, which may be the largest.
    eps = torch.finfo(expected.dtype).eps
    return 1e-5 * size.max() + 2 * eps * size, eps / 16 * size.norm() + eps * size.max()


def _too_often(found: Tensor, wanted: Tensor, part: float) -> bool:
    """Whether 16-bit numbers differ in more places than nearly equal ones that were rounded to nearest do.

    Where a number is far below the others, it may be the rest of a difference that cancels.
    """
    if wanted.dtype.itemsize != 2:
        return False
    large = wanted.abs() > 1e-4 * wanted.abs().max()
    return ((found != wanted) & large).sum().item() > 3 + part * large.sum().item()


def differences(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], approximate: bool = False) -> list[str]:
    """One sentence for each tensor in which a call differs from the other backend by more than rounding.

    Args:
        actual, expected: what ``Case.run`` returns.
        approximate: whether approximate instructions were off by more than their rounding.
    """
    problems = []
    for name, wanted in expected.items():
        found = actual[name]
        if found.dtype != wanted.dtype or found.shape != wanted.shape:
            problems.append(f"{name}: {found.dtype} {tuple(found.shape)}, not {wanted.dtype} {tuple(wanted.shape)}")
        elif wanted.dtype == torch.bool:
            if not torch.equal(found, wanted):
                problems.append(f"{name}: {found.tolist()}, not {wanted.tolist()}")
        elif found.numel():
            element, norm = _allowed(name, wanted, approximate)
            finite = wanted.isfinite()
            error = torch.where(finite, found.double() - wanted.double(), 0).abs()
            same = torch.equal(found[~finite], wanted[~finite]) or bool(wanted[~finite].isnan().any())
            if not (error <= element).all() or not same:
                problems.append(f"{name}: off by {error.max().item():.2e}, allowed {element.max().item():.2e}")
            elif not error.norm() <= norm + 1e-6:
                problems.append(f"{name}: off by {error.norm().item():.2e} in the norm")
            elif _too_often(found, wanted, 0.05 if approximate else 0.01):
                problems.append(f"{name}: {(found != wanted).sum()} of {wanted.numel()} are rounded to a neighbour")
    return problems
