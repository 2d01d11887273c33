"""The command line on a tiny local dataset and saved tiny checkpoints, and the configs that are shipped."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import yaml
from tiny import save_tiny_checkpoint, tiny_image, trainer_options

from vgs import VGSConfig
from vgs.cli import main as cli
from vgs.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A YAML file for four image questions and two saved models."""
    rows = []
    for index, (question, answer) in enumerate([("red ?", "a"), ("blue ?", "b"), ("what is in ?", "c"), ("a ?", "d")]):
        buffer = io.BytesIO()
        tiny_image(index).save(buffer, format="PNG")
        rows.append({"problem": f"<image>{question}", "answer": answer, "image": buffer.getvalue()})
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    part = {"path": str(tmp_path / "data.parquet"), "question": "problem", "images": "image"}
    training = trainer_options(tmp_path / "run", max_steps=2, eta=0.5, max_prompt_length=14)
    sections = {
        "student": {"path": str(save_tiny_checkpoint(tmp_path / "student", seed=0))},
        "teacher": {"path": str(save_tiny_checkpoint(tmp_path / "teacher", seed=1, hidden=48)), "dtype": "float32"},
        "data": {"train": part, "eval": {**part, "limit": 2}},
        "training": {**training, "per_device_train_batch_size": 2},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def test_train_then_eval(config: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> None:
    assert cli.main(["train", str(config), "--learning_rate", "1e-2", "--gamma=0.5"]) == 0
    assert "1 of 4 prompts are longer than 14 tokens: dropped" in caplog.text
    run = config.parent / "run"
    saved = torch.load(run / "training_args.bin", weights_only=False)
    assert (saved.gamma, saved.learning_rate, saved.max_steps) == (0.5, 0.01, 2)
    before, after = (
        transformers.AutoModelForImageTextToText.from_pretrained(path) for path in (config.parent / "student", run)
    )
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert json.loads((run / "eval_results.json").read_text())["eval_accuracy"] in (0.0, 0.5, 1.0)
    capsys.readouterr()

    out = config.parent / "eval.json"
    assert cli.main(["eval", str(config), "--model", str(run), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["samples"] == 2
    assert 0 <= result["accuracy"] <= 1
    assert 1 <= result["mean_length"] <= 6
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--resume_from_checkpoint", "x"],
            "'resume_from_checkpoint' in section 'training'; use --resume.",
        ),
        (["--model_init_kwargs", "{}"], "Unknown key 'model_init_kwargs' in section 'training'; use section student."),
        (["--num_generations", "3"], "num_generations=3 must divide"),
        (["--output_dir", "/proc/nothing"], "output_dir must be a folder that can be written to"),
    ],
)
def test_a_run_that_cannot_start_ends_in_one_sentence(
    config: Path, capsys: pytest.CaptureFixture, overrides: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["train", str(config), *overrides])
    assert error.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_file_that_is_not_yaml(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "x.yaml").write_text("training: [1, 2")
    with pytest.raises(SystemExit):
        cli.main(["plan", str(tmp_path / "x.yaml")])
    assert "x.yaml is not YAML" in capsys.readouterr().err


def test_resume_finds_the_latest_checkpoint(config: Path) -> None:
    assert cli.main(["train", str(config), "--save_strategy=steps", "--save_steps=1", "--max_steps=1"]) == 0
    settings = cli.load_config(config, ["--save_strategy=steps", "--save_steps=1"])
    with pytest.raises(ConfigError, match="max_steps was 1, now 2"):
        cli.train(settings, resume=True)
    trainer = cli.train(settings, resume=True, allow_changes=True)
    assert [x["step"] for x in trainer.state.log_history if "loss" in x] == [1, 2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--gama", "1"], "Unknown key 'gama' in section 'training'; did you mean 'gamma'?"),
        (["--data.train.anwser", "x"], "Unknown key 'anwser' in section 'train'; did you mean 'answer'?"),
        (["--studnet.path", "x"], "did you mean 'student'?"),
        (["--student.qqq", "x"], "Unknown key 'qqq' in section 'student'; valid keys: attn_implementation"),
        (["--task", "letters"], "task must be 'digits' or left out, got 'letters'"),
        (["--gamma"], "--gamma needs a value"),
        (["gamma", "1"], "Expected --key value, got 'gamma'"),
        (["--eta.x", "1", "--lam.y.z", "1"], "Unknown key 'eta'"),
        (["--training.output_dir.x", "1"], "--training.output_dir.x: 'output_dir' is not a section"),
        (["--training", "3"], "section 'training' must be a section of keys, got 3"),
    ],
)
def test_errors_in_a_config(config: Path, capsys: pytest.CaptureFixture, overrides: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", str(config), *overrides])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_and_a_missing_section(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", str(tmp_path / "none.yaml")])
    assert "none.yaml" in capsys.readouterr().err
    (tmp_path / "half.yaml").write_text("student: {path: x}\ndata: {train: {path: y}}\n")
    with pytest.raises(ValueError, match=r"needs teacher.path"):
        cli.load_config(tmp_path / "half.yaml")


def test_overrides_reach_nested_sections_and_numbers(config: Path) -> None:
    options = ["--data.train.limit", "3", "--learning_rate", "1e-5", "--eta", "paper-4b", "--training.lam=1"]
    settings = cli.load_config(config, options)
    assert settings["data"]["train"]["limit"] == 3
    training = settings["training"]
    assert (training["learning_rate"], training["eta"], training["lam"]) == (1e-5, "paper-4b", 1)


@pytest.mark.parametrize(("student", "eta"), [("2b", 0.41), ("4b", 0.36)])
def test_the_papers_settings(student: str, eta: float, tmp_path: Path) -> None:
    """Section 4 of arXiv 2606.00564."""
    settings = cli.load_config(CONFIGS / f"qwen3_vl_8b_to_{student}.yaml", ["--use_cpu", "true"])
    args = VGSConfig(**{**settings["training"], "output_dir": str(tmp_path)})
    objective = args.objective(args.fixed_eta)
    assert (objective.gamma, objective.lam, objective.vds_quantile, objective.eta) == (2.0, 0.01, 0.7, eta)
    assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 512
    assert (args.learning_rate, args.weight_decay, args.num_train_epochs) == (1e-6, 1e-2, 1)
    assert args.lr_scheduler_type == "constant"
    assert args.optim.startswith("adamw_torch")
    assert (args.temperature, args.top_p, args.top_k) == (1.0, 1.0, 0)
    assert (args.max_prompt_length, args.max_completion_length) == (16384, 2048)
    assert student.upper() in settings["student"]["path"]
    assert "8B" in settings["teacher"]["path"]
    assert settings["data"]["train"]["path"].endswith("Vision-SR1-47K")
    assert "<reason>" in settings["data"]["train"]["system_prompt"]


def test_digits_config_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The shipped config on untrained models (training them takes minutes)."""
    from vgs.digits import models as digits_models
    from vgs.digits import task as digits

    processor = digits_models.build_processor()
    shape = digits_models.Shape(layers=1, width=32, heads=2, vision_layers=1)
    models = {
        role: digits_models.build_model(shape, processor, seed) for seed, role in enumerate(("teacher", "student"))
    }
    monkeypatch.setattr(digits, "pretrained", lambda role, cache, seed: (models[role], processor))
    options = ["--output_dir", str(tmp_path), "--use_cpu=true", "--max_steps=1", "--per_device_train_batch_size=4"]
    options += ["--max_completion_length=4", "--digits.train_size=8", "--digits.eval_size=3", "--disable_tqdm=true"]
    config = CONFIGS / "digits.yaml"
    assert cli.main(["train", str(config), *options]) == 0
    assert "eval_accuracy" in json.loads(capsys.readouterr().out.splitlines()[-1])
    assert cli.main(["eval", str(config), *options, "--model", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == 3


def test_demo_hands_over_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    demo = type(sys)("vgs.digits.demo")
    demo.run_demo = lambda *arguments: calls.append(arguments)
    monkeypatch.setitem(sys.modules, "vgs.digits.demo", demo)
    assert cli.main(["demo", "--out", "somewhere"]) == 0
    assert cli.main(["demo", "--quick", "--cache", "models"]) == 0
    assert calls == [(Path("somewhere"), None, False), (Path("runs/demo"), Path("models"), True)]


def test_importing_the_package_and_the_help_are_cheap() -> None:
    code = (
        "import sys, vgs, vgs.cli.main; vgs.cli.main.build_parser();"
        "heavy = {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules); assert not heavy, heavy;"
        "assert 'VGSTrainer' in dir(vgs); vgs.nothing"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError: module 'vgs' has no attribute 'nothing'" in result.stderr


def test_several_sets_to_evaluate_on_have_one_accuracy_each(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(config.read_text())
    part = content["data"]["eval"]
    content["data"]["eval"] = {"first": part, "second": {**part, "limit": 3}}
    content["scorer"] = "judge:yes"
    config.write_text(yaml.safe_dump(content))
    (tmp_path / "judge.py").write_text("def yes(response, gold):\n    return gold in 'ab'\n")
    assert cli.main(["train", str(config)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == {"eval_first_accuracy": 1.0, "eval_second_accuracy": 0.6667}
    assert cli.main(["eval", str(config)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: (each["accuracy"], each["samples"]) for name, each in found.items()} == {
        "first": (1.0, 2),
        "second": (2 / 3, 3),
    }
    assert cli.load_config(config)["data"]["eval.second"]["limit"] == 3
    for wrong, message in (
        ({"eval": part, "eval.other": part}, "data.eval must be one set, or several by name"),
        ({"eval": {"first": {"pth": "x"}}}, "Unknown key 'pth' in section 'first'"),
    ):
        config.write_text(yaml.safe_dump({**content, "data": {"train": content["data"]["train"], **wrong}}))
        with pytest.raises(ConfigError, match=message):
            cli.load_config(config)
