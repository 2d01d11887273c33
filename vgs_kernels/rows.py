"""What the two row backends share: tiles of logit rows, the running statistics, and what becomes of them.

Notation: s, a are the student's logits with and without the image, t, w the teacher's. A *pair* of rows (student,
target) is the special case without a and w: plain distillation, the language term, the VDS.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Running statistics of a pair: (max, sum of exp) of both rows, then sums weighted with exp(s - max).
PAIR_STATE = ("s_max", "s_sum", "t_max", "t_sum", "s_logit", "s_gap")
#: Those of four rows. x_gap are sums of a gap weighted with the unnormalised softmax of x; q is a + t - w.
VGS_STATE = (
    *PAIR_STATE,  # s_logit: s, s_gap: s - t
    *("a_max", "a_sum", "w_max", "w_sum", "q_max", "q_sum"),
    *("s_prior_gap", "s_view_gap", "t_view_gap", "a_gap"),  # a - w, s - a, t - w, a - w
)


def scaled(weight: Tensor | float, value: Tensor) -> Tensor:
    """weight * value, where a zero weight wins over an infinite value."""
    weight = torch.as_tensor(weight, dtype=value.dtype, device=value.device)
    return torch.where(weight == 0, 0, weight * value)


class LogitTransform(NamedTuple):
    """logits = softcap * tanh(scale * x / softcap) / temperature, with ``inv_temperature`` = 1 / temperature."""

    scale: float = 1.0
    softcap: float | None = None
    inv_temperature: float = 1.0

    @property
    def gain(self) -> float:
        """d logits / d x of the linear part."""
        return self.scale * self.inv_temperature

    def __call__(self, x: Tensor) -> Tensor:
        if self.softcap is None:
            return x if self.gain == 1.0 else x * self.gain
        capped = torch.tanh(x * (self.scale / self.softcap)).mul_(self.softcap * self.inv_temperature)
        return capped.masked_fill_(x == -torch.inf, -torch.inf)  # a masked column stays masked


class RowTile(NamedTuple):
    """The same columns of two or four logit rows of R tokens: [R, C] each, before the transform."""

    student: Tensor
    target: Tensor
    student_text: Tensor | None
    teacher_text: Tensor | None
    student_transform: LogitTransform
    target_transform: LogitTransform
    may_be_masked: bool
    """Whether a logit can be -inf."""

    @property
    def four(self) -> bool:
        return self.student_text is not None


class RowCoefficients(NamedTuple):
    """Per-token scalars of the gradient sweep, [R] each: d_s = weight * p * (gap_s - gap_a - mean_gap).

    gap_s = (1 + gamma) (s - t), gap_a = gamma (a - w), p = exp(s - lse). If ``prior_weight`` is given, the student's
    text-only row receives d_a = prior_weight * (exp(a + t - w - steered_lse) - p) as well.
    """

    weight: Tensor
    lse: Tensor
    mean_gap: Tensor
    gamma: Tensor
    prior_weight: Tensor | None = None
    steered_lse: Tensor | None = None


def new_state(n_tokens: int, four: bool, like: Tensor) -> Tensor:
    """[K, N] running statistics of no column at all."""
    names = VGS_STATE if four else PAIR_STATE
    state = like.new_zeros(len(names), n_tokens)
    state[[i for i, name in enumerate(names) if name.endswith("_max")]] = -torch.inf
    return state


class Statistics:
    """Named views of a state, and the log-normalisers and divergences that follow from it, [N] each.

    The [N]-vector arithmetic is done in float64 where the device has it: a divergence is a small difference of large
    numbers, and differences of the maxima and of the logarithms are taken apart so that nothing else is rounded.
    """

    def __init__(self, state: Tensor) -> None:
        names = PAIR_STATE if len(state) == len(PAIR_STATE) else VGS_STATE
        wide = state if state.device.type == "mps" else state.double()
        self._values = dict(zip(names, wide, strict=True))

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def lse(self, row: str) -> Tensor:
        """log sum exp of a row."""
        return self[f"{row}_max"] + self[f"{row}_sum"].log()

    def mean(self, name: str) -> Tensor:
        """Expectation of a gap under the softmax of the row that the name begins with."""
        return self[name] / self[f"{name[0]}_sum"]

    def divergence(self, mean_gap: Tensor, p: str, q: str) -> Tensor:
        """KL(p || q) from E_p[log p - log q + lse(p) - lse(q)]."""
        return mean_gap - (self[f"{p}_max"] - self[f"{q}_max"]) - (self[f"{p}_sum"].log() - self[f"{q}_sum"].log())

    @property
    def standard(self) -> Tensor:
        return self.divergence(self.mean("s_gap"), "s", "t")

    @property
    def visual(self) -> Tensor:
        return self.divergence(self.mean("s_gap") - self.mean("s_prior_gap"), "s", "q")

    @property
    def language(self) -> Tensor:
        return self.divergence(self.mean("a_gap"), "a", "w")

    @property
    def vds(self) -> Tensor:
        return self.divergence(self.mean("t_view_gap"), "t", "w")

    @property
    def student_vds(self) -> Tensor:
        return self.divergence(self.mean("s_view_gap"), "s", "a")

    @property
    def entropy(self) -> Tensor:
        return self.lse("s") - self.mean("s_logit")
