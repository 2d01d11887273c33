"""A report in headless Chromium: it runs without errors and without a network, fits a phone, follows the reader's
colours, and answers to keys.

python docs/tools/check_report.py runs/report/report.html --screenshots runs/screenshots
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"),
    *("--no-first-run", "--hide-scrollbars", "--disable-component-update", "--virtual-time-budget=4000"),
)
#: Name -> width, height, and whether the reader's system is dark (0) or light (1).
SCREENS = {"light": (1280, 2600, 1), "dark": (1280, 2600, 0), "narrow": (390, 2600, 1), "narrow-dark": (390, 2600, 0)}
#: Runs at the end of a copy of the page and writes what it has seen.
PROBE = """
{
const seen = {};
const root = document.documentElement;
seen.overflow = root.scrollWidth - root.clientWidth;
seen.paper = getComputedStyle(document.body).backgroundColor;
const chart = document.querySelector("svg.chart");
chart.focus();
seen.focused = document.activeElement === chart;
const press = (key) => chart.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const tip = document.getElementById("tip");
press("End"); seen.last = tip.textContent;
press("ArrowLeft"); seen.before = tip.textContent; seen.shown = !tip.hidden;
press("Escape"); seen.hidden = tip.hidden;
const box = document.getElementById("show-0");
const lines = [...document.querySelectorAll("polyline.arm-0")];
const hidden = () => lines.every((x) => getComputedStyle(x).display === "none");
seen.drawn = !hidden();
box.click(); seen.gone = hidden(); box.click(); seen.back = !hidden();
const token = document.querySelector(".token");
if (token) {
  const colours = [...document.querySelectorAll("input[name=term]")].map((choice) => {
    choice.click();
    return [...document.querySelectorAll(".token")].map((x) => getComputedStyle(x).background).join();
  });
  seen.colours = colours.length === new Set(colours).size;
}
const targets = [...document.querySelectorAll("a, summary, label")];
seen.small = targets.filter((x) => x.offsetParent && x.offsetHeight < 18).length;
const result = document.createElement("pre");
result.id = "seen"; result.textContent = JSON.stringify(seen); document.body.append(result);
}
"""


def run(program: str, page: Path, screen: tuple[int, int, int], *options: str) -> subprocess.CompletedProcess:
    """The browser on one page, in a profile of its own, with every request to a network sent nowhere."""
    width, height, colours = screen
    with tempfile.TemporaryDirectory() as profile:
        command = [program, *QUIET, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        command += [f"--blink-settings=preferredColorScheme={colours}", "--proxy-server=127.0.0.1:9", *options]
        return subprocess.run([*command, page.resolve().as_uri()], capture_output=True, text=True, timeout=300)


def probe(program: str, page: Path, screen: tuple[int, int, int]) -> tuple[dict[str, Any], str]:
    """What the probe has seen on a copy of a page, and what its console said."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "page.html")
        copy.write_text(page.read_text().replace("</body>", f"<script>{PROBE}</script></body>"))
        done = run(program, copy, screen, "--enable-logging=stderr", "--dump-dom")
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return (json.loads(html.unescape(found[1])) if found else {}), console


def problems(program: str, page: Path) -> Iterator[str]:
    """One sentence for each thing that is wrong.

    Args:
        program: the browser. page: the report.
    """
    papers = {}
    for name, screen in SCREENS.items():
        seen, console = probe(program, page, screen)
        if not seen:
            yield f"{name}: the page's scripts did not come to their end. {console}"
            continue
        if console:
            yield f"{name}: the console says {console}"
        if seen["overflow"] > 0:
            yield f"{name}: the page is {seen['overflow']} pixels wider than the screen"
        wanted = ["focused", "shown", "hidden", "drawn", "gone", "back", *(["colours"] if "colours" in seen else [])]
        yield from (f"{name}: {what} is false" for what in wanted if not seen[what])
        if not seen["last"] or seen["last"] == seen["before"]:
            yield f"{name}: the arrow keys show {seen['before']!r} after {seen['last']!r}"
        if seen["small"]:
            yield f"{name}: {seen['small']} links or labels are less than 18 pixels high"
        papers[name] = seen["paper"]
    if papers.get("light") == papers.get("dark"):
        yield f"light and dark have the same paper, {papers.get('dark')}"


def main() -> int:
    """Prints what is wrong; returns 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, help="report.html")
    parser.add_argument("--screenshots", type=Path, help="folder for pictures of the page")
    options = parser.parse_args()
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        print(f"no browser: install one of {', '.join(PROGRAMS)} (Debian: apt-get install chromium)", file=sys.stderr)
        return 1
    found = list(problems(program, options.page))
    print("\n".join(found) or f"{options.page}: nothing is wrong")
    if options.screenshots:
        options.screenshots.mkdir(parents=True, exist_ok=True)
        for name, screen in SCREENS.items():
            target = (options.screenshots / f"{name}.png").resolve()
            run(program, options.page, screen, f"--screenshot={target}")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
