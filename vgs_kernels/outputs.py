"""What the public functions return: the loss, and detached terms in the tokens' shape [...], in nats."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .active_columns import SHARES

#: Terms with a mean over tokens, in the order of the output's fields.
AVERAGED = ("standard", "visual", "language", "vds", "gate", "entropy", "student_vds", "policy", *SHARES)


@dataclass
class VGSOutput:
    """Loss and terms of one call; names as in :class:`VGSObjective`.

    Attributes:
        loss: 0-d, or [...] with ``reduction="none"``; carries gradient.
        standard, visual, language, vds: [...] divergences; None if the call did not form them.
        gate: [...] bool, whether language is preserved on the token.
        entropy: [...] entropy of p_I.
        student_vds: [...] KL(p_I || p_x), the student's own visual dependency: near 0, the student does not look.
        target_logps: [...] log p_I of ``target_ids``.
        policy: [...] values of the policy term, before its weights.
        counted: [...] bool, the tokens that take part: neither ignored nor of weight 0; None: all.
        gradient_kept: [...] share of the vocabulary whose gradients were multiplied out; this and the following over
            all views of a token, and None without a ``gradient_tolerance``, with ``reduction="none"``, and where
            nothing wants a gradient.
        gradient_lost: [...] share of the L1 norm of the token's logit gradients that was left out.
        gradient_tail: [...] their sum, as a share of that norm: a logit gradient sums to 0 over the vocabulary, and
            what is left out has a sign. Above 0, columns are spared that should have become less probable.
    """

    loss: Tensor
    standard: Tensor | None = None
    visual: Tensor | None = None
    language: Tensor | None = None
    vds: Tensor | None = None
    gate: Tensor | None = None
    entropy: Tensor | None = None
    student_vds: Tensor | None = None
    target_logps: Tensor | None = None
    policy: Tensor | None = None
    counted: Tensor | None = None
    gradient_kept: Tensor | None = None
    gradient_lost: Tensor | None = None
    gradient_tail: Tensor | None = None

    def metrics(self) -> dict[str, Tensor]:
        """Loss and unweighted means over the tokens that take part (0 for none), as detached 0-d tensors."""
        found = {"loss": self.loss.detach().sum()}
        for name in AVERAGED:
            if (x := getattr(self, name)) is not None:
                counted = x.new_ones(x.shape, dtype=bool) if self.counted is None else self.counted
                found[name] = x.float().masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)
        if self.gradient_lost is not None and self.gradient_lost.numel():
            found["gradient_lost_max"] = self.gradient_lost.max()
        return found


@dataclass
class DivergenceOutput:
    """Loss and terms of one call.

    Attributes:
        loss: 0-d, or [...] with ``reduction="none"``; carries gradient.
        divergence: [...] values as they enter the loss, before weights.
        entropy: [...] of the student (of the renormalised student, where the support renormalises it).
        target_logps: [...] log-probabilities of ``target_ids``, likewise.
        policy, counted, gradient_kept, gradient_lost, gradient_tail: [...] as in :class:`VGSOutput`.
    """

    loss: Tensor
    divergence: Tensor
    entropy: Tensor
    target_logps: Tensor | None = None
    policy: Tensor | None = None
    counted: Tensor | None = None
    gradient_kept: Tensor | None = None
    gradient_lost: Tensor | None = None
    gradient_tail: Tensor | None = None


def shares(output: VGSOutput | DivergenceOutput) -> dict[str, Tensor | None]:
    """What the gradients of a call lost, by the names of the fields."""
    return {name: getattr(output, name) for name in SHARES}
