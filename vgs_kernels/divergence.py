"""The knobs of one divergence between the student and a composed target, validated in one place."""

from __future__ import annotations

from dataclasses import dataclass

from . import checks

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "sampled_reverse_kl")
SUPPORTS = ("full", "teacher_top_k", "student_top_k", "plausible")


@dataclass(frozen=True)
class Divergence:
    """Settings of D(p, q) per token, p = softmax(student / T) and q = softmax(target / T).

    A divergence is a sum over vocabulary entries. With m = beta * q + (1 - beta) * p::

        reverse_kl   sum_v p log(p / q)
        forward_kl   sum_v q log(q / p)
        jsd          sum_v beta * q log(q / m) + (1 - beta) * p log(p / m)         (GKD, arXiv 2306.13649, Eq. 1)
        value        T^2 [with temperature_squared] * min(sum_v min(entry_v, clip), token_clip)

    ``sampled_reverse_kl`` is its one-sample estimate, the log-ratio log p(y) - log q(y) of the sampled token, with the
    policy gradient: the log-ratio, held constant, times the gradient of log p(y).

    Attributes:
        divergence: one of the four.
        beta: of ``"jsd"``, in [0, 1]; 0 is the forward and 1 the reverse KL, as in the literature, where the formula
            itself vanishes.
        support: what the distributions are restricted to.
            ``"full"``: the vocabulary.
            ``"teacher_top_k"``: the target's ``top_k`` most probable ones, both distributions renormalised there.
            ``"student_top_k"``: the student's ``top_k``, and all others together as one more entry.
            ``"plausible"``: the target's {v: q_0(v) >= plausibility * max q_0}, q_0 the distribution of its first row.
            It is 0 elsewhere and renormalised; the student stays whole. Not for the reverse KL.
            Membership is held constant; entries that tie with the last one inside are inside.
        top_k: see ``support``, >= 1.
        plausibility: see ``support``, in (0, 1].
        clip: greatest value of an entry, >= 0; an entry above it has no gradient.
        token_clip: greatest value of a token, >= 0, which then has no gradient. Of ``sampled_reverse_kl``, the greatest
            absolute log-ratio, which then keeps its gradient.
        temperature: T, > 0, divides the student's logits and the composed ones.
        temperature_squared: whether values and gradients are multiplied with T^2.

    Raises:
        ValueError, TypeError: naming the setting, what came and what was expected.
    """

    divergence: str = "reverse_kl"
    beta: float = 0.5
    support: str = "full"
    top_k: int | None = None
    plausibility: float | None = None
    clip: float | None = None
    token_clip: float | None = None
    temperature: float = 1.0
    temperature_squared: bool = False

    def __post_init__(self) -> None:
        checks.choice("divergence", self.divergence, DIVERGENCES)
        checks.choice("support", self.support, SUPPORTS)
        checks.number("temperature", self.temperature, "> 0")
        checks.number("beta", self.beta, "in [0, 1]")
        checks.number("clip", self.clip, ">= 0", optional=True)
        checks.number("token_clip", self.token_clip, ">= 0", optional=True)
        checks.instance("temperature_squared", self.temperature_squared, bool)
        for name, wanted in (("top_k", "top_k" in self.support), ("plausibility", self.support == "plausible")):
            value = getattr(self, name)
            if wanted != (value is not None):
                expected = "a number" if wanted else "None"
                raise ValueError(f"{name} must be {expected} for support={self.support!r}, got {value!r}.")
        if self.top_k is not None:
            checks.integer("top_k", self.top_k, ">= 1")
        checks.number("plausibility", self.plausibility, "in (0, 1]", optional=True)
        if self.support == "plausible" and self.kind == "reverse_kl":
            raise ValueError(
                "support='plausible' needs divergence='forward_kl' or 'jsd': outside of it the target is 0 and the "
                f"reverse KL infinite, got {self.divergence!r}."
            )
        if self.divergence == "sampled_reverse_kl" and (self.support != "full" or self.clip is not None):
            raise ValueError(
                "divergence='sampled_reverse_kl' looks at the sampled token alone and takes support='full' and "
                f"clip=None, got support={self.support!r} and clip={self.clip}."
            )

    @property
    def kind(self) -> str:
        """``divergence``, with the end points of the JSD as the KLs that they are."""
        if self.divergence == "jsd" and self.beta in (0.0, 1.0):
            return "forward_kl" if self.beta == 0 else "reverse_kl"
        return self.divergence

    @property
    def sampled(self) -> bool:
        """Whether it is an estimate from the sampled token."""
        return self.divergence == "sampled_reverse_kl"

    @property
    def scale(self) -> float:
        """Factor on values and gradients."""
        return self.temperature**2 if self.temperature_squared else 1.0
