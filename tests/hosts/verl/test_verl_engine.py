"""verl's engine with VGS: losses and gradients of plain models, however verl cuts the batch, on one rank and on two."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import torchrun
from torch import Tensor
from transformers import AutoModelForImageTextToText
from verl_batches import plain_loss, rows_of, save_models

ROOT = Path(__file__).parents[3]
WORKER = Path(__file__).parent / "verl_engine.py"
ON_ONE = (
    "all",
    "two",
    "one",
    "dynamic",
    "token",
    "apart",
    "opd",
    "hybrid",
    "lora",
    "half",
    "plain",
)  # last: verl patches classes
ON_TWO = ("all", "one", "token")
Measured = Callable[[str, float], float]
TERMS = ("standard", "visual", "language", "vds", "gate")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="session")
def reports(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """ranks -> case -> the report of every rank."""
    folder, found = tmp_path_factory.mktemp("reports"), {}
    for ranks, names in ((1, ON_ONE), (2, ON_TWO)):
        torchrun(
            WORKER, ranks, str(models), str(folder), *names, timeout=900, VERL_ENGINE_VENDOR="vgs", TRITON_INTERPRET="1"
        )
        found[ranks] = {
            name: [torch.load(folder / f"{name}.{ranks}.{rank}.pt") for rank in range(ranks)] for name in names
        }
    return found


@pytest.fixture(scope="session")
def plain(models: Path) -> dict[str, tuple[float, dict[str, Tensor], dict[str, Tensor]]]:
    """reduction -> loss, gradients and means of the terms, of plain models whose methods verl has not replaced."""
    teacher = AutoModelForImageTextToText.from_pretrained(models / "teacher")
    found = {}
    for reduction in ("trajectory", "token"):
        student = AutoModelForImageTextToText.from_pretrained(models / "student")
        assert type(student.model).forward.__module__.startswith("transformers.")
        loss, means = plain_loss(student, teacher, *rows_of(models, student), reduction)
        loss.backward()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        found[reduction] = loss.item(), gradients, means
    return found


def gap(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of a gradient, as a share of its parameter's largest entry (of 1e-3 where all are small)."""
    assert actual.keys() == expected.keys() != set()
    return max(((actual[name] - x).abs().max() / x.abs().max().clamp(min=1e-3)).item() for name, x in expected.items())


def loss_of(reports: list[dict[str, Any]]) -> float:
    """As verl reports it: summed over micro-batches, averaged over ranks."""
    return sum(sum(report["losses"]) for report in reports) / len(reports)


def compare(found: list[dict[str, Any]], loss: float, gradients: dict[str, Tensor], measured: Measured) -> None:
    """The loss and every gradient, on every rank, against plain models."""
    assert measured("of a loss's value", abs(loss_of(found) - loss) / loss) < 1e-5
    for report in found:
        assert measured("of a parameter's largest gradient", gap(report["gradients"], gradients)) < 1e-4


@pytest.mark.parametrize(
    ("ranks", "name"), [(1, "all"), (1, "two"), (1, "one"), (1, "dynamic"), (1, "apart"), (2, "all"), (2, "one")]
)
def test_losses_and_gradients_are_those_of_plain_models(
    reports: Any, plain: Any, measured: Measured, ranks: int, name: str
) -> None:
    found, (loss, gradients, means) = reports[ranks][name], plain["trajectory"]
    assert {report["engine"] for report in found} == {"VGSEngine"}
    compare(found, loss, gradients, measured)
    for term in TERMS:
        values = [sum(report["metrics"][f"vgs/{term}"]) for report in found]
        assert sum(values) / ranks == pytest.approx(means[term].item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_mean_over_tokens_with_a_whole_offloaded_teacher(
    reports: Any, plain: Any, measured: Measured, ranks: int
) -> None:
    loss, gradients, _ = plain["token"]
    compare(reports[ranks]["token"], loss, gradients, measured)


def test_another_loss_without_the_text_view(reports: Any, plain: Any) -> None:
    (found,) = reports[1]["opd"]
    assert loss_of([found]) > 0 and "vgs/divergence" in found["metrics"] and "vgs/visual" not in found["metrics"]
    assert gap(found["gradients"], plain["trajectory"][1]) > 0.1


def test_the_policy_loss_is_added_with_its_coefficient(reports: Any) -> None:
    (both,), (ours,), (theirs,) = (reports[1][name] for name in ("hybrid", "token", "plain"))
    assert theirs["engine"] == "FSDPEngineWithLMHead"
    assert sum(both["losses"]) == pytest.approx(sum(ours["losses"]) + 0.3 * sum(theirs["losses"]), rel=1e-5)
    expected = {name: x + 0.3 * theirs["gradients"][name] for name, x in ours["gradients"].items()}
    assert gap(both["gradients"], expected) < 1e-4
    assert {"actor/pg_loss", "vgs/standard"} <= set(both["metrics"])


def test_an_adapter_alone_is_trained(reports: Any, plain: Any) -> None:
    (found,) = reports[1]["lora"]
    assert found["gradients"] and all("lora_" in name for name in found["gradients"])
    assert loss_of([found]) == pytest.approx(plain["trajectory"][0], rel=1e-5)  # a fresh adapter changes nothing


def test_bfloat16_is_near(reports: Any, plain: Any) -> None:
    (found,), (loss, gradients, _) = reports[1]["half"], plain["trajectory"]
    assert loss_of([found]) == pytest.approx(loss, rel=0.05)
    ours, expected = (torch.cat([x[name].flatten() for name in gradients]) for x in (found["gradients"], gradients))
    assert torch.cosine_similarity(ours, expected, dim=0) > 0.95


def test_the_launch_script_has_settings_that_verl_takes(tmp_path: Path) -> None:
    """verl composes its config from them, on two machines, and finds nothing wrong in it; nothing is started."""
    script = ROOT / "configs" / "hosts" / "verl" / "train.sh"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "TRAIN": "x.parquet", "NODES": "2"}
    command = ["bash", str(script), "--cfg", "job"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    sentence, _, text = done.stdout.partition("\n")
    assert sentence.startswith("verl trains with VGS: ")
    (tmp_path / "job.yaml").write_text(text)
    code = f"""
from omegaconf import OmegaConf
from verl.utils.config import validate_config
config = OmegaConf.load({str(tmp_path / "job.yaml")!r})
validate_config(config, use_reference_policy=False, use_critic=False)
print(config.trainer.nnodes, config.actor_rollout_ref.rollout.agent.default_agent_loop)
print(OmegaConf.to_container(config.ray_kwargs.ray_init.runtime_env.env_vars))
"""
    checked = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert checked.returncode == 0, checked.stderr[-3000:]
    *_, nodes, variables = checked.stdout.splitlines()
    assert nodes == "2 vgs_single_turn"
    assert "'VERL_ENGINE_VENDOR': 'vgs'" in variables and "configs/hosts/verl/vgs.yaml" in variables


def check(**variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
    command = [sys.executable, "-m", "vgs.integrations.verl"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_the_command_says_whether_verl_trains_with_vgs() -> None:
    done = check(VERL_ENGINE_VENDOR="vgs", VGS_OPTIONS='{"teacher": "some/teacher", "objective": "opd"}')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "verl trains with VGS: objective opd, teacher some/teacher."


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"VERL_ENGINE_VENDOR": "nvidia"}, "VERL_ENGINE_VENDOR must be 'vgs'; without it verl takes its own engine."),
        ({"VERL_ENGINE_VENDOR": "vgs", "VGS_OPTIONS": "{}"}, "VGS_OPTIONS must have the option teacher"),
    ],
)
def test_the_command_stops_with_one_sentence(variables: dict[str, str], sentence: str) -> None:
    done = check(**variables)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {sentence}")
