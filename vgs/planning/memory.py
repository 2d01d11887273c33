"""Predicted memory of a training run on one GPU, by part and phase, from its config alone.

What is assumed: activations as in ``ModelSize.activation_bytes``; every response as long as allowed (or given), every
prompt as given: under a token budget shorter responses put more images into a pass, which takes more; CUDA context and
libraries take ``OVERHEAD``; memory that the allocator loses to fragmentation is not in it. Autocast keeps a 16-bit copy
of every float32 matrix during a forward. DDP keeps a second copy of the gradients. FSDP2 shards the student, its
gradients and optimizer states, and gathers two layers at a time and the head in whole; the teacher is whole on every
GPU, as TRL places it (ZeRO-3, which shards it too, takes less). 8-bit weights are those of the linear layers; heads and
embeddings stay in 16 bit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import AutoConfig, DynamicCache, PretrainedConfig

from vgs_kernels.active_columns import temporary_bytes
from vgs_kernels.plan import GRADIENT_ROWS

from ..errors import ConfigError, config_errors
from ..models.families import freeze
from ..models.heads import output_layer
from ..trainers.kinds import TRAINERS, trainer_kind
from ..trainers.settings import least_pass, view_count
from .model_size import ModelSize, build_on_meta

GIB = 2**30
OVERHEAD = GIB
PHASES = ("rollout", "teacher", "student", "optimizer")
SHARDINGS = ("ddp", "fsdp2")
#: Optimizer states in copies of the trained parameters, in their dtype.
STATE_COPIES = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adamw_anyprecision": 2,
    "stable_adamw": 2,
    "ademamix": 3,
    "schedule_free_adamw": 2,
    "adagrad": 1,
    "rmsprop": 1,
    "sgd": 0,
}
#: Optimizer states in bytes per trained parameter.
STATE_BYTES = {
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), 2),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit", "adamw_torch_4bit"), 1),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"), 4),
    "paged_adamw_32bit": 8,
}


@dataclass(frozen=True)
class Lengths:
    """Tokens of one sample: of the prompt's text, of its image, and of a response (None: max_completion_length)."""

    prompt: int = 200
    image: int = 1000
    response: int | None = None


@dataclass(frozen=True)
class Machine:
    """GPUs of the run, how the student is spread over them, and the memory of one in bytes (None: not known).

    Raises:
        ConfigError: no GPU, or an unknown way of sharding.
    """

    gpus: int = 1
    sharding: str = "ddp"
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ConfigError(f"gpus must be >= 1, got {self.gpus}.")
        if self.sharding not in SHARDINGS:
            raise ConfigError(f"sharding must be one of {', '.join(SHARDINGS)}, got {self.sharding!r}.")

    @property
    def shards(self) -> int:
        """Among how many GPUs the student's parameters are divided."""
        return self.gpus if self.sharding == "fsdp2" else 1


@dataclass(frozen=True)
class Student:
    """A student as it is trained, on the meta device.

    Attributes:
        parameters: all of them, with LoRA's. trained: those that are trained.
        head: whether the output head is trained. formed_head: whether LoRA is on it. vision: whether anything before
            the decoder is trained.
    """

    parameters: tuple[nn.Parameter, ...]
    trained: tuple[nn.Parameter, ...]
    head: bool
    formed_head: bool
    vision: bool


@dataclass(frozen=True)
class Plan:
    """Predicted bytes on one GPU.

    Attributes:
        parts: name -> phase -> bytes; a part that a phase does not need is left out.
        pass_tokens, teacher_pass_tokens: tokens of the largest pass of each model.
        shortest_pass: the least max_tokens_per_pass: one response with its prompt, both as long as allowed.
        batch_tokens: tokens of the whole generation batch.
        notes: what could not be counted.
    """

    parts: dict[str, dict[str, int]]
    pass_tokens: int
    teacher_pass_tokens: int
    shortest_pass: int
    batch_tokens: int
    notes: tuple[str, ...]

    def total(self, phase: str) -> int:
        """Bytes of a phase."""
        return sum(sizes.get(phase, 0) for sizes in self.parts.values())

    @property
    def peak_phase(self) -> str:
        """The phase that takes most."""
        return max(PHASES, key=self.total)

    @property
    def peak(self) -> int:
        """Its bytes."""
        return self.total(self.peak_phase)


@lru_cache
def _model_config(path: str, revision: str | None, trust: bool) -> PretrainedConfig:
    with config_errors(f"The config of model {path!r} cannot be loaded", OSError, ValueError, KeyError):
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust)


@lru_cache
def _size(path: str, revision: str | None, trust: bool) -> ModelSize:
    with config_errors(f"Model {path!r} cannot be planned", ValueError):
        return ModelSize.of(_model_config(path, revision, trust))


def _key(section: Mapping[str, Any]) -> tuple[str, str | None, bool]:
    return section["path"], section.get("revision"), section.get("trust_remote_code", False)


@lru_cache
def _student(
    key: tuple[str, str | None, bool], dtype: torch.dtype, lora: str, vision: bool, embeddings: bool
) -> Student:
    model: nn.Module = build_on_meta(_model_config(*key)).to(dtype)
    options = json.loads(lora)
    if options:
        with config_errors("section lora", TypeError, ValueError):
            model = get_peft_model(model, LoraConfig(**options))
    freeze(model, vision=vision, embeddings=embeddings)
    head = output_layer(model)
    plain = model.get_base_model() if options else model
    inside = {id(parameter) for parameter in plain.get_decoder().parameters()}
    inside |= {id(parameter) for parameter in head.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Student(
        parameters=tuple(model.parameters()),
        trained=tuple(trained),
        head=any(parameter.requires_grad for parameter in head.parameters()),
        formed_head=isinstance(head, LoraLinear),
        vision=any(id(parameter) not in inside for parameter in trained),
    )


def _dtype(section: Mapping[str, Any], default: str) -> torch.dtype:
    """The dtype of a model section's weights; ``auto`` is the checkpoint's."""
    name = section.get("dtype") or default
    found = _model_config(*_key(section)).dtype or torch.float32 if name == "auto" else getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype of {section['path']!r} must be auto or one of torch, such as bfloat16, got {name!r}.")
    return found


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of their elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def training_options(config: Mapping[str, Any]) -> SimpleNamespace:
    """The ``training`` section over the defaults of its trainer's settings, which ask for the run's devices."""
    settings, _ = TRAINERS[trainer_kind(config)]()
    fields = dataclasses.fields(settings)
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    options = SimpleNamespace(**{**defaults, **config.get("training", {})})
    options.mixed = options.fp16 or options.bf16 is not False  # TRL turns bf16 on unless told otherwise
    return options


def optimizer_bytes(name: str, parameters: Sequence[torch.Tensor]) -> int | None:
    """Bytes of an optimizer's states for these parameters; None for one that is not known here.

    Args:
        name: as in ``TrainingArguments.optim``.
        parameters: those that are trained, on any device.
    """
    if name == "adafactor":  # row and column sums of every matrix
        shapes = [parameter.shape for parameter in parameters]
        return 4 * sum(s.numel() if len(s) < 2 else s.numel() // s[-1] + s.numel() // s[-2] for s in shapes)
    if name in STATE_COPIES:
        return STATE_COPIES[name] * tensor_bytes(parameters)
    return STATE_BYTES[name] * sum(p.numel() for p in parameters) if name in STATE_BYTES else None


@lru_cache
def value_bytes(key_item: int, value_item: int) -> int:
    """Bytes of a cached value's element, as the installed transformers keeps it.

    Up to 5.17 at least, its cache is made in the keys' dtype, to which values are then promoted; later, at the latest
    from 5.24 on, both keep their own.

    Args:
        key_item, value_item: bytes of an element as the attention layer makes it: 2, 4 or 8.
    """
    dtypes = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
    key, value = (torch.empty(1, 1, 1, 1, dtype=dtypes[item]) for item in (key_item, value_item))
    return DynamicCache().update(key, value, 0)[1].element_size()


def _matrices(size: ModelSize) -> int:
    """Elements of the linear layers before the head."""
    return size.text.weights + size.tower.weights + size.mergers


def predict(config: Mapping[str, Any], machine: Machine, lengths: Lengths) -> Plan:
    """The memory that a run of a config (from ``load_config``) will take on one GPU.

    Args:
        config: with ``student`` and ``teacher`` paths, whose model configs are loaded, never their weights.
        machine: the GPUs.
        lengths: of the samples.

    Raises:
        ConfigError: the config names no models (``task: digits``), or one that cannot be loaded or counted.
    """
    if config.get("task") is not None:
        raise ConfigError("plan needs student.path and teacher.path; the models of task digits take a few megabytes.")
    if "path" not in config.get("teacher", {}):
        raise ConfigError(
            "plan needs teacher.path; runs with several teachers, with one elsewhere, or whose student is "
            "its own teacher are not planned."
        )
    options = training_options(config)
    student, teacher = _size(*_key(config["student"])), _size(*_key(config["teacher"]))
    dtype, shards = _dtype(config["student"], "float32"), machine.shards
    lora, own = json.dumps(config.get("lora")), dtype.itemsize
    model = _student(_key(config["student"]), dtype, lora, options.freeze_vision, options.freeze_embeddings)
    teacher_item = _dtype(config["teacher"], "auto").itemsize
    autocast = options.mixed and own == 4
    wide = 1 if options.mixed or own == 2 else 2  # float32 throughout: no 16-bit activations
    notes = []

    # ---- tokens
    views = view_count(options)
    response = lengths.response or options.max_completion_length
    micro = options.per_device_train_batch_size
    responses = micro * options.gradient_accumulation_steps

    def prompts(count: int) -> int:
        return -(-count // options.num_generations) if options.share_prefix else count

    def tokens(count: int, views: int = views) -> int:
        return prompts(count) * (lengths.image + views * lengths.prompt) + count * views * response

    def patches(size: ModelSize, part: int, of: int) -> int:
        return -(-part * prompts(of) // tokens(of)) * lengths.image * size.patches_per_token

    budget = options.max_tokens_per_pass
    pass_tokens = min(budget or tokens(micro), tokens(micro))
    teacher_tokens = min(budget or tokens(micro), tokens(responses))
    rows = -(-pass_tokens * micro * response // tokens(micro))  # of one view

    parts: dict[str, dict[str, int]] = {}

    def add(name: str, size: float, *phases: str) -> None:
        if size:
            part = parts.setdefault(name, {})
            for phase in phases:
                part[phase] = part.get(phase, 0) + round(size)

    # ---- the student at rest
    add("student weights", tensor_bytes(model.parameters) / shards, *PHASES)
    states = optimizer_bytes(options.optim, model.trained)
    if states is None:
        notes.append(f"The states of optimizer {options.optim!r} are not known and not counted.")
    add("optimizer states", (states or 0) / shards, *PHASES)
    gradients = tensor_bytes(model.trained) / shards
    add("gradients", gradients, "student", "optimizer")
    if machine.gpus > 1 and shards == 1:
        add("gradient buckets of DDP", gradients, "student", "optimizer")
    if options.optim == "adamw_torch":  # one multi-tensor step over all parameters
        add("optimizer temporaries", gradients, "optimizer")
    head = student.vocabulary * student.text.hidden
    if shards > 1:
        layers = 2 * 2 * student.text.weights // student.text.layers
        add("gathered parameters", layers + 2 * head, "rollout")
        add("gathered parameters", layers + (own + 2) * head, "student")
    elif autocast:
        add("16-bit copies of the weights", 2 * (_matrices(student) + student.patch_embedding), "rollout", "student")

    # ---- the teacher
    eight = config["teacher"].get("load_in_8bit", False)
    whole = teacher.parameters * (2 if eight else teacher_item) - (_matrices(teacher) if eight else 0)
    teacher_head = teacher.vocabulary * teacher.text.hidden * (2 if eight else teacher_item)
    add("teacher weights", whole, "teacher")
    add("teacher weights", teacher_head if options.teacher_offload else whole, "rollout", "student", "optimizer")
    if options.mixed and teacher_item == 4 and not eight:
        add("16-bit copies of the weights", 2 * _matrices(teacher), "teacher")
    hidden_item = 2 if eight else teacher_item
    hidden = responses * response * views * teacher.text.hidden * hidden_item
    add("teacher hidden states", hidden, "teacher", "student", "optimizer")
    seeing = patches(teacher, teacher_tokens, responses) * teacher.tower.working_bytes(False)
    forward = max(teacher_tokens * teacher.text.working_bytes(teacher_item == 4), seeing)
    add("temporary buffers", forward, "teacher")
    workspace = options.loss_workspace_bytes
    if options.lam > 0 or options.schedule == "adaptive":
        scored = -(-teacher_tokens * response * responses // tokens(responses))
        add("loss workspace", min(workspace, 16 * scored * teacher.vocabulary), "teacher")

    # ---- the student's pass
    kept = pass_tokens
    if views == 2 and options.lam == 0 and options.detach_prior:  # the text-only view runs without gradient
        kept = round(pass_tokens * tokens(micro, views=1) / tokens(micro))
    activations = student.activation_bytes(
        kept,
        patches(student, pass_tokens, micro),
        autocast=autocast,
        checkpointing=options.gradient_checkpointing,
        vision_gradient=model.vision,
    )
    add("activations", wide * activations, "student")
    add("temporary buffers", pass_tokens * student.text.working_bytes(autocast), "student")
    add("loss workspace", min(workspace, 24 * rows * student.vocabulary), "student")
    row_item = 4 if autocast or wide == 2 else own
    states_and_gradients = rows * views * (2 * student.text.hidden * row_item + teacher.text.hidden * hidden_item)
    add("loss: hidden states and gradients", states_and_gradients, "student")
    if options.gradient_tolerance > 0:
        block = (min(rows, GRADIENT_ROWS), student.vocabulary, student.text.hidden)
        loss_dtype = torch.float32 if wide == 2 else torch.bfloat16
        add("loss: gradient tolerance", temporary_bytes(*block, loss_dtype, tokens=rows), "student")
    if model.head:
        add("loss: head gradient", 4 * head, "student")
    if autocast and shards == 1:
        add("loss: 16-bit head", 2 * head, "student")
    if model.formed_head:
        add("loss: head with its adapter", 2 * 4 * head, "student")

    # ---- rollouts
    if not options.use_vllm:
        cached = responses * (lengths.image + lengths.prompt + response)
        # Float32 weights make float32 keys (neither norm nor rotation is autocast), but values of 16 bit.
        values = value_bytes(own, 2 if autocast else own)
        add("rollout: keys and values", student.kv_cache_bytes(cached, own, values), "rollout")
        prefill = responses * (lengths.image + lengths.prompt) * student.text.working_bytes(autocast)
        add("temporary buffers", prefill, "rollout")
        add("rollout: logits", 3 * 4 * responses * student.vocabulary, "rollout")
    elif options.vllm_mode == "colocate":
        if machine.memory is None:
            notes.append("vLLM's share of the GPU is not counted: the GPU's memory is not known.")
        else:
            busy = ("rollout",) if options.vllm_enable_sleep_mode else PHASES
            add("vLLM", options.vllm_gpu_memory_utilization * machine.memory, *busy)
    add("CUDA context and libraries", OVERHEAD, *PHASES)
    shortest = max(tokens(1), least_pass(options))  # the trainer asks for that, whatever the prompts of this plan
    return Plan(parts, pass_tokens, teacher_tokens, shortest, tokens(responses), tuple(notes))
