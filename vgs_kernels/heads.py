"""Language-model heads, and rows of a target: what the public functions take and the driver projects with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .rows.layout import LogitTransform


@dataclass(frozen=True, eq=False)
class Head:
    """A language-model head: logits = softcap * tanh(scale * (hidden @ weight^T + bias) / softcap).

    A bare weight [V, D] stands for ``Head(weight)`` wherever a head is expected.

    Attributes:
        weight: [V, D].
        bias: [V], or None.
        scale: factor on the logits, > 0.
        softcap: > 0; None leaves the logits as they are.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def same(self, other: Head) -> bool:
        """Whether both are one linear map: of the same tensor objects and scale, without soft-cap."""
        linear = self.softcap is None and other.softcap is None and self.scale == other.scale
        return linear and self.weight is other.weight and self.bias is other.bias

    def first(self, columns: int | None) -> Head:
        """The head of the leading ``columns`` of the vocabulary."""
        bias = None if self.bias is None else self.bias[:columns]
        return Head(self.weight[:columns], bias, self.scale, self.softcap)

    def transform(self, temperature: float = 1.0) -> LogitTransform:
        """What becomes of hidden @ weight^T + bias."""
        return LogitTransform(self.scale, self.softcap, 1.0 / temperature)


class TargetRow(NamedTuple):
    """One addend of a composed target: coefficient * logits.

    Attributes:
        coefficient: a number, or [N], one for each token, without gradient.
        hidden: [N, Dk] hidden states of the row's model.
        weight: its :class:`Head`, or [V, Dk]; then the other fields belong to it.
        bias: [V], or None.
        logit_scale: factor on the logits, > 0.
        softcap: c in c * tanh(logits / c), > 0; None leaves them as they are.
    """

    coefficient: float | Tensor
    hidden: Tensor
    weight: Tensor | Head
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


def grouped(rows: Sequence[TargetRow], fold: bool) -> list[list[TargetRow]]:
    """Rows by the head that projects them: if ``fold``, those of the same one together."""
    rows = [row for row in rows if isinstance(row.coefficient, Tensor) or row.coefficient != 0] or rows[:1]
    groups: list[list[TargetRow]] = []
    for row in rows:
        group = next((x for x in groups if fold and x[0].weight.same(row.weight)), None)
        if group is None:
            groups.append([row])
        else:
            group.append(row)
    return groups
