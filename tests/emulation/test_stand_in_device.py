"""The CUDA path of the package on a stand-in device: real checks, allocations and launches, counted; see ``device``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import launch_once

from tests.emulation.device.build import ROOT, environment, missing
from tests.emulation.device.call_matrix import EXPECTED
from tests.emulation.device.record import Product, parse

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def under_the_stand_in(factory: pytest.TempPathFactory, *command: str) -> str:
    """What a module prints there; built once, in a process of its own."""

    def launch(folder: Path) -> None:
        run = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment(folder), capture_output=True, text=True
        )
        (folder / "output").write_text(run.stdout)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]

    name = "stand-in-" + "-".join(x.replace("/", "_") for x in command[:4])
    return (launch_once(factory, name, launch) / "output").read_text()


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return json.loads(under_the_stand_in(tmp_path_factory, "tests.emulation.device.probe"))


def test_the_log_is_read():
    found = parse(
        "kernel fill 1 2 3\nproduct TN 4 5 6 bfloat16 bfloat16 float32 beta 1 epilogue 1\ncopy host device 8\n"
        "wait stream\ncopy device host 8 wait\nkernel x 0 1 1 BAD configuration\nallocate 5"
    )
    assert found.kernels == ["fill", "x"] and found.bad == ["kernel x 0 1 1 BAD configuration"]
    assert found.products == [Product("TN", 4, 5, 6, "bfloat16", "bfloat16", "float32", True)]
    assert found.waits == ["wait stream", "copy device host 8 wait"] and found.copies == 2


@pytest.mark.slow
def test_what_a_call_asks_for_is_counted(probe):
    counted = probe["counted"]
    assert not any(counted["nothing"].values())
    assert (counted["item"]["kernels"], counted["item"]["waits"]) == (1, 1)
    assert (counted["product"]["products"], counted["product"]["waits"]) == (1, 0)
    assert "cpu memory" in probe["refused"]


def test_products_are_rounded_once(probe):
    assert probe["products"] == {"bfloat16": pytest.approx(0.5, abs=0.01), "float32": pytest.approx(0.5, abs=0.01)}


def test_bfloat16_on_the_device_and_on_the_cpu(probe):
    """Gradients of logits are of 16 bits on a CUDA device, and of 32 on the CPU: hence a larger error."""
    assert probe["executed"] > 0
    assert all(1e-4 < x < 2.5e-3 for x in probe["bfloat16"]["cpu"].values())
    assert all(1e-4 < x < 5e-3 for x in probe["bfloat16"]["cuda"].values())


def test_other_numbers_of_tokens_compile_nothing(probe):
    assert probe["compiled again"] == []


@pytest.mark.slow
def test_counts_of_every_form_of_call(tmp_path_factory):
    """At full size; ``call_matrix --record`` writes what is expected. Bytes may differ by what an allocator rounds."""
    found = json.loads(under_the_stand_in(tmp_path_factory, "tests.emulation.device.call_matrix", "--json"))
    expected = json.loads(EXPECTED.read_text())
    assert not {name: row["bad"] for name, row in found.items() if row["bad"]}
    assert set(found) == set(expected)
    for name, row in expected.items():
        for key in ("products", "launches", "waits", "loaded"):
            assert found[name][key] == row[key], (name, key)
        assert found[name]["kernels"] == pytest.approx(row["kernels"], rel=0.02), name  # PyTorch's own may change
        assert found[name]["peak_bytes"] == pytest.approx(row["peak_bytes"], rel=0.01), name


@pytest.mark.slow
def test_tests_that_need_a_gpu_believe_in_one(tmp_path_factory):
    """A part of ``make emulate``."""
    plugin, file = "tests.emulation.device.plugin", "tests/kernels/test_loss_half.py"
    text = under_the_stand_in(tmp_path_factory, "pytest", "-p", plugin, "-m", "gpu and not slow", "-q", file)
    assert " passed" in text and " skipped" not in text and "'launches'" in text
