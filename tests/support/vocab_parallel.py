"""Calls whose vocabulary lies on several ranks, and the worker that ``torchrun`` starts on each of them."""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from divergence_checks import on_rows
from interpreter import patch_once_a_launch
from problems import FAR, NEAR, TERMS, TRAINABLE, Evaluation, Problem, evaluate, make_problem

from vgs_kernels import (
    DivergenceOutput,
    PolicyTerm,
    VGSObjective,
    VGSOutput,
    fused_linear_divergence,
    fused_linear_vgs_loss,
)

VOCAB = 513
SPLITS = {
    2: [(1, 512), (413, 100)],
    3: [(1, 100, 412), (412, 101, 0)],
}
RANKS = 4
#: The ranks that share a vocabulary, by their number.
MEMBERS = {2: [1, 3], 3: [1, 2, 3]}
COMPOSED = {"t": 1.0, "a": 2 / 3, "w": -2 / 3}
DIVERGENCE = on_rows(fused_linear_divergence, COMPOSED)
HEADED = TRAINABLE[:1] + TRAINABLE[2:]


def twice(*args: torch.Tensor, **options: Any) -> VGSOutput:
    """A first backward through a graph that is kept."""
    output = fused_linear_vgs_loss(*args, **options)
    output.loss.backward(retain_graph=True)
    return output


def compiled(*args: torch.Tensor, **options: Any) -> VGSOutput:
    """The call inside a compiled caller."""

    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def step(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = fused_linear_vgs_loss(*inputs, **options)
        return output.loss * 1, output.gate, *(getattr(output, name) for name in TERMS)

    loss, gate, *terms = step(*args)
    return VGSOutput(loss, gate=gate, **dict(zip(TERMS, terms, strict=True)))


@dataclass(frozen=True)
class Case:
    """One call: ``objective`` and ``options`` are the function's, ``masked`` columns have ``mask`` for biases."""

    objective: dict[str, Any] = field(default_factory=lambda: {"lam": 0.5})
    options: dict[str, Any] = field(default_factory=dict)
    function: Callable[..., Any] = fused_linear_vgs_loss
    tokens: int = 33
    gap: float = FAR
    bias: bool = True
    masked: tuple[slice, ...] = ()
    mask: tuple[float, float] = (-torch.inf, -torch.inf)
    dtype: torch.dtype = torch.float64
    requires_grad: tuple[str, ...] = TRAINABLE
    vocab: int = VOCAB
    spoilt: int = 0
    """Every so many tokens one is ignored, and its states are NaN."""

    def problem(self) -> Problem:
        problem = make_problem(self.tokens, self.vocab, gap=self.gap, bias=self.bias, dtype=self.dtype, device="cpu")
        for columns in self.masked:
            problem.student_bias[columns], problem.teacher_bias[columns] = self.mask
        ids = problem.target_ids % self.options.get("vocab_size", self.vocab)
        if self.spoilt:
            ids[:: self.spoilt] = -100
            for name in ("student_hidden", "student_text_hidden", "teacher_hidden", "teacher_text_hidden"):
                getattr(problem, name)[:: self.spoilt] = torch.nan
        return replace(problem, target_ids=ids)

    def run(self, problem: Problem, **options: Any) -> Evaluation:
        """Call it on (a part of) its problem."""
        if self.objective:
            options["objective"] = VGSObjective(**self.objective)
        if problem.tokens:  # of all tokens, whatever part of them this is
            options["token_weights"] = torch.linspace(0.2, 1.0, problem.tokens, dtype=torch.float64)
        options = {"target_ids": problem.target_ids, "backend": "torch", **self.options, **options}
        return evaluate(self.function, problem, requires_grad=self.requires_grad, **options)


def scores(tokens: int) -> torch.Tensor:
    return torch.rand(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def policy(tokens: int, *, old: bool = True) -> PolicyTerm:
    """Ratios on either side of the clip range."""
    draw = torch.Generator().manual_seed(1)
    advantages, weights, guess = torch.randn(3, tokens, dtype=torch.float64, generator=draw)
    return PolicyTerm(advantages, weights.abs(), guess - 3 if old else None)


def values(*args: torch.Tensor, **options: Any) -> DivergenceOutput:
    """Unreduced: a gradient of its own for each token."""
    output = DIVERGENCE(*args, reduction="none", **options)
    return replace(output, loss=(output.loss * torch.linspace(-1, 2, len(output.loss), dtype=torch.float64)).sum())


FAMILY = {
    "forward": {"divergence": "forward_kl", "temperature": 0.8, "student_softcap": 20.0},
    "jsd": {"divergence": "jsd", "beta": 0.3, "temperature": 1.3, "temperature_squared": True},
    "jsd, clips": {"divergence": "jsd", "clip": 0.01, "token_clip": 0.1},
    "sampled": {"divergence": "sampled_reverse_kl", "token_clip": 1.0},
    "student top-k": {"divergence": "jsd", "support": "student_top_k", "top_k": 200},
    "student top-few": {"support": "student_top_k", "top_k": 3, "clip": 0.05},
    "teacher top-k": {"divergence": "jsd", "support": "teacher_top_k", "top_k": 9},
    "plausible": {"divergence": "forward_kl", "support": "plausible", "plausibility": 0.01},
}
CASES = {
    "gated": Case(),
    "nearly equal": Case(gap=NEAR, bias=False),
    "several tiles": Case(tokens=300),
    "cut vocabulary": Case(tokens=300, options={"workspace_bytes": 2**18}),
    "live prior": Case({"lam": 0.5, "detach_prior": False}),
    "adaptive": Case({"lam": 0.5, "schedule": "adaptive", "eta": 0.4}),
    "known threshold": Case(options={"vds_threshold": 0.05}),
    "known scores": Case(options={"vds": scores(33)}),
    "both known, adaptive": Case(
        {"lam": 0.5, "schedule": "adaptive"}, {"vds": scores(33), "vds_threshold": (0.3, 0.6)}
    ),
    "trajectories": Case({"lam": 0.5, "vds_scope": "trajectory"}, {"trajectory_ids": torch.arange(33) % 3}, tokens=33),
    "capped and scaled": Case(
        {"lam": 0.5, "temperature": 0.7, "detach_prior": False},
        {"student_softcap": 12.0, "teacher_softcap": 15.0, "student_logit_scale": 0.8, "teacher_logit_scale": 1.2},
    ),
    "masked shard": Case({"lam": 0.5, "detach_prior": False}, masked=(slice(0, 150), slice(400, 513))),
    "masked and capped": Case(options={"student_softcap": 12.0}, masked=(slice(0, 1), slice(101, 513))),
    "masked by the student": Case(masked=(slice(0, 150),), mask=(-torch.inf, 0.0)),
    "masked by the teacher": Case(masked=(slice(0, 150),), mask=(-1e4, -torch.inf)),
    "padding": Case(options={"vocab_size": 411}),
    "padded shards": Case(options={"vocab_size": 90}),
    "no tokens": Case(tokens=0),
    "ignored tokens": Case(spoilt=3),
    "nothing but ignored tokens": Case({"lam": 0.5, "schedule": "adaptive"}, tokens=5, spoilt=1),
    "ignored tokens, folded": Case({"lam": 0.0}, {"return_terms": False}, spoilt=3, requires_grad=HEADED),
    "ignored tokens of a divergence": Case({}, {"divergence": "jsd"}, DIVERGENCE, spoilt=3, requires_grad=HEADED),
    "frozen head": Case(requires_grad=("student_hidden", "student_text_hidden")),
    "frozen body": Case(requires_grad=("student_weight",)),
    "text-only states alone": Case(requires_grad=("student_text_hidden",)),
    "values alone": Case({"lam": 0.5, "schedule": "adaptive"}, requires_grad=()),
    "graph kept": Case(function=twice),
    "folded": Case({"lam": 0.0, "eta": 0.4}, {"return_terms": False}, requires_grad=TRAINABLE[:1] + TRAINABLE[2:]),
    "divergence": Case(
        {},
        {"temperature": 0.8, "student_softcap": 20.0},
        on_rows(fused_linear_divergence, COMPOSED),
        tokens=300,
        requires_grad=TRAINABLE[:1] + TRAINABLE[2:],
    ),
    **{name: Case({}, options, DIVERGENCE, requires_grad=HEADED) for name, options in FAMILY.items()},
    "jsd, cut vocabulary": Case({}, {**FAMILY["jsd"], "workspace_bytes": 2**18}, DIVERGENCE, 300, requires_grad=HEADED),
    "student top-k, cut vocabulary": Case(
        {}, {**FAMILY["student top-k"], "workspace_bytes": 2**18}, DIVERGENCE, 300, requires_grad=HEADED
    ),
    "student top-k, masked shard": Case(
        {}, FAMILY["student top-k"], DIVERGENCE, masked=(slice(0, 150), slice(400, 513)), requires_grad=HEADED
    ),
    "teacher top-k, padding": Case(
        {}, {**FAMILY["teacher top-k"], "vocab_size": 411}, DIVERGENCE, requires_grad=HEADED
    ),
    "jsd, frozen head": Case({}, FAMILY["jsd"], DIVERGENCE, requires_grad=("student_hidden",)),
    "jsd, no tokens": Case({}, FAMILY["jsd"], DIVERGENCE, tokens=0, requires_grad=HEADED),
    "values": Case({}, {"divergence": "jsd"}, values, requires_grad=HEADED),
    "policy": Case(options={"policy": policy(33)}),
    "policy, live prior": Case({"lam": 0.0, "detach_prior": False}, {"policy": policy(33, old=False)}),
    "policy of a divergence": Case({}, {"divergence": "jsd", "policy": policy(33)}, DIVERGENCE, requires_grad=HEADED),
    "float32": Case(dtype=torch.float32),
    "float32, nearly equal": Case({"lam": 0.5, "detach_prior": False}, gap=NEAR, dtype=torch.float32),
    "bfloat16": Case(dtype=torch.bfloat16),
    "bfloat16, nearly equal": Case(gap=NEAR, dtype=torch.bfloat16),
    "compiled": Case(function=compiled),
    "triton": Case(options={"backend": "triton"}, tokens=5, dtype=torch.float32),
}


class Readable(Case):
    """Its head is the identity: gradients of hidden states are those of logits."""

    def problem(self) -> Problem:
        problem = super().problem()
        hidden = (problem.student_hidden, problem.student_text_hidden)
        logits = [x @ problem.student_weight.T for x in hidden]
        identity = torch.eye(self.vocab, dtype=self.dtype)
        return replace(problem, student_hidden=logits[0], student_text_hidden=logits[1], student_weight=identity)


#: Each rank leaves out columns of its own.
TOLERANT = Readable(options={"gradient_tolerance": 0.1})
#: Any split gives the same result.
RANDOM = Case({"lam": 0.5, "schedule": "adaptive"}, tokens=7, vocab=29, masked=(slice(3, 6), slice(20, 29)))
#: Two ranks share a vocabulary, two of those share a quantile.
GRID = Case({"lam": 0.5, "schedule": "adaptive", "vds_scope": "ranks"}, tokens=13)
GRID_SPLIT, GRID_TOKENS = (100, 413), (slice(0, 5), slice(5, 13))


def cases_of(world: int) -> list[str]:
    """What takes long is asked of two ranks alone."""
    return [name for name in CASES if world == 2 or name not in ("triton", "compiled")]


def random_splits(world: int) -> list[tuple[int, ...]]:
    draw = random.Random(world)
    splits = []
    for _ in range(12):
        cuts = [0, *sorted(draw.choices(range(RANDOM.vocab + 1), k=world - 1)), RANDOM.vocab]
        splits.append(tuple(stop - start for start, stop in itertools.pairwise(cuts)))
    return splits


def shard(problem: Problem, split: tuple[int, ...], rank: int) -> Problem:
    """The same tokens, this rank's columns of both heads."""
    columns = slice(sum(split[:rank]), sum(split[: rank + 1]))
    heads = ("student_weight", "student_bias", "teacher_weight", "teacher_bias")
    return replace(problem, **{n: getattr(problem, n)[columns] for n in heads if getattr(problem, n) is not None})


def columns_of(name: str, value: torch.Tensor, split: tuple[int, ...], rank: int) -> torch.Tensor:
    """What a rank has of a gradient."""
    return value if "hidden" in name else value.split(list(split))[rank]


def terms(output: Any) -> dict[str, torch.Tensor | None]:
    return {name: value.detach() for name, value in vars(output).items() if value is not None}


def errors(group: dist.ProcessGroup, rank: int) -> dict[str, str]:
    """What each mistake is answered with, on this rank of two."""
    mine = shard(Case(tokens=3).problem(), (1, 512), rank)
    shorter = replace(mine, teacher_weight=mine.teacher_weight[:-rank], teacher_bias=mine.teacher_bias[:-rank])
    shared = {"vocab_group": group}
    composed = on_rows(fused_linear_divergence, COMPOSED)
    ranks = VGSObjective(vds_scope="ranks")
    calls = {
        "vocab_size": lambda: evaluate(fused_linear_vgs_loss, mine, vocab_size=514, **shared),
        "no vocab_size": lambda: evaluate(fused_linear_vgs_loss, mine, vocab_size=0, **shared),
        "vocab_size of a divergence": lambda: evaluate(composed, mine, requires_grad=(), vocab_size=514, **shared),
        "columns": lambda: evaluate(fused_linear_vgs_loss, shorter if rank else mine, **shared),
        "target_ids": lambda: evaluate(fused_linear_vgs_loss, mine, target_ids=torch.tensor([0, 1, 513]), **shared),
        "padding ids": lambda: evaluate(
            fused_linear_vgs_loss, mine, target_ids=torch.tensor([0, 1, 7]), vocab_size=7, **shared
        ),
        "process_group": lambda: evaluate(fused_linear_vgs_loss, mine, objective=ranks, **shared),
        "top_k": lambda: evaluate(composed, mine, requires_grad=(), support="student_top_k", top_k=514, **shared),
        "nothing wrong": lambda: evaluate(fused_linear_vgs_loss, mine, vocab_size=513, **shared),
    }
    answers = {}
    for name, call in calls.items():
        try:
            call()
            answers[name] = "accepted"
        except (TypeError, ValueError) as error:
            answers[name] = f"{type(error).__name__}: {error}"
    return answers


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    patch_once_a_launch()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for world, members in MEMBERS.items():
        group = dist.new_group(members)
        if rank not in members:
            continue
        place, results = members.index(rank), {}
        runs = [(name, CASES[name], SPLITS[world]) for name in cases_of(world)]
        for name, case, splits in [
            *runs,
            ("random", RANDOM, random_splits(world)),
            ("tolerant", TOLERANT, SPLITS[world]),
        ]:
            for split in splits:
                results[name, split] = case.run(shard(case.problem(), split, place), vocab_group=group)
        saved = {key: (terms(x.output), x.gradients) for key, x in results.items()}
        if world == 2:
            saved["errors"] = errors(group, place)
        torch.save(saved, folder / f"{world}-{place}.pt")

    # Ranks 0, 1 and 2, 3 share a vocabulary; 0, 2 and 1, 3 have the same columns.
    vocab_groups, data_groups = (
        [dist.new_group(ranks) for ranks in pairs] for pairs in ([[0, 1], [2, 3]], [[0, 2], [1, 3]])
    )
    data, place = divmod(rank, 2)
    mine = shard(GRID.problem().rows(GRID_TOKENS[data]), GRID_SPLIT, place)
    result = GRID.run(mine, process_group=data_groups[place], vocab_group=vocab_groups[data])
    torch.save((terms(result.output), result.gradients), folder / f"grid-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
