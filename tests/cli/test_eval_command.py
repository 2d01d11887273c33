"""``vgs eval RUN --benchmarks``: what is read from a run, what is refused, and what stands in for lmms-eval here."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

import vgs_kernels
from vgs.cli import main as cli
from vgs.errors import ConfigError
from vgs.evaluation.benchmarks import harness
from vgs.evaluation.benchmarks.settings import EvalSettings, settings_of

SYSTEM = "Think in <reason></reason>."
CONFIG = {
    "student": {"path": "org/start", "attn_implementation": "sdpa"},
    "processor": {"max_pixels": 4096},
    "data": {"train": {"path": "x.jsonl", "system_prompt": SYSTEM}},
    "training": {
        "max_completion_length": 4096,
        "temperature": 0.8,
        "top_p": 0.95,
        "chat_template_kwargs": {"enable_thinking": False},
    },
}
#: Stands in for an environment with lmms-eval: answers the question for versions, and writes what lmms-eval writes.
FAKE = """
import json, os, pathlib, re, sys
mode = {mode!r}
if sys.argv[1] == "-c":
    print(json.dumps({versions!r}))
    sys.exit()
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
task, repeats = options["--tasks"], int(options["--repeats"])
settings = json.load(open(os.environ["VGS_EVAL_SETTINGS"]))["settings"]
with open({calls!r}, "a") as file:
    file.write(json.dumps([sys.argv[1:], settings["model"]]) + "\\n")
print("asking", task)
if mode == "status":
    print("RuntimeError: out of memory")
    sys.exit(3)
if mode == "swallowed" and task == "vgs_mathvision":
    print("\\x1b[31m2026 | ERROR - Error during evaluation: no such dataset. Please set `--verbosity ...\\x1b[0m")
    sys.exit()
out = pathlib.Path(options["--output_path"])
worth = 1.0 if "run" in settings["model"] else 0.0
rows = [
    dict(doc_id=i, input="q", target=str(i), scores=[worth] * repeats, token_counts=[dict(output_tokens=9)])
    for i in range(6)
]
rows[0]["scores"] = [0.0] * repeats
(out / f"1_samples_{{task}}.jsonl").write_text("".join(json.dumps(x) + "\\n" for x in rows))
(out / "1_results.json").write_text("{{}}")
"""


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "run.json").write_text(json.dumps({"config": CONFIG, "data": {}}))
    return folder


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``fake(mode, **versions)``: the path of a Python that plays lmms-eval; ``fake.calls()``: how it was called."""
    monkeypatch.chdir(tmp_path)
    calls = tmp_path / "calls.jsonl"

    def make(mode: str = "works", **versions: str | None) -> str:
        found = {"lmms_eval": "0.7.3", "vgs-kernels": vgs_kernels.__version__, **versions}
        found = {name: version for name, version in found.items() if version}
        script = tmp_path / "fake.py"
        script.write_text(FAKE.format(mode=mode, versions=found, calls=str(calls)))
        program = tmp_path / "python"
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n')
        program.chmod(0o755)
        return str(program)

    make.calls = lambda: [json.loads(x) for x in calls.read_text().splitlines()] if calls.exists() else []
    return make


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", *arguments])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("vgs: error: ")
    return lines[0].removeprefix("vgs: error: ")


# what a run says


def test_a_run_is_asked_as_it_was_trained(run_folder: Path) -> None:
    found = settings_of(str(run_folder))
    expected = {
        "model": str(run_folder),
        "dtype": "float32",
        "bf16": True,
        "attn_implementation": "sdpa",
        "processor": {"max_pixels": 4096},
        "system_prompt": SYSTEM,
        "template_options": {"enable_thinking": False},
        "max_new_tokens": 4096,
        "temperature": 0.8,
        "top_p": 0.95,
    }
    assert {name: getattr(found, name) for name in expected} == expected
    assert EvalSettings(**found.as_json()) == found


def test_responses_may_be_as_long_as_the_papers_at_least(run_folder: Path) -> None:
    short = {**CONFIG, "training": {"max_completion_length": 64}}
    (run_folder / "run.json").write_text(json.dumps({"config": short}))
    found = settings_of(str(run_folder))
    assert (found.max_new_tokens, found.temperature, found.top_p, found.bf16) == (2048, 1.0, 1.0, True)
    assert settings_of(str(run_folder), max_new_tokens=99, system_prompt="").system_prompt == ""
    assert settings_of(str(run_folder), max_new_tokens=99).max_new_tokens == 99


def test_a_checkpoint_belongs_to_its_run(run_folder: Path) -> None:
    checkpoint = run_folder / "checkpoint-40"
    checkpoint.mkdir()
    (checkpoint / "adapter_config.json").write_text("{}")
    found = settings_of(str(checkpoint))
    assert found.model == str(checkpoint) and found.system_prompt == SYSTEM


def test_any_other_model_has_the_defaults() -> None:
    assert settings_of("Qwen/Qwen3-VL-2B-Instruct") == EvalSettings(model="Qwen/Qwen3-VL-2B-Instruct")


def test_generation_settings_are_greedy_or_the_runs(run_folder: Path) -> None:
    found = settings_of(str(run_folder))
    greedy = {"max_new_tokens": 4096, "repetition_penalty": 1.0, "temperature": 0, "top_p": 1.0}
    assert found.generation(greedy=True) == greedy
    assert found.generation(greedy=False) == {**greedy, "temperature": 0.8, "top_p": 0.95, "top_k": 0}


# the whole command


def test_the_command_line_is_a_list_with_everything_in_it(run_folder: Path) -> None:
    line = harness.command("/p y", settings_of(str(run_folder), limit=7), "vgs_x", Path("o u t"), repeats=16)
    options = dict(zip(line[3::2], line[4::2], strict=False))
    assert line[:3] == ["/p y", "-m", "lmms_eval"]
    assert options["--model"] == "vgs" and "--model_args" not in options
    assert options["--tasks"] == "vgs_x" and options["--output_path"] == "o u t" and options["--repeats"] == "16"
    assert options["--include_path"] == str(harness.TASKS) and options["--process_docs_parallel"] == "1"
    assert options["--limit"] == "7" and line[-1] == "--log_samples"


def test_both_metrics_of_a_run_and_its_start(run_folder: Path, fake: Any, capfd: pytest.CaptureFixture[str]) -> None:
    names = "logicvista,mathvision"
    arguments = [str(run_folder), "--benchmarks", names, "--repeats", "16", "--lmms-eval", fake(), "--baseline"]
    assert cli.main(["eval", *arguments]) == 0
    shown = capfd.readouterr()
    assert "asking vgs_mathvision" in shown.err and "asking" not in shown.out
    assert len(fake.calls()) == 2 * 2 * 2
    assert {model for _, model in fake.calls()} == {str(run_folder), "org/start"}
    found = json.loads((run_folder / "eval" / "results.json").read_text())
    assert found["model"]["mean"]["Acc@1"]["accuracy"] == pytest.approx(5 / 6)
    assert found["baseline"]["mean"]["Acc@16"]["accuracy"] == 0
    assert found["baseline"]["settings"]["system_prompt"] == SYSTEM  # asked in the same way
    part = found["difference"]["benchmarks"]["mathvision"]["Acc@1"]
    assert (part["gained"], part["lost"], part["mcnemar_p"]) == (5, 0, 2 * 0.5**5)
    assert (run_folder / "eval" / "results.md").read_text().count("| MathVision |") == 5

    cli.main(["eval", *arguments])  # nothing is run twice
    assert len(fake.calls()) == 2 * 2 * 2


def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    run_folder: Path, fake: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(run_folder), "--benchmarks", "paper", "--lmms-eval"]
    assert cli.main([*arguments, fake("swallowed")]) == 1
    log = run_folder / "eval/model/greedy/mathvision.failed.txt"
    expected = f"vgs: error: lmms-eval failed on mathvision (exit status 0): no such dataset; see {log}"
    assert capfd.readouterr().err.strip().splitlines()[-1] == expected
    assert len(fake.calls()) == 6 and log.is_file()
    assert cli.main([*arguments, fake()]) == 0
    assert len(fake.calls()) == 8 and not log.exists()


def test_a_child_that_fails_is_one_sentence(run_folder: Path, fake: Any, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(run_folder), "--benchmarks", "logicvista", "--lmms-eval", fake("status")]
    assert cli.main(arguments) == 1
    assert "(exit status 3): RuntimeError: out of memory; see " in capfd.readouterr().err.strip().splitlines()[-1]


def test_results_of_other_settings_are_kept_unless_asked(
    run_folder: Path, fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run_folder), "--benchmarks", "logicvista", "--lmms-eval", fake()]
    assert cli.main(["eval", *arguments]) == 0
    capsys.readouterr()
    message = error_of([*arguments, "--max-tokens", "5"], capsys)
    assert "max_new_tokens was 4096, now 5" in message and "--overwrite" in message
    assert cli.main(["eval", *arguments, "--max-tokens", "5", "--overwrite"]) == 0
    os.utime(run_folder / "config.json", (1, 1))  # trained again
    capsys.readouterr()
    assert "the model's files have changed" in error_of([*arguments, "--max-tokens", "5"], capsys)
    written = run_folder / "eval/model/greedy/logicvista/samples.jsonl"
    assert "no/python" in error_of([*arguments, "--overwrite", "--lmms-eval", "no/python"], capsys)
    assert written.is_file()


def test_a_model_on_the_hub_has_its_results_below_runs(fake: Any, tmp_path: Path) -> None:
    assert cli.main(["eval", "org/run-1", "--benchmarks", "logicvista", "--lmms-eval", fake()]) == 0
    assert (tmp_path / "runs/eval-org-run-1/results.json").is_file()
    assert cli.main(["eval", "org/run-1", "--benchmarks", "logicvista", "--lmms-eval", fake(), "--out", "here"]) == 0
    assert (tmp_path / "here/model/greedy/logicvista/log.txt").read_text() == "asking vgs_logicvista\n"


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--benchmarks", "mathvista"], "--benchmarks must be paper or some of mmmu_pro_4, "),
        (["--benchmarks", "paper", "--gamma", "2"], "'--gamma' has no effect with --benchmarks"),
        (["--benchmarks", "paper", "--model", "x"], "--model has no effect with --benchmarks"),
        (["--benchmarks", "paper", "--gpus", "2"], "--gpus 2 needs --backend vllm"),
        (["--benchmarks", "paper", "--temperature", "1"], "--temperature has no effect without --repeats"),
        (["--benchmarks", "paper", "--lmms-eval", "no/python"], "--lmms-eval must be the Python of an environment"),
        (["--benchmarks", "paper", "--backend", "vllm"], "--backend vllm cannot take the run's chat_template_kwargs"),
        (["--benchmarks", "paper", "--baseline", "no such/thing"], "expected the folder of a run or of a model, or a"),
        (["--repeats", "16"], "--repeats has no effect without --benchmarks"),
        (["--overwrite"], "--overwrite has no effect without --benchmarks"),
        ([], "expected a config, got the folder "),
    ],
)
def test_options_that_cannot_be(
    options: list[str], message: str, run_folder: Path, fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of([str(run_folder), *options], capsys)
    assert not fake.calls()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lmms_eval": None}, "has no lmms-eval: `make lmms-eval` makes one in .venv-eval"),
        ({"vgs-kernels": "0.0.1"}, f"must have vgs-kernels {vgs_kernels.__version__}, as here"),
        ({"vgs-kernels": None}, "got none"),
    ],
)
def test_environments_that_will_not_do(
    change: dict[str, str | None], message: str, run_folder: Path, fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    python = fake(**change)
    assert message in error_of([str(run_folder), "--benchmarks", "paper", "--lmms-eval", python], capsys)


def test_vllm_must_be_there(fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["org/model", "--benchmarks", "paper", "--backend", "vllm", "--lmms-eval", fake()]
    assert "--backend vllm needs vllm in the environment" in error_of(arguments, capsys)


def test_without_lmms_eval_one_sentence_says_how(
    run_folder: Path, fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of([str(run_folder), "--benchmarks", "paper"], capsys)
    assert message.startswith("lmms-eval is not installed here: `make lmms-eval` makes one")


def test_models_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no model \(config.json is missing\)"):
        settings_of(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="expected the folder of a run or of a model"):
        settings_of(str(tmp_path / "missing"))


def test_a_run_on_digits_has_no_benchmarks(run_folder: Path) -> None:
    (run_folder / "run.json").write_text(json.dumps({"config": {"task": "digits"}}))
    with pytest.raises(ConfigError, match="trained on the built-in digits"):
        settings_of(str(run_folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generation_kwargs": {"num_beams": 2}}, "the run's generation_kwargs"),
        ({"model": "a,b"}, "a comma or '='"),
    ],
)
def test_what_vllm_cannot_be_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        harness.check_backend(EvalSettings(**{"model": "m", "backend": "vllm", **settings}))


def test_an_adapter_is_not_for_vllm(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot load the adapter"):
        harness.check_backend(EvalSettings(model=str(tmp_path), backend="vllm"))
