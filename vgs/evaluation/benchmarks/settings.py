"""What is evaluated and how it is asked: read from a run's folder, or the defaults for any other model.

Nothing is loaded here, and no library of training is needed: a run's ``run.json`` holds its resolved config.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError, config_errors
from ..generation import MAX_NEW_TOKENS, Generation, generation_settings

RECORD = "run.json"
HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
BACKENDS = ("hf", "vllm")


@dataclass(frozen=True, kw_only=True)
class EvalSettings(Generation):
    """Everything that decides what a model answers; ``temperature`` and the like are of the sampled responses (Acc@k),
    for Acc@1 is greedy.

    Attributes:
        model: its folder, or its name on the hub. revision: of a model on the hub.
        backend: ``hf`` (transformers) or ``vllm``.
        dtype: type of the weights, of torch, or ``auto``: as they were saved.
        bf16: on a GPU, compute in bfloat16 by autocast, as training does from float32 weights.
        attn_implementation, trust_remote_code: of transformers.
        processor: settings of the processor, such as ``max_pixels``.
        system_prompt: text of a system message before every question; None: none.
        seed: of sampling.
        limit: ask only the first so many questions of each benchmark; None: all.
    """

    model: str
    revision: str | None = None
    backend: str = "hf"
    dtype: str = "auto"
    bf16: bool = False
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    processor: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    seed: int = 0
    limit: int | None = None

    def generation(self, greedy: bool) -> dict[str, Any]:
        """Settings of lmms-eval's ``--gen_kwargs``.

        Args:
            greedy: take the likeliest token.
        """
        found = {"max_new_tokens": self.max_new_tokens, "repetition_penalty": self.repetition_penalty}
        if greedy:
            return {**found, "temperature": 0, "top_p": 1.0}
        found |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return found if self.min_p is None else {**found, "min_p": self.min_p}

    def of_other_model(self, model: str) -> EvalSettings:
        """The same questions, asked in the same way, to another model."""
        return dataclasses.replace(self, model=check_model(model), revision=None)

    def as_json(self) -> dict[str, Any]:
        """The settings as a JSON file holds them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def check_model(name: str) -> str:
    """The name of a model, which is a folder that holds one, or can be a name on the hub.

    Raises:
        ConfigError: a folder without a model, or what can be neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ConfigError(
                f"{name!r} holds no model (config.json is missing): expected a folder that save_pretrained has "
                "written; of a run that has not ended, name one of its checkpoints."
            )
        return str(folder.resolve())
    if folder.exists() or not HUB_NAME.fullmatch(name):
        raise ConfigError(f"expected the folder of a run or of a model, or a name on the hub, got {name!r}.")
    return name


def run_config(model: str) -> dict[str, Any] | None:
    """The resolved config of the run that a folder, or the folder of its checkpoint, belongs to; None without one.

    Args:
        model: of ``check_model``.

    Raises:
        ConfigError: a record that cannot be read, or of the built-in task, whose models read digits alone.
    """
    folder = Path(model)
    places = [folder, *([folder.parent] if folder.name.startswith("checkpoint-") else [])]
    path = next((place / RECORD for place in places if (place / RECORD).is_file()), None)
    if path is None:
        return None
    with config_errors(f"{path} cannot be read", OSError, ValueError, KeyError, TypeError):
        config = dict(json.loads(path.read_text())["config"])
    if config.get("task") == "digits":
        raise ConfigError(f"{model!r} was trained on the built-in digits, and can answer nothing else.")
    return config


def settings_of(model: str, **given: Any) -> EvalSettings:
    """How a model is evaluated: as its run has asked it, where it is one of ours, else by the defaults.

    Args:
        model: folder or name.
        **given: fields of ``EvalSettings`` that count before the run's; None: not given.

    Raises:
        ConfigError: see ``check_model`` and ``run_config``.
    """
    model = check_model(model)
    config = run_config(model)
    fields = {} if config is None else _of_run(config)
    return EvalSettings(model=model, **{**fields, **{name: x for name, x in given.items() if x is not None}})


def _of_run(config: Mapping[str, Any]) -> dict[str, Any]:
    student, training = config.get("student") or {}, config.get("training") or {}
    asked = generation_settings(training)
    half = training.get("fp16") or False
    return {
        **asked,
        "max_new_tokens": max(MAX_NEW_TOKENS, asked.get("max_new_tokens", 0)),
        "dtype": student.get("dtype") or "float32",
        "bf16": (not half) if training.get("bf16") is None else bool(training["bf16"]),
        "attn_implementation": student.get("attn_implementation"),
        "trust_remote_code": bool(student.get("trust_remote_code")),
        "processor": dict(config.get("processor") or {}),
        "system_prompt": (config.get("data", {}).get("train") or {}).get("system_prompt"),
    }


def initial_student(model: str) -> str:
    """The model that a run began with.

    Args:
        model: the run's folder, or that of one of its checkpoints.

    Raises:
        ConfigError: it is no run of ours.
    """
    config = run_config(check_model(model))
    if config is None:
        raise ConfigError(f"--baseline needs a value for {model!r}, which is no run of vgs train (no {RECORD}).")
    return config["student"]["path"]
