"""The examples on documents as evidence, in their order: data, a pair, runs, and what is measured of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from documents import ROOT
from example_runs import run_example
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from vgs.cli import main as cli

SMALL = (
    "--use_cpu true --bf16 false --report_to none --disable_tqdm true --max_steps 2 --save_steps 1 --logging_steps 1"
)
SMALL += " --max_completion_length 4"
ARMS = {"plain": ["--gamma", "0", "--lam", "0"], "vgs": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands leave behind, on a tiny Gemma 3 and a Python file of one's own."""
    path = tmp_path_factory.mktemp("documents")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        (path / "examples").symlink_to(ROOT / "examples")
        code = Path("code/shapes.py")
        code.parent.mkdir()
        words = ("red", "green", "blue", "one", "two", "three", "a", "b")
        functions = [
            f'def f{i}():\n    """The picture\n    is {x} in {y} ."""\n' for i, x in enumerate(words) for y in words
        ]
        code.write_text("".join(functions) + 'def _hidden():\n    """The picture is red in red ."""\n')
        run_example("documents.py", "--folder", "code", "--least", "20", "--most", "60", "--held_out", "12")
        torch.manual_seed(0)
        sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 64, "initializer_range": 0.3}
        Gemma3ForCausalLM(Gemma3TextConfig(**sizes)).save_pretrained("gemma")
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained("gemma")
        run_example("weaken.py", "--model", "gemma", "--window", "8", "--noise", "0.2")
        for name, options in ARMS.items():
            out = f"runs/documents/{name}"
            assert cli.main(["train", "examples/documents.yaml", "--output_dir", out, *SMALL.split(), *options]) == 0
        yield path


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs where the commands have run."""
    monkeypatch.chdir(folder)
    return folder


def test_documents_are_docstrings_on_one_line_and_none_is_in_both_files(inside: Path) -> None:
    parts = [list(map(json.loads, Path(x).read_text().splitlines())) for x in ("documents.jsonl", "held_out.jsonl")]
    assert [len(part) for part in parts] == [52, 12]
    train, held_out = ({row["document"] for row in part} for part in parts)
    assert not train & held_out and len(train | held_out) == 64
    assert "The picture is red in two ." in train | held_out
    assert all(row["question"].endswith(" of Python's shapes do?") for part in parts for row in part)


def test_the_student_sees_less_far_and_the_teacher_is_the_model(inside: Path) -> None:
    student, teacher, model = (
        AutoModelForCausalLM.from_pretrained(path)
        for path in ("runs/documents/student", "runs/documents/teacher", "gemma")
    )
    assert (student.config.sliding_window, teacher.config.sliding_window) == (8, 64)
    for (name, own), theirs, given in zip(
        student.named_parameters(), teacher.parameters(), model.parameters(), strict=True
    ):
        assert torch.equal(theirs, given)
        change = (own - given).std().item() / given.std().item() if given.ndim == 2 else 0.0
        assert change == pytest.approx(0.0 if given.ndim < 2 or "embed" in name else 0.2, abs=0.03)


def test_a_model_without_sliding_attention_is_refused(inside: Path, capsys: pytest.CaptureFixture) -> None:
    config = json.loads(Path("gemma/config.json").read_text()) | {"sliding_window": None}
    Path("whole").mkdir()
    Path("whole/config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="2"):
        run_example("weaken.py", "--model", "whole")
    assert "--model must have sliding attention (sliding_window in its config), got whole." in capsys.readouterr().err


def test_geometry_of_the_student(inside: Path) -> None:
    words = ["geometry", "examples/documents.yaml", "--samples", "4", "--bins", "2", "--out", "runs/documents/geometry"]
    assert cli.main([*words, *SMALL.split()]) == 0
    record = json.loads(Path("runs/documents/geometry/geometry-000000.json").read_text())
    assert record["vds"][0] < record["vds"][1]
    assert all(0 < angle < 180 for angle in record["parameters"]["angles"]["language-visual"])


def test_terms_of_several_students_on_the_same_answers(inside: Path) -> None:
    students = [f"runs/documents/{name}" for name in ("student", *ARMS)]
    words = ["--samples", "6", "--max_new_tokens", "4", "--bins", "3"]
    names = run_example("compare_terms.py", "--students", *students, *words)
    report = json.loads(Path("runs/documents/terms.json").read_text())["nats"]
    assert list(report) == ["student", "plain", "vgs", "plain - student", "vgs - student", "vgs - plain"]
    for term in ("standard", "visual", "language"):
        columns = [[mean for mean, *_ in report[name][term]] for name in ("vgs", "plain", "vgs - plain")]
        assert columns[2] == pytest.approx([x - y for x, y in zip(*columns[:2], strict=True)], abs=1e-6)
        assert all(low <= mean <= high for mean, low, high in report["vgs - plain"][term])
    assert report["plain"]["vds"] == report["student"]["vds"]  # of the teacher, on the same answers
    whole = names["found"]["student"]["standard"]
    assert report["student"]["standard"][-1][0] == pytest.approx(whole.mean(), rel=1e-5)
    # All answers in one bin: the bootstrap's spread is that of a mean over questions.
    means = [part.mean() for part in torch.tensor(whole).split([len(row["vds"]) for row in names["rows"]])]
    _, low, high = report["student"]["standard"][-1]
    assert 0 < high - low < 2 * (max(means) - min(means))


def test_parts_of_the_objective_and_going_on(inside: Path) -> None:
    words = ["--max_new_tokens", "4", "--batch_size", "2"]
    run_example("parts.py", *words, "--batches", "1")
    first = Path("runs/documents/parts.jsonl").read_text()
    run_example("parts.py", *words, "--batches", "2")
    lines = Path("runs/documents/parts.jsonl").read_text().splitlines(keepends=True)
    assert lines[0] == first and len(lines) == 2
    for line in map(json.loads, lines):
        assert line["plain"]["to plain"] < 0.1 and line["vgs"]["to vgs"] < 0.1
        assert 0 < line["lam 0"]["to vgs"] < line["lam 1"]["to vgs"] < 90
        assert line["prior with gradient"]["to vgs"] > 1
        assert all(math.isfinite(found["norm"]) and found["norm"] > 0 for found in line.values())
