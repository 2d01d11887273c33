"""StudentCopy: averaged and frozen weights of the student, whole and sharded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from launch import SUPPORT, torchrun
from peft import LoraConfig, get_peft_model
from self_processes import CASES, run, teacher_weights
from selves import make_self_trainer
from tiny import tiny_model

from vgs.models.averaged import COPY_FILE, StudentCopy
from vgs.models.heads import read_head
from vgs.trainers.prior import CopyFollower


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def disturb(model: torch.nn.Module, scale: float, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def held(copy: StudentCopy, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    with copy.in_place(model):
        return state(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_that_of_a_plain_loop(dtype: torch.dtype) -> None:
    """Also in 16 bits, where 0.005 of a small difference is nothing."""
    model = tiny_model(0).to(dtype)
    copy = StudentCopy("ema", 0.995)
    copy.take(model)
    expected = {name: x.double() for name, x in state(model).items()}
    for step in range(20):
        disturb(model, 0.02, seed=step)
        expected = {name: 0.995 * expected[name] + 0.005 * x.double() for name, x in state(model).items()}
        copy.update(model)
    start = tiny_model(0).to(dtype).state_dict()
    for name, value in copy._kept.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)
        assert value.dtype == torch.float32 and not torch.equal(value, start[name].float())
    for name, value in held(copy, model).items():
        assert value.dtype == dtype and torch.equal(value, copy._kept[name].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["ema", "frozen"])
def test_the_student_gets_its_weights_back(source: str, dtype: torch.dtype) -> None:
    model = tiny_model(0).to(dtype).train()
    copy = StudentCopy(source, 0.5)
    copy.take(model)
    start, kept = state(model), {name: x.clone() for name, x in copy._kept.items()}
    disturb(model, 0.1)
    moved = state(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"), copy.in_place(model):
            assert not model.training and all(torch.equal(x, start[name]) for name, x in state(model).items())
            raise RuntimeError("out of memory")
        assert model.training and all(torch.equal(x, moved[name]) for name, x in state(model).items())
        assert all(torch.equal(x, kept[name]) for name, x in copy._kept.items())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("source", ["live", "frozen"])
def test_the_head_is_the_copys_while_a_graph_is_alive(source: str, tie: bool) -> None:
    model = tiny_model(0, tie=tie)
    copy = StudentCopy(source)
    copy.take(model)
    start = model.get_output_embeddings().weight.detach().clone()
    disturb(model, 0.1)
    now = model.get_output_embeddings().weight.detach().clone()
    head = read_head(model, torch.float32)
    loss = head.weight.square().sum()
    teacher = copy.head(model, torch.float32)
    assert torch.equal(teacher.weight, start if source == "frozen" else now) and not teacher.weight.requires_grad
    loss.backward()
    parameter = model.get_output_embeddings().weight
    torch.testing.assert_close(parameter.grad, 2 * now)
    assert parameter.requires_grad and len(list(model.parameters())) == len(list(tiny_model(0, tie=tie).parameters()))


def test_only_what_is_trained_is_kept() -> None:
    model = tiny_model(0)
    model.get_input_embeddings().requires_grad_(False)
    copy = StudentCopy("ema")
    copy.take(model)
    frozen = model.get_input_embeddings().weight
    assert sum(x.numel() for x in copy._kept.values()) == sum(p.numel() for p in model.parameters()) - frozen.numel()
    assert torch.equal(copy.head(model, torch.float32).weight, frozen)


def lora_model(**options: Any) -> torch.nn.Module:
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], **options}
    return get_peft_model(tiny_model(0, tie=False), LoraConfig(**settings))


@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_the_frozen_teacher_of_a_lora_student_is_the_base(extra: dict[str, Any]) -> None:
    model = lora_model(**extra)
    copy = StudentCopy("frozen")
    copy.check(model, flat=True)
    copy.take(model)
    assert not copy.taken
    disturb(model, 0.3)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    ids = torch.tensor([[9, 10, 11]])
    base = tiny_model(0, tie=False).eval()
    own = model.eval()(input_ids=ids).logits
    with copy.in_place(model), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    assert torch.equal(copy.head(model, torch.float32).weight, base.lm_head.weight)
    assert torch.equal(model(input_ids=ids).logits, own) and not torch.equal(own, base(input_ids=ids).logits)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def test_a_lora_start_that_changes_the_base_is_refused() -> None:
    model = lora_model(init_lora_weights="pissa")
    with pytest.raises(ValueError, match="init_lora_weights='pissa' changes the base"):
        StudentCopy("frozen").check(model, flat=False)
    StudentCopy("ema").check(model, flat=False)


@pytest.mark.parametrize("engine", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_shards_that_cannot_be_followed_are_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: DistributedType
) -> None:
    trainer = make_self_trainer(tmp_path)
    kind = type(trainer.accelerator)
    monkeypatch.setattr(kind, "distributed_type", engine)
    monkeypatch.setattr(kind, "is_fsdp2", False)
    with pytest.raises(ValueError, match=r"teacher='ema' needs parameters that are whole or sharded by FSDP2"):
        trainer.make_teachers()
    CopyFollower(trainer, StudentCopy("live"))
    monkeypatch.setattr(kind, "is_fsdp2", True)
    if engine == DistributedType.FSDP:
        CopyFollower(trainer, StudentCopy("ema"))


def test_a_checkpoint_brings_the_copy_back(tmp_path: Path) -> None:
    model = tiny_model(0).bfloat16()
    copy = StudentCopy("ema", 0.9)
    copy.take(model)
    disturb(model, 0.1)
    copy.update(model)
    copy.save(tmp_path, write=False)
    assert not (tmp_path / COPY_FILE).exists()
    copy.save(tmp_path, write=True)
    again = StudentCopy("ema", 0.9)
    again.load(tmp_path, model)
    assert again._kept.keys() == copy._kept.keys()
    assert all(torch.equal(x, copy._kept[name]) and x.dtype == torch.float32 for name, x in again._kept.items())
    model.get_input_embeddings().requires_grad_(False)
    with pytest.raises(ValueError, match=r"differ in 1 trained parameters, for example 'model.language_model.embed"):
        StudentCopy("ema").load(tmp_path, model)


def test_nothing_is_kept_or_written_of_a_live_student(tmp_path: Path) -> None:
    model, copy = tiny_model(0), StudentCopy("live")
    copy.take(model)
    copy.save(tmp_path, write=True)
    copy.load(tmp_path, model)
    assert not copy.taken and not list(tmp_path.iterdir())
    disturb(model, 0.1)
    now = state(model)
    assert all(torch.equal(x, now[name]) for name, x in held(copy, model).items())


# ---- several processes


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """What each of two ranks reports of a case; all cases share a launch."""
    folder = tmp_path_factory.mktemp("selves")
    launched = SimpleNamespace(done=False)

    def read(name: str) -> list[dict[str, Any]]:
        if not launched.done:
            launched.done = True
            torchrun(SUPPORT / "self_processes.py", 2, str(folder), *CASES, timeout=600)
        return [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(2)]

    return read


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_have_the_teacher_of_one_process(name: str, reports: Any, tmp_path: Path) -> None:
    one = run(name, tmp_path, single=True)
    expected, teacher = one.model.state_dict(), teacher_weights(one)
    trained = sum(x.numel() for x in (one.copy._kept or {}).values())
    for report in reports(name):
        assert report["engine"] == {"ddp": "MULTI_CPU", "fsdp": "FSDP"}[CASES[name][0]]
        assert report["survives"], "a checkpoint"
        for key, value in report["weights"].items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
            assert torch.equal(value, report["again"][key]), "the student has its weights back"
            torch.testing.assert_close(report["held"][key], teacher[key], rtol=1e-4, atol=1e-6)
        assert report["losses"] == pytest.approx([x["loss"] for x in one.state.log_history if "loss" in x], rel=1e-4)
        if CASES[name][0] == "fsdp" and trained:
            assert report["kept"] < 0.8 * trained, "a shard of the copy"
    moved = max((expected[key] - teacher[key]).abs().max().item() for key in expected)
    assert (moved > 1e-4) == (one.copy.taken), "the teacher is not the student"
