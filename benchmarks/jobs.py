"""The jobs that are measured, and the matrix products that none of them can do without (objective.md's floor).

A *phase* is a set of products over a part of the tokens: logits of the student and of the teacher in one or two views,
gradients of hidden states and of the head. A job's floor is its phases, whoever executes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from vgs_kernels import Divergence, VGSObjective

from .problem import Shape


class Phase(NamedTuple):
    """Matrix products over ``fraction`` of the tokens: rows of logits by model, rows of gradients by destination."""

    fraction: float
    student: int
    teacher: int
    d_hidden: int
    d_weight: int

    def tokens(self, n: int) -> int:
        return math.ceil(self.fraction * n)

    def columns(self, shape: Shape) -> float:
        """Multiply-adds per token of the whole and per vocabulary entry."""
        student = self.student + self.d_hidden + self.d_weight
        return self.fraction * (student * shape.student + self.teacher * shape.teacher)


@dataclass(frozen=True)
class Job:
    """One thing to compute, forward and backward.

    Attributes:
        title: for people.
        objective: of the loss.
        trainable: inputs that require grad.
        threshold_given: whether the VDS threshold is known beforehand.
        folded: whether neither terms nor VDS are asked for.
        divergence: of plain distillation, where the text-only rows play no part.
        dense: whether the caller holds the logits, so that no matrix product is left.
    """

    title: str
    objective: VGSObjective
    trainable: tuple[str, ...] = ("student", "student_text", "student_weight")
    threshold_given: bool = False
    folded: bool = False
    divergence: Divergence | None = None
    dense: bool = False

    @property
    def plain(self) -> bool:
        return self.divergence is not None

    @property
    def beta(self) -> float:
        """Plain distillation as a generalised JSD, of which the forward KL is 0 and the reverse KL 1."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0}.get(self.divergence.kind, self.divergence.beta)

    def phases(self, shape: Shape) -> list[Phase]:
        """The cheapest products that suffice; none for logits that are given."""
        if self.dense:
            return []
        head = int("student_weight" in self.trainable)
        if self.plain:
            return [Phase(1, 1, 1, 1, head)]
        if self.folded:
            return [Phase(1, 2, 1, 1, head)]
        phases = [Phase(1, 2, 2, 1, head)]
        if self.objective.lam > 0:
            gated = 1 - self.objective.vds_quantile
            again = 0 if self.threshold_given else 1  # the gated tokens are projected again unless the gate was known
            options = [Phase(gated, again, again, 1, head)]
            if not head:  # or all tokens are multiplied out while their logits are there, and masked afterwards
                options.append(Phase(1, 0, 0, 1, 0))
            phases.append(min(options, key=lambda phase: phase.columns(shape)))
        return phases

    def flops(self, shape: Shape, n: int) -> float:
        """Of the floor."""
        return 2.0 * shape.vocab * n * sum(phase.columns(shape) for phase in self.phases(shape))

    def compulsory_bytes(self, shape: Shape, n: int, itemsize: int) -> float:
        """Inputs read once and gradients written once: what no implementation can avoid moving."""
        views = 1 if self.plain else 2
        if self.dense:
            return float(n) * shape.vocab * itemsize * 3 * views
        head = "student_weight" in self.trainable
        heads = shape.vocab * (shape.student * (2 if head else 1) + shape.teacher)
        gradients = 1 if self.plain or self.folded else 2
        hidden = n * ((views + gradients) * shape.student + views * shape.teacher)
        return float(itemsize) * (heads + hidden)


def _plain(title: str, divergence: str) -> Job:
    objective = VGSObjective(gamma=0.0, lam=0.0, eta=1.0)
    return Job(title, objective, ("student", "student_weight"), divergence=Divergence(divergence))


JOBS = {
    "vgs": Job("VGS-LP, exact quantile", VGSObjective()),
    "vgs-threshold": Job("VGS-LP, threshold given", VGSObjective(), threshold_given=True),
    "vgs-folded": Job("VGS, lam = 0, folded", VGSObjective(lam=0.0), ("student", "student_weight"), folded=True),
    "vgs-frozen-head": Job("VGS-LP, frozen head", VGSObjective(), ("student", "student_text")),
    "vgs-logits": Job("VGS-LP from given logits", VGSObjective(), ("student", "student_text"), dense=True),
    "reverse-kl": _plain("plain reverse KL", "reverse_kl"),
    "forward-kl": _plain("plain forward KL", "forward_kl"),
    "jsd": _plain("plain JSD, beta 0.5", "jsd"),
}
