"""What the pages say still holds: code blocks run, commands parse, links and names exist."""

from __future__ import annotations

import re
from pathlib import Path

import documents
import pytest
import torch
from documents import ROOT, Block, all_blocks, broken_command, broken_link, broken_name
from PIL import Image
from real_checkpoints import real_checkpoint
from transformers import AutoConfig, GenerationConfig

import vgs
from vgs.models.families import placeholder_ids

STUDENT, TEACHER = "Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"
TEXT_STUDENT = "google/gemma-3-270m-it"
ELSEWHERE = ("README.md", "docs/tutorial.md")  # below, and in test_tutorial.py
README = [block for block in all_blocks("python") if block.page == "README.md"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader has it: tiny models under the names of the real ones, a picture, questions, the configs."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in (STUDENT, TEACHER):
        real_checkpoint("qwen3_vl", folder / name, teacher=name == TEACHER)
    settings = GenerationConfig.from_pretrained(folder / STUDENT)
    settings.suppress_tokens = placeholder_ids(AutoConfig.from_pretrained(folder / STUDENT))  # which training forbids
    settings.save_pretrained(folder / STUDENT)
    Image.new("RGB", (64, 48), (200, 30, 30)).save(folder / "apples.jpg")
    (line,) = [block.text for block in all_blocks("json") if block.page == "README.md"]
    (folder / "questions.jsonl").write_text(line * 4)
    (config,) = [block.text for block in all_blocks("yaml") if block.page == "README.md"]
    for name in ("my.yaml", "apples.yaml"):
        (folder / name).write_text(config)
    for name in ("configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def inside(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


def run(block: Block) -> dict:
    """The names that a block of Python leaves behind."""
    names: dict = {}
    exec(compile(block.text, str(block), "exec"), names)
    return names


# Code.


def test_every_block_says_what_it_is():
    languages = {block.language for path in documents.PAGES for block in documents.blocks(path.read_text(), path.name)}
    assert languages == {"python", "bash", "yaml", "json", "inline"}


def test_the_step_of_the_readme(inside):
    (block,) = README
    assert len([line for line in block.text.splitlines() if line.strip()]) <= 15
    torch.manual_seed(0)
    names = run(block)
    assert type(names["processor"]).__name__ == "Qwen3VLProcessor"
    output, student = names["output"], names["student"]
    assert 0 < output.loss.item() < float("inf")
    assert len(output.vds) == len(names["answer"])
    assert output.student_vds.max() > 0, "the image changes nothing: it was not seen"
    assert all(x.grad is not None for x in student.model.language_model.layers.parameters())
    assert any(x.grad.abs().max() > 0 for x in student.model.visual.parameters() if x.grad is not None)
    assert all(x.grad is None for x in names["teacher"].parameters())


def test_training_as_the_readme_says(inside):
    (config,) = [block.text for block in all_blocks("yaml") if block.page == "README.md"]
    assert len(config.splitlines()) == 3
    commands = [
        words
        for block in all_blocks("bash")
        if block.page == "README.md"
        for words in documents.commands(block.text)
        if words[0] == "vgs"
    ]
    small = "--max_steps 1 --per_device_train_batch_size 2 --max_completion_length 4 --use_cpu true --bf16 false "
    small += "--report_to none --output_dir runs/my --disable_tqdm true --gradient_checkpointing false"
    from vgs.cli.main import main

    assert [command[1] for command in commands] == ["check", "train"]
    for command in commands:
        assert main([*command[1:], *small.split()]) == 0
    assert (inside / "runs/my/model.safetensors").exists()
    assert (inside / "runs/my/processor_config.json").exists()


@pytest.mark.parametrize("block", [x for x in all_blocks("python") if x.page not in ELSEWHERE], ids=str)
def test_python_runs(block, inside, monkeypatch):
    trained = []
    monkeypatch.setattr(vgs.VGSTrainer, "train", lambda trainer: trained.append(trainer))  # set up in full, not run
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # the reader's machine
    run(block)
    assert len(trained) == block.text.count(".train()")


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=str)
def test_configs_load(block, tmp_path):
    from vgs.cli.main import load_config

    (tmp_path / "my.yaml").write_text(block.text)
    assert load_config(tmp_path / "my.yaml")["student"]["path"] in (STUDENT, TEXT_STUDENT)


@pytest.mark.parametrize("block", all_blocks("bash"), ids=str)
def test_commands_parse(block, inside):
    problems = [broken_command(words) for words in documents.commands(block.text)]
    assert not [problem for problem in problems if problem]


@pytest.mark.parametrize("page", documents.PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_in_sentences_exist(page, inside):
    problems = []
    for block in documents.blocks(page.read_text(), page.name):
        if block.language == "inline":
            problems.append(broken_name(block.text))
            if re.match(rf"(?:{'|'.join(documents.PROGRAMS)}) [^:]", block.text):
                problems += [broken_command(words) for words in documents.commands(block.text)]
    assert not [problem for problem in problems if problem]


@pytest.mark.parametrize("page", [*documents.PAGES, *documents.NOTES], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    problems = [broken_link(target, page) for target in documents.links(page.read_text())]
    assert not [problem for problem in problems if problem]


def test_every_page_can_be_reached_from_the_readme():
    waiting, reached = [ROOT / "README.md"], set()
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        targets = (target.partition("#")[0] for target in documents.links(page.read_text()))
        waiting += [(page.parent / target).resolve() for target in targets if target and "://" not in target]
    assert {path for path in documents.PAGES if path.name != "CHANGELOG.md"} <= reached


# That each of these can fail.


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("vgs trian my.yaml", "trian"),
        ("vgs train missing.yaml", "missing.yaml"),
        ("vgs train my.yaml --learning_rat 1e-5", "did you mean 'learning_rate'"),
        ("vgs train CONFIG --objective vgx", "did you mean 'vgs'"),
        ("vgs demo --gamma 2", "unrecognized"),
        ("vgs study golf", "golf"),
        ("vgs plant", "plant"),
        ("accelerate launch --config_file configs/none.yaml -m vgs.cli train CONFIG", "no file configs/none.yaml"),
        ("accelerate launch -m vgs.cli train CONFIG --gama 1", "did you mean 'gamma'"),
        ("accelerate launch --machine_rnk 1 -m vgs.cli train CONFIG", "--machine_rnk"),
        ("accelerate launch -m vgs.main train CONFIG", "starts vgs.main"),
        ("python -m benchmarks loss --jobs golf", "golf"),
        ("python -m pytest -m golf", "no marker golf"),
        ("python -m pytest tests/test_golf.py", "no file tests/test_golf.py"),
        ("python tests/golf.py", "no file tests/golf.py"),
        ("make golf", "no target golf"),
        ("pip install -e '.[golf]'", "no extra golf"),
        ("curl example.org", "no test knows"),
    ],
)
def test_a_wrong_command_is_found(line, problem, inside):
    (words,) = documents.commands(line)
    assert problem in broken_command(words)


@pytest.mark.parametrize(
    "line", ["vgs plan", "vgs train CONFIG --eta 1  # a comment", "make lint", "pip install -e '.[train]'"]
)
def test_a_right_command_passes(line, inside):
    (words,) = documents.commands(line)
    assert broken_command(words) is None


@pytest.mark.parametrize(
    ("span", "right"),
    [
        ("vgs/cli/main.py", True),
        ("vgs/golf.py", False),
        ("vgs.errors.ConfigError", True),
        ("vgs.errors.Golf", False),
        ("vgs_kernels.reference", True),
        ("vgs_kernels.golf", False),
        ("lam: 0", True),
        ("golf: 1", False),
        ("some words", True),
    ],
)
def test_a_wrong_name_is_found(span, right):
    assert (broken_name(span) is None) is right


@pytest.mark.parametrize(
    ("target", "right"),
    [
        ("docs/training.md", True),
        ("docs/golf.md", False),
        ("docs/training.md#9-what-to-watch", True),
        ("docs/training.md#golf", False),
        ("#two-commands", True),
        ("https://example.org/golf", True),
    ],
)
def test_a_wrong_link_is_found(target, right):
    assert (broken_link(target, ROOT / "README.md") is None) is right


def test_blocks_are_read():
    text = "One `span`.\n\n```bash\nmake a  # b\nmake \\\n  c\n```\n\n    a `formula`\n\n[x](y.md) `[no](link)`\n"
    found = documents.blocks(text)
    assert [(block.line, block.language) for block in found] == [(1, "inline"), (3, "bash"), (11, "inline")]
    assert documents.commands(found[1].text) == [["make", "a"], ["make", "c"]]
    assert list(documents.links(text)) == ["y.md"]
