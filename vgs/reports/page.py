"""The page of a report: one HTML file that loads nothing from anywhere.

All numbers on it are read from the report's JSON through ``Page.number``, which notes where each stands.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from .charts import Chart, all_charts, look_up
from .quantities import PHASES, shown
from .svg import line_chart

GENERATOR = "vgs report"
CHECKED = ' checked="checked"'
SECTIONS = {
    "summary": "At a glance",
    "curves": "Learning curves",
    "bins": "Terms by visual dependency",
    "geometry": "Geometry of the gradients",
    "samples": "Answers, token by token",
    "cost": "Cost of a step",
    "settings": "Settings",
    "versions": "Versions",
}
ABOUT = {
    "curves": "Mean over seeds; the band is the 95 % t-interval, and may leave the frame where seeds are few. "
    "Point at a chart, or focus it and use the arrow keys, to read values.",
    "bins": "Every batch's tokens in bins of equal count by the teacher's visual dependency KL(q_I ‖ q_x): the palest "
    "line has the tokens that need the image least, the darkest those that need it most (arXiv 2606.00564, Fig. 4).",
    "geometry": "The gradients of the three terms, by bin of visual dependency: 90° between language and visual means "
    "that what the image teaches is at right angles to what language does (arXiv 2606.00564, Fig. 3 and 7).",
    "samples": "The same questions, answered greedily at several steps. The stronger a token's colour, the larger the "
    "chosen value; blue is below 0. Visual dependency: how much the image changes the distribution, in nats. Visual "
    "gain: how much likelier the image makes the token itself, log p(y | image) − log p(y | text).",
    "cost": "Means over the steps but the first, which starts things up. "
    "What sampling, teacher and eta leave of a step is the student's.",
    "settings": "In which settings the arms differ; below, all settings of each.",
    "versions": "Of the libraries under each arm.",
}


def text(value: Any) -> str:
    """A value as text that is no markup."""
    return html.escape(str(value))


class Page:
    """Builds the page of a report.

    Args:
        numbers: of ``collect.collect``, as they come back from JSON.
        title: of the page.
    """

    def __init__(self, numbers: Mapping[str, Any], title: str) -> None:
        self.numbers, self.title = numbers, title
        self.arms = numbers["arms"]
        self.charts = all_charts(numbers)

    def number(self, place: str, unit: str = "") -> str:
        """The number at a dotted place of the report, with that place; a dash where there is none."""
        value = look_up(self.numbers, place)
        if value is None:
            return '<span class="none" title="not measured">–</span>'
        said = text(shown(value, unit))
        return f'<data value="{text(repr(value))}" data-place="{text(place)}" data-unit="{text(unit)}">{said}</data>'

    def whole(self) -> str:
        """The page."""
        style, script = ((files(__package__) / name).read_text() for name in ("page.css", "page.js"))
        bodies = {name: getattr(self, f"_{name}")() for name in SECTIONS}
        bodies = {name: body for name, body in bodies.items() if body}
        links = "".join(f'<a href="#{name}">{SECTIONS[name]}</a>' for name in bodies)
        sections = "".join(
            f'<section id="{name}" aria-labelledby="h-{name}"><h2 id="h-{name}">{SECTIONS[name]}</h2>'
            f"{self._about(name)}{body}</section>"
            for name, body in bodies.items()
        )
        embedded = json.dumps(self.numbers, separators=(",", ":")).replace("<", "\\u003c")
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
            f'<meta name="generator" content="{GENERATOR}"/><meta name="color-scheme" content="light dark"/>'
            '<link rel="icon" href="data:,"/>'
            f"<title>{text(self.title)}</title><style>{style}{self._arm_rules()}</style></head><body>"
            f'<a class="skip" href="#{next(iter(bodies))}">Skip to the numbers</a>'
            f"<header><h1>{text(self.title)}</h1>{self._lead()}</header>"
            f'<nav aria-label="Sections">{links}</nav>{self._legend()}<main>{sections}</main>'
            f"<footer><p>Made by <code>vgs report</code> {text(self.numbers['made_by'])}. The numbers are in "
            "<code>report.json</code> beside this page, the figures in <code>figures/</code>.</p></footer>"
            '<div id="tip" role="status" aria-live="polite" hidden="hidden"></div>'
            f'<script type="application/json" id="numbers">{embedded}</script><script>{script}</script></body></html>\n'
        )

    def _about(self, name: str) -> str:
        return f'<p class="about">{text(ABOUT[name])}</p>' if name in ABOUT else ""

    def _lead(self) -> str:
        runs = sum(len(arm["runs"]) for arm in self.arms)
        said = f"{runs} run{'s' if runs > 1 else ''} in {len(self.arms)} arm{'s' if len(self.arms) > 1 else ''}"
        return f"<p>{said} of on-policy distillation with Visual Gradient Steering and its relatives.</p>"

    def _arm_rules(self) -> str:
        """A box in the legend hides its arm without any script."""
        return "".join(f"body:has(#show-{n}:not(:checked)) .arm-{n}{{display:none}}" for n in range(len(self.arms)))

    def _arm(self, place: int) -> str:
        return f'<span class="key arm-key" style="--own:var(--hue-{place % 8})">{text(self.arms[place]["name"])}</span>'

    def _legend(self) -> str:
        rows = []
        for place, arm in enumerate(self.arms):
            count = len(arm["runs"])
            seeds = f"{count} seeds" if count > 1 else "1 seed"
            steps = "no curves" if arm["steps"] is None else f"{self.number(f'arms.{place}.steps')} steps"
            rows.append(
                f'<label><input type="checkbox" id="show-{place}" checked="checked"/>{self._arm(place)} '
                f"<small>{seeds}, {steps}</small></label>"
            )
        return f'<fieldset class="legend"><legend>Arms</legend>{"".join(rows)}</fieldset>'

    # ---- sections

    def _summary(self) -> str:
        heads = "".join(f'<th scope="col" class="arm-{n}">{self._arm(n)}</th>' for n in range(len(self.arms)))
        rows = []
        for place, row in enumerate(self.numbers["summary"]):
            cells = "".join(
                f'<td class="arm-{n}">{self._spread(f"summary.{place}.cells.{n}", row["unit"])}</td>'
                for n in range(len(self.arms))
            )
            unit = " <small>nats</small>" if row["unit"] == "nats" else ""
            rows.append(
                f'<tr><th scope="row" title="{text(row["meaning"])}">{text(row["title"])}{unit}</th>{cells}</tr>'
            )
        note = "Last value of each run: mean over seeds ± half of the 95 % t-interval."
        if bare := [arm["name"] for arm in self.arms if arm["steps"] is None]:
            note += f" Of {' · '.join(map(text, bare))} there are final values alone, no curves."
        table = f"<thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
        return f'<div class="wide"><table><caption>{note}</caption>{table}</table></div>'

    def _spread(self, place: str, unit: str) -> str:
        cell = look_up(self.numbers, place)
        if cell is None:
            return '<span class="none" title="not measured">–</span>'
        half = "" if cell["half"] is None else f" <small>± {self.number(f'{place}.half', unit)}</small>"
        return f"<b>{self.number(f'{place}.mean', unit)}</b>{half}"

    def _curves(self) -> str:
        more = self.charts["more"]
        body = f'<div class="grid-of-charts">{"".join(map(self._figure, self.charts["curves"]))}</div>'
        if more:
            inner = "".join(map(self._figure, more))
            body += (
                f'<details class="more"><summary>Everything else that was logged ({len(more)} charts)</summary>'
                f'<div class="grid-of-charts">{inner}</div></details>'
            )
        return body if self.charts["curves"] or more else ""

    def _bins(self) -> str:
        charts = self.charts["bins"]
        if not charts:
            return ""
        count = len(charts[0].lines)
        scale = "".join(f'<i style="--share:{100 * n / max(count - 1, 1):.0f}%"></i>' for n in range(count))
        key = (
            f'<p class="scale"><span>lowest dependency</span><span class="steps">{scale}</span><span>highest</span></p>'
        )
        return f"{key}{self._paired(map(self._figure, charts))}"

    def _geometry(self) -> str:
        charts = self.charts["geometry"]
        return self._paired(self._figure(chart, key=True) for chart in charts) if charts else ""

    def _paired(self, figures: Iterable[str]) -> str:
        """A grid in which, where there is room, the arms of one kind of chart stand side by side."""
        count = len(self.arms)
        columns = {1: 3, 2: 4}.get(count, min(count, 4))
        return f'<div class="grid-of-charts paired" style="--columns:{columns}">{"".join(figures)}</div>'

    def _figure(self, chart: Chart, key: bool = False) -> str:
        unit = {"nats": "nats per token", "share": "", "degrees": "degrees"}.get(chart.unit, chart.unit)
        note = ", ".join(part for part in (chart.note, unit) if part)
        keys = "".join(
            f'<span class="key" style="--own:var(--hue-{line.hue})">{text(line.label)}</span>' for line in chart.lines
        )
        keys = f'<p class="keys">{keys}</p>' if key else ""
        arms = {line.arm for line in chart.lines}
        own = f' class="arm-{next(iter(arms))}"' if len(arms) == 1 and None not in arms else ""
        return (
            f'<figure id="{chart.name}"{own}><figcaption><b>{text(chart.title)}</b> <small>{text(note)}</small>'
            f"</figcaption>{line_chart(self.numbers, chart)}{keys}{self._table(chart)}</figure>"
        )

    def _table(self, chart: Chart) -> str:
        """The numbers of a chart, for those who would rather read them."""
        heads = "".join(f'<th scope="col">{text(line.label)}</th>' for line in chart.lines)
        places = sorted({x for line in chart.lines for x in look_up(self.numbers, line.x)})
        columns = [{x: n for n, x in enumerate(look_up(self.numbers, line.x))} for line in chart.lines]
        rows = []
        for x in places:
            known = next((line, own[x]) for line, own in zip(chart.lines, columns, strict=True) if x in own)
            head = self.number(f"{known[0].x}.{known[1]}")
            cells = "".join(
                f"<td>{self._cell(line, own.get(x), chart.unit)}</td>"
                for line, own in zip(chart.lines, columns, strict=True)
            )
            rows.append(f'<tr><th scope="row">{head}</th>{cells}</tr>')
        return (
            '<details><summary>Numbers</summary><div class="wide"><table><thead><tr>'
            f'<th scope="col">{text(chart.x_label)}</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
            "</div></details>"
        )

    def _cell(self, line: Any, index: int | None, unit: str) -> str:
        if index is None:
            return '<span class="none" title="not measured">–</span>'
        value = self.number(f"{line.y}.{index}", unit)
        if line.low is None or look_up(self.numbers, f"{line.low}.{index}") is None:
            return value
        ends = [self.number(f"{place}.{index}", unit) for place in (line.low, line.high)]
        return f"{value} <small>{ends[0]} to {ends[1]}</small>"

    def _samples(self) -> str:
        samples = self.numbers["samples"]
        if samples is None:
            return ""
        choices = "".join(
            f'<label><input type="radio" name="term" id="by-{term["name"]}"{CHECKED if not place else ""}/>'
            f"{text(term['title'])} <small>up to {self.number(f'samples.terms.{place}.largest')}</small></label>"
            for place, term in enumerate(samples["terms"])
        )
        rules = "".join(
            f"body:has(#by-{term['name']}:checked) .token{{--value:var(--{term['name']},0)}}"
            for term in samples["terms"]
        )
        cards = "".join(self._question(place) for place in range(len(samples["questions"])))
        choices = f'<fieldset class="legend plain"><legend>Colour by</legend>{choices}</fieldset>'
        return f'<style>{rules}</style>{choices}<div class="cards">{cards}</div>'

    def _question(self, place: int) -> str:
        question = self.numbers["samples"]["questions"][place]
        images = "".join(
            f'<img src="{text(image)}" alt="picture {n + 1}"/>' for n, image in enumerate(question["images"])
        )
        gold = f" <small>answer: {text(question['answer'])}</small>" if question["answer"] is not None else ""
        answers = self._answers(place)
        return (
            f'<article class="card"><div class="pictures">{images or "<small>no picture</small>"}</div><div>'
            f"<h3>{text(question['question'])}{gold}</h3>{answers}{self._values(place)}</div></article>"
        )

    def _answers(self, place: int) -> str:
        """Each arm's first and last answer to a question; those between can be opened."""
        rows = self.numbers["samples"]["questions"][place]["answers"]
        parts = []
        for arm in dict.fromkeys(row["arm"] for row in rows):
            said = [self._answer(place, number) for number, row in enumerate(rows) if row["arm"] == arm]
            between = said[1:-1]
            if len(between) > 2:
                summary = f"<summary>{len(between)} answers between</summary>"
                between = [f'<details class="arm-{arm}">{summary}{"".join(between)}</details>']
            parts += [*said[:1], *between, *said[1:][-1:]]
        return "".join(parts)

    def _answer(self, place: int, row: int) -> str:
        answer = self.numbers["samples"]["questions"][place]["answers"][row]
        right = {True: "✓ right", False: "✗ wrong", None: ""}[answer["right"]]
        largest = {term["name"]: term["largest"] or 1.0 for term in self.numbers["samples"]["terms"]}
        spans = []
        for number, token in enumerate(answer["tokens"]):
            values = {name: column[number] for name, column in answer["terms"].items() if column[number] is not None}
            style = ";".join(
                f"--{name}:{value / largest[name]:.3f}" for name, value in values.items() if name in largest
            )
            said = ", ".join(f"{name} {shown(value, 'nats')}" for name, value in values.items())
            spans.append(f'<span class="token" style="{style}" title="{text(said)}">{text(token)}</span>')
        at = self.number(f"samples.questions.{place}.answers.{row}.step")
        verdict = f'<em class="{"right" if answer["right"] else "wrong"}">{right}</em>' if right else ""
        speaker = f"{self._arm(answer['arm'])} <small>step {at}</small> {verdict}"
        return (
            f'<p class="said arm-{answer["arm"]}"><span class="who">{speaker}</span><span>{" ".join(spans)}</span></p>'
        )

    def _values(self, place: int) -> str:
        """Every token's values of every answer to a question, as tables."""
        tables = []
        for row, answer in enumerate(self.numbers["samples"]["questions"][place]["answers"]):
            at = f"samples.questions.{place}.answers.{row}"
            names = list(answer["terms"])
            heads = "".join(f'<th scope="col">{text(name)}</th>' for name in names)
            lines = "".join(
                f'<tr><th scope="row">{text(token)}</th>'
                + "".join(f"<td>{self.number(f'{at}.terms.{name}.{n}', 'nats')}</td>" for name in names)
                + "</tr>"
                for n, token in enumerate(answer["tokens"])
            )
            caption = f"{self._arm(answer['arm'])} step {self.number(f'{at}.step')}"
            tables.append(
                f'<table><caption>{caption}</caption><thead><tr><th scope="col">token</th>{heads}</tr></thead>'
                f"<tbody>{lines}</tbody></table>"
            )
        inner = "".join(tables)
        return f'<details><summary>Values of every token</summary><div class="wide">{inner}</div></details>'

    def _cost(self) -> str:
        cost = self.numbers["cost"]
        if cost is None:
            return ""
        longest = max(row["seconds"]["step"]["mean"] for row in cost["rows"]) or 1.0
        named = [name for name in PHASES if any(row["seconds"][name] for row in cost["rows"])]
        parts = [name for name in named if name != "step"]
        bars = "".join(
            f'<div class="arm-{row["arm"]}">{self._arm(row["arm"])}<div class="stack">'
            f"{_stack(row['seconds'], parts or ['step'], longest, 0 if parts else row['arm'])}</div></div>"
            for row in cost["rows"]
        )
        keys = "".join(
            f'<span class="key" style="--own:var(--hue-{n % 8})">{text(PHASES[x])}</span>' for n, x in enumerate(parts)
        )
        heads = "".join(f'<th scope="col">{text(PHASES[name])}</th>' for name in named)
        rows = "".join(
            f'<tr class="arm-{row["arm"]}"><th scope="row">{self._arm(row["arm"])}</th>'
            + "".join(f"<td>{self._spread(f'cost.rows.{n}.seconds.{name}', 'seconds')}</td>" for name in named)
            + "</tr>"
            for n, row in enumerate(cost["rows"])
        )
        table = (
            f"<table><caption>Seconds</caption><thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        )
        return f'<figure class="cost"><p class="keys">{keys}</p>{bars}<div class="wide">{table}</div></figure>'

    def _settings(self) -> str:
        rows = self.numbers["differences"]
        body = (
            self._compared([(row["setting"], row["values"]) for row in rows])
            if rows
            else ("<p>The arms share all settings that are known.</p>" if len(self.arms) > 1 else "")
        )
        for place, settings in enumerate(self.numbers["settings"]):
            if settings:
                lines = "".join(
                    f'<tr><th scope="row"><code>{text(row["setting"])}</code></th><td>{_setting(row["value"])}</td>'
                    "</tr>"
                    for row in settings
                )
                body += (
                    f'<details><summary>All settings of {self._arm(place)}</summary><div class="wide"><table><tbody>'
                    f"{lines}</tbody></table></div></details>"
                )
        seeds = ", ".join(f"{arm['name']}: {', '.join(str(run['seed']) for run in arm['runs'])}" for arm in self.arms)
        return f'{body}<p class="about">Seeds — {text(seeds)}.</p>'

    def _versions(self) -> str:
        return self._compared([(row["name"], row["values"]) for row in self.numbers["versions"]])

    def _compared(self, rows: Sequence[tuple[str, Sequence[Any]]]) -> str:
        """One column an arm; rows that are not the same everywhere are marked."""
        if not rows:
            return ""
        heads = "".join(f'<th scope="col" class="arm-{n}">{self._arm(n)}</th>' for n in range(len(self.arms)))
        lines = []
        for name, values in rows:
            differs = ' class="differs"' if any(value != values[0] for value in values) else ""
            cells = "".join(f'<td class="arm-{n}">{_setting(value)}</td>' for n, value in enumerate(values))
            lines.append(f'<tr{differs}><th scope="row"><code>{text(name)}</code></th>{cells}</tr>')
        body = f"<thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
        return f'<div class="wide"><table>{body}</table></div>'


def _stack(seconds: Mapping[str, Any], parts: Sequence[str], longest: float, first: int = 0) -> str:
    """The phases of a step side by side, as wide as they are long, in colours from the ``first`` on."""
    bars = []
    for number, name in enumerate(parts, first):
        if seconds[name]:
            mean = seconds[name]["mean"]
            style = f"--own:var(--hue-{number % 8});width:{100 * mean / longest:.2f}%"
            title = f"{PHASES[name]}: {shown(mean, 'seconds')} s"
            bars.append(f'<i class="phase" style="{style}" title="{text(title)}"></i>')
    return "".join(bars)


def _setting(value: Any) -> str:
    return '<span class="none">unset</span>' if value is None else f"<code>{text(value)}</code>"
