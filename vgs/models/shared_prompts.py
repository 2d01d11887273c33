"""A prompt that several responses share, read once while ``generate`` samples them.

With ``num_return_sequences`` transformers repeats every prompt before the model reads it. Here the model reads it once,
and what its cache holds of it is repeated. All else remains the library's: the processed scores, the random numbers of
a draw, where a response ends, and equally many forwards on every rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin

from .adapters import without_adapter
from .families import backbone
from .shared_images import SharedImages, repeat_features, replaced

#: Parameters of transformers' ``GenerationMixin._prefill``, 5.16 to 5.24; where they are others nothing is shared.
PREFILL = ("self", "input_ids", "generation_config", "model_kwargs", "is_first_iteration")
UPDATE = "_update_model_kwargs_for_generation"  # its method between two forwards, which models replace
ENCODED = "mm_encoder_outputs"  # under this name 5.24 has the features of pictures; 5.17 has pixels


@contextmanager
def prompts_once(model: nn.Module) -> Iterator[None]:
    """Inside, ``generate`` reads each prompt once for all responses that are sampled to it.

    It reads a prompt for every response, as it does elsewhere, where the cache cannot be repeated (a static or an
    offloaded one, none at all, one with states that do not follow ``reorder_cache``), where beams are searched, and
    where the model or the call wants more of the first forward than logits and cache. Prompts with several pictures are
    right there with transformers 5.24; 5.17 repeats pixels itself, and mixes up their order in many families.

    Args:
        model: an unwrapped (possibly PEFT) model.
    """
    inner = without_adapter(model)
    known = tuple(inspect.signature(getattr(GenerationMixin, "_prefill", lambda: None)).parameters) == PREFILL
    if not (known and isinstance(inner, GenerationMixin)):
        yield
        return
    expand, prefill = inner._expand_inputs_for_generation, inner._prefill
    found: list[_Prompts] = []  # one, while ``generate`` is between the two

    def expanded(expand_size: int = 1, is_encoder_decoder: bool = False, **inputs: Any) -> tuple[Tensor, dict]:
        options = {"expand_size": expand_size, "is_encoder_decoder": is_encoder_decoder}
        found.clear()
        if expand_size == 1 or is_encoder_decoder:
            return expand(**options, **inputs)
        found.append(_Prompts(expand_size, inputs.pop("input_ids"), inputs))
        rows = {name: value for name, value in inputs.items() if name != ENCODED}
        return expand(**options, input_ids=found[0].ids, **rows)

    def read(
        input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict, *args: Any, **rest: Any
    ) -> Any:
        if not found:
            return prefill(input_ids, generation_config, model_kwargs, *args, **rest)
        prompts = found.pop()
        name = prompts.cache_name(input_ids, generation_config, model_kwargs)
        if name is not None:
            cache, untouched = model_kwargs[name], deepcopy(model_kwargs[name])
            outputs = prefill(prompts.ids, generation_config, {**model_kwargs, **prompts.fields}, *args, **rest)
            alone = outputs.get(name) is cache and not _read_after(inner, outputs.keys() - {"logits", name})
            if alone and _repeat(cache, len(outputs.logits), prompts.times):
                outputs.logits = outputs.logits[:, -1:].repeat_interleave(prompts.times, dim=0)
                return outputs
            model_kwargs[name] = untouched
        if ENCODED in prompts.fields:
            model_kwargs[ENCODED] = prompts.repeated_features(inner)
        return prefill(input_ids, generation_config, model_kwargs, *args, **rest)

    with replaced(inner, "_expand_inputs_for_generation", expanded), replaced(inner, "_prefill", read):
        yield


@dataclass(frozen=True)
class _Prompts:
    """B prompts as they were before ``generate`` repeated them.

    Attributes:
        times: responses to each prompt.
        ids: [B, P] int64.
        fields: all else that the first forward takes of them.
    """

    times: int
    ids: Tensor
    fields: dict[str, Any]

    def cache_name(self, repeated: Tensor, config: GenerationConfig, inputs: Mapping[str, Any]) -> str | None:
        """The name of the empty cache among the inputs of the first forward; None where it has to read the repeated
        prompts.

        Args:
            repeated: [B * times, P] the prompts that it would read.
            config: how ``generate`` was asked.
            inputs: the other inputs.
        """
        name = next((name for name, value in inputs.items() if isinstance(value, DynamicCache)), None)
        if name is None or inputs[name].offloading or _states(inputs[name]):
            return None
        if config.num_beams != 1 or config.output_attentions or config.output_hidden_states:
            return None
        return name if torch.equal(self.ids.repeat_interleave(self.times, dim=0), repeated) else None

    def repeated_features(self, model: nn.Module) -> dict[str, Any]:
        """The features of pictures for the repeated prompts, in the order of their rows.

        transformers 5.24 repeats each picture of a prompt by itself in GLM-4V, the whole batch in SmolVLM, where all
        pictures stand in one row; in Granite 4 Vision it does not repeat the features for deeper layers.

        Args:
            model: that made them.
        """
        shared = SharedImages(tuple(self.ids.cpu()), (self.times,) * len(self.ids), {})
        body, features = backbone(model), self.fields[ENCODED]
        return {kind: x if x is None else repeat_features(x, shared, body) for kind, x in features.items()}


def _states(holder: Any) -> list[Tensor]:
    """The tensors with dimensions in a cache and in its layers, in their order."""
    if isinstance(holder, Tensor):
        return [holder] if holder.ndim else []
    if hasattr(holder, "reorder_cache"):
        parts: Any = vars(holder).values()
    else:
        parts = holder.values() if isinstance(holder, Mapping) else holder if isinstance(holder, (list, tuple)) else ()
    return [state for part in parts for state in _states(part)]


def _repeat(cache: DynamicCache, rows: int, times: int) -> bool:
    """Put each row of a cache ``times`` in a row; False where a state of it did not follow."""
    before = [state.numel() for state in _states(cache)]
    device = next((state.device for state in _states(cache)), None)
    cache.reorder_cache(torch.arange(rows, device=device).repeat_interleave(times))
    return [state.numel() for state in _states(cache)] == [times * count for count in before]


def _read_after(model: GenerationMixin, names: set[str]) -> set[str]:
    """Which fields of the first forward's output the model hands on to the next forward itself."""
    own = [vars(x)[UPDATE] for x in type(model).__mro__ if x is not GenerationMixin and UPDATE in vars(x)]
    codes = [inspect.unwrap(method).__code__ for method in own]
    return names & {name for code in codes for name in (*code.co_names, *code.co_consts) if isinstance(name, str)}
