"""The frozen teacher in a step: its weights in host memory between its phases, and what is kept of a response."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TeacherRows:
    """What the teacher says of one response of T tokens.

    A token costs 8 KB per view as a hidden state of width 4,096 in 16 bits and 300 KB as logits, so the responses of a
    whole generation batch are scored before the student runs.

    Attributes:
        rows: view -> [T, Dt] hidden states, of the views that the loss looks at.
        vds: [T] visual dependency score KL(q_I || q_x), nats; None if it was not asked for.
        factors: [T] float32 factors on the token weights; None if the preset has none.
    """

    rows: dict[str, Tensor]
    vds: Tensor | None = None
    factors: Tensor | None = None


class Offload:
    """Keeps a frozen model's weights, but for some, in host memory, and lends them to the device.

    The host copy (pinned where the device is CUDA) is made once; leaving the device copies nothing back.

    Args:
        model: the model.
        resident: parameters that stay on the device.
        device: where all of the model is.

    Raises:
        ValueError: the model is not on ``device`` alone.
    """

    def __init__(self, model: nn.Module, resident: Sequence[nn.Parameter], device: torch.device) -> None:
        if others := {str(p.device) for p in model.parameters() if p.device != device}:
            raise ValueError(
                f"teacher_offload=True needs the whole teacher on {device} to begin with, but parameters are on "
                f"{', '.join(sorted(others))}. Load it without a device_map, or in 8 bits instead."
            )
        kept = {id(parameter) for parameter in resident}
        self._parameters = [p for p in model.parameters() if id(p) not in kept]
        self._device = device
        pin = device.type == "cuda"
        self._host = [p.data.cpu().pin_memory() if pin else p.data for p in self._parameters]
        self._leave()

    def _leave(self) -> None:
        for parameter, host in zip(self._parameters, self._host, strict=True):
            parameter.data = host

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The whole model is on the device inside."""
        for parameter, host in zip(self._parameters, self._host, strict=True):
            parameter.data = host.to(self._device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            self._leave()
