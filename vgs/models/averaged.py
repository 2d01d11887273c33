"""Earlier weights of the student as its teacher: frozen at the start or averaged, sharded as the student is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import ConfigError
from .adapters import is_peft_layer, is_peft_model
from .heads import Head, output_layer, read_head

SOURCES = ("live", "frozen", "ema")
COPY_FILE = "student_copy.safetensors"
# LoRA initialisations that leave the base as it was and begin as nothing.
NEUTRAL_LORA = (True, "gaussian", "eva")


class StudentCopy:
    """The weights that a self-distilling student's teacher has, lent to the student's own modules.

    Only trained parameters are kept, once, each as a shard where the student's is one. For the teacher's forwards they
    change places with the student's (``in_place``), so that the teacher runs in whatever engine holds the student. Of
    a PEFT student that is the adapter; its frozen teacher is the base with the adapter off, which needs no copy.

    Weights of 16 bits are averaged in float32: (1 - decay) of a difference is less than they can tell apart. Only
    these need a second copy for the time that the teacher runs.

    Args:
        source: ``"live"`` (the student as it is), ``"frozen"`` (as it was at the start) or ``"ema"``.
        decay: of the average, per optimizer step: copy <- decay * copy + (1 - decay) * student.
        role: the setting that asks for it, for messages.

    Raises:
        ValueError: another source, or a decay outside [0, 1).
    """

    def __init__(self, source: str, decay: float = 0.995, role: str = "teacher") -> None:
        if source not in SOURCES:
            raise ValueError(f"{role} must be one of {', '.join(SOURCES)}, got {source!r}.")
        if not 0 <= decay < 1:
            raise ValueError(f"The decay of {role} must be in [0, 1), got {decay}.")
        self.source, self.decay, self.role = source, decay, role
        self._kept: dict[str, Tensor] | None = None
        self._aliases: dict[str, str] = {}

    def needs_weights(self, model: nn.Module) -> bool:
        """Whether there is something to keep."""
        return self.source != "live" and not self._is_base(model)

    def _is_base(self, model: nn.Module) -> bool:
        return self.source == "frozen" and is_peft_model(model)

    @property
    def taken(self) -> bool:
        """Whether weights are kept; until then the teacher is the student as it is."""
        return self._kept is not None

    def check(self, model: nn.Module, *, flat: bool) -> None:
        """Stop where a copy could not follow.

        Args:
            model: the unwrapped student.
            flat: whether its engine holds parameters otherwise than whole or as DTensors (ZeRO-3, FSDP1).

        Raises:
            ConfigError: such an engine, or a frozen teacher whose base is not what the student starts from.
        """
        if flat and self.needs_weights(model):
            raise ConfigError(
                f"{self.role}={self.source!r} needs parameters that are whole or sharded by FSDP2, which ZeRO "
                f'(DeepSpeed) and FSDP1 do not show. Use FSDP2, {self.role}="live", or LoRA with {self.role}="frozen".'
            )
        if self._is_base(model):
            for config in model.peft_config.values():
                start = getattr(config, "init_lora_weights", True)
                if start not in NEUTRAL_LORA:
                    raise ConfigError(
                        f'{self.role}="frozen" takes the base without the adapter for the initial student, but '
                        f'init_lora_weights={start!r} changes the base. Use true or "gaussian".'
                    )

    # ---- the copy

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Keep the student's trained weights as they are now (once it is prepared for training)."""
        if not self.needs_weights(model):
            return
        _reshard(model)
        self._kept, self._aliases = {}, {}
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                continue
            known = first.setdefault(id(parameter), name)
            self._aliases[name] = known
            if known == name:
                kept = parameter.detach().clone()
                self._kept[name] = kept.float() if self.source == "ema" else kept

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one optimizer step into the average."""
        if self.source != "ema":
            return
        for parameter, kept in self._pairs(model):
            kept.lerp_(parameter.to(kept.dtype), 1.0 - self.decay)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """The student's parameters with what is kept of each; shards are plain tensors of this rank."""
        _reshard(model)
        parameters = dict(model.named_parameters())
        for name, kept in self._kept.items():
            yield _local(parameters[name]), _local(kept)

    # ---- in use

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """The student has the teacher's weights inside, in evaluation mode and without gradient.

        Args:
            model: the unwrapped student; no graph through its weights may be waiting for its backward.
        """
        training = model.training
        with ExitStack() as stack:
            stack.callback(model.train, training)
            model.eval()
            if self._kept is not None:
                stack.enter_context(self._lent(model))
            elif self._is_base(model):
                stack.enter_context(model.disable_adapter())
            yield

    @contextmanager
    def _lent(self, model: nn.Module) -> Iterator[None]:
        with torch.no_grad():
            undo = [_lend(parameter, kept) for parameter, kept in self._pairs(model)]
        try:
            yield
        finally:
            _reshard(model)  # whole parameters that a forward has gathered are the copy's
            with torch.no_grad():
                for give_back in undo:
                    give_back()

    def head(self, model: nn.Module, dtype: torch.dtype) -> Head:
        """The teacher's output head as ``heads.read_head`` has the student's, as constants.

        May be called while the student's graph is alive. Under FSDP2 all ranks must call it.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self._kept is not None:
                stack.enter_context(self._head_lent(model))
            elif self._is_base(model) and _adapted(output_layer(model)):
                stack.enter_context(model.disable_adapter())
            head = read_head(model, dtype)
        bias = None if head.bias is None else head.bias.detach()
        return Head(head.weight.detach(), bias, head.logit_scale, head.softcap)

    @contextmanager
    def _head_lent(self, model: nn.Module) -> Iterator[None]:
        layer = output_layer(model)
        (path,) = [name for name, module in model.named_modules() if module is layer]
        replaced = []
        for name, module in layer.named_modules(prefix=path):
            for key, parameter in module._parameters.items():
                if (known := self._aliases.get(f"{name}.{key}")) is not None:
                    replaced.append((module._parameters, key, parameter))
                    module._parameters[key] = self._kept[known].to(parameter.dtype)
        try:
            yield
        finally:
            for parameters, key, parameter in replaced:
                parameters[key] = parameter

    # ---- checkpoints

    def save(self, folder: str | Path, *, write: bool) -> None:
        """Write the kept weights, whole, to ``COPY_FILE``. Under FSDP2 all ranks must call it.

        Args:
            folder: of the checkpoint.
            write: whether this process is the one that writes.
        """
        if self._kept is None:
            return
        whole = {}
        for name, kept in self._kept.items():
            value = kept.full_tensor() if isinstance(kept, DTensor) else kept
            if write:
                whole[name] = value.cpu().contiguous()
        if write:
            save_file(whole, Path(folder) / COPY_FILE, metadata={"source": self.source})

    @torch.no_grad()
    def load(self, folder: str | Path, model: nn.Module) -> None:
        """Read what ``save`` wrote, as shards of this rank where the student's parameters are; bit for bit.

        Raises:
            ValueError: no file, one of another kind of teacher, or other parameters.
        """
        if not self.needs_weights(model):
            return
        path = Path(folder) / COPY_FILE
        if not path.exists():
            raise ValueError(f"{folder} has no {COPY_FILE}: {self.role}={self.source!r} cannot be resumed from it.")
        self.take(model)
        with safe_open(path, framework="pt") as file:
            source = (file.metadata() or {}).get("source")
            if source != self.source:
                raise ValueError(f"{path} holds the weights of {self.role}={source!r}, expected {self.source!r}.")
            if different := set(file.keys()) ^ self._kept.keys():
                raise ValueError(
                    f"{path} and the student differ in {len(different)} trained parameters, for example "
                    f"{min(different)!r}."
                )
            for name, kept in self._kept.items():
                whole = file.get_tensor(name)
                if isinstance(kept, DTensor):
                    whole = distribute_tensor(
                        whole.to(kept.device), kept.device_mesh, kept.placements, src_data_rank=None
                    )
                _local(kept).copy_(_local(whole))


def _adapted(layer: nn.Module) -> bool:
    return any(is_peft_layer(module) for module in layer.modules())


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _reshard(model: nn.Module) -> None:
    """Drop what FSDP2 has gathered; it may keep the outermost parameters after a forward without backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _lend(parameter: Tensor, kept: Tensor) -> Callable[[], Any]:
    """Put kept weights into a parameter; returns what undoes it."""
    if parameter.dtype == kept.dtype:
        _swap(parameter, kept)
        return lambda: _swap(parameter, kept)
    own = parameter.clone()
    parameter.copy_(kept)
    return lambda: parameter.copy_(own)


def _swap(one: Tensor, other: Tensor) -> None:
    held = one.clone()
    one.copy_(other)
    other.copy_(held)
