"""Predicted times on the page about GPUs are those of the files that the time models wrote."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PREDICTED, TOLERANCE = (
    json.loads((ROOT / f"benchmarks/results/predicted/{name}.json").read_text())["devices"]
    for name in ("times", "tolerance")
)
NAMES = {
    "vgs": "VGS, exact quantile",
    "vgs-folded": "VGS, folded",
    "vgs-frozen-head": "VGS, frozen head",
    "reverse-kl": "reverse KL",
    "forward-kl": "forward KL",
    "jsd": "JSD",
}


@pytest.mark.parametrize("job", PREDICTED["H200"])
def test_the_page_shows_what_was_predicted(job):
    cells = [NAMES[job]]
    for device in ("H200", "H100"):
        ours, floor = (PREDICTED[device][job][label]["seconds"] for label in ("ours", "floor"))
        cells += [f"{1e3 * ours:.1f}", f"{floor / ours:.2f}"]
    assert f"| {' | '.join(cells)} |" in (ROOT / "docs/gpu.md").read_text()


@pytest.mark.parametrize("job", TOLERANCE["H200"])
def test_the_page_shows_what_was_predicted_with_a_tolerance(job):
    cells = [NAMES[job]]
    for device in ("H200", "H100"):
        ours, floor = sum(TOLERANCE[device][job].values()), PREDICTED[device][job]["floor"]["seconds"]
        cells += [f"{1e3 * ours:.1f}", f"{floor / ours:.2f}"]
    assert f"| {' | '.join(cells)} |" in (ROOT / "docs/gpu.md").read_text()
