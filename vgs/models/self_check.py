"""How a model may be run: whether packed rows, and padded batches, say what the model says of each sequence alone.

Nobody can list the families that will be trained. So the question is put to the family itself: a shallow copy of the
model (``shallow``) scores two small prompts with two responses each, packed with shared prompts, and is compared with
one plain forward for every sequence: the states that enter the head, and the gradient of one scalar. Where packed rows
disagree, padded batches are compared in the same way. The answer is kept, on disk as well, for this config, these
libraries and this device.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from huggingface_hub.constants import HF_HOME
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedConfig

from ..disk import remembered
from ..errors import ConfigError
from ..log import warn_once
from .adapters import is_peft_model
from .attention import attention_put_back
from .differences import first_difference, traced
from .families import backbone
from .groups import PER_TOKEN_FIELDS, PromptGroup, response_lengths
from .packed import score_packed
from .shallow import shallow_copy
from .states import final_states, score_padded

logger = logging.getLogger(__name__)

#: Largest difference of a state, and of a gradient, from the plain forward's, relative to the largest entry. Rounding
#: in float32 makes 1e-6 to 1e-4; what leaks, or stands at another position, made 0.02 and more.
STATE_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 1e-2
#: Tokens of the responses: the first is longer than windows of the copy and chunks of linear attention.
RESPONSES = (70, 3)
SMALL = 2**20  # entries of a parameter whose gradient is compared
VERSIONS = ("torch", "transformers", "triton", "flash-linear-attention", "causal-conv1d", "flash-attn", "peft")


@dataclass(frozen=True)
class Agreement:
    """How far one way of running a model is from a plain forward per sequence.

    Attributes:
        states, gradients: largest relative differences; None where the way raises an error.
        where: the first module that says something else, in words; or the error.
    """

    states: float | None
    gradients: float | None
    where: str | None = None

    @property
    def exact(self) -> bool:
        """Whether both are rounding."""
        if self.states is None or self.gradients is None:
            return False
        return self.states <= STATE_TOLERANCE and self.gradients <= GRADIENT_TOLERANCE  # False for NaN

    def __str__(self) -> str:
        if self.states is None:
            return self.where or "an error"
        numbers = f"states differ by {self.states:.1e}, gradients by {self.gradients:.1e} of the largest"
        return f"{numbers}; first in {self.where}" if self.where else numbers


@dataclass(frozen=True)
class Verdict:
    """What the check found.

    Attributes:
        ways: name of the way (``"packed"``, ``"padded"``) -> its agreement; those that were tried.
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


# Fields of the prompts that were tried -> what was found, by hash; and whether it packs, by model.
_KNOWN: dict[str, dict[frozenset[str], Verdict]] = {}
_ANSWERS: WeakKeyDictionary[nn.Module, dict[frozenset[str], bool]] = WeakKeyDictionary()


def packs(model: nn.Module, groups: Sequence[PromptGroup]) -> bool:
    """Whether a model runs in packed rows; else it runs in padded batches, which one line says.

    The first call for a family takes seconds. On several processes all of them call together.

    Args:
        model: unwrapped (possibly PEFT); its weights are not looked at.
        groups: prompts as the model's own processor encodes them; the shortest with an image, and its text, are used.

    Raises:
        ConfigError: neither way says what the model says of each sequence alone.
    """
    inner = model.base_model.model if is_peft_model(model) else model
    fields = frozenset(name for group in groups for name in group.images)
    answers = _ANSWERS.setdefault(inner, {})
    for seen, answer in answers.items():
        if fields <= seen:
            return answer
    answers[fields] = runs_packed(type(inner), inner.config, groups, _device(inner))
    return answers[fields]


def runs_packed(
    model_class: type[nn.Module], config: PreTrainedConfig, groups: Sequence[PromptGroup], device: torch.device
) -> bool:
    """As ``packs``, of a model that need not be loaded.

    Args:
        model_class: of the model with its head. config: its config.
        groups: see ``packs``.
        device: where it is to run.

    Raises:
        ConfigError: neither way says what the model says of each sequence alone.
    """
    found = verdict(model_class, config, groups, device)
    name = f"{model_class.__name__} ({config.model_type})"
    if found.way == "packed":
        return True
    if found.error is not None:
        warn_once(logger, f"{name} runs in padded batches: a small copy of it cannot be asked, {found.error}.")
        return False
    if found.way is None:
        ways = "; ".join(f"{way}: {agreement}" for way, agreement in found.ways.items())
        raise ConfigError(
            f"{name} cannot be run as its own forward would, neither in packed rows nor in padded batches ({ways})."
        )
    warn_once(logger, f"{name} runs in padded batches, which takes longer: in packed rows its {found.ways['packed']}.")
    return False


def verdict(
    model_class: type[nn.Module], config: PreTrainedConfig, groups: Sequence[PromptGroup], device: torch.device
) -> Verdict:
    """The check itself, or what it said before of this class, config, device and these libraries.

    Args:
        model_class: of the model with its head. config: its config, of any size.
        groups: see ``packs``.
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
    raw = [remembered(Path(HF_HOME) / "vgs" / f"check-{name}.json", compute)]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(raw, src=0, device=device if device.type == "cuda" else None)
    ways = {way: Agreement(**numbers) for way, numbers in raw[0].pop("ways").items()}
    found = Verdict(ways, **raw[0])
    known[fields] = found
    return found


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
        "source": _source(model_class),
        "config": {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {name: _version(name) for name in VERSIONS},
        "vgs": hashlib.sha256(b"".join(path.read_bytes() for path in own)).hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _source(model_class: type) -> str:
    try:
        return hashlib.sha256(Path(inspect.getfile(model_class)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return ""


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
    start, ways, error = time.perf_counter(), {}, None
    try:
        model = shallow_copy(model_class, config, device)
        with _exact_float32():
            expected = _outcome(model, groups, plain_states)
            for name in WAYS:
                ways[name] = compare(model, groups, name, expected)
                if ways[name].exact:
                    break
    except Exception as problem:  # whatever a family's code raises
        error = _words(problem)
    if device.type == "cuda":
        model = expected = None
        torch.cuda.empty_cache()
    return Verdict(ways, time.perf_counter() - start, error)


def _words(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"


@contextmanager
def _exact_float32() -> Iterator[None]:
    """No autocast, and no TF32 in products and convolutions."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.enable_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _device(model: nn.Module) -> torch.device:
    return model.get_input_embeddings().weight.device


def plain_states(model: nn.Module, groups: Sequence[PromptGroup]) -> tuple[Tensor, Tensor]:
    """Both views by one plain forward for each response: what every other way is compared with.

    Args:
        model: unwrapped, with output embeddings.
        groups: prompts with their responses.

    Returns:
        ([N, D] multimodal, [N, D] text-only); order: group, response, token.
    """
    device, views = _device(model), []
    for with_image in (True, False):
        rows = []
        for group in groups:
            prompt = group.prompt_ids if with_image else group.text_prompt_ids
            for response in group.responses:
                ids = torch.cat([prompt, response])[None].to(device)
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                for name, value in group.images.items():
                    if name in PER_TOKEN_FIELDS:
                        kinds = value[None].to(device) if with_image else torch.zeros_like(prompt)[None].to(device)
                        inputs[name] = pad(kinds, (0, len(response)))
                    elif with_image:
                        inputs[name] = value.to(device)
                rows.append(final_states(model, **inputs)[0, len(prompt) - 1 : -1])
        views.append(torch.cat(rows))
    return views[0], views[1]


def _packed(model: nn.Module, groups: Sequence[PromptGroup]) -> tuple[Tensor, ...]:
    with attention_put_back(backbone(model)):  # padded batches, asked next, run by the model's own
        return score_packed(model, groups, True, [True] * len(response_lengths(groups)), _device(model))


def _padded(model: nn.Module, groups: Sequence[PromptGroup]) -> tuple[Tensor, ...]:
    return score_padded(model, groups, True, [True] * len(response_lengths(groups)), _device(model))


#: Ways to run a model, the best first.
WAYS: dict[str, Callable[[nn.Module, Sequence[PromptGroup]], tuple[Tensor, ...]]] = {
    "packed": _packed,
    "padded": _padded,
}


def _outcome(
    model: nn.Module, groups: Sequence[PromptGroup], run: Callable[..., tuple[Tensor, ...]]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Both views' states, and the gradients of a random linear functional of them."""
    parameters = {name: p for name, p in model.named_parameters() if p.numel() <= SMALL and p.is_floating_point()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        states = run(model, groups)
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(x.shape, generator=generator).to(x.device) for x in states]
        value = sum((x.float() * weight).sum() for x, weight in zip(states, weights, strict=True))
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    finally:
        model.requires_grad_(False)
    gradients = {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}
    return [x.detach().float() for x in states], gradients


def compare(
    model: nn.Module,
    groups: Sequence[PromptGroup],
    way: str,
    expected: tuple[list[Tensor], dict[str, Tensor]] | None = None,
) -> Agreement:
    """One way of running a model against the plain forward of every sequence.

    Args:
        model: unwrapped, in float32 and evaluation mode; no parameter requires gradient afterwards.
        groups: prompts with their responses.
        way: of ``WAYS``.
        expected: of the plain forwards, where they have been run.
    """
    states, gradients = _outcome(model, groups, plain_states) if expected is None else expected
    try:
        own_states, own_gradients = _outcome(model, groups, WAYS[way])
    except Exception as problem:  # whatever a family's code raises
        return Agreement(None, None, _words(problem))
    gap = max(_relative(x, y, y.abs().max()) for x, y in zip(own_states, states, strict=True))
    largest = max((x.abs().max() for x in gradients.values()), default=torch.tensor(0.0))
    slope = max(
        (
            _relative(own_gradients.get(name, torch.zeros_like(x)), x, torch.maximum(x.abs().max(), 1e-3 * largest))
            for name, x in gradients.items()
        ),
        default=0.0,
    )
    found = Agreement(gap, slope)
    return found if found.exact else replace(found, where=_where(model, groups, way))


def _relative(value: Tensor, expected: Tensor, scale: Tensor) -> float:
    gap = (value - expected).abs().max() if value.numel() else value.new_zeros(())
    return (gap / scale.clamp(min=1e-30)).nan_to_num(nan=torch.inf).item()


@torch.no_grad()
def _where(model: nn.Module, groups: Sequence[PromptGroup], way: str) -> str | None:
    """The first module that says something else of a sequence which stands behind others."""
    for target in reversed(groups):
        ordered = [*(group for group in groups if group is not target), target]
        before = len(response_lengths(ordered[:-1]))
        for number in range(len(target.responses)):
            with traced(model, 0, 1, 0) as plain:
                plain_states(model, [target.select([number])])
            with traced(model, len(ordered) - 1, number + 1, before + number) as other:
                WAYS[way](model, ordered)
            if found := first_difference(model, plain, other, STATE_TOLERANCE):
                return found
    return None
