"""One packed row equals separate passes; heads are read with everything that changes their logits."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch
from tiny import plain_rows, tiny_model, tiny_processor, tiny_samples
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vgs.data.prompts import encode_groups
from vgs.evaluation.token_terms import score_responses
from vgs.models.families import freeze, placeholder_ids
from vgs.models.forward import fused_loss, score_groups
from vgs.models.groups import PromptGroup, response_lengths
from vgs.models.heads import logit_scale, read_head
from vgs_kernels import VGSObjective

PROCESSOR = tiny_processor()
SAMPLES = tiny_samples(4)
RESPONSES = [[[20, 1], [20]], [[21, 22, 23, 1]], [[24]], [[25, 26, 1], [22], [22, 23]]]
COUNT = 14  # response tokens


@pytest.fixture(scope="module")
def student() -> nn.Module:
    return tiny_model(0)


@pytest.fixture(scope="module")
def groups(student) -> list[PromptGroup]:
    return encode_groups(PROCESSOR, SAMPLES, RESPONSES, placeholder_ids(student.config))


def close(actual, expected) -> bool:
    return torch.allclose(actual, expected, rtol=0, atol=1e-5)


def separate_rows(model: nn.Module, with_image: bool) -> torch.Tensor:
    pairs = [(sample, answer) for sample, answers in zip(SAMPLES, RESPONSES, strict=True) for answer in answers]
    return torch.cat([plain_rows(model, PROCESSOR, *pair, with_image) for pair in pairs])


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["dense", "flex"])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_one_packed_row_equals_each_response_on_its_own(student, groups, share_prefix: bool, kernel: str) -> None:
    rows, text_rows = score_groups(student, groups, share_prefix=share_prefix, kernel=kernel)
    assert rows.shape == text_rows.shape == (COUNT, 32)
    assert close(rows, separate_rows(student, True))
    assert close(text_rows, separate_rows(student, False))
    assert (rows - text_rows).abs().max() > 0.1, "the image must matter for this test to mean anything"


def test_the_prompt_and_its_image_run_once(student, groups) -> None:
    tokens, patches = [], []
    handles = [
        student.model.register_forward_pre_hook(
            lambda module, args, kwargs: tokens.append(kwargs["input_ids"].shape), with_kwargs=True
        ),
        student.model.visual.register_forward_pre_hook(lambda module, args: patches.append(len(args[0]))),
    ]
    score_groups(student, groups)
    score_groups(student, groups, share_prefix=False)
    for handle in handles:
        handle.remove()
    one_each = sum(len(group.images["pixel_values"]) for group in groups)
    assert patches == [one_each, sum(len(g.images["pixel_values"]) * len(g.responses) for g in groups)]
    # A response's last token predicts nothing that is scored, so it is not fed.
    prompts = [len(group.prompt_ids) + len(group.text_prompt_ids) for group in groups]
    fed = 2 * (COUNT - 7)
    repeated = sum(size * len(group.responses) for size, group in zip(prompts, groups, strict=True))
    assert tokens == [(1, sum(prompts) + fed), (1, repeated + fed)]


@pytest.mark.parametrize("wanted", [True, False, [True, False, True, False, True, False, False]])
def test_text_rows_carry_gradient_only_where_needed(student, groups, wanted) -> None:
    calls = []
    handle = student.base_model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    rows, text_rows = score_groups(student, groups, text_gradient=wanted)
    handle.remove()
    assert calls == ([True] if wanted is True else [True, False])
    assert rows.requires_grad
    assert text_rows.requires_grad == (wanted is not False)
    assert close(rows, separate_rows(student, True))
    assert close(text_rows, separate_rows(student, False))
    if isinstance(wanted, list):
        marks = torch.tensor(wanted).repeat_interleave(torch.tensor(response_lengths(groups)))
        norms = [
            torch.autograd.grad(text_rows[mark].sum(), student.lm_head.weight, retain_graph=True)[0].norm()
            for mark in (marks, ~marks)
        ]
        assert norms[0] > 0
        assert norms[1] == 0


def test_text_gradient_needs_one_entry_per_response(student, groups) -> None:
    with pytest.raises(ValueError, match="one entry for each of 7 responses, got 4"):
        score_groups(student, groups, text_gradient=[True] * 4)


def gradients(model: nn.Module, rows, text_rows) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weights = torch.randn(2, COUNT, 32)
    model.zero_grad()
    ((rows * weights[0]).sum() + (text_rows * weights[1]).sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_gradients_through_shared_prompts_equal_separate_passes(groups, reentrant: bool | None) -> None:
    expected = gradients(model := tiny_model(0), separate_rows(model, True), separate_rows(model, False))
    packed = tiny_model(0).train()
    if reentrant is not None:
        packed.gradient_checkpointing_enable({"use_reentrant": reentrant})
        packed.enable_input_require_grads()
    actual = gradients(packed, *score_groups(packed, groups))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        largest = value.abs().max().item()
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5 * max(largest, 1e-2), msg=name)


def test_frozen_parts_get_no_gradient(groups) -> None:
    model = tiny_model(0, tie=False)
    freeze(model, vision=True, embeddings=True)
    rows, text_rows = score_groups(model, groups)
    found = gradients(model, rows, text_rows)
    assert not any("visual" in name or "embed_tokens" in name for name in found)
    assert any("language_model.layers.0" in name for name in found)


def test_sampling_works_on_after_packing(student, groups) -> None:
    """The decoder's own attention still serves padded batches and caches."""
    fresh = tiny_model(0)
    inputs = PROCESSOR.apply_chat_template(
        conversation=[SAMPLES[0]["prompt"]], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    score_groups(student, groups)
    assert student.config.get_text_config()._attn_implementation != fresh.config.get_text_config()._attn_implementation
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(student.generate(**inputs, **options), fresh.generate(**inputs, **options))


def test_a_prompt_that_lost_its_images_is_refused(student, groups) -> None:
    cut = replace(groups[0], prompt_ids=groups[0].prompt_ids[groups[0].prompt_ids != student.config.image_token_id])
    with pytest.raises(
        ValueError, match=r"0 image placeholders, but its images of grids \[\[1, 4, 4\]\] make 4 tokens"
    ):
        score_groups(student, [cut])


def test_a_wrapped_model_is_refused(student, groups) -> None:
    with pytest.raises(TypeError, match="model must be unwrapped, got a DataParallel: score it inside run_inside"):
        score_groups(nn.DataParallel(student), groups)


def test_an_unknown_kernel_is_refused(student, groups) -> None:
    with pytest.raises(ValueError, match="kernel must be one of auto, dense, flex, varlen, got 'Flex'"):
        score_groups(student, groups, kernel="Flex")


def test_varlen_without_dropout(groups) -> None:
    model = tiny_model(0).train()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(ValueError, match='packed_attention="varlen" has no attention dropout'):
        score_groups(model, groups, share_prefix=False, kernel="varlen")


def test_varlen_needs_plain_sequences(student, groups) -> None:
    with pytest.raises(ValueError, match='packed_attention="varlen" takes plain causal sequences alone'):
        score_groups(student, groups, kernel="varlen")


def causal_segments(query, key, value, offsets, scale: float, **options) -> torch.Tensor:
    """[T, H, D] each -> [T, H, D]: what the kernels for packed sequences compute."""
    parts = []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        attend = torch.nn.functional.scaled_dot_product_attention
        parts.append(attend(q, k, v, is_causal=True, scale=scale, **options).transpose(0, 1))
    return torch.cat(parts)


def test_flash_attention_gets_the_sequences(groups, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on CUDA alone; a stand-in under its name takes what the library's own takes."""

    def stand_in(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, max_length_q, **options):
        assert module.config._attn_implementation == "flash_attention_2"
        assert attention_mask is None
        assert torch.equal(cu_seq_lens_q, options["cu_seq_lens_k"])
        assert max_length_q == options["max_length_k"] == cu_seq_lens_q.diff().max()
        rows = [x[0].transpose(0, 1) for x in (query, key, value)]
        return causal_segments(*rows, cu_seq_lens_q, scaling, enable_gqa=True)[None], None

    model = tiny_model(0)
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", stand_in)
    rows, text_rows = score_groups(model, groups, share_prefix=False, kernel="varlen")
    assert close(rows, separate_rows(tiny_model(0), True))
    assert close(text_rows, separate_rows(tiny_model(0), False))


def test_varlen_gets_the_sequences(student, groups, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs on CUDA alone; a stand-in with its arguments shows that they mean the same."""
    from torch.nn.attention import varlen

    def stand_in(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False) -> torch.Tensor:
        assert window_size == (-1, 0)
        assert torch.equal(cu_q, cu_k)
        assert max_q == max_k == cu_q.diff().max()
        return causal_segments(query, key, value, cu_q, scale, enable_gqa=enable_gqa)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    rows, text_rows = score_groups(student, groups, share_prefix=False, kernel="varlen")
    assert close(rows, separate_rows(student, True))
    assert close(text_rows, separate_rows(student, False))


def test_a_new_peft_adapter_leaves_the_rows_alone(student, groups) -> None:
    peft = pytest.importorskip("peft")
    expected = score_groups(student, groups, text_gradient=False)[0]
    wrapped = peft.get_peft_model(tiny_model(0), peft.LoraConfig(target_modules=["q_proj"], r=2))
    rows = score_groups(wrapped, groups, text_gradient=False)[0]  # a new adapter is the identity
    assert close(rows, expected)
    rows.sum().backward()
    assert {name.split(".")[-3] for name, p in wrapped.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


def test_a_patched_model_forward_is_not_used(student, groups) -> None:
    """use_liger_kernel replaces the whole model's forward by one with a loss of its own; only the backbone is run."""
    patched = tiny_model(0)

    def forward(*args, **kwargs) -> None:
        raise AssertionError("the whole model's forward was called")

    patched.forward = forward
    assert close(score_groups(patched, groups)[0], score_groups(student, groups)[0])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 1.0),
        ({"logit_scale": 0.25}, 0.25),
        ({"logit_scale": None, "output_multiplier": 2.0}, 2.0),
        ({"lm_head_multiplier": 0.5}, 0.5),
        ({"logits_scaling": 8.0, "model_type": "granite"}, 0.125),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, 8.0),
    ],
)
def test_logit_scale(fields: dict, expected: float) -> None:
    config = types.SimpleNamespace(**fields)
    assert logit_scale(config, lambda name: True) == expected
    assert logit_scale(config, lambda name: False) == 1.0


def test_scale_and_softcap_reach_the_loss() -> None:
    torch.manual_seed(0)
    objective = VGSObjective(gamma=0.0, lam=0.0)
    model = tiny_model(0)
    rows = torch.randn(5, 32), torch.randn(5, 32)

    def loss(scale: float, softcap: float | None) -> float:
        head = replace(read_head(model, torch.float32), logit_scale=scale, softcap=softcap)
        return fused_loss(rows, rows[::-1], head, head, objective).loss.item()

    values = [loss(1.0, None), loss(0.5, None), loss(1.0, 1.0), loss(0.5, 1.0)]
    assert len({round(value, 4) for value in values}) == 4


@pytest.mark.parametrize("weights", [None, torch.linspace(0, 1, 5)], ids=["mean", "weighted"])
def test_eta_scales_the_loss_of_the_multimodal_view_alone(student, weights: torch.Tensor | None) -> None:
    """As it scales the loss of both views, of which gamma = lam = 0 leaves the same."""
    torch.manual_seed(0)
    head = read_head(student, torch.float32)
    rows, teacher_rows = torch.randn(2, 2, 5, 32)
    objective = VGSObjective(gamma=0.0, lam=0.0, eta=0.4)
    both, alone = (
        fused_loss(rows[:views], teacher_rows[:views], head, head, objective, token_weights=weights).loss
        for views in (2, 1)
    )
    torch.testing.assert_close(alone, both, rtol=1e-5, atol=0)


def reference_terms(student: nn.Module, teacher: nn.Module) -> dict[str, torch.Tensor]:
    def log_probs(model: nn.Module, with_image: bool) -> torch.Tensor:
        rows = separate_rows(model, with_image).double()
        return (rows @ model.lm_head.weight.double().T).log_softmax(dim=-1)

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p.exp() * (p - q)).sum(dim=-1)

    with torch.no_grad():
        s, a, t, w = (log_probs(model, view) for model in (student, teacher) for view in (True, False))
    target = (a + t - w).log_softmax(dim=-1)
    return {
        "standard": kl(s, t),
        "visual": kl(s, target),
        "language": kl(a, w),
        "vds": kl(t, w),
        "student_vds": kl(s, a),
        "entropy": -(s.exp() * s).sum(dim=-1),
    }


def test_score_responses_equals_the_definition(student) -> None:
    teacher = tiny_model(1, hidden=48)
    firsts = [answers[0] for answers in RESPONSES]
    scored = score_responses(student, teacher, PROCESSOR, SAMPLES, firsts, VGSObjective())
    assert [x["token_ids"].tolist() for x in scored] == firsts
    chosen = torch.tensor([0, 1, 3, 4, 5, 6, 7, 8, 9, 10])  # the tokens of every first response
    for name, expected in reference_terms(student, teacher).items():
        actual, expected = torch.cat([x[name] for x in scored]), expected[chosen]
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
