"""Every key has its type, stands once, and has an effect; else one sentence says so before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vgs.cli import main as cli
from vgs.cli.keys import REQUIRED, all_keys, training_keys
from vgs.cli.resolved import as_yaml, resolved, training_arguments
from vgs.errors import ConfigError
from vgs.trainers.kinds import TRAINERS

MODELS = {"student": {"path": "student"}, "teacher": {"path": "teacher"}, "data": {"train": {"path": "x.jsonl"}}}
CONFIGS = Path(__file__).parents[2] / "configs"


def load(tmp_path: Path, text: str, *overrides: str) -> dict:
    """The config of a file with two models, data and ``text``."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(MODELS) + text)
    return cli.load_config(tmp_path / "run.yaml", overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('training: {gradient_checkpointing: "false"}', "training.gradient_checkpointing must be true or false"),
        ('training: {learning_rate: "1e-4x"}', "training.learning_rate must be a number, got '1e-4x'"),
        ("training: {learning_rate: 1e-4x}", "training.learning_rate must be a number, got '1e-4x'"),
        ('training: {max_steps: "5"}', "training.max_steps must be a whole number \\(without quotes\\), got '5'"),
        ("training: {max_steps: 1.5}", "training.max_steps must be a whole number, got 1.5"),
        ("training: {max_steps: true}", "training.max_steps must be a whole number, got True"),
        ("training: {bf16: 1}", "training.bf16 must be true or false, got 1"),
        ("training: {output_dir: 3}", "training.output_dir must be a text, got 3"),
        ("training: {gamma: 1}\ntraining: {lam: 1}", "the key 'training' stands twice"),
        ("training: {gamma: 1, lam: 0, gamma: 2}", "the key 'gamma' stands twice"),
        ("training: {generation_kwargs: {max_new_token: 3}}", "did you mean 'max_new_tokens'"),
        ("training: {generation_kwargs: {max_new_tokens: 0}}", "training.generation_kwargs: "),
        ("lora: {rr: 8}", "Unknown key 'rr' in section 'lora'; did you mean 'r'"),
        ("lora: {bias: some}", "lora.bias must be 'none' or 'all' or 'lora_only', got 'some'"),
        ("digits: {cache: x}", "section 'digits' has no effect without task: digits"),
        ("rewards: [format]", "rewards has no effect without trainer: grpo"),
        ("objective: gkd\ntraining: {gamma: 2.0}", "training.gamma has no effect with objective 'gkd'"),
        ("objective: visual_opsd", "section 'teacher' has no effect with objective 'visual_opsd'"),
        ("training: {eval_strategy: steps}", "eval_strategy 'steps' has no effect without data.eval"),
        ("training: {eval_on_start: true}", "eval_on_start has no effect without data.eval"),
        ("training: {divergence: 3}", "training.divergence must be a section of keys, got 3"),
        ("lora: true", "section 'lora' must be a section of keys, got True"),
        ("task: digits", "section 'student' has no effect with task: digits"),
    ],
)
def test_refused_at_once(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    training = load(tmp_path, 'training: {learning_rate: 1e-6, weight_decay: "1e-2", max_steps: 1e2}')["training"]
    assert training == {"learning_rate": 1e-6, "weight_decay": 1e-2, "max_steps": 100}
    assert type(training["max_steps"]) is int


def test_null_and_empty_sections_are_left_out(tmp_path: Path) -> None:
    config = load(tmp_path, "lora:\ntraining: {learning_rate: null, max_prompt_length: null}")
    assert config == {**MODELS, "training": {"max_prompt_length": None}}


def test_rewards_are_those_of_training(tmp_path: Path) -> None:
    config = load(tmp_path, "trainer: grpo\nrewards: format")
    assert config["training"] == {"rewards": ["format"]} and "rewards" not in config
    with pytest.raises(ConfigError, match=r"rewards and training\.rewards are the same key"):
        load(tmp_path, "trainer: grpo\nrewards: [format]\ntraining: {rewards: [choice]}")


@pytest.mark.parametrize("kind", TRAINERS)
def test_every_key_has_a_meaning_and_a_default_of_its_type(kind: str) -> None:
    for section, keys in all_keys(kind).items():
        for key in keys.values():
            assert key.meaning, f"{section}.{key.name}"
            assert key.default is REQUIRED or key.default is None or key.leaves


def test_keys_are_listed(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["keys", "prior_decay"]) == 0
    assert capsys.readouterr().out.startswith("training.prior_decay: a number, default 0.995\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help-all"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"training.{name}" in shown for kind in TRAINERS for name in training_keys(kind))
    with pytest.raises(SystemExit) as stop:
        cli.main(["keys", "nothing like it"])
    assert stop.value.code == 2


@pytest.mark.parametrize("name", ["digits", "digits_grpo", "digits_visual_opsd", "presets/gkd", "presets/opsd"])
def test_the_resolved_config_is_the_same_run(name: str, tmp_path: Path) -> None:
    options = ["--use_cpu", "true", "--output_dir", str(tmp_path / "run")]
    config = cli.load_config(CONFIGS / f"{name}.yaml", options)
    args = training_arguments(config)
    (tmp_path / "again.yaml").write_text(as_yaml(resolved(config, args)))
    again = cli.load_config(tmp_path / "again.yaml")
    args_again = training_arguments(again)
    assert resolved(again, args_again) == resolved(config, args)
    different = {key for key, value in args.to_dict().items() if args_again.to_dict()[key] != value}
    assert different <= {"run_name", "logging_dir"}


def test_the_config_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    load(tmp_path, "training: {use_cpu: true, bf16: false, output_dir: run}")
    assert cli.main(["train", str(tmp_path / "run.yaml"), "--print-config", "--lam", "0.5"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["objective"] == "vgs" and shown["training"]["lam"] == 0.5 and shown["training"]["gamma"] == 2.0
    assert shown["data"]["train"]["on_bad_row"] == "error"
