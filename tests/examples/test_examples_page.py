"""What examples/README.md says: every file is on it, every command runs, and the table of Liger is what is measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from documents import ROOT, blocks, commands
from example_runs import EXAMPLES, OBJECTIVE, PLAIN, fresh, make_workplace, run_example
from launch import SUPPORT
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as PATCHES
from real_checkpoints import REAL_FAMILIES
from transformers import AutoProcessor

from vgs import vgs_step

PAGE = (EXAMPLES / "README.md").read_text()
COMMANDS = [words for block in blocks(PAGE) if block.language == "bash" for words in commands(block.text)]
SMALL = {
    "metrics.py": ["--samples", "2", "--max_new_tokens", "4"],
    "accelerate_loop.py": ["--max_new_tokens", "4"],
    "hf_trainer.py": ["--max_new_tokens", "4", "--max_steps", "1", *PLAIN],
    "trl_gkd.py": ["--max_new_tokens", "4", "--max_steps", "1", *PLAIN],
    "trl_distillation.py": ["--max_completion_length", "4", "--max_steps", "1", *PLAIN],
}
#: What is measured of the table of Liger's families: Gemma 4 takes too long.
KNOWN = ("qwen3_5", "glm4v", "internvl", "smolvlm", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v_moe")
KNOWN += ("llava", "qwen3_vl_moe", "qwen3_5_moe")
#: Run by tests of their own: in Triton's interpreter, and on documents (``test_documents_examples.py``).
ELSEWHERE = [f"examples/{name}.py" for name in ("liger", "documents", "weaken", "compare_terms", "parts")]
SCRIPTS = [words[1:] for words in COMMANDS if words[0] == "python" and words[1] not in ELSEWHERE]


def name_of(words: list[str]) -> str:
    """The example that a command runs."""
    (found,) = [Path(word).name for word in words if word.startswith("examples/")]
    return found


def test_every_example_is_short_and_on_the_page() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml")}
    assert files == {name_of(words) for words in COMMANDS[1:]}
    assert files == set(re.findall(r"\]\(([\w.]+\.(?:py|yaml))\)", PAGE))
    assert {name: count for name in files if (count := len((EXAMPLES / name).read_text().splitlines())) >= 60} == {}
    assert [words for words in COMMANDS if words[0] == "pip"] == [["pip", "install", "-e", ".[train]"]]


def test_examples_say_their_own_command() -> None:
    for words in SCRIPTS:
        said = (EXAMPLES / name_of(words)).read_text().split('"""')[1]
        assert f"examples/{name_of(words)}" in said


@pytest.mark.slow
@pytest.mark.parametrize("words", SCRIPTS, ids=name_of)
def test_the_commands_of_the_page_run(words: list[str], inside: Path) -> None:
    name = name_of(words)
    names = run_example(name, *words[1:], *SMALL.get(name, ["--steps", "1", "--max_new_tokens", "4"]))
    student = names["trainer"].model if "trainer" in names else names.get("student")
    if name == "metrics.py":
        assert len(names["means"]) == 2
    elif name == "lora.py":
        assert any(x.any() for key, x in student.named_parameters() if "lora_B" in key)
    else:
        before = fresh().state_dict()
        assert any(not torch.equal(x, before[key]) for key, x in student.state_dict().items())


@pytest.mark.slow
def test_own_data_is_checked_and_trained(inside: Path) -> None:
    from vgs.cli.main import main

    small = "--max_steps 1 --per_device_train_batch_size 2 --max_completion_length 4 --use_cpu true --bf16 false "
    small += "--report_to none --disable_tqdm true --gradient_checkpointing false"
    assert main(["check", "examples/own_data.yaml", *small.split()]) == 0
    assert main(["train", "examples/own_data.yaml", *small.split()]) == 0
    assert (inside / "runs/own_data/model.safetensors").exists()


# ---- Liger: its kernels in Triton's interpreter, which must be chosen before Triton is imported


def interpreted(script: str, *words: str, folder: Path) -> str:
    """What a script prints in a process of its own."""
    paths = os.pathsep.join([str(ROOT), str(SUPPORT)])
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SUPPORT / script), *words]
    done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def said(found: str | dict) -> str:
    """What the page calls a measurement."""
    if isinstance(found, str):
        return "not known" if "active drivers" in found else "does not"  # a kernel that asks which GPU there is
    return "works" if found["layers"] and found["error"] < 1e-3 else "does not"


@pytest.mark.slow
def test_the_liger_families_of_the_page_are_those_that_work(tmp_path: Path) -> None:
    rows = dict(re.findall(r"(?m)^\| `(\w+)` \| (works|does not|not known) \|", PAGE.partition("## Liger")[2]))
    lines = interpreted("liger_families.py", str(tmp_path), *KNOWN, folder=tmp_path).splitlines()
    measured = {name: found for line in lines for name, found in json.loads(line).items()}
    assert {name: said(found) for name, found in measured.items()} == {name: rows[name] for name in KNOWN}, measured
    assert {name for name in PATCHES if name in REAL_FAMILIES} == rows.keys()


@pytest.mark.slow
def test_the_loss_of_a_student_patched_by_liger_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = "student", "teacher"
    make_workplace(tmp_path, "internvl", (student, teacher))  # Qwen3.5 takes more than ten minutes in the interpreter
    words = ["--student", student, "--teacher", teacher, "--steps", "1", "--batch_size", "1", "--max_new_tokens", "2"]
    interpreted("liger_example.py", *words, folder=tmp_path)
    monkeypatch.chdir(tmp_path)
    report = torch.load("liger.pt", weights_only=False)
    assert any(name.startswith("Liger") for name in report["layers"])
    models = fresh(student), fresh(teacher).eval(), AutoProcessor.from_pretrained(student)
    loss = vgs_step(*models, *report["calls"][0], OBJECTIVE).loss.item()
    assert report["losses"] == pytest.approx([loss], rel=1e-4)
