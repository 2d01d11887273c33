"""``vgs report`` on real runs: the page is whole and loads nothing, and its numbers are those of the runs."""

from __future__ import annotations

import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vgs.cli import main as cli
from vgs.reports.charts import look_up
from vgs.reports.quantities import shown
from vgs.reports.statistics import interval
from vgs.reports.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH

pytestmark = pytest.mark.slow  # the runs: some seconds

VOID = {"meta", "link", "input", "img", "br"}
SVG_ALONE = {"line", "polyline", "polygon", "circle", "rect"}  # written as <x/>
LOADS = ("src", "srcset", "href", "data", "poster", "xlink:href", "action")


class Document(HTMLParser):
    """A page: whether its tags close in order, what it loads, and its numbers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.numbers: list[tuple[dict[str, str], str]] = []
        self.loose: list[str] = []  # digits in cells that are no <data>
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self.loads += [attributes[x] for x in LOADS if x in attributes and not (tag == "a" or x == "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        assert tag in VOID | SVG_ALONE, tag
        self.tags.append((tag, dict(attrs)))
        self.loads += [value for name, value in attrs if name in LOADS]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.open[-3:])

    def handle_data(self, data: str) -> None:
        if not self.open:
            return
        self.texts.setdefault(self.open[-1], []).append(data)
        if self.open[-1] == "data":
            self.numbers.append((self.tags[-1][1], data))
        elif {"td", "tbody"} <= set(self.open) and "code" not in self.open and re.search(r"\d", data):
            self.loose.append(data)


@pytest.fixture(scope="module")
def text(report: Path) -> str:
    return (report / "report.html").read_text()


@pytest.fixture(scope="module")
def page(text: str) -> Document:
    return Document(text)


@pytest.fixture(scope="module")
def numbers(report: Path) -> dict[str, Any]:
    return json.loads((report / "report.json").read_text())


def test_the_page_is_whole_and_loads_nothing(text: str, page: Document) -> None:
    assert page.loads and all(target.startswith("data:") or target.startswith("#") for target in page.loads)
    styles = "".join(page.texts["style"])
    assert "@import" not in styles and not re.search(r"url\((?!#)", styles)
    script = page.texts["script"][-1]
    assert not re.search(r"fetch|XMLHttp|import\(|WebSocket|https?:", script)
    assert "https://" not in text.replace("http://www.w3.org", "")
    found = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(found) == len(set(found))
    assert {"summary", "curves", "bins", "geometry", "samples", "cost", "settings", "versions"} <= set(found)
    for tag, attributes in page.tags:
        assert set(attributes.get("aria-labelledby", "").split()) <= set(found)
        if tag == "a":
            assert attributes["href"].removeprefix("#") in found
        if tag == "svg":
            assert attributes["tabindex"] == "0" and attributes["role"] == "img"
        if tag == "img":
            assert attributes["alt"] and attributes["src"].startswith("data:image/png;base64,")
    assert page.texts["h1"] == ["Plain <and> steered"]


def test_every_number_of_the_page_is_that_of_the_json(page: Document, numbers: dict[str, Any]) -> None:
    assert len(page.numbers) > 500 and not page.loose
    for attributes, text in page.numbers:
        value = look_up(numbers, attributes["data-place"])
        assert float(attributes["value"]) == value and text == shown(value, attributes["data-unit"])
    (embedded,) = [x for x in page.texts["script"] if x.startswith("{")]
    assert json.loads(embedded) == numbers


def test_every_line_is_drawn_where_its_numbers_are(page: Document, numbers: dict[str, Any]) -> None:
    charts, lines = 0, 0
    frame: dict[str, Any] = {}
    for tag, attributes in page.tags:
        if tag == "svg":
            frame, charts = json.loads(attributes["data-chart"]), charts + 1
        if tag == "polyline" and "data-row" in attributes:
            line, lines = frame["lines"][int(attributes["data-row"])], lines + 1
            across = (WIDTH - LEFT - RIGHT) / (frame["right"] - frame["left"])
            up = (HEIGHT - TOP - BOTTOM) / (frame["top"] - frame["bottom"])
            drawn = [tuple(map(float, point.split(","))) for point in attributes["points"].split()]
            wanted = zip(look_up(numbers, line["x"]), look_up(numbers, line["y"]), strict=True)
            kept = [(x, y) for x, y in wanted if y is not None]
            for (left, low), (x, y) in zip(drawn, kept, strict=True):
                assert left == pytest.approx(LEFT + (x - frame["left"]) * across, abs=0.006)
                assert low == pytest.approx(HEIGHT - BOTTOM - (y - frame["bottom"]) * up, abs=0.006)
                assert TOP - 0.01 <= low <= HEIGHT - BOTTOM + 0.01
    assert charts > 20 and lines > 40


def test_the_numbers_are_those_of_the_runs(runs: list[Path], numbers: dict[str, Any]) -> None:
    assert [arm["name"] for arm in numbers["arms"]] == ["plain", "vgs"]
    assert [[run["seed"] for run in arm["runs"]] for arm in numbers["arms"]] == [[0, 1], [0, 1]]
    logs = [json.loads((run / "trainer_state.json").read_text())["log_history"] for run in runs]

    def logged(place: int, key: str) -> dict[int, float]:
        return {entry["step"]: entry[key] for entry in logs[place] if key in entry}

    for curve in numbers["curves"]:
        for series in curve["series"]:
            both = [logged(2 * series["arm"] + seed, curve["key"]) for seed in (0, 1)]
            assert series["steps"] == sorted(both[0]) and series["averaged"] == 1
            for row, step in enumerate(series["steps"]):
                mean, half = interval([values[step] for values in both])
                assert series["mean"][row] == pytest.approx(mean)
                assert series["high"][row] - series["low"][row] == pytest.approx(2 * half, abs=1e-9)
    main = [curve["key"] for curve in numbers["curves"] if curve["main"]]
    assert main[0] == "eval_accuracy" and {"standard", "visual", "language", "vds"} <= set(main)

    assert {(entry["arm"], entry["term"]) for entry in numbers["bins"]} >= {(0, "standard"), (1, "visual")}
    for entry in numbers["bins"]:
        for number, values in enumerate(entry["values"]):
            both = [logged(2 * entry["arm"] + seed, f"{entry['term']}_bin_{number}") for seed in (0, 1)]
            wanted = [statistics.fmean(x[step] for x in both) for step in entry["steps"]]
            assert values == pytest.approx(wanted)
    vds = next(entry["values"] for entry in numbers["bins"] if entry["term"] == "vds")
    assert all(low <= middle <= high for low, middle, high in zip(*vds, strict=True))

    for row in numbers["cost"]["rows"]:
        seconds = {name: cell["mean"] for name, cell in row["seconds"].items() if cell}
        parts = sum(seconds[name] for name in ("sampling", "teacher", "student", "optimizer"))
        assert parts == pytest.approx(seconds["step"], rel=0.1) and min(seconds.values()) > 0

    differing = {row["setting"]: row["values"] for row in numbers["differences"]}
    assert differing == {"training.gamma": [0.0, 2.0], "training.lam": [0.0, 0.01]}


def test_the_instruments_are_in_it(runs: list[Path], numbers: dict[str, Any]) -> None:
    stored = json.loads((runs[2] / "instruments" / "geometry-000004.json").read_text())
    entry = next(x for x in numbers["geometry"] if (x["arm"], x["step"], x["space"]) == (1, 4, "parameters"))
    assert entry["angles"] == stored["parameters"]["angles"] and len(entry["bins"]) == len(stored["vds"])
    questions = numbers["samples"]["questions"]
    assert [question["question"] for question in questions] == ["red ?", "blue ?"]
    for question in questions:
        assert [(x["arm"], x["step"]) for x in question["answers"]] == [(arm, s) for arm in (0, 1) for s in (0, 2, 4)]
        for answer in question["answers"]:
            assert all(len(column) == len(answer["tokens"]) for column in answer["terms"].values())
            assert answer["right"] in (True, False)
    # Before the first step both arms are the same student.
    assert questions[0]["answers"][0]["terms"] == questions[0]["answers"][3]["terms"]


def test_the_figures_are_pictures(report: Path) -> None:
    for name in ("curves", "bins", "geometry", "cost"):
        with Image.open(report / "figures" / f"{name}.png") as picture:
            assert picture.info["Software"] == "vgs report" and min(picture.size) > 200
            assert len(picture.convert("L").resize((64, 64)).getcolors()) > 10


def test_it_is_written_again_and_nobody_elses_file_is(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["report", str(runs[0]), "--out", str(tmp_path)]
    assert cli.main(command) == 0
    first = (tmp_path / "report.json").read_bytes(), (tmp_path / "report.html").read_bytes()
    assert cli.main(command) == 0
    assert first == ((tmp_path / "report.json").read_bytes(), (tmp_path / "report.html").read_bytes())
    for name, content in {
        "report.html": b"<html>mine</html>",
        "report.json": b'{"kind": "mine"}',
        "figures/curves.png": b"\x89PNG mine",
    }.items():
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            cli.main(command)
        assert stop.value.code == 2 and "which this command has not written" in capsys.readouterr().err
        assert (tmp_path / name).read_bytes() == content
        (tmp_path / name).write_bytes(before)


def test_a_run_that_was_stopped_is_read_from_its_newest_checkpoint(runs: list[Path], tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    (stopped / "checkpoint-2").mkdir(parents=True)
    (stopped / "checkpoint-10").mkdir()
    (stopped / "run.json").write_bytes((runs[2] / "run.json").read_bytes())
    state = json.loads((runs[2] / "trainer_state.json").read_text())
    for step in (2, 10):
        history = [{"step": n, "loss": 1.0 / n} for n in range(1, step + 1)]
        entry = {**state, "global_step": step, "log_history": history}
        (stopped / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(entry))
    assert cli.main(["report", str(stopped), "--out", str(tmp_path / "out")]) == 0
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    assert numbers["arms"][0]["steps"] == 10 and numbers["curves"][0]["series"][0]["mean"][-1] == pytest.approx(0.1)


def test_geometry_of_a_run_goes_into_its_report(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--bins", "2", "--samples", "3", "--out", str(tmp_path)]
    assert cli.main(["geometry", str(runs[3]), *options]) == 0
    said = capsys.readouterr().out
    assert (
        "parameters, exact" in said and "language / visual" in said and said.count("\nall") + said.count(" all ") >= 2
    )
    exact = json.loads((tmp_path / "geometry-000004.json").read_text())
    assert exact["samples"] == 3 and len(exact["parameters"]["bins"]) == 2 and exact["model"] == "vgs-1"
    with Image.open(tmp_path / "geometry-000004.png") as picture:
        assert min(picture.size) > 200
    assert cli.main(["geometry", str(runs[3]), *options, "--projections", "16"]) == 0
    near = json.loads((tmp_path / "geometry-000004.json").read_text())
    for pair, values in exact["parameters"]["angles"].items():
        errors = near["parameters"]["errors"]["angles"][pair]
        for value, estimate, error in zip(values, near["parameters"]["angles"][pair], errors, strict=True):
            assert abs(value - estimate) < 5 * error + 1e-6
    assert near["hidden"] == exact["hidden"]
