"""The built site: nothing is loaded from elsewhere, every link inside leads somewhere, every public name is there.

python docs/tools/check_site.py site
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from names import public_names

#: Attributes from which a browser loads by itself; an ``a`` only leads there.
LOADS = {"src", "srcset", "data", "poster", "background", "action"}
CSS_LOADS = re.compile(r"""(?:url\(|@import)\s*["']?(https?:)?//""")


class Document(HTMLParser):
    """What one page loads, where it leads, and its anchors.

    Args:
        text: of an HTML file.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.leads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            elif name in LOADS or (tag == "link" and name == "href" and dict(attrs).get("rel") != "canonical"):
                self.loads.append(value)
            elif tag == "a" and name == "href":
                self.leads.append(value)


def problems(site: Path) -> Iterator[str]:
    """One sentence for each thing that is wrong.

    Args:
        site: the folder that mkdocs wrote.
    """
    pages = {path.resolve(): Document(path.read_text()) for path in site.rglob("*.html")}
    if not pages:
        yield f"{site} has no page"
    for path, page in pages.items():
        for target in page.loads:
            if urlsplit(target).netloc:
                yield f"{path.name} loads {target}"
        if path.name == "404.html":
            continue  # its links are for a server's root
        for target in [*page.leads, *page.loads]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or target.startswith("javascript"):
                continue
            other = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            other = other / "index.html" if other.is_dir() else other
            if not other.exists():
                yield f"{path.name} leads to {target}, which is not there"
            elif parts.fragment and other in pages and unquote(parts.fragment) not in pages[other].anchors:
                yield f"{path.name} leads to {target}, which has no such anchor"
    for path in site.rglob("*.css"):
        if CSS_LOADS.search(path.read_text()):
            yield f"{path.name} loads from another site"
    for package in ("vgs", "vgs_kernels"):
        reference = pages.get((site / f"docs/api/{package}.html").resolve(), Document(""))
        for name in public_names(package):
            if f"{package}.{name}" not in reference.anchors:
                yield f"{package}.{name} is not in the reference"


if __name__ == "__main__":
    found = list(problems(Path(sys.argv[1])))
    print(*found, sep="\n", end="\n" if found else "")
    raise SystemExit(bool(found))
