"""What a step asks of a teacher: the hidden states of responses, with and without the image, and its output head.

Logits would be 300 KB a token; a hidden state of width 4,096 is 8 KB in 16 bits, and says the same exactly, because
logits are the head applied to it. So hidden states are what a teacher hands over, wherever it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..models.groups import PromptGroup
from ..models.heads import Head

#: ``then(rows)``: what else is wanted of a pass, by name, [N] or [N, Dt] each, from its [N, Dt] hidden states.
Then = Callable[[list[Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class TeacherRows:
    """What a teacher says of one response of T tokens.

    A token costs 8 KB per view as a hidden state of width 4,096 in 16 bits and 300 KB as logits, so the responses of a
    whole generation batch are scored before the student runs.

    Attributes:
        rows: view -> [T, Dt] hidden states, of the views that the loss looks at.
        vds: [T] visual dependency score KL(q_I || q_x), nats; None if it was not asked for.
        factors: [T] float32 factors on the token weights; None if the preset has none.
        teacher: the name of the teacher, whose head the rows go with; "" where there is one alone.
    """

    rows: dict[str, Tensor]
    vds: Tensor | None = None
    factors: Tensor | None = None
    teacher: str = ""


@dataclass(frozen=True)
class TeacherFacts:
    """What a run must know of a teacher before it starts.

    Attributes:
        what: it, for messages: ``"teacher_model"``, ``"the teacher at http://..."``.
        head_rows: rows of its output head.
        placeholder_ids: the ids of image and video tokens that it reads, sorted.
    """

    what: str
    head_rows: int
    placeholder_ids: list[int]


class Teacher(Protocol):
    """Gives hidden states and the head that they go with.

    Attributes:
        facts: see ``TeacherFacts``.
        sharded: whether its parameters are spread over the processes, so that all of them must ask the same number of
            times.
    """

    facts: TeacherFacts
    sharded: bool

    def ready(self) -> AbstractContextManager[None]:
        """``states`` may be called inside: what it needs is on the device."""

    def states(self, groups: list[PromptGroup], text: bool, then: Then) -> dict[str, Tensor]:
        """Score all responses of some groups at once, as the caller's mixed precision (autocast) has it.

        Args:
            groups: prompts with their responses, N response tokens in all; none where processes ask together.
            text: whether the view without images is wanted beside the one with them.
            then: is called once, with [N, Dt] hidden states of one or both views, in the order group, response, token,
                where ``head`` may be opened.

        Returns:
            What ``then`` returns.

        Raises:
            ConfigError: a response that this teacher knows nothing of, or a server that does not answer.
        """

    def head(self, dtype: torch.dtype) -> AbstractContextManager[Head]:
        """The output head, whole inside.

        Args:
            dtype: of the hidden states that meet it.
        """
