"""Hooks of mkdocs: the site has the layout of the repository, and lists the docstrings of all public names."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
from names import ROOT, groups

#: What belongs to the site beside ``docs/``: pages, and the pictures on them.
OUTSIDE = ("*.md", "benchmarks/*.md", "benchmarks/results/**/*.png", "findings/*", "examples/*")
REFERENCE = "docs/api/"
#: What public names of a package take or derive from, and users set.
BESIDE = {"vgs": ("vgs.trainers.settings.VGSOptions", "vgs.data.sources.DataSource")}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Give every page its path in the repository, so that relative links hold there and here."""
    ours = [file for file in files if file.src_dir and Path(file.src_dir) == Path(config.docs_dir)]
    theme = [file for file in files if file not in ours]
    outside = {path.relative_to(ROOT) for pattern in OUTSIDE for path in ROOT.glob(pattern) if path.is_file()}
    paths = [f"docs/{file.src_uri}" for file in ours] + sorted(map(str, outside))
    chosen = [path for path in paths if not (path.startswith("docs/") and path.endswith((".py", ".pyc")))]
    return Files([*theme, *(File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in chosen)])


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """A page of the reference, ``docs/api/PACKAGE.md``, gets what the docstrings of the package's names say."""
    path = Path(page.file.src_uri)
    if not page.file.src_uri.startswith(REFERENCE):
        return markdown
    parts = [markdown]
    for title, names in groups(path.stem):
        parts += [f"## {title[0].upper()}{title[1:]}"] if title else []
        parts += [f"::: {path.stem}.{name}" for name in names]
    if path.stem in BESIDE:
        parts += ["## What these take", *(f"::: {name}" for name in BESIDE[path.stem])]
    return "\n\n".join(parts)
