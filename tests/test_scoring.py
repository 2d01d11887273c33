"""One forward over both views equals two; heads are read with everything that changes their logits."""

from __future__ import annotations

import types

import pytest
import torch
from tiny import plain_rows, tiny_model, tiny_processor, tiny_samples
from torch import nn

from vgs.pairing import PairedViews, encode_views, placeholder_ids
from vgs.scoring import fused_loss, hidden_rows, logit_scale, read_head, score_responses, score_views
from vgs_kernels import VGSObjective

PROCESSOR = tiny_processor()
SAMPLES = tiny_samples(4)
RESPONSES = [[20, 1], [21, 22, 23, 1], [24], [25, 26, 1]]


@pytest.fixture(scope="module")
def student() -> nn.Module:
    return tiny_model(0)


@pytest.fixture(scope="module")
def views(student) -> PairedViews:
    return encode_views(PROCESSOR, SAMPLES, RESPONSES, placeholder_ids(student.config))


def close(actual, expected) -> bool:
    return torch.allclose(actual, expected, rtol=0, atol=1e-5)


def separate_rows(model: nn.Module, with_image: bool) -> torch.Tensor:
    return torch.cat([plain_rows(model, PROCESSOR, *x, with_image) for x in zip(SAMPLES, RESPONSES, strict=True)])


@torch.no_grad()
def test_one_forward_equals_each_response_on_its_own(student, views) -> None:
    rows, text_rows = score_views(student, views)
    assert rows.shape == text_rows.shape == (10, 32)
    assert close(rows, separate_rows(student, True))
    assert close(text_rows, separate_rows(student, False))
    assert (rows - text_rows).abs().max() > 0.1, "the image must matter for this test to mean anything"


@pytest.mark.parametrize("text_gradient", [True, False])
def test_text_rows_carry_gradient_only_if_needed(student, views, text_gradient: bool) -> None:
    calls = []
    handle = student.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((len(kwargs["input_ids"]), torch.is_grad_enabled())), with_kwargs=True
    )
    rows, text_rows = score_views(student, views, text_gradient)
    handle.remove()
    assert rows.requires_grad
    assert text_rows.requires_grad == text_gradient
    assert calls == ([(8, True)] if text_gradient else [(4, True), (4, False)])
    with torch.no_grad():
        both = hidden_rows(student, views).chunk(2)
    assert close(rows, both[0])
    assert close(text_rows, both[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(views, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(0).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        rows, text_rows = score_views(model, views)
        (rows.square().sum() + text_rows.sum()).backward()
        gradients.append(model.model.language_model.layers[0].mlp.up_proj.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_a_new_peft_adapter_leaves_the_rows_alone(student, views) -> None:
    peft = pytest.importorskip("peft")
    expected = score_views(student, views, False)[0]
    wrapped = peft.get_peft_model(tiny_model(0), peft.LoraConfig(target_modules=["q_proj"], r=2))
    rows = score_views(wrapped, views, False)[0]  # a new adapter is the identity
    assert close(rows, expected)
    rows.sum().backward()
    assert {name.split(".")[-3] for name, p in wrapped.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


def test_a_patched_model_forward_is_not_used(student, views) -> None:
    """use_liger_kernel replaces the whole model's forward by one with a loss of its own; only the backbone is run."""
    patched = tiny_model(0)

    def forward(*args, **kwargs) -> None:
        raise AssertionError("the whole model's forward was called")

    patched.forward = forward
    assert close(score_views(patched, views)[0], score_views(student, views)[0])


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
    assert logit_scale(types.SimpleNamespace(**fields)) == expected


def test_head_keeps_scale_softcap_and_gathers_a_sharded_weight() -> None:
    model = tiny_model(0)
    model.config.get_text_config().logit_scale = 0.5
    model.config.get_text_config().final_logit_softcapping = 30.0
    head = read_head(model, torch.float32)
    assert (head.logit_scale, head.softcap, head.bias) == (0.5, 30.0, None)
    assert head.weight is model.lm_head.weight

    class Sharded:
        def full_tensor(self) -> torch.Tensor:
            return torch.ones(3, 2)

    layer = types.SimpleNamespace(weight=Sharded(), bias=None)
    stub = types.SimpleNamespace(get_output_embeddings=lambda: layer, config=model.config)
    head = read_head(stub, torch.bfloat16)
    assert head.weight.dtype == torch.bfloat16
    assert head.weight.shape == (3, 2)


def test_scale_and_softcap_reach_the_loss() -> None:
    torch.manual_seed(0)
    objective = VGSObjective(gamma=0.0, lam=0.0)
    model = tiny_model(0)
    rows = torch.randn(5, 32), torch.randn(5, 32)

    def loss(scale: float, softcap: float | None) -> float:
        model.config.get_text_config().logit_scale = scale
        model.config.get_text_config().final_logit_softcapping = softcap
        head = read_head(model, torch.float32)
        return fused_loss(rows, rows[::-1], head, head, objective).loss.item()

    values = [loss(1.0, None), loss(0.5, None), loss(1.0, 1.0), loss(0.5, 1.0)]
    assert len({round(value, 4) for value in values}) == 4


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
    scored = score_responses(student, teacher, PROCESSOR, SAMPLES, RESPONSES, VGSObjective())
    assert [x["token_ids"].tolist() for x in scored] == RESPONSES
    for name, expected in reference_terms(student, teacher).items():
        actual = torch.cat([x[name] for x in scored])
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
