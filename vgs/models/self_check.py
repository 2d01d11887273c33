"""How a model may be run: whether packed rows, and padded batches, say what the model says of each sequence alone.

Nobody can list the families that will be trained. So the question is put to the family itself: a shallow copy of the
model (``shallow``) scores two small prompts with two responses each, packed with shared prompts, and is compared with
one plain forward for every sequence: the states that enter the head, and the gradient of one scalar. Where packed rows
disagree, padded batches are compared in the same way. The answer is kept, on disk as well, for this config, these
libraries and this device.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from huggingface_hub.constants import HF_HOME
from torch import nn
from transformers import PreTrainedConfig

from ..disk import remembered
from ..errors import ConfigError
from ..log import warn_once
from .adapters import without_adapter
from .agreement import TOLERANCES, WAYS, Agreement, compare, in_words, outcome
from .families import device_of
from .groups import PER_TOKEN_FIELDS, PromptGroup
from .shallow import module_classes, shallow_copy
from .states import looks_ahead, plain_states

logger = logging.getLogger(__name__)

#: Tokens of the responses: the first is longer than windows of the copy and chunks of linear attention.
RESPONSES = (70, 3)
#: Fields of a config that the check does not depend on.
UNASKED = frozenset({"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"})
UNASKED |= {"pad_token_id", "bos_token_id", "eos_token_id", "quantization_config", "output_router_logits"}
VERSIONS = ("torch", "transformers", "triton", "flash-linear-attention", "causal-conv1d", "flash-attn", "peft")


@dataclass(frozen=True)
class Verdict:
    """What the check found.

    Attributes:
        ways: name of the way (of ``WAYS``) -> its agreement; those that were tried.
        seconds: that it took.
        error: why no copy of the model could be asked.
    """

    ways: dict[str, Agreement]
    seconds: float
    error: str | None = None

    @property
    def way(self) -> str | None:
        """The first exact way; None where there is none."""
        return next((name for name, found in self.ways.items() if found.exact), None)


# Fields of the prompts that were tried -> what was found, by hash; and the way, by model.
_KNOWN: dict[str, dict[frozenset[str], Verdict]] = {}
_ANSWERS: WeakKeyDictionary[nn.Module, dict[frozenset[str], str]] = WeakKeyDictionary()


def chosen_way(model: nn.Module, groups: Sequence[PromptGroup]) -> str:
    """How a model runs, a key of ``WAYS``; one line says so where it is not the best.

    The first call for a family takes seconds. Several processes answer alike, whenever each of them calls.

    Args:
        model: unwrapped (possibly PEFT); its weights are not looked at.
        groups: prompts as the model's own processor encodes them; the shortest with an image, and its text, are used.

    Raises:
        ConfigError: no way says what the model says of each sequence alone.
    """
    inner = without_adapter(model)
    fields = frozenset(name for group in groups for name in group.images)
    answers = _ANSWERS.setdefault(inner, {})
    for seen, answer in answers.items():
        if fields <= seen:
            return answer
    answers[fields] = way_of(type(inner), inner.config, groups, device_of(inner))
    return answers[fields]


def packs(model: nn.Module, groups: Sequence[PromptGroup]) -> bool:
    """Whether a model runs in packed rows; arguments and errors as of ``chosen_way``."""
    return chosen_way(model, groups) == "packed"


def way_of(
    model_class: type[nn.Module], config: PreTrainedConfig, groups: Sequence[PromptGroup], device: torch.device
) -> str:
    """As ``chosen_way``, of a model that need not be loaded.

    Args:
        model_class: of the model with its head. config: its config.
        groups: see ``chosen_way``.
        device: where it is to run.

    Raises:
        ConfigError: no way says what the model says of each sequence alone.
    """
    found = verdict(model_class, config, groups, device)
    name = f"{model_class.__name__} ({config.model_type})"
    if found.way == "packed":
        return found.way
    if found.error is not None:
        warn_once(logger, f"{name} runs in padded batches: a small copy of it cannot be asked, {found.error}.")
        return "repeated"
    if found.way is None:
        ways = "; ".join(f"{way}: {agreement}" for way, agreement in found.ways.items())
        raise ConfigError(
            f"{name} cannot be run as its own forward would, neither in packed rows nor in padded batches ({ways})."
        )
    repeated = ", with an image for every response" if found.way == "repeated" else ""
    warn_once(
        logger,
        f"{name} runs in padded batches{repeated}, which takes longer: in packed rows its {found.ways['packed']}.",
    )
    return found.way


def verdict(
    model_class: type[nn.Module], config: PreTrainedConfig, groups: Sequence[PromptGroup], device: torch.device
) -> Verdict:
    """The check itself, or what it said before of this class, config, device and these libraries.

    Args:
        model_class: of the model with its head. config: its config, of any size.
        groups: see ``chosen_way``.
        device: whose kernels are asked.
    """
    chosen = check_groups(groups)
    fields = frozenset(name for group in chosen for name in group.images)
    key = _key(model_class, config, device)
    known = _KNOWN.setdefault(key, {})
    for seen, found in known.items():
        if fields <= seen:
            return found

    def compute() -> dict[str, Any]:
        return asdict(examine(model_class, config, chosen, device))

    name = hashlib.sha256(json.dumps([key, sorted(fields)]).encode()).hexdigest()[:32]
    raw = remembered(Path(HF_HOME) / "vgs" / f"check-{name}.json", compute, _lasting)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raw = _first_said([_key(model_class, config, torch.device("meta")), sorted(fields)], raw)
    ways = {way: Agreement(**numbers) for way, numbers in raw.pop("ways").items()}
    found = Verdict(ways, **raw)
    known[fields] = found
    return found


def _first_said(question: Any, answer: Any) -> Any:
    """The answer of the process that answered first: all run a model alike.

    Processes ask when their own batches make them, so none of them may wait for the others here.
    """
    store = dist.distributed_c10d._get_default_store()
    return json.loads(store.compare_set(f"vgs check {json.dumps(question)}", "", json.dumps(answer)))


def _lasting(raw: Mapping[str, Any]) -> bool:
    """Whether a verdict's fields say something about the model: a device whose memory others fill does not."""
    return raw["error"] is None and not any("MemoryError" in (found["where"] or "") for found in raw["ways"].values())


def check_groups(groups: Sequence[PromptGroup]) -> list[PromptGroup]:
    """The two shortest prompts with images and the shortest one's text, with responses made up of its words.

    Args:
        groups: at least one.
    """
    images = sorted((group for group in groups if group.has_images), key=lambda group: len(group.prompt_ids))
    text = min(groups, key=lambda group: len(group.text_prompt_ids)).text_prompt_ids
    zeros = {name: torch.zeros_like(text) for name in PER_TOKEN_FIELDS if images and name in images[0].images}
    chosen = [*images[:2], PromptGroup(text, text, (), zeros)]
    generator = torch.Generator().manual_seed(0)
    responses = [text[torch.randint(len(text), (length,), generator=generator)] for length in RESPONSES]
    return [replace(group, responses=tuple(responses)) for group in chosen]


def _key(model_class: type, config: PreTrainedConfig, device: torch.device) -> str:
    own = sorted(Path(__file__).parent.glob("*.py"))
    parts = {
        "class": f"{model_class.__module__}.{model_class.__qualname__}",
        "forwards": _forwards(module_classes(model_class, config)),
        "config": _described(config.to_dict()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {name: _version(name) for name in VERSIONS},
        "vgs": hashlib.sha256(b"".join(path.read_bytes() for path in own)).hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _described(config: Any) -> Any:
    """A config's fields at all depths, without what every run sets for itself."""
    if not isinstance(config, dict):
        return config
    return {str(name): _described(value) for name, value in config.items() if name not in UNASKED}


def _forwards(kinds: Iterable[type]) -> list[list[str]]:
    """Name and file of each class's forward: patches put one of their own there."""
    functions = [inspect.unwrap(kind.forward) for kind in kinds]
    return sorted([getattr(x, "__qualname__", repr(type(x))), _source(x)] for x in functions)


def _source(function: Any) -> str:
    try:
        return _hashed(inspect.getfile(function))
    except (OSError, TypeError):
        return ""


@functools.cache
def _hashed(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine(
    model_class: type[nn.Module], config: PreTrainedConfig, groups: Sequence[PromptGroup], device: torch.device
) -> Verdict:
    """The check, whatever is known already.

    Args:
        model_class, config, device: as of ``verdict``.
        groups: of ``check_groups``.
    """
    start, ways, errors = time.perf_counter(), {}, []
    for dtype in TOLERANCES:
        try:
            with torch.inference_mode(False):
                ways = _ask(model_class, config, groups, device, dtype)
            errors = []
            break
        except Exception as problem:  # whatever a family's code raises
            errors.append(in_words(problem))
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return Verdict(ways, time.perf_counter() - start, errors[0] if errors else None)


def _ask(
    model_class: type[nn.Module],
    config: PreTrainedConfig,
    groups: Sequence[PromptGroup],
    device: torch.device,
    dtype: str,
) -> dict[str, Agreement]:
    """The ways that were tried on a copy of this dtype; any error of its plain forward is raised."""
    kind = getattr(torch, dtype)
    model = shallow_copy(model_class, config, device).to(kind)
    # Copies: what was made in inference mode cannot be saved for a backward.
    images = [
        {n: x.to(kind if x.is_floating_point() else x.dtype, copy=True) for n, x in group.images.items()}
        for group in groups
    ]
    groups = [replace(group, images=own) for group, own in zip(groups, images, strict=True)]
    with _exact_float32():
        expected = outcome(model, groups, plain_states)
        if (ahead := looks_ahead(model, groups[:1])) > TOLERANCES[dtype][0]:
            words = f"states change by {ahead:.1e} with tokens that stand behind them"
            return {"plain": Agreement(None, None, words, dtype)}
        ways = {}
        for name in WAYS:
            ways[name] = compare(model, groups, name, expected)
            if ways[name].exact:
                break
    return ways


@contextmanager
def _exact_float32() -> Iterator[None]:
    """No autocast, and no TF32 or less in products and convolutions."""
    # The older switches cannot be read where these have been set, as the option ``tf32`` of transformers does.
    parts = [
        *(torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn),
        *(torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn),
    ]
    before = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "ieee"
    try:
        with torch.enable_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision
