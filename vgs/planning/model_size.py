"""Parameters, work and stored activations of a vision-language model, counted from its config; no weights are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PretrainedConfig, Qwen3VLConfig

from ..models.heads import output_layer

PER_IMAGE_TOKEN = ("merger", "projector", "connector")  # modules that run on image tokens instead of patches


def build_on_meta(config: PretrainedConfig) -> nn.Module:
    """The model of a config on the meta device: shapes without memory."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def matrix_weights(module: nn.Module) -> int:
    """Elements of the linear layers' weights in ``module``: multiply-adds per token."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def _field(config: PretrainedConfig, *names: str) -> int:
    """A config's field under the first of its names that it has."""
    return next(value for name in names if (value := getattr(config, name, None)) is not None)


def patches_per_token(config: PretrainedConfig) -> int:
    """Image patches that become one image token.

    Raises:
        ValueError: the config has no field that says so.
    """
    vision = config.vision_config
    patch = getattr(vision, "patch_size", None)
    if getattr(vision, "spatial_merge_size", None) is not None:  # Qwen-VL, Mistral 3
        return int(vision.spatial_merge_size) ** 2
    if getattr(config, "downsample_ratio", None) is not None:  # InternVL
        return round(1 / config.downsample_ratio**2)
    if getattr(config, "scale_factor", None) is not None:  # SmolVLM, Idefics3
        return int(config.scale_factor) ** 2
    if getattr(config, "mm_tokens_per_image", None) is not None:  # Gemma 3
        return (vision.image_size // patch) ** 2 // int(config.mm_tokens_per_image)
    if getattr(config, "vision_feature_layer", None) is not None:  # LLaVA: one token a patch
        return 1
    raise ValueError(f"Model type {config.model_type!r}: its config does not say how many patches form an image token.")


@dataclass(frozen=True)
class Stack:
    """A stack of equal transformer layers.

    Attributes:
        layers: their number. hidden, intermediate: widths of the residual stream and of the MLP.
        query, key_value: widths of all query heads and of all key (or value) heads. heads: number of query heads.
        norms: normalisations of width ``hidden`` per layer. qk_norm: whether queries and keys are normalised.
        gated: whether the MLP has a gate. fused_qkv: whether one matrix makes queries, keys and values.
        weights: elements of all matrices, all layers.
    """

    layers: int
    hidden: int
    intermediate: int
    query: int
    key_value: int
    heads: int
    norms: int
    qk_norm: bool
    gated: bool
    fused_qkv: bool
    weights: int

    @classmethod
    def of(cls, config: PretrainedConfig, blocks: nn.ModuleList) -> Stack:
        """The stack of ``blocks``, whose widths a text or vision config names.

        Raises:
            ValueError: the layers differ in size, or hold matrices outside linear layers (a mixture of experts).
        """
        heads = _field(config, "num_attention_heads", "num_heads")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        names = [(name, parameter) for name, parameter in blocks[0].named_parameters() if name.endswith("weight")]
        flat = [(name, len(weight)) for name, weight in names if weight.dim() == 1]
        matrices = sum(parameter.numel() for parameter in blocks.parameters() if parameter.dim() > 1)
        weights = matrix_weights(blocks)
        if matrices != weights or weights != len(blocks) * matrix_weights(blocks[0]):
            raise ValueError(f"Model type {config.model_type!r}: only stacks of equal dense layers can be counted.")
        return cls(
            layers=len(blocks),
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            query=heads * head_dim,
            key_value=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
            heads=heads,
            norms=sum(size == config.hidden_size for _, size in flat),
            qk_norm=any(name.endswith(("q_norm.weight", "k_norm.weight")) for name, _ in flat),
            gated=any("gate_proj" in name for name, _ in names),
            fused_qkv=any("qkv" in name for name, _ in names),
            weights=weights,
        )

    def layer_bytes(self, autocast: bool, rms: bool) -> int:
        """Bytes per token that one layer keeps for its backward; see ``ModelSize.activation_bytes``."""
        readers = 3 + (2 if self.gated else 1) if rms and autocast else 2  # autocast casts anew for every linear layer
        inputs = 2 * self.hidden * readers
        attention = 4 * self.query + 4 * self.key_value + 4 * self.heads  # queries, output, keys, values, log-sum-exp
        if self.qk_norm:
            attention += 6 * (self.query + self.key_value)
        if self.fused_qkv:  # the values are a view that keeps the others alive, beside their rotated copies
            attention += 2 * (self.query + self.key_value)
        mlp = (8 if self.gated else 4) * self.intermediate
        return self.norms * self.norm_bytes(autocast, rms) + inputs + attention + mlp

    def norm_bytes(self, autocast: bool, rms: bool) -> int:
        """Bytes per token that one normalisation keeps."""
        stream = self.boundary_bytes(autocast)
        # An RMS norm as transformers writes it: its float32 input, and its rows before they meet the weight.
        return 4 * self.hidden + stream if rms else stream

    def boundary_bytes(self, autocast: bool) -> int:
        """Bytes per token of one hidden state of the residual stream, which autocast keeps in float32."""
        return (4 if autocast else 2) * self.hidden

    def working_bytes(self, autocast: bool) -> int:
        """Bytes per token that one layer holds at once in a forward without gradient: the residual stream, its
        normalised copy in float32, and the MLP's intermediates in 16 bit."""
        return self.boundary_bytes(autocast) + 4 * self.hidden + 2 * (3 if self.gated else 2) * self.intermediate


@dataclass(frozen=True)
class Work:
    """What is run: a forward alone, or with its backward.

    Attributes:
        backward: with the gradients of the inputs.
        weights: and of the weights (False: frozen weights that gradients pass through).
        recompute: gradient checkpointing, which runs the forward once more.
    """

    backward: bool = True
    weights: bool = True
    recompute: bool = False

    @property
    def matrices(self) -> int:
        """Matrix products outside checkpointed layers, in forwards."""
        return 1 + (1 + self.weights if self.backward else 0)

    @property
    def layer_matrices(self) -> int:
        """Matrix products of the layers, in forwards."""
        return self.matrices + (self.backward and self.recompute)

    @property
    def attention(self) -> float:
        """Attention, in forwards: the backward of flash-style attention has five products to the forward's two."""
        return 1 + (2.5 + self.recompute if self.backward else 0)


FORWARD = Work(backward=False)
TRAINING = Work()


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a vision-language model: parameters by part, FLOPs of its passes, bytes of stored activations.

    FLOPs are floating point operations (a multiply-add is two) of matrix products and attention; norms, activation
    functions and rotary embeddings are left out, as in ``torch.utils.flop_counter``.

    Attributes:
        vision: parameters of everything before the decoder: vision tower, mergers, projector.
        embeddings: of the token embedding [V, D]. decoder: of the decoder without it. head: of the output head, 0 if
            it is tied to the embedding (``tied``).
        vocabulary: V, rows of the head.
        patches_per_token: image patches that become one image token.
        text, tower: the decoder's and the vision tower's layers.
        patch_embedding: elements of the patch embedding's weight. mergers: of the matrices that run on image tokens.
        merge_inputs: sum of the input widths of those.
    """

    vision: int
    embeddings: int
    decoder: int
    head: int
    tied: bool
    vocabulary: int
    patches_per_token: int
    text: Stack
    tower: Stack
    patch_embedding: int
    mergers: int
    merge_inputs: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> ModelSize:
        """Count the model of a transformers config.

        Raises:
            ValueError: no vision-language model, layers of different sizes, or a mixture of experts.
        """
        if getattr(config, "vision_config", None) is None:
            raise ValueError(f"config must be of a vision-language model, got model type {config.model_type!r}.")
        model = build_on_meta(config)
        decoder = model.get_decoder()
        embedding, head = model.get_input_embeddings().weight, output_layer(model)
        tied = head.weight is embedding
        inside = sum(parameter.numel() for parameter in decoder.parameters()) - embedding.numel()
        outside = 0 if tied else sum(parameter.numel() for parameter in head.parameters())
        total = sum(parameter.numel() for parameter in model.parameters())
        inner = {id(module) for module in decoder.modules()} | {id(head)}
        seeing = [(name, module) for name, module in model.named_modules() if id(module) not in inner]
        merging = [module for name, module in seeing if any(part in name for part in PER_IMAGE_TOKEN)]
        merging_parameters = {id(p): p for module in merging for p in module.parameters() if p.dim() > 1}
        vision = config.vision_config
        depth = _field(vision, "num_hidden_layers", "depth")
        blocks = next(m for _, m in seeing if isinstance(m, nn.ModuleList) and len(m) == depth)
        return cls(
            vision=total - inside - outside - embedding.numel(),
            embeddings=embedding.numel(),
            decoder=inside,
            head=outside,
            tied=tied,
            vocabulary=len(head.weight),
            patches_per_token=patches_per_token(config),
            text=Stack.of(config.get_text_config(), decoder.layers),
            tower=Stack.of(vision, blocks),
            patch_embedding=sum(m.weight.numel() for _, m in seeing if isinstance(m, (nn.Conv2d, nn.Conv3d))),
            mergers=sum(parameter.numel() for parameter in merging_parameters.values()),
            merge_inputs=sum(module.in_features for module in merging if isinstance(module, nn.Linear)),
        )

    @property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        return self.vision + self.embeddings + self.decoder + self.head

    def decoder_flops(self, tokens: int, pairs: int, work: Work = FORWARD) -> float:
        """FLOPs of the decoder's layers.

        Args:
            tokens: rows of the pass, T.
            pairs: (query, key) pairs that attend, in one layer and head: T (T + 1) / 2 for one causal sequence.
            work: forward alone or with backward.
        """
        attention = 4 * self.text.query * self.text.layers * pairs
        return work.layer_matrices * 2 * self.text.weights * tokens + work.attention * attention

    def vision_flops(self, patches: Sequence[int], work: Work = FORWARD) -> float:
        """FLOPs of the vision tower and the projection to image tokens.

        Args:
            patches: number of patches of every image; an image attends to itself, all to all.
            work: as in ``decoder_flops``. Pixels need no gradient.
        """
        total = sum(patches)
        attention = 4 * self.tower.query * self.tower.layers * sum(count * count for count in patches)
        layers = work.layer_matrices * 2 * self.tower.weights * total + work.attention * attention
        mergers = work.matrices * 2 * self.mergers * total / self.patches_per_token
        embedding = 2 * self.patch_embedding * total * (1 + (work.backward and work.weights))
        return layers + mergers + embedding

    def head_flops(self, tokens: int, work: Work = FORWARD) -> float:
        """FLOPs of one output projection of ``tokens`` rows to the whole vocabulary."""
        return work.matrices * 2 * self.vocabulary * self.text.hidden * tokens

    def kv_cache_bytes(self, tokens: int, key_item: int = 2, value_item: int = 2) -> int:
        """Bytes of the keys and values of cached tokens.

        Args:
            tokens: of all sequences, in full attention.
            key_item, value_item: bytes of one element of a key and of a value.
        """
        return (key_item + value_item) * self.text.layers * self.text.key_value * tokens

    def activation_bytes(
        self,
        tokens: int,
        patches: int = 0,
        *,
        autocast: bool = False,
        checkpointing: bool = False,
        vision_gradient: bool = True,
    ) -> int:
        """Bytes that a forward with gradient keeps for its backward, at the peak.

        Without checkpointing, per token and decoder layer of width H, query width Q, key width K, MLP width I and n
        heads, with 16-bit weights and RMS norms: 2 * 6H (norms) + 4H (inputs of the projections)
        + 4Q + 4K + 4n (attention: queries, keys, values, output, log-sum-exp) + 6Q + 6K (query and key norms, if any)
        + 8I (gate, its activation, up, product). Under autocast from float32 weights the residual stream is float32 and
        every projection keeps its own 16-bit copy of its input: 2 * 8H + 10H instead of 16H. The vision tower per
        patch: the same with its norms and MLP, and 2Q + 2K more where values are views of one projection. Then the
        mergers and the decoder's last norm. Pixels are left out.

        With checkpointing: one hidden state per layer, and all of one layer.

        Assumptions: flash-style attention (no scores are stored), norms as transformers writes them (not fused), no
        dropout; matrices all trainable, which bounds LoRA from above. Temporary buffers of single operations are not
        in it (``Stack.working_bytes``).

        Args:
            tokens: decoder rows of the pass. patches: image patches of the pass.
            autocast: float32 master weights under bf16 autocast; False: bf16 weights.
            checkpointing: gradient checkpointing in decoder and vision tower.
            vision_gradient: False for a frozen vision tower, which keeps nothing.
        """
        decoder = self.text.layer_bytes(autocast, rms=True) * tokens
        boundary = self.text.boundary_bytes(autocast) * tokens
        patches = patches if vision_gradient else 0
        tower = self.tower.layer_bytes(autocast, rms=self.tower.gated) * patches
        # Every projection keeps its 16-bit input, and the norm or activation before it its own.
        single = 4 * self.merge_inputs * patches // self.patches_per_token
        single += self.text.norm_bytes(autocast, rms=True) * tokens
        if not checkpointing:
            return self.text.layers * decoder + self.tower.layers * tower + single
        edges = self.text.layers * boundary + self.tower.layers * self.tower.boundary_bytes(autocast) * patches
        return edges + single + max(decoder, tower)


def _qwen3_vl(hidden: int, intermediate: int, layers: int, heads: int, large_tower: bool) -> Qwen3VLConfig:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True, "mrope_section": [24, 20, 20]}
    depth, width, inner, taps = (27, 1152, 4304, [8, 16, 24]) if large_tower else (24, 1024, 4096, [5, 11, 17])
    return Qwen3VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_parameters": rope,
            "tie_word_embeddings": not large_tower,
        },
        vision_config={
            "depth": depth,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_heads": 16,
            "out_hidden_size": hidden,
            "deepstack_visual_indexes": taps,
        },
        tie_word_embeddings=not large_tower,
    )


# The shapes of Qwen/Qwen3-VL-{2B,4B,8B}-Instruct: 2.13, 4.44 and 8.77 billion parameters.
QWEN3_VL: dict[str, Callable[[], Qwen3VLConfig]] = {
    "2B": partial(_qwen3_vl, 2048, 6144, 28, 16, large_tower=False),
    "4B": partial(_qwen3_vl, 2560, 9728, 36, 32, large_tower=False),
    "8B": partial(_qwen3_vl, 4096, 12288, 36, 32, large_tower=True),
}
