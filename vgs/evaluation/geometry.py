"""Angles and norms of the gradients of the three terms, by visual dependency (arXiv 2606.00564, Fig. 3 and 7).

``standard`` is KL(p_I || q_I), ``language`` KL(p_x || q_x) and ``visual`` KL(p_I || q*) with q* ~ p_x q_I / q_x a
constant. Tokens are put into bins of equal count by KL(q_I || q_x), and each term is averaged over a bin. Its gradient
is looked at in two places:

- in the space of all trained parameters: exactly, with two gradients in memory at a time, or by random projections with
  one, of which an angle has a standard error;
- at the last hidden states, which costs no backward pass through the model: a token's three gradients are taken as
  vectors at one state, although ``language`` has the state of the view without image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vgs_kernels import fused_linear_divergence

from ..models.forward import score_groups
from ..models.groups import PromptGroup, response_lengths, select_responses
from ..models.heads import Head, read_head, visual_dependency
from .projections import MOST, project, standard_error

FORM = 1
TERMS = ("standard", "language", "visual")
PAIRS = (("language", "visual"), ("standard", "visual"), ("standard", "language"))
#: ``states(groups) -> ([N, Dt] with images, [N, Dt] without)`` of a teacher.
States = Callable[[list[PromptGroup]], Sequence[Tensor]]
#: (inner products by pair of terms); a term with itself is its squared norm.
Products = dict[tuple[str, str], float]


def equal_bins(scores: Tensor, bins: int) -> list[Tensor]:
    """Which tokens are in which bin: by rank, so that bins differ by one token at most, also where scores are equal.

    Args:
        scores: [N] visual dependency scores.
        bins: how many.

    Returns:
        The bins' token indices [N_b] int64, from the lowest scores to the highest; empty ones where N is smaller.
    """
    return list(torch.tensor_split(torch.argsort(scores, stable=True), bins))


@dataclass
class GeometryProbe:
    """A student on given responses, and what the teacher says of them.

    Args:
        student: an unwrapped model; run in eval mode, and left in the mode that it came in.
        batches: prompts with their responses, a list for each forward pass.
        states: of the teacher. teacher_head: its head.
        temperature: divides the logits. vocab_size: leading columns in use; None for all.
        progress: show a bar.

    Attributes:
        teacher: of each batch the teacher's rows with and without images. prior: the student's without.
        vds: [N] KL(q_I || q_x) of all tokens.
    """

    student: nn.Module
    batches: Sequence[list[PromptGroup]]
    states: States
    teacher_head: Head
    temperature: float = 1.0
    vocab_size: int | None = None
    progress: bool = False
    teacher: list[Sequence[Tensor]] = field(init=False, default_factory=list)
    prior: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._options = {"temperature": self.temperature, "vocab_size": self.vocab_size}
        scores = []
        with torch.no_grad(), self._evaluating():
            for groups in self.batches:
                rows = self.states(groups)
                self.teacher.append(rows)
                scores.append(visual_dependency(rows, self.teacher_head, **self._options).double())
                self.prior.append(self._rows(groups, text=True))
        self.vds = torch.cat(scores)
        self._ends = [0, *torch.tensor([len(x) for x in scores]).cumsum(0).tolist()]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.student.training
        self.student.eval()
        try:
            yield
        finally:
            self.student.train(training)

    def _rows(self, groups: Sequence[PromptGroup], text: bool) -> Tensor:
        """[N, Ds] hidden states of the student in one view."""
        if text:
            groups = [replace(group, prompt_ids=group.text_prompt_ids, images={}) for group in groups]
        return score_groups(self.student, groups, text=False)[0]

    def _value(self, term: str, rows: Tensor, number: int, kept: Any, weights: Tensor, head: Head | None = None) -> Any:
        """A term of some tokens of a batch.

        Args:
            term: its name.
            rows: [N, Ds] hidden states of the view that it is of.
            number: of the batch. kept: which of the batch's tokens the rows are, an index.
            weights: [N] of the tokens. head: of the student; None reads it, with gradient.
        """
        image, text = (x[kept] for x in self.teacher[number])
        head, taught = head or read_head(self.student, rows.dtype), self.teacher_head
        target = [taught.target(text if term == "language" else image)]
        if term == "visual":
            target += [head.target(self.prior[number][kept]), taught.target(text)._replace(coefficient=-1.0)]
        return fused_linear_divergence(
            rows, head.weight, target, token_weights=weights.to(rows.device), **head.student_options, **self._options
        )

    # ---- at the hidden states

    def hidden(self, bins: Sequence[Tensor]) -> tuple[list[Products], dict[str, list[float]]]:
        """Inner products of the gradients at the hidden states, as means over the tokens of each bin; and the terms.

        Args:
            bins: token indices of each.
        """
        found: dict[str, list[Tensor]] = {term: [] for term in TERMS}
        values: dict[str, list[Tensor]] = {term: [] for term in TERMS}
        with self._evaluating():
            for number, groups in enumerate(self.batches):
                with torch.no_grad():
                    image = self._rows(groups, text=False)
                    head = read_head(self.student, image.dtype)
                bias = None if head.bias is None else head.bias.detach()
                head = replace(head, weight=head.weight.detach(), bias=bias)
                for term in TERMS:
                    rows = (self.prior[number] if term == "language" else image).detach().requires_grad_()
                    output = self._value(term, rows, number, slice(None), torch.ones(len(rows)), head)
                    (gradient,) = torch.autograd.grad(output.loss, rows)
                    found[term].append(gradient.double())
                    values[term].append(output.divergence.detach().double())
        whole = {term: torch.cat(parts) for term, parts in found.items()}
        products = [
            {
                (a, b): float((whole[a][chosen] * whole[b][chosen]).sum() / max(len(chosen), 1))
                for a, b in (*PAIRS, *((term, term) for term in TERMS))
            }
            for chosen in bins
        ]
        flat = {term: torch.cat(parts) for term, parts in values.items()}
        return products, {term: [float(x[chosen].mean()) for chosen in bins] for term, x in flat.items()}

    # ---- in the space of the parameters

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.student.parameters() if parameter.requires_grad]

    def _weights(self, chosen: Tensor) -> list[Tensor]:
        """The mean over some tokens, as weights of each batch's tokens."""
        weights = torch.zeros_like(self.vds)
        weights[chosen] = 1.0 / max(len(chosen), 1)
        return [weights[first:last] for first, last in pairwise(self._ends)]

    def _accumulate(self, term: str, weights: Sequence[Tensor], advance: Callable[[], Any]) -> None:
        """Adds the gradient of a term's weighted sum to the parameters' ``grad``."""
        parameters = self._parameters()
        for number, (groups, own) in enumerate(zip(self.batches, weights, strict=True)):
            lengths = response_lengths(groups)
            weighed = [bool(part.any()) for part in own.split(lengths)]
            if any(weighed):
                mask = torch.tensor(weighed).repeat_interleave(torch.tensor(lengths)).to(own.device)
                part = select_responses(groups, [index for index, wanted in enumerate(weighed) if wanted])
                rows = self._rows(part, text=term == "language")
                self._value(term, rows, number, mask, own[mask]).loss.backward(inputs=parameters)
            advance()

    @contextmanager
    def _own_gradients(self) -> Iterator[list[nn.Parameter]]:
        """Parameters whose ``grad`` may be used inside, and is as before afterwards."""
        parameters = self._parameters()
        before = [parameter.grad for parameter in parameters]
        try:
            yield parameters
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient

    def exact(self, bins: Sequence[Tensor]) -> list[Products]:
        """Inner products of each bin's gradients. Four gradients are computed, and two held at a time.

        Args:
            bins: token indices of each.
        """
        found = []
        bar = tqdm(total=4 * len(bins) * len(self.batches), desc="gradients", disable=not self.progress)
        with bar, self._evaluating(), self._own_gradients() as parameters:

            def gradient(term: str) -> list[Tensor]:
                for parameter in parameters:
                    parameter.grad = None
                self._accumulate(term, weights, bar.update)
                taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
                for parameter in parameters:
                    parameter.grad = None
                return taken

            for chosen in bins:
                weights, products = self._weights(chosen), {}
                held = gradient("standard")
                products["standard", "standard"] = _inner(held, held)
                other = gradient("language")
                products["language", "language"] = _inner(other, other)
                products["standard", "language"] = _inner(held, other)
                del other
                other = gradient("visual")
                products["visual", "visual"] = _inner(other, other)
                products["standard", "visual"] = _inner(held, other)
                held = other
                del other
                other = gradient("language")
                products["language", "visual"] = _inner(other, held)
                del other, held
                found.append(products)
        return found

    def projected(self, bins: Sequence[Tensor], repeats: int, seed: int = 0) -> list[list[Products]]:
        """Estimates of the same, ``repeats`` for each bin. One forward pass for each batch, one gradient at a time.

        Args:
            bins: token indices of each.
            repeats: projections. seed: of their signs.
        """
        sums: dict[tuple[int, str], Tensor] = {}
        total = len(bins) * len(TERMS) * len(self.batches)
        weights = [self._weights(chosen) for chosen in bins]
        with tqdm(total=total, desc="projections", disable=not self.progress) as bar, self._evaluating():
            for number, groups in enumerate(self.batches):
                for view, terms in (("image", ("standard", "visual")), ("text", ("language",))):
                    rows = self._rows(groups, text=view == "text")
                    for place in range(len(bins)):
                        for term in terms:
                            own = weights[place][number]
                            if own.any():
                                loss = self._value(term, rows, number, slice(None), own).loss
                                parts = torch.autograd.grad(
                                    loss,
                                    self._parameters(),
                                    retain_graph=True,
                                    materialize_grads=True,
                                    allow_unused=True,
                                )
                                added = project(parts, repeats, seed)
                                sums[place, term] = sums[place, term] + added if (place, term) in sums else added
                            bar.update()
        pairs = (*PAIRS, *((term, term) for term in TERMS))
        return [
            [
                {(a, b): float(sums[place, a][repeat] @ sums[place, b][repeat]) for a, b in pairs}
                for repeat in range(repeats)
            ]
            for place in range(len(bins))
        ]


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _angle(products: Mapping[tuple[str, str], float], pair: tuple[str, str]) -> float | None:
    """In degrees; None where a gradient is 0."""
    squares = [products[term, term] for term in pair]
    if min(squares) <= 0:
        return None
    return math.degrees(math.acos(min(max(products[pair] / math.sqrt(squares[0] * squares[1]), -1.0), 1.0)))


def _space(found: Sequence[Products], estimates: Sequence[Sequence[Products]] | None = None) -> dict[str, Any]:
    """Angles and norms by bin, as they are stored; the last entry is that of all tokens together."""

    def columns(products: Sequence[Products]) -> dict[str, Any]:
        angles = {f"{a}-{b}": [_angle(each, (a, b)) for each in products] for a, b in PAIRS}
        norms = {term: [math.sqrt(max(each[term, term], 0.0)) for each in products] for term in TERMS}
        return {"angles": angles, "norms": norms}

    def spread(kind: str, name: str) -> list[float | None]:
        rows = [[columns([one])[kind][name][0] for one in own] for own in estimates or ()]
        return [None if None in row else standard_error(row) for row in rows]

    whole = columns(found)
    errors = {kind: {name: spread(kind, name) for name in whole[kind]} for kind in whole} if estimates else None

    def part(tree: Any, which: slice | int) -> Any:
        return {name: part(x, which) for name, x in tree.items()} if isinstance(tree, dict) else tree[which]

    by_bin = {"bins": list(range(len(found) - 1)), **part(whole, slice(0, -1))}
    by_bin["errors"] = None if errors is None else part(errors, slice(0, -1))
    return {**by_bin, "all": {**part(whole, -1), "errors": None if errors is None else part(errors, -1)}}


def measure(
    probe: GeometryProbe, bins: int = 10, projections: int | None = None, parameters: bool = True
) -> dict[str, Any]:
    """Angles (degrees) and norms of the terms' gradients, by bin of visual dependency and for all tokens together.

    Args:
        probe: a student on its responses.
        bins: of equal count.
        projections: estimate those of the parameters by so many random projections; None: exactly.
        parameters: whether to look at the parameters at all, and not at the hidden states alone.

    Returns:
        ``tokens``, ``vds`` and ``terms`` (means by bin, nats), and for ``parameters`` and ``hidden``: ``bins`` (their
        numbers), ``angles`` by pair, ``norms`` by term, their standard ``errors`` (None where exact), and ``all``.

    Raises:
        ValueError: fewer tokens than bins, a number out of its range, or a student of which nothing is trained.
    """
    if bins < 1 or len(probe.vds) < bins:
        raise ValueError(f"bins must lie in [1, {len(probe.vds)}], the number of tokens, got {bins}.")
    if projections is not None and not 2 <= projections <= MOST:
        raise ValueError(f"projections must lie in [2, {MOST}] or be None, got {projections}.")
    if parameters and not any(parameter.requires_grad for parameter in probe.student.parameters()):
        raise ValueError("the student must have parameters that are trained, got none.")
    chosen = [*equal_bins(probe.vds, bins), torch.arange(len(probe.vds), device=probe.vds.device)]
    products, terms = probe.hidden(chosen)
    record: dict[str, Any] = {
        "kind": "geometry",
        "form": FORM,
        "method": "exact" if projections is None else f"{projections} random projections",
        "tokens": len(probe.vds),
        "vds": [float(probe.vds[part].mean()) for part in chosen[:-1]],
        "terms": {term: values[:-1] for term, values in terms.items()},
        "hidden": _space(products),
    }
    if parameters and projections is None:
        record["parameters"] = _space(probe.exact(chosen))
    elif parameters:
        estimates = probe.projected(chosen, projections)
        means = [{pair: sum(one[pair] for one in own) / len(own) for pair in own[0]} for own in estimates]
        record["parameters"] = _space(means, estimates)
    return record
