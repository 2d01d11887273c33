"""What is published: a wheel whose losses need torch and Triton alone, and a source distribution with the rest."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from documents import ROOT

import vgs
import vgs_kernels
from vgs.cli import start

LOSS = """
import sys, torch, vgs_kernels, vgs
h = torch.randn(6, 8, requires_grad=True)
rows = [vgs_kernels.TargetRow(1.0, torch.randn(6, 4), torch.randn(32, 4))]
vgs_kernels.fused_linear_divergence(h, torch.randn(32, 8), rows).loss.backward()
assert h.grad.abs().max() > 0 and "transformers" not in sys.modules
print(vgs_kernels.__version__, vgs_kernels.__file__)
"""


def needed_by(*names: str) -> set[str]:
    """Names of distributions and of all that they need here, without extras."""
    waiting, found = list(names), set()
    while waiting:
        name = waiting.pop()
        if name.lower() in found:
            continue
        found.add(name.lower())
        for line in distribution(name).requires or ():
            condition = line.partition(";")[2]
            if "extra ==" not in condition and start._version(other := re.split(r"[^\w.-]", line, maxsplit=1)[0]):
                waiting.append(other)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    copy = tmp_path_factory.mktemp("checkout") / "project"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)  # no leftovers of earlier builds
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(copy)]
    subprocess.run(command, check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def torch_alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, torch and Triton, and what these two need: its folder of programs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in needed_by("torch", "triton"):
        found = distribution(name)
        for top in {path.parts[0] for path in found.files or () if path.parts[0] not in ("..", "__pycache__")}:
            link, target = site / top, Path(str(found.locate_file(top)))
            if not link.exists() and target.exists():
                link.symlink_to(target)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(wheel)], check=True)
    return folder / "bin"


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_their_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"vgs/py.typed", "vgs_kernels/py.typed"} <= names
    listed = ["git", "ls-files", "vgs", "vgs_kernels"]
    ours = set(subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    assert ours <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]


@pytest.mark.slow
def test_torch_and_triton_are_enough_for_the_losses(torch_alone: Path, tmp_path: Path) -> None:
    run = subprocess.run([torch_alone / "python", "-I", "-c", LOSS], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    version, file = run.stdout.split()
    assert version == vgs_kernels.__version__ and Path(file).is_relative_to(torch_alone.parent)


@pytest.mark.slow
def test_the_command_says_what_it_needs(torch_alone: Path, tmp_path: Path) -> None:
    said = subprocess.run([torch_alone / "vgs", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0
    assert said.stdout.startswith(f"vgs {vgs_kernels.__version__} (torch ") and said.stdout.count("\n") == 1
    assert "transformers" in said.stdout and "pip install 'vgs-kernels[train]'" in said.stdout
    said = subprocess.run([torch_alone / "vgs", "train", "x.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 2 and not said.stdout
    assert said.stderr.startswith("vgs: error: the command needs transformers") and said.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_source_distribution_is_enough_to_test_and_to_document(tmp_path: Path) -> None:
    copy = tmp_path / "project"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)], cwd=copy, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=copy, capture_output=True, text=True, check=True).stdout.split()
    assert set(tracked) - names == {".ci/run", ".gitignore"}


def test_the_version_is_said(capsys: pytest.CaptureFixture) -> None:
    assert start.main(["--version"]) == 0
    line = capsys.readouterr().out
    assert re.fullmatch(rf"vgs {re.escape(vgs_kernels.__version__)} \(torch \S+, .*trl \S+\)\n", line)
    from vgs.cli.main import main

    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == line


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    lines = [
        "torch>=2.11",
        "trl<2,>=1.14; extra == 'train'",
        "trl>=1.15; extra == 'train'",
        'pyyaml; extra == "train"',
        'vllm; extra == "vllm"',
    ]
    monkeypatch.setattr(start, "requires", lambda _: lines)
    there = {"torch": "2.14", "pyyaml": "6", "vgs-kernels": "0"}
    monkeypatch.setattr(start, "version", lambda name: there[name] if name in there else missing(name))
    assert start.missing_packages() == ["trl"]
    with pytest.raises(SystemExit) as stop:
        start.main(["train", "my.yaml"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "vgs: error: the command needs trl: pip install 'vgs-kernels[train]'\n"


def missing(name: str) -> str:
    raise start.PackageNotFoundError(name)


def test_what_is_exported_can_be_imported() -> None:
    for name in vgs.__all__:
        assert getattr(vgs, name) is not None
