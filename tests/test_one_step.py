"""``vgs_step``: equal to the trainer, to plain forwards and the paper's formula, and on ranks to one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from launch import SUPPORT, torchrun
from one_step_processes import CASES, RANKS, count, models, train
from peft import LoraConfig, get_peft_model
from tiny import IMAGE, SPECIAL, plain_rows, tiny_model, tiny_processor, tiny_samples
from torch import Tensor, nn
from trainers import make_trainer, rollout

from vgs import ConfigError, vgs_step
from vgs_kernels import DivergenceOutput, VGSObjective, VGSOutput

PROCESSOR = tiny_processor()
SAMPLES = tiny_samples(4)
RESPONSES = [[[20, 1], [20]], [[21, 22, 23, 1], []], [[24, 9]], [[25, 26, 1], [22], [22, 23]]]
COUNT = 15  # response tokens, of 7 responses that have some


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return tiny_model(1, hidden=48).eval()


@pytest.fixture
def accelerator() -> Iterator[Callable[..., Accelerator]]:
    """Makes accelerators whose settings do not outlive the test."""
    AcceleratorState._reset_state(True)
    yield lambda **options: Accelerator(cpu=True, **options)
    AcceleratorState._reset_state(True)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], share: float) -> None:
    """Equal but for a share of each tensor's largest entry."""
    assert actual.keys() == expected.keys() != set()
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 1e-3)
        torch.testing.assert_close(actual[name].to(value.dtype), value, rtol=0, atol=share * scale, msg=name)


# ---- the trainer


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("vgs", {"lam": 0.5, "num_generations": 2}),
        ("vgs", {"lam": 0.5, "loss_reduction": "token", "vds_scope": "trajectory", "temperature": 1.3}),
        ("vgs", {"gamma": 0.0, "lam": 0.0, "log_terms": False, "share_prefix": False}),
        ("vgs", {"lam": 0.0, "log_terms": False, "vocab_size": 30}),  # the folded form
        ("vgs", {"detach_prior": False, "lam": 0.0}),
        ("vgs_adaptive", {"lam": 0.5}),
        ("language_steering", {}),
        ("gkd", {}),
        ("opd", {"divergence": {"divergence": "sampled_reverse_kl"}}),
    ],
    ids=["gate", "token", "plain", "folded", "live prior", "adaptive", "language", "gkd", "sampled"],
)
def test_equals_the_trainers_step(tmp_path: Path, teacher: nn.Module, preset: str, settings: dict[str, Any]) -> None:
    samples = tiny_samples(8 // settings.get("num_generations", 1))
    repeated = [sample for sample in samples for _ in range(8 // len(samples))]
    options = {"per_device_train_batch_size": 8, "eta": 1.0, "gamma_guard": False, **settings}
    trainer = make_trainer(tmp_path, preset=preset, samples=repeated, **options)
    batch = rollout(trainer)
    trainer.current_gradient_accumulation_steps = 1
    expected_loss = trainer.compute_loss(trainer.model, batch)
    expected = gradients(trainer.model, expected_loss)
    steered = trainer.args.preset_in_force.steered
    output = vgs_step(
        trainer.model,
        teacher,
        PROCESSOR,
        samples,
        [[ids.tolist() for ids in group.responses] for group in batch["groups"]],
        trainer.objective if steered else trainer.args.preset_in_force,
        reduction=trainer.args.loss_reduction if steered else None,
        return_terms=trainer.args.log_terms,
        share_prefix=trainer.args.share_prefix,
        vocab_size=trainer.args.vocab_size,
        backend="torch",
    )
    torch.testing.assert_close(output.loss, expected_loss, rtol=1e-6, atol=0)
    assert_close(gradients(trainer.model, output.loss), expected, 1e-6)


# ---- the paper


def definition(student: nn.Module, teacher: nn.Module, objective: VGSObjective, reduction: str) -> Tensor:
    """The loss by one plain forward for every response and view; dense logits, the models' own precision."""
    terms = {"standard": [], "visual": [], "language": [], "vds": []}
    weights, lengths = [], [len(x) for answers in RESPONSES for x in answers]
    items = sum(lengths) if reduction == "token" else sum(length > 0 for length in lengths)
    for sample, answers in zip(SAMPLES, RESPONSES, strict=True):
        for ids in filter(None, answers):
            rows = [
                plain_rows(model, PROCESSOR, sample, ids, view) @ model.lm_head.weight.T
                for model in (student, teacher)
                for view in (True, False)
            ]
            p, prior, q, blind = ((x / objective.temperature).log_softmax(-1) for x in rows)
            q, blind = q.detach(), blind.detach()
            target = (prior.detach() + q - blind).log_softmax(-1)
            for name, (one, other) in {
                "standard": (p, q),
                "visual": (p, target),
                "language": (prior, blind),
                "vds": (q, blind),
            }.items():
                terms[name].append((one.exp() * (one - other)).sum(-1))
            weights += [1 / (items if reduction == "token" else items * len(ids))] * len(ids)
    columns = {name: torch.cat(parts) for name, parts in terms.items()}
    gate = columns["vds"] > columns["vds"].quantile(objective.vds_quantile)
    tokens = columns["standard"] + objective.gamma * columns["visual"] + objective.lam * gate * columns["language"]
    return objective.eta * (torch.tensor(weights, dtype=tokens.dtype) * tokens).sum()


@pytest.mark.parametrize("reduction", ["trajectory", "token"])
def test_equals_plain_forwards_in_float64(teacher: nn.Module, reduction: str) -> None:
    objective = VGSObjective(gamma=1.5, lam=0.5, eta=0.7, temperature=1.2)
    exact = tiny_model(0).double()
    expected_loss = definition(exact, tiny_model(1, hidden=48).double(), objective, reduction)
    expected = gradients(exact, expected_loss)
    student = tiny_model(0)
    output = vgs_step(student, teacher, PROCESSOR, SAMPLES, RESPONSES, objective, reduction=reduction)
    assert output.loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert_close(gradients(student, output.loss), expected, 1e-4)
    names = ("standard", "visual", "language", "vds", "gate", "entropy", "student_vds")
    assert all(len(getattr(output, name)) == COUNT for name in names)
    assert all(p.grad is None for p in teacher.parameters())


def test_num_items_is_what_the_sum_is_divided_by(teacher: nn.Module) -> None:
    student = tiny_model(0)

    def loss(**options: Any) -> float:
        return vgs_step(student, teacher, PROCESSOR, SAMPLES, RESPONSES, **options).loss.item()

    assert loss(num_items=7) == pytest.approx(loss(), rel=1e-6)  # the empty response is none
    assert loss(num_items=torch.tensor(14.0)) == pytest.approx(loss() / 2, rel=1e-6)
    assert loss(reduction="token", num_items=COUNT) == pytest.approx(loss(reduction="token"), rel=1e-6)


def test_nothing_to_score_is_a_loss_of_zero_that_reaches_every_parameter(teacher: nn.Module) -> None:
    student = tiny_model(0)
    output = vgs_step(student, teacher, PROCESSOR, SAMPLES[:2], [[], []])
    found = gradients(student, output.loss)
    assert output.loss.item() == 0.0 and len(output.standard) == 0
    assert found.keys() == {name for name, _ in student.named_parameters()}
    assert not any(x.any() for x in found.values())


# ---- models as loops hold them


def test_a_peft_student(teacher: nn.Module) -> None:
    student = get_peft_model(tiny_model(0), LoraConfig(r=2, target_modules=["q_proj"]))
    output = vgs_step(student, teacher, PROCESSOR, SAMPLES, RESPONSES)
    plain = vgs_step(tiny_model(0), teacher, PROCESSOR, SAMPLES, RESPONSES)
    assert output.loss.item() == pytest.approx(plain.loss.item(), rel=1e-5), "a new adapter is the identity"
    assert all("lora" in name for name in gradients(student, output.loss))


def test_a_compiled_student(teacher: nn.Module) -> None:
    compiled = torch.compile(student := tiny_model(0), backend="eager")
    output = vgs_step(compiled, teacher, PROCESSOR, SAMPLES, RESPONSES)
    assert torch.equal(output.loss, vgs_step(student, teacher, PROCESSOR, SAMPLES, RESPONSES).loss)


def test_accelerates_mixed_precision_is_kept(accelerator: Callable[..., Accelerator]) -> None:
    """accelerate puts a model's forward into autocast; ``vgs_step`` runs in its place, in the same autocast."""
    prepare, dtypes = accelerator(mixed_precision="bf16"), []
    student, teacher = prepare.prepare(tiny_model(0)), prepare.prepare_model(tiny_model(1), evaluation_mode=True)
    student.model.language_model.layers[0].mlp.down_proj.register_forward_hook(lambda *x: dtypes.append(x[2].dtype))
    output = vgs_step(student, teacher, PROCESSOR, SAMPLES, RESPONSES)
    assert set(dtypes) == {torch.bfloat16} and output.loss.dtype == torch.float32
    bare = tiny_model(0)
    with torch.autocast("cpu", torch.bfloat16):
        expected = vgs_step(bare, tiny_model(1), PROCESSOR, SAMPLES, RESPONSES)
    assert torch.equal(output.loss, expected.loss)
    assert_close(gradients(student, output.loss), gradients(bare, expected.loss), 0.0)
    full = vgs_step(bare, tiny_model(1), PROCESSOR, SAMPLES, RESPONSES)
    assert not torch.equal(output.loss, full.loss)
    with torch.no_grad():
        student(input_ids=torch.tensor([[8, 9]]))
    assert dtypes[-1] == torch.bfloat16, "accelerate's forward is back in its place"


# ---- ranks


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What every rank of every case reports; all cases share a launch."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(SUPPORT / "one_step_processes.py", RANKS, str(folder), *CASES, timeout=300)
    return {
        name: [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(RANKS)] for name in CASES
    }


def single(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after the same steps by one process on the joined batch."""
    student, teacher, optimizer = models(CASES[name])
    before = {key: x.clone() for key, x in student.state_dict().items()}
    train(replace(CASES[name], calls=1), student, teacher, optimizer, lambda loss: loss.backward(), None)
    return before, student.state_dict()


def trained(key: str) -> bool:
    """Whether a parameter of a PEFT student is trained."""
    return "lora_" in key or "modules_to_save" in key


def drift(reports: list[dict[str, Any]]) -> float:
    """The greatest difference between the weights of two ranks."""
    one, other = (report["weights"] for report in reports)
    return max((one[key] - other[key]).abs().max().item() for key in one)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.inside and not case.half])
@pytest.mark.slow
def test_ranks_are_one_process(name: str, reports: dict[str, list[dict[str, Any]]]) -> None:
    before, expected = single(name)
    sharded = "FSDPPeftModel" if CASES[name].lora else "FSDPQwen3VLForConditionalGeneration"
    wrapper = {"ddp": "DistributedDataParallel", "fsdp": sharded}[CASES[name].engine]
    assert [report["wrapper"] for report in reports[name]] == [wrapper] * RANKS
    assert drift(reports[name]) == 0.0
    for key, value in reports[name][0]["weights"].items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
        assert torch.equal(value, before[key]) == (CASES[name].lora is not None and not trained(key)), key


def test_without_the_wrappers_forward_replicas_drift_apart(reports: dict[str, list[dict[str, Any]]]) -> None:
    assert drift(reports["ddp_outside"]) > 1e-3
    assert drift(reports["ddp_half"]) == 0.0


def test_ranks_keep_accelerates_mixed_precision(reports: dict[str, list[dict[str, Any]]]) -> None:
    assert [report["dtypes"] for report in reports["ddp_half"]] == [{torch.bfloat16}] * RANKS
    assert [report["dtypes"] for report in reports["ddp"]] == [{torch.float32}] * RANKS


def test_the_batches_of_the_ranks_are_uneven() -> None:
    """Else the mean over each rank would do."""
    assert [count(CASES["ddp"], step) for step in range(3)] == [7, 4, 4]
    assert [count(CASES["ddp_calls"], step) for step in range(3)] == [17, 10, 17]


# ---- what a user can get wrong


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"objective": "vgss"}, ValueError, r"objective 'vgss' is not known; did you mean 'vgs'\?"),
        ({"objective": "vcsd"}, ConfigError, "needs the view control of the teacher, and vgs_step has images and text"),
        ({"objective": "visual_opsd"}, ConfigError, "has a teacher of kind 'ema', the student's own weights"),
        ({"reduction": "mean"}, ValueError, "reduction must be one of trajectory, token, got 'mean'"),
        ({"kernel": "flash"}, ValueError, "kernel must be one of auto, dense, flex, varlen, got 'flash'"),
        ({"responses": RESPONSES[:1]}, ValueError, "responses holds entries for 1 samples, expected 4"),
        (
            {"responses": [[1, 2]] * 4},
            TypeError,
            r"responses\[0\] must be a list of responses, each a list of",
        ),
        (
            {"responses": [[[9]], [[9], [9, SPECIAL.index(IMAGE)]], [], []]},
            ValueError,
            r"responses\[1\]\[1\] contains the image or video token 3",
        ),
    ],
)
def test_mistakes(teacher: nn.Module, options: dict[str, Any], error: type, message: str) -> None:
    arguments = {"samples": SAMPLES, "responses": RESPONSES, **options}
    with pytest.raises(error, match=message):
        vgs_step(tiny_model(0), teacher, PROCESSOR, **arguments)


def test_the_kind_of_the_output(teacher: nn.Module) -> None:
    def kind(*objective: Any, **options: Any) -> type:
        return type(vgs_step(tiny_model(0), teacher, PROCESSOR, SAMPLES, RESPONSES, *objective, **options))

    assert kind() is VGSOutput
    assert kind("opd") is DivergenceOutput
    assert kind(VGSObjective(gamma=0.0, lam=0.0), return_terms=False) is DivergenceOutput
