"""What a token counts: the mean over a batch, and the factors that some relatives put on responses and tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LOSS_REDUCTIONS = ("trajectory", "token")


def token_weights(
    lengths: Sequence[int],
    reduction: str,
    num_items: Tensor | float | None = None,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """[T] float32 for every response: weights whose sum over tokens makes the loss a mean.

    Args:
        lengths: of the responses, in tokens; may be 0.
        reduction: ``"trajectory"``: mean over the tokens of each response, then over responses that have tokens (arXiv
            2606.00564); ``"token"``: mean over all tokens.
        num_items: how many responses or tokens the mean is over, a number or 0-d; None: those of ``lengths``.
        device: of the weights.

    Raises:
        ValueError: another reduction.
    """
    if reduction not in LOSS_REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(LOSS_REDUCTIONS)}, got {reduction!r}.")
    by_token = reduction == "token"
    if num_items is None:
        num_items = max(sum(lengths) if by_token else sum(length > 0 for length in lengths), 1)
    items = torch.as_tensor(num_items, dtype=torch.float32, device=device)
    return [(1.0 / (items if by_token else items * max(length, 1))).expand(length) for length in lengths]


def standardised(scores: Tensor) -> Tensor:
    """[G] scores minus their mean, over their population standard deviation; 0 where all are equal."""
    centred = scores - scores.mean()
    return centred / (centred.square().mean().sqrt() + 1e-6)


@dataclass(frozen=True)
class VisualAdvantage:
    """VA-OPD (arXiv 2605.21924): what the image makes likelier counts more.

    a_t = max(log q(y_t | image) - log q(y_t | control), 0). The loss of a prompt is sum_k w_k l_k over its responses,
    w = softmax(z(mean a) / temperature), and of a response l = balance * (mean over the ``share`` of its tokens with
    the highest a) + (1 - balance) * (mean over the others). The paper leaves rounding open: the share is rounded up,
    of equal tokens the earlier ones are in it, and a response that has no others takes the mean over all its tokens.

    Attributes:
        temperature: > 0.
        balance: weight of the tokens with the highest advantage, in [0, 1].
        share: of the tokens that are in that group, in (0, 1).
    """

    temperature: float = 1.0
    balance: float = 0.5
    share: float = 0.2

    within_response = True

    def __call__(self, image: Sequence[Tensor], control: Sequence[Tensor]) -> list[Tensor]:
        """Factors on weights that average over a response's tokens, then over responses.

        Args:
            image, control: the teacher's log-probabilities [T] of each response to one prompt, in each view.

        Returns:
            [T] float32 for each response, of mean 1 over responses of any lengths.
        """
        advantages = [(x - y).float().clamp(min=0) for x, y in zip(image, control, strict=True)]
        means = torch.stack([x.mean() for x in advantages])
        weights = len(means) * torch.softmax(standardised(means) / self.temperature, dim=0)
        return [weight * self._tokens(x) for weight, x in zip(weights, advantages, strict=True)]

    def _tokens(self, advantages: Tensor) -> Tensor:
        count = len(advantages)
        top = math.ceil(self.share * count)
        if top == count:
            return torch.ones_like(advantages)
        factors = torch.full_like(advantages, (1 - self.balance) * count / (count - top))
        factors[advantages.argsort(descending=True, stable=True)[:top]] = self.balance * count / top
        return factors


@dataclass(frozen=True)
class EvidenceContrast:
    """V-Zero (arXiv 2606.25319): responses that rest on what the image shows count more.

    A response's score is the mean of log q(y_t | image) - log q(y_t | control), its weight clip(1 + alpha * z, 0,
    ``limit``), z the score standardised among the responses to the prompt. The paper has alpha = 1, its code 0.5.

    Attributes:
        alpha: >= 0.
        limit: greatest weight.
    """

    alpha: float = 1.0
    limit: float = 2.0

    within_response = False

    def __call__(self, image: Sequence[Tensor], control: Sequence[Tensor]) -> list[Tensor]:
        """Factors on token weights; as ``VisualAdvantage``, constant over a response."""
        contrasts = [(x - y).float() for x, y in zip(image, control, strict=True)]
        scores = torch.stack([x.mean() for x in contrasts])
        weights = (1 + self.alpha * standardised(scores)).clamp(0, self.limit)
        return [weight.expand(len(x)) for weight, x in zip(weights, contrasts, strict=True)]


Weighting = VisualAdvantage | EvidenceContrast


def weigh(weighting: Weighting, image: Sequence[Tensor], control: Sequence[Tensor]) -> list[Tensor]:
    """A prompt's factors; responses without tokens take no part.

    Args:
        weighting: of a preset.
        image, control: [T] for each response, T may be 0.
    """
    kept = [index for index, x in enumerate(image) if len(x)]
    factors = [x.float() for x in image]
    if kept:
        found = weighting([image[index] for index in kept], [control[index] for index in kept])
        for index, value in zip(kept, found, strict=True):
            factors[index] = value
    return factors
