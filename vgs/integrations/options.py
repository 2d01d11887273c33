"""What a run inside another trainer wants of VGS: from a file or an environment variable, checked at once."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from vgs_kernels import DEFAULT_WORKSPACE_BYTES, VGSObjective

from ..errors import ConfigError, config_errors
from ..models.attention import KERNELS
from ..objectives.definitions import Preset
from ..objectives.weighting import LOSS_REDUCTIONS
from ..one_step import resolve_objective

#: The environment variable: the path of a YAML (or JSON) file, or such a text itself.
VARIABLE = "VGS_OPTIONS"
PLACEMENTS = ("sharded", "whole")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BACKENDS = ("auto", "torch", "loops", "triton")


@dataclass(frozen=True)
class HostOptions:
    """Settings of VGS inside a host; everything else is the host's own.

    Attributes:
        teacher: path or name of the teacher, where the host does not load one itself.
        objective: a preset's name, or fields of ``VGSObjective``; ``vds_scope`` is "ranks" where it is left out.
        loss_reduction: "trajectory" or "token", see ``vgs.token_weights``; None: as the preset says, else "trajectory".
        policy_coefficient: factor on the host's own policy loss, added to ours; 0 leaves that loss out.
        teacher_placement: "sharded": its layers are divided among the ranks, and gathered one by one; "whole": every
            rank holds all of it.
        teacher_dtype: "bfloat16", "float16" or "float32".
        teacher_offload: whether its weights wait in host memory while the student trains.
        share_prompts: whether responses to one prompt run behind one copy of it.
        return_terms: whether the metrics have the terms that the loss alone does not need.
        template_options: for the chat template of the text-only prompt.
        vocab_size, workspace_bytes, gradient_tolerance, backend, kernel: see ``vgs_step``.

    Raises:
        ConfigError: naming the option, what came and what was expected.
    """

    teacher: str | None = None
    objective: str | dict[str, Any] = "vgs"
    loss_reduction: str | None = None
    policy_coefficient: float = 0.0
    teacher_placement: str = "sharded"
    teacher_dtype: str = "bfloat16"
    teacher_offload: bool = False
    share_prompts: bool = True
    return_terms: bool = True
    template_options: dict[str, Any] = field(default_factory=dict)
    vocab_size: int | None = None
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES
    gradient_tolerance: float = 0.0
    backend: str = "auto"
    kernel: str = "auto"

    def __post_init__(self) -> None:
        for name, kinds in (
            ("teacher", (str, type(None))),
            ("objective", (str, dict)),
            ("template_options", (dict,)),
            *((name, (bool,)) for name in ("teacher_offload", "share_prompts", "return_terms")),
        ):
            _expect(name, getattr(self, name), kinds)
        for name, choices in (
            ("loss_reduction", (*LOSS_REDUCTIONS, None)),
            ("teacher_placement", PLACEMENTS),
            ("teacher_dtype", tuple(DTYPES)),
            ("backend", BACKENDS),
            ("kernel", KERNELS),
        ):
            if (value := getattr(self, name)) not in choices:
                words = ", ".join(str(choice) for choice in choices)
                raise ConfigError(f"{name} must be one of {words}, got {value!r}.")
        factor = self.policy_coefficient
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
            raise ConfigError(f"policy_coefficient must be a number >= 0, got {factor!r}.")
        tolerance = self.gradient_tolerance
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < 1:
            raise ConfigError(f"gradient_tolerance must be a number in [0, 1), got {tolerance!r}.")
        for name, value in (("workspace_bytes", self.workspace_bytes), ("vocab_size", self.vocab_size or 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number > 0, got {getattr(self, name)!r}.")
        self.resolved()

    def resolved(self) -> tuple[Preset, VGSObjective]:
        """What is minimised, and its knobs.

        Raises:
            ConfigError: an objective that needs more than two views of a separate teacher, or a wrong knob.
        """
        if isinstance(self.objective, dict):
            with config_errors("objective", ValueError, TypeError):
                return resolve_objective(VGSObjective(**{"vds_scope": "ranks", **self.objective}))
        with config_errors("objective", ValueError):
            preset, knobs = resolve_objective(self.objective)
        return preset, dataclasses.replace(knobs, vds_scope="ranks")

    @property
    def reduction(self) -> str:
        """What the loss is the mean over."""
        return self.loss_reduction or self.resolved()[0].settings.get("loss_reduction", "trajectory")

    @property
    def loss_options(self) -> dict[str, Any]:
        """What every fused loss is given."""
        names = ("vocab_size", "workspace_bytes", "gradient_tolerance", "backend")
        return {name: getattr(self, name) for name in names}


def read_options(environment: Mapping[str, str] = os.environ, *, needs_teacher: bool = False) -> HostOptions:
    """The options of this process.

    Args:
        environment: holds ``VGS_OPTIONS``: a path, or the options themselves as YAML or JSON, in braces.
        needs_teacher: whether the teacher's path must be among them.

    Raises:
        ConfigError: no such file, a text that is no mapping, an unknown or a wrong option.
    """
    text = environment.get(VARIABLE, "").strip()
    source = VARIABLE
    if text and not text.startswith("{"):
        source = text
        with config_errors(f"{VARIABLE} names the file {text!r}, which cannot be read", OSError, UnicodeDecodeError):
            text = Path(text).read_text()
    with config_errors(f"{source} is no YAML", yaml.YAMLError):
        values = yaml.safe_load(text) if text else {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold options (name: value), got {type(values).__name__}.")
    names = [option.name for option in dataclasses.fields(HostOptions)]
    if unknown := [str(name) for name in values if name not in names]:
        raise ConfigError(f"{source} has the option {unknown[0]!r}; expected some of {', '.join(names)}.")
    options = HostOptions(**values)
    if needs_teacher and not options.teacher:
        raise ConfigError(f"{source} must have the option teacher, the path of the teacher's weights; got none.")
    return options


def _expect(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    if not isinstance(value, kinds):
        words = {str: "a text", dict: "a mapping", bool: "true or false", type(None): "nothing"}
        raise ConfigError(f"{name} must be {' or '.join(words[kind] for kind in kinds)}, got {value!r}.")
