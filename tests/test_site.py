"""The site (``make docs``): every page has its place, every public name is in the reference, all is on the site."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import PAGES, ROOT

import vgs
import vgs_kernels

sys.path.insert(0, str(ROOT / "docs" / "tools"))
import check_site
from names import groups, public_names

SETTINGS = (ROOT / "mkdocs.yml").read_text()


def entries(nav: Any) -> Iterator[str]:
    """The pages that a nav names."""
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from entries(part)


def test_every_page_has_a_place():
    """Entries for pages that are to come stand in mkdocs.yml as comments: the page's commit takes the mark away."""
    named = list(entries(yaml.safe_load(SETTINGS)["nav"]))
    pages = {str(path.relative_to(ROOT)) for path in PAGES}
    assert set(named) == pages, "the nav of mkdocs.yml and the pages differ"
    assert len(named) == len(set(named))


def test_the_site_needs_no_other():
    settings = yaml.safe_load(SETTINGS)
    assert settings["theme"]["font"] is False
    assert settings["use_directory_urls"] is False, "links between pages would need a server"
    assert not re.search(r"https?://", SETTINGS)


@pytest.mark.parametrize("package", [vgs, vgs_kernels], ids=lambda package: package.__name__)
def test_the_reference_has_all_public_names(package):
    assert sorted(public_names(package.__name__)) == sorted(package.__all__)
    assert f"# {package.__name__}:" in (ROOT / f"docs/api/{package.__name__}.md").read_text()


def test_the_reference_is_in_groups():
    titles = [title for title, _ in groups("vgs")]
    assert len(titles) > 3 and all(titles)
    assert [title for title, _ in groups("vgs_kernels")] == [""]


def test_type_checkers_see_what_is_imported_on_demand():
    """``vgs`` imports a name when it is first used; type checkers and the reference read ``if TYPE_CHECKING``."""
    found = re.findall(r"(?m)^    from \.([\w.]+) import (\w+) as \2$", inspect.getsource(vgs))
    assert {name: module for module, name in found} == vgs._EXPORTS


# That the check of the built site can fail.

PAGE = '<html><body><h1 id="here">x</h1>{}</body></html>'


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site on which all is well."""
    for package in ("vgs", "vgs_kernels"):
        anchors = "".join(f'<h3 id="{package}.{name}"></h3>' for name in public_names(package))
        page = tmp_path / f"docs/api/{package}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(PAGE.format(anchors))
    (tmp_path / "index.html").write_text(PAGE.format('<a href="docs/api/vgs.html#vgs.vgs_step"></a><a href="#here">'))
    (tmp_path / "x.css").write_text("a { background: url('x.png') }")
    return tmp_path


def test_a_good_site_passes(site):
    assert list(check_site.problems(site)) == []


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.html", '<script src="https://example.org/a.js"></script>', "loads https://example.org/a.js"),
        ("a.html", '<link rel="stylesheet" href="//example.org/a.css">', "loads //example.org/a.css"),
        ("a.html", '<img src="none.png">', "leads to none.png, which is not there"),
        ("a.html", '<a href="golf.html"></a>', "leads to golf.html, which is not there"),
        ("a.html", '<a href="index.html#golf"></a>', "leads to index.html#golf, which has no such anchor"),
        ("a.css", "@import 'https://example.org/font.css'", "a.css loads from another site"),
        ("docs/api/vgs.html", "", "vgs.vgs_step is not in the reference"),
    ],
)
def test_a_problem_of_the_site_is_found(site, name, text, problem):
    (site / name).write_text(PAGE.format(text) if name.endswith("html") else text)
    assert any(problem in found for found in check_site.problems(site))
