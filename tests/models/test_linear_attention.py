"""Layers that carry a state from token to token, in packed rows: equal to one plain forward per sequence."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import VOCABULARY, separate_rows
from linear_families import CONFIGS, OTHERS, compute_in_float64, text_groups, text_model
from real_checkpoints import FIELD_FAMILIES, REAL_FAMILIES, photo_samples
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.configuration_utils import ALLOWED_LAYER_TYPES

import vgs
from vgs.models.adapters import is_peft_model
from vgs.models.attention import RowLayout
from vgs.models.families import backbone, placeholder_ids
from vgs.models.forward import score_groups
from vgs.models.groups import PromptGroup
from vgs.models.linear_attention import StateTree, state_layers

KNOWN = {"qwen3_5", "qwen3_5_moe", "lfm2_vl", "lfm3_vl", "minicpmv4_6"}
REAL = [x for x in (*REAL_FAMILIES, *FIELD_FAMILIES) if x in KNOWN]
RESPONSES = [[[70, 71, 72], [80] * 70, [81]], [[90, 91], [], [73, 74, 75, 76]], [[100], [75, 76, 77]]]


@pytest.fixture(autouse=True)
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vgs.models.forward.chosen_way", lambda *_: "packed")


@pytest.fixture(scope="module")
def double() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


class Case:
    """A model in float64, prompts for it, and what plain forwards say."""

    def __init__(self, model: nn.Module, groups: Sequence[PromptGroup], stack: str = "") -> None:
        self.model, self.groups, self.stack = model, groups, stack
        self.rows = self.separate()
        self.gradients = self.backward(self.rows)
        self.rows = [rows.detach() for rows in self.rows]

    def separate(self) -> list[Tensor]:
        """Both views, from one plain forward for each response."""
        inner = self.model.base_model.model if is_peft_model(self.model) else self.model
        return [torch.cat([separate_rows(inner, group, view) for group in self.groups]) for view in (True, False)]

    def backward(self, rows: Sequence[Tensor]) -> dict[str, Tensor]:
        """Of a random linear functional of the rows, by every parameter."""
        generator = torch.Generator().manual_seed(0)
        value = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in rows)
        self.model.zero_grad()
        value.backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def check(self, rows: Sequence[Tensor]) -> None:
        """That these rows, and gradients through them, are the expected ones."""
        assert max(map(relative, rows, self.rows)) <= 1e-12
        gradients = self.backward(rows)
        assert gradients.keys() == self.gradients.keys()
        # Those of some biases are zero.
        least = 1e-6 * max(grad.abs().max().item() for grad in self.gradients.values())
        errors = {name: relative(grad, self.gradients[name], least) for name, grad in gradients.items()}
        assert {name: error for name, error in errors.items() if error > 1e-11} == {}


def carries_state(model: nn.Module) -> bool:
    return any(state_layers(model))


def handles_state(model: nn.Module) -> bool:
    return not state_layers(model)[1]


def relative(actual: Tensor, expected: Tensor, least: float = 0.0) -> float:
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=least)).item()


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request: pytest.FixtureRequest, double: pytest.MonkeyPatch) -> Case:
    return Case(compute_in_float64(double, text_model(request.param)), text_groups(), request.param)


@pytest.fixture
def trained(case: Case) -> Iterator[nn.Module]:
    """The model in training mode."""
    yield case.model.train()
    case.model.gradient_checkpointing_disable()
    case.model.eval()


@pytest.mark.parametrize("share_prefix", [True, False])
def test_rows_and_gradients_equal_separate_passes(case: Case, share_prefix: bool) -> None:
    assert carries_state(case.model) and handles_state(case.model)
    case.check(score_groups(case.model, case.groups, share_prefix=share_prefix))


@pytest.mark.slow
@pytest.mark.parametrize("stack", list(OTHERS))
def test_other_families_of_the_same_functions(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(compute_in_float64(monkeypatch, text_model(stack)), text_groups())
    assert carries_state(case.model) and handles_state(case.model)
    case.check(score_groups(case.model, case.groups))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_with_the_same_tree(case: Case, trained: nn.Module, reentrant: bool) -> None:
    trained.gradient_checkpointing_enable({"use_reentrant": reentrant})
    case.check(score_groups(trained, case.groups))


@torch.no_grad()
def test_positions_alone_do_not_keep_sequences_apart(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a packed row gives without the tree."""
    monkeypatch.setattr("vgs.models.packed.carried_states", lambda model, row: {})
    for share_prefix in (True, False):
        rows = score_groups(case.model, case.groups, share_prefix=share_prefix)
        assert min(map(relative, rows, case.rows)) > 1e-2


@torch.no_grad()
def test_outside_a_packed_row_nothing_changes(case: Case) -> None:
    """Sampling with a cache, and plain forwards."""
    ids = case.groups[0].prompt_ids[None]
    fresh = text_model(case.stack).double()
    expected = fresh.generate(ids, do_sample=False, max_new_tokens=6)
    score_groups(case.model, case.groups)
    assert torch.equal(case.model.generate(ids, do_sample=False, max_new_tokens=6), expected)
    assert all(map(torch.equal, case.separate(), case.rows))


@pytest.mark.slow
def test_an_adapter_is_no_obstacle(case: Case) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=r".*\.(in_proj\w*|q_proj)", r=2, init_lora_weights=False)
    model = peft.get_peft_model(case.model, config).double()
    try:
        adapted = Case(model, case.groups)
        assert all("lora" in name for name in adapted.gradients) and handles_state(model)
        assert min(map(relative, adapted.rows, case.rows)) > 1e-2
        adapted.check(score_groups(model, case.groups))
    finally:
        model.unload()
        case.model.requires_grad_(True)


@pytest.mark.parametrize("stack", ["qwen3_5", "lfm2", "nemotron_h"])
def test_mixed_precision_is_as_near_as_plain_forwards_are(stack: str) -> None:
    model, groups = text_model(stack), text_groups()
    exact = score_groups(model, groups)
    with torch.autocast("cpu", torch.bfloat16):
        rows = score_groups(model, groups)
        plain = [torch.cat([separate_rows(model, group, view) for group in groups]) for view in (True, False)]
    for actual, other, expected in zip(rows, plain, exact, strict=True):
        typical = (other - expected).abs().mean()
        assert 0 < (actual - expected).abs().mean() < 1.2 * typical
    sum(x.float().sum() for x in rows).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# ---- prompts with pictures, from checkpoints as users have them


@pytest.fixture(scope="module", params=REAL)
def pictured(
    request: pytest.FixtureRequest, double: pytest.MonkeyPatch, checkpoint: Callable[..., Path], tmp_path_factory: Any
) -> Case:
    folder = checkpoint(request.param)
    options = {"attn_implementation": "sdpa", "experts_implementation": "eager"}
    model = AutoModelForImageTextToText.from_pretrained(folder, **options).eval()
    samples = photo_samples(tmp_path_factory.mktemp("photos"))
    processor = AutoProcessor.from_pretrained(folder)
    groups = vgs.encode_groups(processor, samples, RESPONSES, placeholder_ids(model.config))
    pixels = [{**group.images} for group in groups]
    for fields in pixels:
        fields |= {name: x.double() for name, x in fields.items() if x.is_floating_point()}
    groups = [replace(group, images=fields) for group, fields in zip(groups, pixels, strict=True)]
    return Case(compute_in_float64(double, model), groups)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.slow
def test_rows_with_pictures_equal_separate_passes(pictured: Case, share_prefix: bool) -> None:
    assert carries_state(pictured.model) and handles_state(pictured.model)
    pictured.check(score_groups(pictured.model, pictured.groups, share_prefix=share_prefix))


# ---- kernels that take the lengths of sequences


class Kernels:
    """Stand-ins for flash-linear-attention's rules, with the arguments that they document, as plain loops.

    They count their calls. No kernel runs here: what is tested is that we call them as documented.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool, bool]] = []

    def delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        assert q.shape[:3] == k.shape[:3] and g.shape[:2] == beta.shape[:2] == q.shape[:2]
        if cu_seqlens is None:
            cu_seqlens = torch.arange(len(q) + 1) * q.shape[1]
        else:
            assert len(q) == 1 and cu_seqlens.dtype == torch.int64 and int(cu_seqlens[-1]) == q.shape[1]
            assert (cu_seqlens.diff() > 0).all()
        assert initial_state is None or len(initial_state) == len(cu_seqlens) - 1
        self.calls.append((len(cu_seqlens) - 1, initial_state is not None, output_final_state))
        if use_qk_l2norm_in_kernel:
            q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        copies = v.shape[2] // q.shape[2]
        q, k = (x.repeat_interleave(copies, dim=2).flatten(0, 1) for x in (q, k))
        flat_v, flat_g, flat_beta = v.flatten(0, 1), g.flatten(0, 1), beta.flatten(0, 1)
        rows, states = [], []
        for number in range(len(cu_seqlens) - 1):
            state = q.new_zeros(v.shape[2], k.shape[-1], v.shape[-1])
            if initial_state is not None:
                state = initial_state[number]
            for token in range(int(cu_seqlens[number]), int(cu_seqlens[number + 1])):
                state = flat_g[token].exp()[:, None, None] * state
                change = flat_v[token] - torch.einsum("hk,hkv->hv", k[token], state)
                state = state + torch.einsum("hk,hv->hkv", k[token], flat_beta[token][:, None] * change)
                rows.append(torch.einsum("hk,hkv->hv", q[token] * k.shape[-1] ** -0.5, state))
            states.append(state)
        return torch.stack(rows).reshape(v.shape), torch.stack(states) if output_final_state else None

    @staticmethod
    def convolution(x: Tensor, weight: Tensor, bias: Any = None, seq_idx: Any = None, activation: Any = None) -> Tensor:
        assert x.shape[1] == len(weight) and seq_idx is None and activation in (None, "silu")
        out = torch.nn.functional.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
        out = out[..., : x.shape[2]]
        return torch.nn.functional.silu(out) if activation else out


def filtered(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """As transformers calls kernels: without the arguments that they do not have."""
    known = inspect.signature(kernel).parameters
    return lambda *args, **options: kernel(*args, **{name: x for name, x in options.items() if name in known})


@pytest.mark.parametrize("stack", ["qwen3_5", "qwen3_next"])
def test_kernels_that_take_lengths_are_called_twice(
    stack: str, double: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(compute_in_float64(double, text_model(stack)), text_groups())
    kernels = Kernels()
    (mixer,) = {type(x) for x in case.model.modules() if type(x).__name__.endswith("GatedDeltaNet")}
    modeling = sys.modules[mixer.__module__]

    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", filtered(kernels.delta_rule))
    monkeypatch.setattr(modeling, "causal_conv1d_fn", filtered(kernels.convolution))
    case.check(score_groups(case.model, case.groups))
    prompts, responses = 2 * len(case.groups), 2 * sum(n > 1 for group in case.groups for n in group.response_lengths)
    layers = case.model.config.layer_types.count("linear_attention")
    found = [call for call in kernels.calls if call[0] > 2]  # without the question whether they take lengths
    assert found == [(prompts, False, True), (responses, True, False)] * layers
    assert len(kernels.calls) == len(found) + 2


# ---- the tree


def layout(*lengths: tuple[int, ...]) -> RowLayout:
    starts = torch.tensor([0, *map(sum, lengths)]).cumsum(0).tolist()
    empty = torch.zeros(starts[-1], dtype=torch.int32)
    return RowLayout(empty, empty, empty.long(), tuple(starts), lengths, True)


def test_a_convolution_reaches_back_into_the_own_prompt_alone() -> None:
    tokens, kept = StateTree(layout((2, 0, 3), (5, 1))).halo(4)
    none = 11
    assert tokens.tolist() == [
        *[none, none, none, 0, 1],
        *[none, 0, 1, 2, 3, 4],
        *[none, none, none, 5, 6, 7, 8, 9],
        *[7, 8, 9, 10],
    ]
    assert tokens[kept].tolist() == list(range(11))


def test_batches_are_of_similar_lengths() -> None:
    plan = StateTree(layout((1000, 900, 30), (20, 500), (600, 0), (64, 1), (65,))).plan(by_length=False)
    assert sorted(tuple(x.places.shape) for x in plan.prompts) == [(1, 65), (2, 64), (2, 1000)]
    assert sorted(tuple(x.places.shape) for x in plan.responses) == [(1, 500), (1, 900), (2, 30)]
    flat = torch.cat([batch.places.flatten() for batch in plan.prompts + plan.responses])
    assert flat[plan.order].tolist() == list(range(len(plan.order)))
    starts = [int(row[0]) for batch in plan.prompts for row in batch.places]
    found = {int(row[0]): starts[x] for b in plan.responses for row, x in zip(b.places, b.parents, strict=True)}
    assert found == {1000: 0, 1900: 0, 1950: 1930, 3114: 3050}


# ---- what is handled


def known(config: hf.PreTrainedConfig) -> tuple[bool, bool]:
    auto = hf.AutoModelForImageTextToText if hasattr(config, "vision_config") else hf.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    return carries_state(model), handles_state(model)


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}


def test_attention_carries_nothing() -> None:
    assert known(hf.Qwen3Config(**SMALL)) == (False, True)
    assert known(hf.Gemma3TextConfig(**SMALL)) == (False, True)


def test_a_convolution_of_its_own_is_not_handled() -> None:
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(hf.Qwen3Config(**SMALL))
        backbone(model).layers[0].filter = nn.Conv1d(32, 32, 3)
    assert carries_state(model) and not handles_state(model)
    with pytest.raises(ValueError, match=r"^Conv1d carries something from token to token in a way that packed rows"):
        score_groups(model, text_groups())


def _glm5() -> hf.PreTrainedConfig:
    kinds = {"layer_types": ["linear_attention", "indexed_attention"], "mlp_layer_types": ["dense"] * 2}
    return hf.Glm5NextConfig(text_config={**SMALL, **kinds})


@pytest.mark.parametrize(
    "config",
    [
        lambda: hf.MambaConfig(**SMALL),
        lambda: hf.JambaConfig(**SMALL, attn_layer_period=2, attn_layer_offset=1, num_experts=2),
        lambda: hf.MiniMaxConfig(**SMALL, layer_types=["linear_attention", "full_attention"]),
        lambda: hf.RecurrentGemmaConfig(**SMALL),
        *([_glm5] if hasattr(hf, "Glm5NextConfig") and "indexed_attention" in ALLOWED_LAYER_TYPES else []),
    ],
    ids=lambda config: config().model_type,
)
def test_states_that_we_do_not_know_are_not_handled(config: Callable[[], hf.PreTrainedConfig]) -> None:
    assert known(config()) == (True, False)


def causal_conv1d_fn(hidden_states: Tensor, **options: Any) -> Tensor:
    return hidden_states


class Closed(nn.Module):
    def forward(self, hidden_states: Tensor, attention_mask: Any = None) -> Tensor:
        return causal_conv1d_fn(hidden_states)


class Open(nn.Module):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return causal_conv1d_fn(hidden_states, **kwargs)


@pytest.mark.parametrize(("mixer", "handled"), [(Closed, False), (Open, True)])
def test_a_mixer_must_take_the_tree(mixer: type[nn.Module], handled: bool) -> None:
    model = text_model("lfm2")
    backbone(model).layers[0].conv = mixer()
    assert carries_state(model) and handles_state(model) == handled
