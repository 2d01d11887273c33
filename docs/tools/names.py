"""The public names of both packages, read without importing them: the site is built where torch is not installed."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def public_names(package: str) -> list[str]:
    """Names that a package exports, in the order of its file.

    Args:
        package: ``vgs`` or ``vgs_kernels``.
    """
    return [name for _, names in groups(package) for name in names]


def groups(package: str) -> Iterator[tuple[str, list[str]]]:
    """(title, names) of each group: comments of the list of exports are the titles; "" where there is none."""
    text = (ROOT / package / "__init__.py").read_text()
    values = {
        target.id: node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    exports = values.get("_EXPORTS", values["__all__"])
    listed = exports.keys if isinstance(exports, ast.Dict) else exports.elts
    names = {node.lineno: node.value for node in listed}
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT and exports.lineno < token.start[0] < exports.end_lineno
    }
    title, found = "", []
    for line in range(exports.lineno, exports.end_lineno + 1):
        if line in comments and line not in names:
            if found:
                yield title, found
            title, found = comments[line], []
        if line in names:
            found.append(names[line])
    yield title, found
