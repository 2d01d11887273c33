"""The card of a trained student: read back as the hub reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from grpo_runs import grpo_trainer
from huggingface_hub import ModelCard
from real_checkpoints import photos, real_checkpoint
from selves import make_self_trainer
from trainers import make_trainer

import vgs_kernels
from vgs.cli.main import main
from vgs.teachers.sources import TeacherSource
from vgs.trainers.model_card import _Base, is_ours, teachers_of

BASE_CARD = "---\nlicense: apache-2.0\nbase_model: somebody/tiny-qwen\n---\n\n# A base\n"
CONFIG = """
student: {path: student}
teacher: {path: teacher}
data:
  train: {path: questions.jsonl}
  eval: {path: questions.jsonl, limit: 2}
lora: {r: 2, target_modules: [q_proj]}
training:
  output_dir: runs/mine
  gamma: 1.5
  eta: 0.5
  max_steps: 2
  save_steps: 1
  save_total_limit: 1
  per_device_train_batch_size: 2
  max_completion_length: 3
  use_cpu: true
  bf16: false
  report_to: none
  disable_tqdm: true
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of the command line, with an adapter, checkpoints and held-out questions."""
    real_checkpoint("qwen3_vl", tmp_path / "student")
    (tmp_path / "student/README.md").write_text(BASE_CARD)
    real_checkpoint("qwen3_vl", tmp_path / "teacher", teacher=True)
    rows = [
        {"question": "what is in the picture ?", "image": f"photos/{path.name}", "answer": "seven"}
        for path in photos(tmp_path / "photos", 4)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "my.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "my.yaml"]) == 0
    return tmp_path / "runs/mine"


def test_a_run_says_what_was_trained_on_what(run: Path) -> None:
    card, record = ModelCard.load(run / "README.md"), json.loads((run / "run.json").read_text())
    data = card.data
    assert (data.base_model, data.base_model_relation, data.license) == ("somebody/tiny-qwen", "adapter", "apache-2.0")
    assert data.library_name == "peft" and data.pipeline_tag == "image-text-to-text" and data.model_name == "mine"
    assert {"vgs", "trl", "generated_from_trainer"} <= set(data.tags) and data.datasets is None
    (result,) = data.eval_results
    assert result.metric_type == "accuracy" and 0 <= result.metric_value <= 1
    rows = dict(re.findall(r"(?m)^\| (\w[^|]*) \| (.*) \|$", card.text))
    assert rows["source"] == "questions.jsonl" and rows["fingerprint"] == record["data"]["train"]
    assert rows["gamma"] == "1.5" and rows["eta"] == "0.5" and rows["steps"] == "2" and rows["questions"] == "4"
    assert rows["vgs-kernels"] == vgs_kernels.__version__ and int(rows["tokens of prompts and responses"]) > 0
    assert rows["held-out questions"].endswith("(step 2)") and rows["trained weights"] == "a LoRA adapter"
    assert "a model of the folder `teacher` said of every token" in card.text
    assert str(run) not in card.content, "a path of this machine is nobody's business"
    assert is_ours(card.content)


def test_a_folder_of_the_same_name_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "student").mkdir(parents=True)
        (tmp_path / name / "student/README.md").write_text(f"---\nbase_model: somebody/{name}\n---\n")
        monkeypatch.chdir(tmp_path / name)
        assert _Base(SimpleNamespace(_name_or_path="student")).id == f"somebody/{name}"


def test_a_card_that_a_person_has_edited_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path / "out")
    trainer.create_model_card()
    path = tmp_path / "out/README.md"
    assert is_ours(path.read_text())
    trainer.state.global_step = 7
    trainer.create_model_card(model_name="named", tags="mine", dataset_name="somebody/questions")
    card = ModelCard.load(path)
    assert "| steps | 7 |" in card.text and card.data.model_name == "named" and "mine" in card.data.tags
    assert card.data.datasets == ["somebody/questions"]

    edited = path.read_text().replace("## Data", "## Data\n\nPictures of my garden.")
    path.write_text(edited)
    assert not caplog.records
    trainer.create_model_card()
    assert path.read_text() == edited
    assert f"{path} was not written by this package, or was edited" in caplog.text


def test_what_is_not_known_is_not_said(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", preset="opd")
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license is None and card.data.base_model is None and card.data.eval_results is None
    assert "names no licence, or has not been found" in card.text and "Nothing was evaluated" in card.text
    assert "Objective `opd`" in card.text and "gamma" not in card.text and "| prior |" not in card.text
    assert "passed to the trainer from Python" in card.text


def test_data_are_named_without_the_folders_of_this_machine(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out")
    section = {"path": str(tmp_path / "mine.jsonl"), "split": "train[:9]"}
    record = {"config": {"data": {"train": section}}, "data": {"train": "f00"}}
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out/run.json").write_text(json.dumps(record))
    trainer.create_model_card()
    text = (tmp_path / "out/README.md").read_text()
    assert "| source | mine.jsonl |" in text and "| split | train[:9] |" in text and "| fingerprint | f00 |" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("alpha", "said"),
    [
        (0.0, "A model without a name was trained by GRPO: of several answers, those with a higher reward"),
        (0.3, "was trained by on-policy distillation, mixed with GRPO (`alpha` 0.3): it answered"),
    ],
)
def test_rewards_are_said(tmp_path: Path, alpha: float, said: str) -> None:
    trainer = grpo_trainer(tmp_path / "out", alpha=alpha)
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out/README.md")
    assert "| rewards | exact_match, brevity |" in card.text
    assert ("nothing was distilled" in card.text) is (alpha == 0) is ("Objective `vgs`" not in card.text)
    assert said in card.text and f"| alpha | {alpha} |" in card.text and "grpo" in card.data.tags


def test_a_student_that_taught_itself_says_so(tmp_path: Path) -> None:
    trainer = make_self_trainer(tmp_path / "out", teacher="ema")
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out/README.md")
    assert "a copy of its own weights (ema), which saw more, said of every token" in card.text
    assert "Objective `visual_opsd`" in card.text


@pytest.mark.slow
def test_teachers_elsewhere_are_named_without_their_address() -> None:
    sources = {
        "sums": TeacherSource("somebody/large"),
        "charts": TeacherSource(url="http://10.0.0.7:8017"),
        "maps": TeacherSource(cache="/data/kept"),
    }
    opened = {name: SimpleNamespace(source=source, model=None) for name, source in sources.items()}
    said = teachers_of(SimpleNamespace(opened=opened))
    assert said == (
        "[somebody/large](https://huggingface.co/somebody/large) (`sums`) and a teacher behind a server (`charts`) and "
        "a teacher whose hidden states were kept (`maps`), each for rows of its own,"
    )
