"""``objective: NAME``: how a config and the command line name what is minimised, and what is refused at start-up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from tiny import SPECIAL, WORDS, save_tiny_checkpoint, tiny_image, tiny_samples, trainer_options
from trainers import make_trainer
from transformers.utils import logging

from vgs import VGSConfig
from vgs.cli import main as cli
from vgs.cli import runs
from vgs.errors import ConfigError
from vgs.objectives.presets import PRESETS, TEACHERS, VIEWS, find_preset

CONFIGS = Path(__file__).parents[2] / "configs" / "presets"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of tiny models and data on the disk, without an objective."""
    for seed, role in enumerate(("student", "teacher")):
        save_tiny_checkpoint(tmp_path / role, seed=seed)
    rows = []
    for index in range(4):
        tiny_image(index).save(tmp_path / f"{index}.png")
        rows.append({"question": "what is in the picture ?", "answer": "a", "images": [f"{index}.png"]})
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    content = {
        "student": {"path": str(tmp_path / "student")},
        "teacher": {"path": str(tmp_path / "teacher")},
        "data": {"train": {"path": str(data)}},
        "training": trainer_options(tmp_path / "run", max_steps=1),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def without_teacher(config: Path) -> Path:
    """The config without its teacher."""
    content = yaml.safe_load(config.read_text())
    del content["teacher"]
    config.write_text(yaml.safe_dump(content))
    return config


def test_presets_are_complete() -> None:
    names = "gkd opd opsd visual_opsd vision_opd va_opd v_zero vcsd vgs vgs_adaptive language_steering"
    assert set(PRESETS) == set(names.split())
    for name, preset in PRESETS.items():
        assert preset.name == name and preset.paper.count(".") == 1 and preset.equation
        assert preset.teacher in TEACHERS and preset.views <= set(VIEWS)
        assert (preset.teacher == "ema") == (preset.ema_decay is not None)
        assert ("control" in preset.views) == (preset.control is not None)
        assert preset.settings.get("num_generations", 1) >= preset.generations


@pytest.mark.parametrize("name", PRESETS)
def test_the_shipped_config_is_a_valid_run(name: str, tmp_path: Path) -> None:
    settings = cli.load_config(CONFIGS / f"{name}.yaml", ["--use_cpu", "true", "--output_dir", str(tmp_path)])
    assert settings["objective"] == settings["training"]["preset"] == name
    arguments, _ = runs.TRAINERS[runs.trainer_kind(settings)]()
    args = arguments(**settings["training"])
    preset = args.preset_in_force
    assert preset.name == name and preset.paper in (CONFIGS / f"{name}.yaml").read_text()
    published = PRESETS[name].configured(1.0).divergence
    assert preset.divergence == published, "the config trains what the preset says"
    assert (preset.teacher == "separate") == ("teacher" in settings)
    if preset.teacher != "separate":
        assert (args.teacher, args.ema_decay) == (preset.teacher, preset.ema_decay or args.ema_decay)
        assert settings["data"]["train"]["privileged_images"]


def test_every_shipped_config_has_a_preset() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(PRESETS)


def test_an_objective_fills_what_is_left_open(config: Path) -> None:
    assert "preset" not in cli.load_config(config)["training"]
    training = cli.load_config(config, ["--objective", "va_opd"])["training"]
    assert (training["preset"], training["num_generations"]) == ("va_opd", 4)
    training = cli.load_config(config, ["--objective=va_opd", "--num_generations", "2"])["training"]
    assert training["num_generations"] == 2
    assert cli.load_config(config, ["--preset", "va_opd"])["training"]["num_generations"] == 4
    assert cli.load_config(config, ["--objective", "VA_OPD"])["training"]["preset"] == "va_opd"
    grpo = cli.load_config(config, ["--objective", "va_opd", "--trainer", "grpo"])["training"]
    assert "num_generations" not in grpo, "reinforcement has its own"


@pytest.mark.parametrize("name", PRESETS)
def test_every_way_to_name_a_preset_means_the_same(name: str, config: Path, tmp_path: Path) -> None:
    """The class alone, the command line, and the shipped config."""
    options = ["--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path), "--full_vocabulary", "false"]
    options = options if PRESETS[name].teacher != "separate" else options[:-2]
    config = without_teacher(config) if PRESETS[name].teacher != "separate" else config
    runs_of = [cli.load_config(path, [*options, "--objective", name]) for path in (CONFIGS / f"{name}.yaml", config)]
    settings, _ = runs.TRAINERS[runs.trainer_kind(runs_of[0])]()
    given = [{**run["training"], "per_device_train_batch_size": 8} for run in runs_of]
    alone = {key: given[1][key] for key in ("output_dir", "use_cpu", "bf16", "per_device_train_batch_size")}
    if PRESETS[name].teacher != "separate":
        alone["full_vocabulary"] = False
    alone |= {"preset": name, "num_generations": PRESETS[name].generations}
    first, *others = (settings(**x) for x in (*given, alone))
    for args in others:
        assert args.preset_in_force == first.preset_in_force
        assert (args.loss_reduction, args.schedule) == (first.loss_reduction, first.schedule)
    assert first.preset_in_force.divergence == PRESETS[name].divergence


def test_beta_is_that_of_gkd(tmp_path: Path) -> None:
    def found(**options) -> float:
        return VGSConfig(**trainer_options(tmp_path, preset="gkd", **options)).preset_in_force.divergence.beta

    assert (found(), found(beta=0.0), found(beta=1.0), found(divergence={"beta": 0.3})) == (0.5, 0.0, 1.0, 0.3)
    with pytest.raises(ValueError, match=r"beta=0.1 and divergence=\{'beta': 0.3\} differ"):
        found(beta=0.1, divergence={"beta": 0.3})
    args = VGSConfig(**trainer_options(tmp_path, preset="opd"))
    assert args.beta == 1.0 and dataclasses.replace(args, preset="gkd", beta=None).beta == 0.5


def test_the_reduction_is_the_presets_unless_given(tmp_path: Path) -> None:
    for given, expected in ((None, "token"), ("trajectory", "trajectory"), ("token", "token")):
        assert VGSConfig(**trainer_options(tmp_path, preset="gkd", loss_reduction=given)).loss_reduction == expected


@pytest.mark.parametrize("options", [{}, {"prior": "frozen"}, {"prior": "ema"}, {"schedule": "adaptive"}])
@pytest.mark.parametrize("name", ["vgs", "language_steering"])
def test_a_loss_derived_for_the_reverse_kl_takes_no_other(tmp_path: Path, name: str, options: dict) -> None:
    if name == "language_steering" and "prior" in options:
        return
    args = trainer_options(tmp_path, preset=name, **options)
    VGSConfig(**args, divergence={})
    with pytest.raises(ValueError, match=f"divergence must be left out for preset='{name}', got {{'clip': 1.0}}"):
        VGSConfig(**args, divergence={"clip": 1.0})


def test_settings_that_a_preset_does_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.get_logger("vgs").addHandler(caplog.handler)
    try:
        VGSConfig(**trainer_options(tmp_path, preset="opd", gamma=5.0, detach_prior=False, control_kind="black"))
        expected = "preset='opd' does not read control_kind='black', detach_prior=False, gamma=5.0: without effect."
        assert expected in caplog.text
        caplog.clear()
        VGSConfig(**trainer_options(tmp_path, preset="vgs", gamma=5.0, schedule="adaptive", lp_every=2))
        VGSConfig(**trainer_options(tmp_path, preset="vgs_adaptive", gamma=5.0, prior="ema", prior_decay=0.9))
        VGSConfig(**trainer_options(tmp_path, preset="vcsd", control_kind="noise"))
        VGSConfig(**trainer_options(tmp_path, preset="opd"))
        assert "does not read" not in caplog.text
    finally:
        logging.get_logger("vgs").removeHandler(caplog.handler)


@pytest.mark.parametrize("word", ["no", "off", "false"])
def test_a_bare_no_is_a_word_where_one_is_expected(config: Path, word: str) -> None:
    training = cli.load_config(config, ["--eval_strategy", word, "--log_terms", word])["training"]
    assert (training["eval_strategy"], training["log_terms"]) == ("no", False)


def test_the_objective_picks_the_trainer(config: Path) -> None:
    kinds = {name: runs.trainer_kind({"objective": name}) for name in PRESETS}
    assert {name for name, kind in kinds.items() if kind == "self"} == {"opsd", "visual_opsd", "vision_opd"}
    assert runs.trainer_kind({}) == "distillation" and runs.trainer_kind({"trainer": "grpo"}) == "grpo"
    assert runs.trainer_kind({"training": {"preset": "opsd"}}) == "self"
    # Settings of another trainer are unknown keys.
    with pytest.raises(ConfigError, match="Unknown key 'ema_decay'"):
        cli.load_config(config, ["--objective", "opd", "--ema_decay", "0.9"])
    cli.load_config(without_teacher(config), ["--objective", "opsd", "--ema_decay", "0.9"])


def test_self_distillation_needs_no_teacher(config: Path) -> None:
    with pytest.raises(ConfigError, match="section 'teacher' has no effect with objective 'visual_opsd'"):
        cli.load_config(config, ["--objective", "visual_opsd"])
    assert "teacher" not in cli.load_config(without_teacher(config), ["--objective", "visual_opsd"])
    with pytest.raises(ValueError, match=r"needs teacher\.path"):
        cli.load_config(config, ["--objective", "opd"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--objective", "va_odp"], "objective 'va_odp' is not known; did you mean 'va_opd'?"),
        (["--objective", "zzz"], "objective 'zzz' is not known; expected one of gkd, opd,"),
        (["--objective", "gkd", "--training.preset", "opd"], "objective 'gkd' and training.preset 'opd' differ"),
        (["--trainer", "ppo"], "trainer must be 'grpo' or left out, got 'ppo'"),
        (["--objective", "va_opd", "--num_generations", "1"], "num_generations must be >= 2 for preset='va_opd'"),
        (["--objective", "va_opd", "--loss_reduction", "token"], "needs loss_reduction=\"trajectory\", got 'token'"),
        (["--objective", ""], "objective '' is not known; expected one of gkd, opd,"),
        (["--objective", "['opd']"], "objective ['opd'] is not known; expected one of gkd, opd,"),
        (["--preset", "va_odp"], "training.preset 'va_odp' is not known; did you mean 'va_opd'?"),
        (["--objective", "vgs_adaptive", "--schedule", "constant"], "schedule must be 'adaptive' or left out for"),
        (
            ["--objective", "opd", "--beta", "0.5"],
            "training.beta has no effect with objective 'opd' (it belongs to 'gkd'",
        ),
        (["--objective", "gkd", "--beta", "abc"], "training.beta must be a number, got 'abc'"),
        (["--objective", "gkd", "--divergence", "{beta: abc}"], "beta must be a number, got str"),
        (["--divergence", "abc"], "training.divergence must be a section of keys, got 'abc'"),
        (["--divergence", "[1]"], "training.divergence must be a section of keys, got [1]"),
        (["--divergence", "{clip: 0.1}"], "divergence must be left out for preset='vgs', got {'clip': 0.1}"),
        (["--objective", "opd", "--divergence", "{temperature: 3.0}"], "divergence has the key 'temperature'"),
        (
            ["--objective", "opd", "--divergence", "{support: teacher_top_k, top_k: 2.5}"],
            "top_k must be an int, got float",
        ),
        (
            ["--objective", "visual_opsd", "--divergence", "{top_k: 5}", "--full_vocabulary", "true"],
            "divergence has top_k=5, which needs full_vocabulary=False or a support",
        ),
        (
            ["--objective", "gkd", "--trainer", "grpo", "--num_generations", "4", "--beta", "0.5"],
            "beta must be 0.0, got 0.5",
        ),
        (
            ["--objective", "va_opd", "--trainer", "grpo", "--num_generations", "4"],
            "preset='va_opd' with divergence=None cannot be mixed with a policy gradient",
        ),
        (["--objective", "opd", "--divergence", "{clup: 1}"], "divergence has the key 'clup'; expected some of"),
        (["--objective", "opd", "--divergence", "{clip: -1}"], "clip must be >= 0, got -1"),
        (["--objective", "vcsd", "--control_kind", "blur"], "control_kind must be one of black, pixelated, noise"),
        (
            ["--objective", "opd", "--divergence", "{support: teacher_top_k, top_k: 1000}"],
            f"top_k=1000 likeliest tokens, but the vocabulary has {len(SPECIAL) + len(WORDS)}",
        ),
        (["--objective", "opsd"], "preset='opsd' needs privileged context in data.train"),
    ],
)
def test_refused_at_start_up(config: Path, capsys: pytest.CaptureFixture, overrides: list[str], message: str) -> None:
    if {"opsd", "visual_opsd"} & set(overrides):
        config = without_teacher(config)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", str(config), *overrides])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_preset_trains_from_the_command_line(config: Path, tmp_path: Path) -> None:
    assert cli.main(["train", str(config), "--objective", "vcsd", "--num_generations", "2"]) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_degraded_images_need_images(tmp_path: Path) -> None:
    samples = [{name: value for name, value in sample.items() if name != "images"} for sample in tiny_samples(4)]
    with pytest.raises(ConfigError, match="preset='vcsd' degrades images, but train_dataset has no column 'images'"):
        make_trainer(tmp_path, preset="vcsd", samples=samples)


@pytest.mark.parametrize("name", ["vgs", "vgs_adaptive", "language_steering"])
def test_steering_needs_images(tmp_path: Path, name: str) -> None:
    samples = [{key: value for key, value in sample.items() if key != "images"} for sample in tiny_samples(4)]
    with pytest.raises(ConfigError, match=f"preset='{name}' compares prompts with and without images, but"):
        make_trainer(tmp_path, preset=name, samples=samples)
    make_trainer(tmp_path, preset="opd", samples=samples)
    if name == "vgs":
        make_trainer(tmp_path, preset=name, samples=samples, gamma=0.0, lam=0.0)


def test_a_trainer_with_another_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="teacher of kind 'ema', which VGSTrainer has not"):
        make_trainer(tmp_path, preset="visual_opsd", eta=1.0)


def test_only_steering_measures_eta(tmp_path: Path) -> None:
    for name in PRESETS:
        generations = PRESETS[name].generations
        args = VGSConfig(**trainer_options(tmp_path, preset=name, num_generations=generations, eta="measure"))
        assert args.fixed_eta == (None if name in ("vgs", "vgs_adaptive") else 1.0)
    assert VGSConfig(**trainer_options(tmp_path, preset="vgs_adaptive")).objective(1.0).schedule == "adaptive"


def test_names_are_found() -> None:
    assert find_preset("vgs") is find_preset("VGS") is PRESETS["vgs"]
    with pytest.raises(ValueError, match="did you mean 'v_zero'"):
        find_preset("vzero")
