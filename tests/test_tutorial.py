"""The tutorial, from its first block to its last: a folder of pictures, and tiny models under the real names."""

from __future__ import annotations

import json
from pathlib import Path

import documents
import pytest
from documents import ROOT, all_blocks
from PIL import Image
from real_checkpoints import photos, real_checkpoint

from vgs.cli import main as cli

PAGE = "docs/tutorial.md"
BLOCKS = [block for language in ("python", "bash") for block in all_blocks(language) if block.page == PAGE]
SMALL = "--max_steps 2 --per_device_train_batch_size 2 --max_completion_length 4 --report_to none --disable_tqdm true"
SMALL += " --eval_strategy no --learning_rate 1e-3 --gradient_checkpointing false"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the reader has before the first step; the working directory is there."""
    for name, teacher in (("Qwen/Qwen3-VL-2B-Instruct", False), ("Qwen/Qwen3-VL-8B-Instruct", True)):
        real_checkpoint("qwen3_vl", tmp_path / name, teacher=teacher)
    pictures = photos(tmp_path / "photos", 12)
    png = pictures[0].with_suffix(".png")
    Image.open(pictures[0]).save(png)
    pictures[0].unlink()
    rows = "".join(f"{path.name},{('three', 'none')[number % 2]}\n" for number, path in enumerate([png, *pictures[1:]]))
    (tmp_path / "labels.csv").write_text(f"picture,apples\n{rows}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: list[str]) -> None:
    """One command of the page, made small where it trains or answers."""
    if line[0] != "vgs":
        assert documents.broken_command(line) is None
        return
    extra = SMALL.split() if line[1] == "train" else SMALL.split()[4:6] if line[1] == "eval" else []
    assert cli.main([*line[1:], *extra]) == 0, line


@pytest.mark.slow
def test_the_tutorial_from_top_to_bottom(workplace: Path) -> None:
    seen = []
    for block in sorted(BLOCKS, key=lambda block: block.line):
        if block.language == "python":
            names: dict = {}
            exec(compile(block.text, str(block), "exec"), names)
            seen.append(sorted(names))
            continue
        for line in documents.commands(block.text):
            run(line)
            seen.append(line[:2])
    rows = [json.loads(line) for line in Path("questions.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(Path(row["images"][0]).exists() for row in rows)
    assert {path.suffix for path in Path("photos").iterdir()} == {".jpg", ".png"}
    assert [words[1] for words in seen if words[0] == "vgs"] == [
        *("init", "check", "plan", "eval", "eval", "train", "train", "eval", "train")
    ]
    results = [json.loads(Path(f"{name}.json").read_text()) for name in ("before", "teacher", "after")]
    assert [result["samples"] for result in results] == [1, 1, 1]
    for folder in ("runs/apples", "runs/apples_plain"):
        assert Path(folder, "model.safetensors").exists() and Path(folder, "README.md").exists()
    assert ROOT not in Path(folder).resolve().parents
