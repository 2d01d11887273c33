"""FLOPs of models whose layers are of several kinds, counted from their config: windows, linear attention, no tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from vgs.models.heads import output_layer
from vgs.planning.model_size import FORWARD, PER_IMAGE_TOKEN, Work, build_on_meta, matrix_weights

CHUNK = 64  # tokens that the gated delta rule takes at once


@dataclass(frozen=True)
class HybridSize:
    """Work of a vision-language model; the methods are those of ``ModelSize``.

    Attributes:
        hidden, vocabulary: of the head.
        weights: of all linear layers of the decoder.
        attention: of each layer with attention the width of all its query heads, and its window (None: it sees all).
        rule: FLOPs of the delta rules of all layers, for a token.
        tower, mergers: weights that meet every patch, and every image token.
        tower_query: widths of all queries of the tower's layers together. patches_per_token: of an image.
    """

    hidden: int
    vocabulary: int
    weights: int
    attention: tuple[tuple[int, int | None], ...]
    rule: int
    tower: int
    mergers: int
    tower_query: int
    patches_per_token: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> HybridSize:
        """Count the model of a config of Qwen3.5 or Gemma 4."""
        model = build_on_meta(config)
        decoder, head, text = model.get_decoder(), output_layer(model), config.get_text_config()
        inner = {id(module) for module in decoder.modules()} | {id(head)}
        seeing = {
            name: module.weight.numel()
            for name, module in model.named_modules()
            if id(module) not in inner and isinstance(module, (nn.Linear, nn.Conv3d)) and "audio" not in name
        }
        merging = {name: x for name, x in seeing.items() if any(part in name for part in (*PER_IMAGE_TOKEN, "embed_"))}
        vision = config.vision_config
        side = getattr(vision, "pooling_kernel_size", None) or vision.spatial_merge_size
        depth = getattr(vision, "depth", None) or getattr(vision, "num_hidden_layers", 0)
        attention, rule = [], 0
        for layer, kind in zip(decoder.layers, text.layer_types, strict=True):
            if kind == "linear_attention":
                mixer = layer.linear_attn
                key, value = mixer.head_k_dim, mixer.head_v_dim
                # In a chunk: keys and queries with keys, the triangular systems, values; between chunks: three products
                # with the state.
                products = 2 * CHUNK * (2 * key + value) + CHUNK * (key + value) + 6 * key * value
                rule += mixer.num_v_heads * products
            else:
                window = text.sliding_window if kind == "sliding_attention" else None
                attention.append((layer.self_attn.o_proj.in_features, window))
        return cls(
            hidden=head.weight.shape[1],
            vocabulary=head.weight.shape[0],
            weights=matrix_weights(decoder),
            attention=tuple(attention),
            rule=rule,
            tower=sum(seeing.values()) - sum(merging.values()),
            mergers=sum(merging.values()),
            tower_query=depth * getattr(vision, "hidden_size", 0),
            patches_per_token=side**2,
        )

    @property
    def text(self) -> HybridSize:
        """Where ``ModelSize`` has the decoder's width."""
        return self

    def decoder_flops(self, tokens: int, pairs: int, work: Work = FORWARD) -> float:
        """As of ``ModelSize``; a window bounds the pairs by its length for every token."""
        seen = sum(query * min(pairs, tokens * (window or pairs)) for query, window in self.attention)
        return work.layer_matrices * (2 * self.weights + self.rule) * tokens + work.attention * 4 * seen

    def vision_flops(self, patches: Sequence[int], work: Work = FORWARD) -> float:
        """As of ``ModelSize``."""
        attention = work.attention * 4 * self.tower_query * sum(count * count for count in patches)
        layers = work.layer_matrices * 2 * self.tower * sum(patches)
        return layers + attention + work.matrices * 2 * self.mergers * sum(patches) / self.patches_per_token
