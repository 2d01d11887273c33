"""What the row backends share: tiles of logit rows, the online softmax's running statistics, and what becomes of them.

Notation: s, a are the student's logits with and without the image, t, w the teacher's, q = a + t - w those of the
steered target. A *pair* of rows (student, target) is the special case without a and w: plain distillation, the
language term, the VDS.

All statistics are of logits centred at their row's maximum, x' = x - max x. A divergence is then a small difference of
small numbers, KL(p || q) = E_p[p' - q'] - log sum exp p' + log sum exp q', whatever offsets the two heads have.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..workspace import large_empty

#: Running statistics of a pair: max and sum of exp(x') of both rows, then weighted sums, see ``GAPS``.
PAIR_STATE = ("s_max", "s_sum", "t_max", "t_sum", "s_logit", "s_gap", "t_gap")
#: Those of four rows. q_max is relative to max a + max t - max w.
VGS_STATE = (
    *(*PAIR_STATE[:4], "a_max", "a_sum", "w_max", "w_sum", "q_max", "q_sum"),
    *("s_logit", "s_gap", "s_prior_gap", "s_view_gap", "t_view_gap", "a_gap"),
)
#: Weighted sum -> (row whose exp(x') weights, the two rows whose centred logits are subtracted).
GAPS = {
    "s_logit": ("s", "s", None),
    "s_gap": ("s", "s", "t"),
    "t_gap": ("t", "t", "s"),
    "s_prior_gap": ("s", "a", "w"),
    "s_view_gap": ("s", "s", "a"),
    "t_view_gap": ("t", "t", "w"),
    "a_gap": ("a", "a", "w"),
}
#: Sums of exp(x') * (exp(-gap) - 1 + gap), which are never negative -> (row that weights, the other one of the gap).
#: Only ``loops`` take them; the state of others ends before them. A NaN is one that is not known.
RESTS = {
    "s_rest": ("s", "t"),
    "t_rest": ("t", "s"),
    "s_view_rest": ("s", "a"),
    "t_view_rest": ("t", "w"),
    "a_rest": ("a", "w"),
    "q_rest": ("s", "q"),
}
PAIR_RESTS, VGS_RESTS = ("s_rest", "t_rest"), ("s_rest", "s_view_rest", "t_view_rest", "a_rest", "q_rest")
_NAMES = {len(x): x for x in (PAIR_STATE, PAIR_STATE + PAIR_RESTS, VGS_STATE, VGS_STATE + VGS_RESTS)}

#: Above this an entry's p is so near 1 that 1 - p is to be summed from the other entries; sums treat entries above
#: ``LARGE`` so, which includes them whatever the rounding.
SATURATED, LARGE = 0.999, 0.99
#: Logits that a CPU moves at a time, through memory beside them (1 MiB); other devices move all in one launch.
_MOVED_LOGITS = 1 << 18


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """dtype of logits, statistics and collected gradients: float32, or float64 where one input is of it."""
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64: Apple's and some of Intel's do not."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def wide(x: Tensor) -> Tensor:
    """In float64 where the device has it."""
    return x.double() if has_float64(x.device) else x


def scaled(weight: Tensor | float, value: Tensor) -> Tensor:
    """weight * value, where a zero weight wins over an infinite value."""
    if not isinstance(weight, Tensor):
        return weight * value if weight != 0 else torch.zeros_like(value)
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
    readable: int
    """Columns >= C that may be read in all rows, and overwritten in those of gradients; what stands there is void."""
    deciding: Tensor | None = None
    """The logits that decide which columns count, [R, C], where no other row does."""

    @property
    def four(self) -> bool:
        return self.student_text is not None

    def pair_at(self, tokens: Tensor) -> RowTile:
        """A copy of the student's and the target's rows of some tokens, as wide as those can be read."""
        rows = (row.as_strided((row.shape[0], self.readable), row.stride()) for row, _ in self.pair)
        copies = (torch.index_select(row, 0, tokens, out=large_empty(row, len(tokens), self.readable)) for row in rows)
        student, target = (copy[:, : self.student.shape[1]] for copy in copies)
        return RowTile(student, target, None, None, *self[4:8])

    @property
    def text_pair(self) -> RowTile:
        """The text-only rows as a pair."""
        return RowTile(self.student_text, self.teacher_text, None, None, *self[4:8])

    def move_text(self, tokens: Tensor) -> RowTile:
        """The pair of the text-only rows of some tokens, moved to the first of these rows, which overwrites others."""
        pair, count, columns = self.text_pair, len(tokens), self.student_text.shape[1]
        at_a_time = max(_MOVED_LOGITS // max(count, 1), 1) if tokens.device.type == "cpu" else columns
        for row, _ in pair.pair:
            for here in slices(columns, at_a_time):
                row[:count, here] = row[:, here].index_select(0, tokens)
        return pair._replace(student=pair.student[:count], target=pair.target[:count])

    @property
    def pair(self) -> list[tuple[Tensor, LogitTransform]]:
        """The student's and the target's logits and their transforms."""
        return [(self.student, self.student_transform), (self.target, self.target_transform)]


class RowCoefficients(NamedTuple):
    """Per-token scalars of a gradient, [R] each; None where they play no part.

    Of four rows, d_s = weight * p * (gap - mean) with p = softmax(s), gap = (1 + gamma) (s' - t') - gamma (a' - w').
    With a live prior, d_a = weight * gamma * (softmax(q) - p).

    Of a pair, d_s = weight * (slope - p * mean), see entries_torch.py, whose ``SUMS`` [4, R] over all columns
    ``sums`` are; weight * top where p > ``SATURATED``: such an entry is the difference of two numbers that nearly
    cancel, and ``top`` comes from all others. With a ``limit``, the least logit of the student, as it lies in the tile,
    that is inside the support, columns outside have weight * (share * tail_slope - p * mean), with the share
    exp(s' - tail_log) of the tail, which ``sums`` include.

    With four rows and a ``slot`` (int32, negative for none), the gradient of text_weight * KL(softmax(a) || softmax(w))
    by a is written there; the first 4 of ``text_sums`` [splits, 6, R], added up over the splits, are the ``SUMS`` of
    that pair.

    Where ``policy`` is given, d_s gains policy * (1 - p) at the column ``chosen`` of the tile (int64, may lie outside)
    and -policy * p elsewhere.
    """

    weight: Tensor
    gamma: Tensor | None = None
    sums: Tensor | None = None
    live_prior: bool = False
    policy: Tensor | None = None
    chosen: Tensor | None = None
    tail_slope: Tensor | None = None
    tail_log: Tensor | None = None
    limit: Tensor | None = None
    slot: Tensor | None = None
    text_weight: Tensor | None = None
    text_sums: Tensor | None = None

    def centre(self, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """``mean`` and ``top`` [R], from the statistics of all columns: raw gaps, for every normaliser cancels."""
        if self.sums is None:
            x = Statistics(state)
            mean = (1 + self.gamma) * x.mean("s_gap") - scaled(self.gamma, x.mean("s_prior_gap"))
            return mean.to(state.dtype), None
        _, slope, rest, top = wide(self.sums)
        # (1 - p) * slope - p * all other slopes, of the entry with all the mass.
        return (slope + top).to(state.dtype), (rest * top - (1 - rest) * slope).to(state.dtype)


def quiet(x: Tensor, live: Tensor | None, lowest: float = 0.0) -> Tensor:
    """Rows [..., R, C] of which those that are not ``live`` [R] may hold anything: what is not finite becomes 0.

    ``lowest`` is what becomes of -inf, which masks a logit.
    """
    return x if live is None else torch.where(live.unsqueeze(1), x, x.nan_to_num(0.0, 0.0, lowest))


def slices(n: int, size: int) -> list[slice]:
    """``range(n)`` in pieces of ``size``, the last one shorter."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def named(state: Tensor) -> dict[str, Tensor]:
    """The statistics [R] of a state by name."""
    return dict(zip(_NAMES[len(state)], state.unbind(), strict=True))


def new_state(n_tokens: int, four: bool, like: Tensor, *, rests: bool = False) -> Tensor:
    """[K, N] running statistics of no column at all, with or without ``RESTS``."""
    names = VGS_STATE + VGS_RESTS * rests if four else PAIR_STATE + PAIR_RESTS * rests
    state = like.new_zeros(len(names), n_tokens)
    state[: 10 if four else 4 : 2] = -torch.inf  # the maxima
    return state


def anchor(maximum: Tensor) -> Tensor:
    """What a row is centred at: its maximum, or 0 as long as all columns are masked."""
    return maximum.masked_fill(maximum == -torch.inf, 0)


def _stack(rows: Sequence[Tensor], places: Sequence[int]) -> Tensor:
    """rows[places]; an index tensor would be copied from the host."""
    return torch.stack([rows[place] for place in places])


def _steered(rows: Tensor) -> Tensor:
    """a + t - w of [4, R] numbers in the order of ``RunningStatistics.names``."""
    return rows[2] + rows[1] - rows[3]


class RunningStatistics:
    """A state [K, R] of the online softmax, rescaled in place to ever higher maxima.

    What is done to [R] vectors is done to all rows, or gaps, at once.

    Attributes:
        names: of the rows.
        gaps: the part of ``GAPS`` that these rows have.
        maxima, sums: [rows, R] views of the state.
        totals: [gaps, R] weighted sums, another view.
        rests: [R] views by name, of ``RESTS``.
        q_max, q_sum: [R] likewise; None of a pair.
    """

    def __init__(self, state: Tensor) -> None:
        names = named(state)
        self.four, self.names = "a_max" in names, "staw" if "a_max" in names else "st"
        self.gaps = {name: gap for name, gap in GAPS.items() if name in names}
        n_rows = len(self.names)
        self.maxima, self.sums = state[0 : 2 * n_rows : 2], state[1 : 2 * n_rows : 2]
        self.rests = {name: names[name] for name in RESTS if name in names}
        first = len(state) - len(self.rests) - len(self.gaps)
        self.q_max, self.q_sum, self.totals = names.get("q_max"), names.get("q_sum"), state[first:][: len(self.gaps)]
        places = [[n_rows if name is None else self.names.index(name) for name in gap] for gap in self.gaps.values()]
        self._weighting, self._upper, self._lower = zip(*places, strict=True)

    def rescale(self, maxima: Tensor, masked: bool) -> Tensor:
        """Centre what was summed at higher maxima [rows, R]; returns the new anchors."""
        anchors, n_rows = anchor(maxima), len(self.names)
        shift, discount = anchor(self.maxima) - anchors, (self.maxima - anchors).exp_()
        shifts = [*shift, torch.zeros_like(shift[0])]
        kept = _stack(discount, self._weighting)
        discounts = [*discount, torch.ones_like(discount[0])]
        for name in self.rests:  # q, which is centred apart, does not move
            row, other = (self.names.index(x) if x in self.names else n_rows for x in RESTS[name])
            self._move(name, shifts[row] - shifts[other], discounts[row], discounts[other])
        moved = _stack(shifts, self._upper) - _stack(shifts, self._lower)
        self.totals.add_(moved * _stack(self.sums, self._weighting)).mul_(kept)
        if masked:  # 0 * inf is 0: nothing of it is left beside the new maximum
            self.totals.masked_fill_(kept == 0, 0)
        self.sums.mul_(discount)
        if self.four:
            self.q_max.add_(_steered(shift))
        self.maxima.copy_(maxima)
        return anchors

    def rescale_steered(self, maximum: Tensor) -> Tensor:
        """The same of q alone: another ``q_max`` [R], for the present maxima of the other rows."""
        q_anchor = anchor(maximum)
        discount = (self.q_max - q_anchor).exp_()
        if "q_rest" in self.rests:
            self._move("q_rest", q_anchor - anchor(self.q_max), torch.ones_like(discount), discount)
        self.q_sum.mul_(discount)
        self.q_max.copy_(maximum)
        return q_anchor

    def _move(self, name: str, change: Tensor, discount: Tensor, other_discount: Tensor) -> None:
        """Gaps of a rest grow by ``change`` [R], its rows' sums, still those of before, get these factors."""
        row, other = (self.q_sum if row == "q" else self.sums[self.names.index(row)] for row in RESTS[name])
        rest = self.rests[name]
        moved = (rest + scaled(other, torch.expm1(-change)) + row * change) * discount
        rest.copy_(torch.where(row == 0, other * other_discount, moved))  # nothing but the other one was summed yet

    def common_maxima(self) -> Tensor:
        """Maxima that compare between states of the same tokens, [rows, R], and that of q where there is one."""
        if not self.four:
            return self.maxima
        return torch.cat([self.maxima, (self.q_max + _steered(anchor(self.maxima))).unsqueeze(0)])

    def rescale_to(self, maxima: Tensor) -> None:
        """Centre at the common ``maxima`` of several states: then their sums and totals add up."""
        anchors = self.rescale(maxima[: len(self.names)], masked=True)
        if self.four:
            self.rescale_steered(maxima[-1] - _steered(anchors))

    def addends(self) -> list[Tensor]:
        """Everything that adds up between states with common maxima."""
        return [*self.sums, *self.totals, *self.rests.values(), *([self.q_sum] if self.four else [])]


class Statistics:
    """Named views of a state and the divergences that follow from it, [N] each, in float64 where the device has it.

    What is done to one row is done to all at once, and kept: an operator's start takes longer than its work.
    """

    def __init__(self, state: Tensor) -> None:
        self._state = wide(state)
        self._names, self._values = _NAMES[len(state)], named(self._state)
        self._means: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    @functools.cached_property
    def _logs(self) -> dict[str, Tensor]:
        """log sum exp of the rows' centred logits."""
        names = [name for name in self._names if name.endswith("_sum")]
        logs = self._state[1 : 2 * len(names) : 2].log().unbind()
        return {name[0]: log for name, log in zip(names, logs, strict=True)}

    def mean(self, name: str) -> Tensor:
        """Expectation of a gap of centred logits, see ``GAPS``."""
        if name not in self._means:
            row = GAPS[name][0]  # whose gaps lie beside each other
            gaps = [x for x in self._names if x in GAPS and GAPS[x][0] == row]
            first = self._names.index(gaps[0])
            means = self._state[first : first + len(gaps)] / self[f"{row}_sum"]
            self._means |= dict(zip(gaps, means.unbind(), strict=True))
        return self._means[name]

    def kl(self, gap: str) -> Tensor:
        """KL(softmax(x) || softmax(y)) of the gap x' - y' whose weights are of x, see ``GAPS``."""
        _, x, y = GAPS[gap]
        plain = self.mean(gap) - self._logs[x] + self._logs[y]
        return self._exact(gap.replace("gap", "rest"), plain)

    def near(self, rest: str) -> Tensor:
        """[N] bool: whether the KL of this one of ``RESTS`` is exact however small it is."""
        known = self._values.get(rest, torch.full_like(self["s_sum"], torch.nan))
        return (self._excess(rest).abs() < 0.1) & ~known.isnan()

    def _excess(self, rest: str) -> Tensor:
        """E_p[exp(-gap)] - 1."""
        row, other = RESTS[rest]
        return self[f"{other}_sum"] / self[f"{row}_sum"] - 1

    def _exact(self, rest: str, plain: Tensor) -> Tensor:
        """E_p[gap] + log E_p[exp(-gap)] as a sum of terms that are of second order each, where these are known.

        With e the excess, E_p[gap] = E_p[exp(-gap) - 1 + gap] - e.
        """
        if rest not in self._values:
            return plain
        excess = self._excess(rest)
        exact = self[rest] / self[f"{RESTS[rest][0]}_sum"] + (excess.log1p() - excess)
        return torch.where(self.near(rest), exact, plain)

    @property
    def visual(self) -> Tensor:
        """KL(softmax(s) || softmax(q))."""
        mean_gap = self.mean("s_gap") - self.mean("s_prior_gap")
        return self._exact("q_rest", mean_gap - self._logs["s"] + self._logs["q"] + self["q_max"])

    @property
    def entropy(self) -> Tensor:
        """Of softmax(s)."""
        return self._logs["s"] - self.mean("s_logit")

    @property
    def log_sums(self) -> Tensor:
        """log sum exp s' - log sum exp t': what makes s' - t' the log-ratio of the two probabilities."""
        return self._logs["s"] - self._logs["t"]

    def log_probability(self, logits: Tensor, row: str = "s") -> Tensor:
        """log softmax(row) at columns with these logits, [N]."""
        return (logits - self[f"{row}_max"]) - self._logs[row]
