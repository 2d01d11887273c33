"""The guard of gamma: steering fades while the student is blind or drifts, and comes back as it sees.

The steered target holds the student's own text-only view. Where its two views hardly differ, the target feeds back on
itself, and training can collapse. Two numbers of every step tell how near that is, and a factor in [0, 1] on gamma
follows them: down at once, up by a tenth of the way in each step. It begins at 0: what `language` is by itself can only
be seen before steering acts on it, and that is measured in the first steps:

- *sight*, the share of the teacher's visual dependency that the student has: the sum over tokens of
  min(KL(p_I || p_x), KL(q_I || q_x)) over the sum of KL(q_I || q_x). Tokens count by the teacher's dependency; more
  than the teacher's on one token does not make up for less on another. It does not depend on how a batch is split.
- *drift*, how far ``language`` = KL(p_x || q_x) has climbed above what it was at first, in nats per token.
"""

from __future__ import annotations

DECAY = 0.7  # of the running means, per optimizer step
BLIND, SEEING = 0.4, 0.7  # sight up to which gamma is 0, and from which it is whole
STEADY, DRIFTING = 1.3, 2.0  # language over its start, the other way round: whole up to the first
RISE = 0.1  # of the way up to what the two numbers allow, per optimizer step
MARGIN = 0.02  # nats per token that `language` may climb in any case before that, and as wide is the least ramp


def running_mean(before: float | None, value: float, decay: float = DECAY) -> float:
    """An exponential mean that begins with its first value."""
    return value if before is None else decay * before + (1 - decay) * value


def ramp(value: float, low: float, high: float) -> float:
    """0 up to ``low``, 1 from ``high``, in between the cubic without a kink at either end."""
    x = min(max((value - low) / (high - low), 0.0), 1.0)
    return x * x * (3 - 2 * x)


def allowed(sight: float | None, language: float | None, start: float | None) -> float:
    """What the two numbers leave of gamma, in [0, 1].

    Args:
        sight: running mean, in [0, 1]; None while nothing has been seen, and then nothing is held back.
        language: running mean, nats per token. start: its mean over the first steps, without steering.
    """
    share = 1.0 if sight is None else ramp(sight, BLIND, SEEING)
    if language is None or start is None:
        return share
    return share * (1 - ramp(language, STEADY * start + MARGIN, DRIFTING * start + 2 * MARGIN))


def followed(factor: float, target: float) -> float:
    """The factor of the next step, which follows what is ``allowed``: down at once, up slowly."""
    return min(target, factor + RISE * (target - factor))
