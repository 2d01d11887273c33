"""The core stands without TRL, PEFT, accelerate and datasets, and ``import vgs`` without transformers and torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vgs

ROOT = Path(__file__).parents[1]
BLOCKED = ("trl", "peft", "accelerate", "datasets")
CORE = ("models", "objectives", "one_step", "errors", "log", "data.prompts", "evaluation.token_terms")
CORE += tuple(f"integrations.{name}" for name in ("options", "rows", "models", "step"))

#: Before anything else: the blocked packages are as if they were not installed.
BLOCK = f"""
import importlib.machinery, sys
found = importlib.machinery.PathFinder.find_spec
def find_spec(name, *rest):
    return None if name.split(".")[0] in {BLOCKED} else found(name, *rest)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""

#: A whole step and the forward under it.
STEP = """
import torch
from tiny import tiny_model, tiny_processor, tiny_samples
from vgs import score_responses, vgs_step
from vgs_kernels import VGSObjective
student, teacher, processor, samples = tiny_model(0), tiny_model(1, hidden=48), tiny_processor(), tiny_samples(2)
output = vgs_step(student, teacher, processor, samples, [[[9, 1]], [[10], [11, 12]]], VGSObjective(lam=0.5))
output.loss.backward()
assert all(p.grad is not None for p in student.parameters())
assert len(score_responses(student, teacher, processor, samples, [[9, 1], [10]], VGSObjective())) == 2
"""

#: The trainers show that the packages are really missing.
BLOCKS = """
import vgs
try:
    vgs.VGSTrainer
except ModuleNotFoundError:
    print("whole")
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120)


def core_modules() -> list[str]:
    """Every module of the core by its full name."""
    found = []
    for name in CORE:
        path = ROOT / "vgs" / name.replace(".", "/")
        files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        found += [f"vgs.{name}.{file.stem}" if path.is_dir() else f"vgs.{name}" for file in files]
    return [name.removesuffix(".__init__") for name in found]


@pytest.mark.slow
def test_the_core_works_without_what_trainers_need() -> None:
    imports = "\n".join(f"import {name}" for name in core_modules())
    done = python(f"{BLOCK}\n{imports}\n{STEP}\nassert not {set(BLOCKED)} & set(sys.modules)\n{BLOCKS}")
    assert done.stdout.endswith("whole\n"), done.stderr


def test_importing_vgs_is_cheap() -> None:
    done = python("import sys, vgs; print(sorted({'torch', 'transformers', 'trl', 'numpy'} & set(sys.modules)))")
    assert done.stdout == "[]\n", done.stderr


def test_every_public_name_is_there() -> None:
    assert set(vgs.__all__) <= set(dir(vgs))
    for name in vgs.__all__:
        assert getattr(vgs, name) is not None
    with pytest.raises(AttributeError, match="module 'vgs' has no attribute 'VGSTrainr'"):
        vgs.VGSTrainr  # noqa: B018
