"""What the public functions return: the loss, and detached terms in the tokens' shape [...], in nats."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

#: Terms with a mean over tokens, in the order of the output's fields.
AVERAGED = ("standard", "visual", "language", "vds", "gate", "entropy", "student_vds", "policy")


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

    def metrics(self) -> dict[str, Tensor]:
        """Loss and unweighted means over the tokens that take part (0 for none), as detached 0-d tensors."""
        found = {"loss": self.loss.detach().sum()}
        for name in AVERAGED:
            if (x := getattr(self, name)) is not None:
                counted = x.new_ones(x.shape, dtype=bool) if self.counted is None else self.counted
                found[name] = x.float().masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)
        return found


@dataclass
class DivergenceOutput:
    """Loss and terms of one call.

    Attributes:
        loss: 0-d, or [...] with ``reduction="none"``; carries gradient.
        divergence: [...] values as they enter the loss, before weights.
        entropy: [...] of the student (of the renormalised student, where the support renormalises it).
        target_logps: [...] log-probabilities of ``target_ids``, likewise.
        policy, counted: [...] as in :class:`VGSOutput`.
    """

    loss: Tensor
    divergence: Tensor
    entropy: Tensor
    target_logps: Tensor | None = None
    policy: Tensor | None = None
    counted: Tensor | None = None
