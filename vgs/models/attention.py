"""Attention inside a packed row: every response sees its prompt and itself, and nothing else.

A model's text decoder gets an attention implementation of ours around its own. Outside a packed pass (sampling, padded
batches) it does what the model's own did. Inside one, the mask that the family asks for (causal, sliding window,
bidirectional images) is composed with the row's layout, and the kind of mask selects the kernel. Masks travel as
arguments of the layers, so gradient checkpointing recomputes with the same one.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward, repeat_kv
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

KERNELS = ("auto", "dense", "flex", "varlen")
PREFIX = "vgs_packed_"  # + the model's own implementation
#: What layers can ask of attention that sdpa and sequence lengths have not: capped scores, sinks.
BEYOND_SDPA = ("softcap", "s_aux")
MaskFunction = Callable[[Any, Any, Any, Any], Any]


@dataclass(frozen=True)
class RowLayout:
    """Who may attend to whom in a packed row of T tokens.

    Attributes:
        prompt: [T] int32, the prompt that a token belongs to, in one view.
        branch: [T] int32, 0 for the prompt's own tokens, g for those of its g-th response.
        home: [T] int64, the place in the row where the token would stand if its response followed the prompt at once:
            the family's own mask (its sliding window, say) is asked about these places.
        starts: the places in the row where a prompt begins, and T.
        lengths: for every prompt, its tokens in the row and then those of each of its responses.
        shared: whether any prompt has several responses.
        kernel: ``"dense"`` (a padded batch of prompts with their responses, and a mask [L, L] each), ``"flex"``,
            ``"varlen"`` (sequence lengths alone, 16 bits, CUDA), or ``"auto"``: varlen where it applies and flex
            elsewhere on CUDA, dense on other devices.
    """

    prompt: Tensor
    branch: Tensor
    home: Tensor
    starts: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]
    shared: bool
    kernel: str = "auto"

    def compose(self, family: MaskFunction) -> MaskFunction:
        """The row's mask, out of the family's."""

        def mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
            seen = (self.branch[key] == 0) | (self.branch[key] == self.branch[query])
            own = self.prompt[key] == self.prompt[query]
            return own & seen & family(batch, head, self.home[query], self.home[key])

        return mask

    def mask(self, family: MaskFunction, dtype: torch.dtype) -> Segments | BlockMask | Blocks:
        """The mask as the kernel takes it.

        Raises:
            ValueError: ``kernel="varlen"`` where sequence lengths do not say everything.
        """
        device, size = self.prompt.device, len(self.prompt)
        plain = not self.shared and family is causal_mask_function
        kernel = self.kernel
        if kernel == "auto":
            if device.type != "cuda":
                kernel = "dense"
            else:
                kernel = "varlen" if plain and _compute_dtype(dtype, device).itemsize == 2 else "flex"
        if kernel == "varlen":
            if not plain:
                raise ValueError(
                    'packed_attention="varlen" takes plain causal sequences alone, but this row shares prompts between '
                    'responses or its family masks otherwise; use "flex" or "auto".'
                )
            return Segments.of(self.starts, device)
        if kernel == "flex":
            create = _compiled_block_mask() if device.type == "cuda" else create_block_mask
            return create(self.compose(family), None, None, size, size, device=device)
        return Blocks.of(self.starts, self.compose(family), device)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Decoders called inside see a row of this layout."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)


_ACTIVE: ContextVar[RowLayout | None] = ContextVar("packed_row", default=None)


def active_layout() -> RowLayout | None:
    """The layout of the packed row that is running; None outside a packed pass."""
    return _ACTIVE.get()


@functools.cache
def _compiled_block_mask() -> Callable:
    return torch.compile(create_block_mask)  # uncompiled it would form the whole mask


@dataclass(frozen=True)
class Segments:
    """Sequences that follow each other in a row: [S + 1] int32 offsets, and the longest one's length."""

    offsets: Tensor
    longest: int

    @classmethod
    def of(cls, starts: tuple[int, ...], device: torch.device) -> Segments:
        offsets = torch.tensor(starts, dtype=torch.int32)
        return cls(offsets.to(device, non_blocking=True), int(offsets.diff().max()))

    def flash_options(self) -> dict[str, Any]:
        """As the library's flash attention takes them."""
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        return dict(zip(names, (self.offsets, self.offsets, self.longest, self.longest), strict=True))


@dataclass(frozen=True)
class Blocks:
    """Prompts with their responses as a padded batch, for attention alone: the other layers see no padding.

    Attributes:
        gather: [S, L] int64, the token of the row at each place of the batch (any token where there is padding).
        scatter: [T] int64, the place in the flattened batch of every token of the row.
        mask: [S, 1, L, L] bool.
    """

    gather: Tensor
    scatter: Tensor
    mask: Tensor

    @classmethod
    def of(cls, starts: tuple[int, ...], mask: MaskFunction, device: torch.device) -> Blocks:
        first = torch.tensor(starts[:-1]).unsqueeze(1)
        sizes = torch.tensor(starts).diff().unsqueeze(1)
        at = torch.arange(int(sizes.max()))
        real = at < sizes
        gather = torch.where(real, first + at, first).to(device)
        real = real.to(device)
        query, key = gather[:, None, :, None], gather[:, None, None, :]
        zero = torch.zeros_like(query)
        seen = mask(zero, zero, query, key) & real[:, None, None, :]
        # A place of padding attends to itself: a softmax over nothing would be NaN.
        seen = seen | (torch.eye(len(at), dtype=torch.bool, device=device) & ~real[:, None, :, None])
        return cls(gather, real.flatten().nonzero().squeeze(1), seen)

    def attend(self, module: nn.Module, *rows: Tensor, plain: bool, **options: Any) -> Tensor:
        """[1, H, T, D] queries, keys and values -> [1, T, H, D]; ``plain`` says that sdpa knows all that is asked."""
        batch = [x[0].transpose(0, 1)[self.gather].transpose(1, 2) for x in rows]
        if plain:
            out, _ = sdpa_attention_forward(module, *batch, self.mask, **options)
        else:
            dtype = batch[0].dtype
            mask = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            mask = mask.masked_fill(~self.mask, torch.finfo(dtype).min)
            out, _ = _own_attention(module)(module, *batch, mask, **options)
        return out.flatten(0, 1)[self.scatter][None]


def _own_attention(module: nn.Module) -> Callable:
    """The eager attention of the file that a layer's class stands in: families have soft-caps and sinks there."""
    for kind in type(module).__mro__:  # FSDP2 makes a class of its own
        if own := getattr(sys.modules[kind.__module__], "eager_attention_forward", None):
            return own
    return sdpa_attention_forward


def _compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None) -> Tensor:
    """[1, H, T, D] each -> [1, T, H, D], causal within every segment."""
    from torch.nn.attention.varlen import varlen_attn  # not in every build of PyTorch

    options: dict[str, Any] = {"scale": scale}
    parameters = inspect.signature(varlen_attn).parameters
    options |= {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        else:
            key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    offsets, longest = segments.offsets, segments.longest
    return varlen_attn(*rows, offsets, offsets, longest, longest, **options)[None]


def _attention(
    base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    if isinstance(attention_mask, (Segments, BlockMask)):
        # Norms in float32 under autocast leave queries and keys in another dtype than the values.
        dtype = _compute_dtype(value.dtype, value.device)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, **options)
    if isinstance(attention_mask, Blocks):
        beyond = any(options.get(name) is not None for name in BEYOND_SDPA)
        plain = base == "sdpa" or (base != "eager" and not beyond)
        return attention_mask.attend(module, query, key, value, plain=plain, **options), None
    if isinstance(attention_mask, Segments):
        if "flash" not in base:
            unknown = [name for name in BEYOND_SDPA if options.get(name) is not None]
            if unknown or options.get("dropout"):
                lacks = unknown[0] if unknown else "dropout"
                raise ValueError(f'packed_attention="varlen" has no attention {lacks}; use "flex" or "dense".')
            return _varlen(query, key, value, attention_mask, options.get("scaling")), None
        options |= attention_mask.flash_options()
        attention_mask = None
    if base == "eager":
        return _own_attention(module)(module, query, key, value, attention_mask, **options)
    # Flash attention looks its kernel up by the name in the config.
    config = module.config
    config._attn_implementation = base
    try:
        return ALL_ATTENTION_FUNCTIONS[base](module, query, key, value, attention_mask, **options)
    finally:
        config._attn_implementation = PREFIX + base


def _mask(base: Callable, *arguments: Any, **options: Any) -> Any:
    layout = active_layout()
    if layout is None:
        return base(*arguments, **options)
    return layout.mask(options["mask_function"], options["dtype"])


def use_packed_attention(backbone: PreTrainedModel) -> None:
    """Give a multimodal backbone's text decoder the implementation described above; once is enough.

    What a family's own eager attention knows (capped scores, sinks), packed rows know too.
    """
    decoder = backbone.get_decoder()
    current = decoder.config._attn_implementation
    if current.startswith(PREFIX):
        return
    name = PREFIX + current
    masks = AttentionMaskInterface()
    AttentionInterface.register(name, functools.partial(_attention, current))
    AttentionMaskInterface.register(name, functools.partial(_mask, masks.get(current, sdpa_mask)))
    for config in (decoder.config, backbone.config.get_text_config()):
        config._attn_implementation = name


@contextmanager
def attention_put_back(backbone: PreTrainedModel) -> Iterator[None]:
    """At the end a multimodal backbone's text decoder has the implementation that it had before."""
    configs = backbone.get_decoder().config, backbone.config.get_text_config()
    before = [config._attn_implementation for config in configs]
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


def whole_rows(backbone: PreTrainedModel) -> dict[str, Any]:
    """Arguments with which a multimodal backbone's decoder runs all tokens of a packed row through all layers.

    Layers that share keys and values may be given the last tokens alone (Gemma 4), by cutting masks that ours are not.
    """
    takes = inspect.signature(type(backbone.get_decoder()).forward).parameters
    return {"logits_to_keep": slice(None)} if "logits_to_keep" in takes else {}
