"""The output heads of plain, PEFT-wrapped and sharded models, as the fused losses take them, and what a head says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial

from vgs_kernels import TargetRow, fused_linear_divergence

from .adapters import is_adapter_layer
from .wrappers import gathered

HEAD_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Head:
    """A model's output projection: logits = softcap * tanh(logit_scale * (h W^T + bias) / softcap).

    Attributes:
        weight: [V, D]. bias: [V] or None. logit_scale: a factor on the logits. softcap: None for no soft-cap.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] float32 logits of hidden states [N, D], for a few tokens: the losses never form them."""
        bias = None if self.bias is None else self.bias.float()
        logits = self.logit_scale * nn.functional.linear(hidden.float(), self.weight.float(), bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def target(self, hidden: Tensor) -> TargetRow:
        """Logits of hidden states [N, D], as the target of a divergence."""
        return TargetRow(1.0, hidden, self.weight, self.bias, logit_scale=self.logit_scale, softcap=self.softcap)

    @property
    def student_options(self) -> dict[str, Any]:
        """What the fused losses want to know of a student's head beside its weight."""
        return {
            "student_bias": self.bias,
            "student_softcap": self.softcap,
            "student_logit_scale": self.logit_scale,
        }


def logit_scale(config: Any, applies: Callable[[str], bool]) -> float:
    """The factor that a model family puts on its logits, under whichever name its text config has it.

    Args:
        config: a text config.
        applies: whether the model's forward reads the field of this name.
    """
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None and applies(name):
            return float(getattr(config, name))
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None or not applies("logits_scaling"):
        return 1.0
    # The same field divides in Granite, and multiplies in HyperCLOVA X.
    return float(divisor) if config.model_type == "hyperclovax" else 1.0 / float(divisor)


def output_layer(model: nn.Module) -> nn.Module:
    """The layer that makes logits, of an unwrapped (possibly PEFT) model.

    Some wrappers do not name it, but the text model inside them does (Nemotron-H Omni).

    Raises:
        ValueError: there is none.
    """
    for part in model.modules():
        if hasattr(part, "get_output_embeddings") and (layer := part.get_output_embeddings()) is not None:
            return layer
    raise ValueError(f"{type(model).__name__} has no output head: get_output_embeddings() is None.")


@cache
def _source_behind(kind: type, head: str) -> str | None:
    """The code of a class's forward, from the call of its head on; None where there is none to read."""
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return None
    return source[max(source.find(f"self.{head}("), 0) :]


def _head_reads(model: nn.Module) -> Callable[[str], bool]:
    """Whether the forward that applies the output head reads a field of the text config for its logits.

    A wrapper need not do as its text model's own class does: AyaVision and LLaVA leave out the factor of Cohere's.
    What is read before the head is in the states that enter it (MiniCPM3).
    """
    layer = output_layer(model)
    places = ((x, name) for x in model.modules() for name, part in x._modules.items() if part is layer)
    owner, name = next(places, (model, ""))
    source = _source_behind(type(owner), name)
    return lambda field: source is None or field in source


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter that ``read_head`` reads: what ZeRO-3 has to gather around it and the loss.

    Each is read as its module's attribute: inside a forward that tells ZeRO-3 to have it whole in the backward, too.
    """
    modules = output_layer(model).modules()
    return [getattr(module, name) for module in modules for name, _ in module.named_parameters(recurse=False)]


def whole_heads(*models: nn.Module) -> AbstractContextManager[Any]:
    """The output heads of unwrapped models are whole inside, for ``read_head`` and the loss, where ZeRO-3 cuts them.

    Args:
        models: unwrapped (possibly PEFT) models.
    """
    return gathered([parameter for model in models for parameter in head_parameters(model)])


def read_head(model: nn.Module, dtype: torch.dtype) -> Head:
    """The output head of an unwrapped (possibly PEFT) model, as the model itself would apply it now.

    Of PEFT students: a head in ``modules_to_save`` is the active adapter's copy; a head with LoRA is W + s B A, formed
    here once and cast to ``dtype``, with gradients to A and B ([V, D] more memory for it and for its gradient);
    ``trainable_token_indices`` replace rows of W. Disabled and merged adapters count as in the model's forward.

    An FSDP2 head is a DTensor: it is gathered once, here, and cast from its float32 master copy to ``dtype``. A ZeRO-3
    head must be gathered around this call and the loss (``whole_heads``).

    Args:
        model: an unwrapped model with output embeddings.
        dtype: of the hidden states that meet the head.

    Raises:
        TypeError: the head is quantised, or has an adapter other than plain LoRA.
        ValueError: a LoRA head with dropout, in training.
    """
    layer = output_layer(model)
    if is_adapter_layer(layer):
        weight, bias = _adapted(layer, dtype)
    else:  # PEFT's wrappers (modules_to_save, trainable_token_indices) show the weight in force
        weight, bias = _weight(layer), getattr(layer, "bias", None)
    if isinstance(weight, DTensor):
        weight, bias = _whole(weight).to(dtype), None if bias is None else _whole(bias)
    config, reads = model.config.get_text_config(), _head_reads(model)
    softcap = getattr(config, "final_logit_softcapping", None) if reads("final_logit_softcapping") else None
    return Head(weight, bias, logit_scale(config, reads), softcap)


def _whole(parameter: Tensor) -> Tensor:
    """A parameter in full: of FSDP2's DTensors the ranks' parts together, others as they are.

    Every rank has its own loss; their gradients are averaged, as FSDP2 averages others.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    ranks = parameter.device_mesh.size()
    whole = parameter.full_tensor(grad_placements=[Partial()] * parameter.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / ranks)
    return whole


def _weight(layer: nn.Module) -> Tensor:
    weight = getattr(layer, "weight", None)
    if weight is None or weight.dtype not in HEAD_DTYPES:
        held = "no weight" if weight is None else f"a {weight.dtype} weight"
        raise TypeError(
            f"The output head must be a layer with a 16-bit or float32 weight, got {type(layer).__name__} with {held}. "
            "Keep it out of the quantisation (llm_int8_skip_modules, modules_to_not_convert)."
        )
    return weight


def _adapted(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a head that is an adapter layer (``peft.tuners.tuners_utils.BaseTunerLayer``)."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as the layer's own forward does
    base = layer.get_base_layer()
    weight, bias = _weight(base), getattr(base, "bias", None)
    held = {name for part in layer.adapter_layer_names for name in getattr(layer, part)}
    active = [name for name in layer.active_adapters if name in held]
    if layer.disable_adapters or layer.merged or not active:
        return weight, bias
    if isinstance(layer, TrainableTokensLayer):
        return layer.get_merged_weights(active), None
    # FSDP2 makes a class of its own of a layer that it shards by itself.
    kind = next(part for part in type(layer).__mro__ if not issubclass(part, FSDPModule))
    if kind is not LoraLinear or any(name in layer.lora_variant for name in active):
        raise TypeError(
            f"The output head has an adapter of type {kind.__name__}; only plain LoRA can be read. Merge it."
        )
    weight, bias = _whole(weight), None if bias is None else _whole(bias)
    for name in active:
        rate = getattr(layer.lora_dropout[name], "p", 0.0)
        if rate > 0 and layer.training:
            raise ValueError(
                f"lora_dropout must be 0 for a LoRA output head, got {rate}: the head is one matrix for all tokens. "
                'Or train the head in full with modules_to_save=["lm_head"].'
            )
        down, up = (_whole(part[name].weight) for part in (layer.lora_A, layer.lora_B))
        wide = torch.promote_types(up.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):  # B A in 16 bit would lose most of a small update
            weight = weight + ((up.to(wide) @ down.to(wide)) * layer.scaling[name]).to(up.dtype)
            if layer.lora_bias[name]:
                shift = layer.scaling[name] * _whole(layer.lora_B[name].bias)
                bias = shift if bias is None else bias + shift
    return weight.to(dtype), bias


def visual_dependency(rows: Sequence[Tensor], head: Head, temperature: float, **options: Any) -> Tensor:
    """[N] KL(q_I || q_x) in nats (arXiv 2606.00564, Eq. 12).

    Args:
        rows: [N, D] hidden states with and without the image.
        head: the model's.
        temperature: divides the logits.
        **options: vocab_size, workspace_bytes, gradient_tolerance and backend of ``fused_linear_divergence``.
    """
    output = fused_linear_divergence(
        rows[0], head.weight, [head.target(rows[1])], temperature=temperature, **head.student_options, **options
    )
    return output.divergence


def token_logps(rows: Tensor, token_ids: Tensor, head: Head, temperature: float, **options: Any) -> Tensor:
    """[N] log-probabilities of sampled tokens.

    Args:
        rows: [N, D] hidden states.
        token_ids: [N] int64.
        head, temperature, options: as in ``visual_dependency``.
    """
    # A divergence from itself: of what the fused losses return, this is the only part that is wanted.
    output = fused_linear_divergence(
        rows,
        head.weight,
        [head.target(rows)],
        target_ids=token_ids,
        temperature=temperature,
        **head.student_options,
        **options,
    )
    return output.target_logps
