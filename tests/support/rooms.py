"""The rooms of this project, which of them uses which, and the picture of it.

A room is a folder of ``vgs``, a file or two beside the folders, or ``vgs_kernels`` as a whole. The rooms are in layers:
a module may import from its own room and from rooms further down, nowhere else.

``python tests/support/rooms.py`` draws docs/rooms.png again and writes the graph that it shows into it.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "rooms.png"
REDRAW = "python tests/support/rooms.py"
PACKAGES = ("vgs_kernels", "vgs")
#: Every room, from below to above.
LAYERS = (
    "vgs_kernels",
    "errors",
    "models",
    "objectives",
    "data",
    "one_step",
    "evaluation",
    "teachers",
    "trainers",
    "integrations",
    "planning",
    "reports",
    "digits",
    "cli",
    "vgs",
)
#: Files of ``vgs`` that are not in a folder, and the room that they belong to. ``vgs`` itself holds the public names.
FILES = {"vgs": "vgs", "vgs.errors": "errors", "vgs.log": "errors", "vgs.disk": "errors", "vgs.one_step": "one_step"}

Graph = dict[str, dict]


@dataclass(frozen=True, order=True)
class Import:
    """One import statement: the module that it stands in, the module that it asks for, and the line."""

    importer: str
    imported: str
    line: int


def module_name(path: Path, root: Path) -> str:
    """``vgs/models/heads.py`` -> ``vgs.models.heads``; an ``__init__.py`` is its folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the packages below a folder, by its dotted name."""
    paths = (path for package in PACKAGES for path in sorted((root / package).rglob("*.py")))
    return {module_name(path, root): path for path in paths}


def room_of(module: str) -> str:
    """The room that a module of the packages is in.

    Raises:
        ValueError: no room is known for it.
    """
    if module.split(".")[0] == "vgs_kernels":
        return "vgs_kernels"
    room = FILES.get(module) or (module.split(".")[1] if module.count(".") else "")
    if room not in LAYERS:
        raise ValueError(f"{module} is in no room: put it into a folder, or add it to LAYERS or FILES in {__file__}.")
    return room


def _absolute(module: str, is_package: bool, node: ast.ImportFrom) -> str:
    """The full name of what ``from ... import`` names, dots in front resolved."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def imports_of(module: str, source: str, is_package: bool = False) -> Iterator[tuple[str, int]]:
    """Every name that a module's text imports, wherever the statement stands, with its line.

    Imports inside functions, under ``TYPE_CHECKING``, and ``import_module("...")`` with a name in quotes count too.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = _absolute(module, is_package, node)
            yield from ((f"{start}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                package = module if is_package else module.rpartition(".")[0]
                yield resolve_name(node.args[0].value, package), node.lineno


def find_imports(modules: Mapping[str, Path]) -> tuple[list[Import], list[Import]]:
    """(imports of each other, imports of anything else) of these modules."""
    inside, outside = [], []
    for module, path in modules.items():
        for name, line in imports_of(module, path.read_text(), path.name == "__init__.py"):
            target = name
            while target and target not in modules:  # a name inside a module -> the module
                target = target.rpartition(".")[0]
            if target:
                inside.append(Import(module, target, line))
            else:
                outside.append(Import(module, name, line))
    return sorted(inside), sorted(outside)


def upward(imports: Iterable[Import]) -> list[str]:
    """One sentence for each import that points to a room above its own."""
    return [
        f"{x.importer}, line {x.line}: imports {x.imported}, and {room_of(x.imported)} is above {room_of(x.importer)}"
        for x in imports
        if LAYERS.index(room_of(x.imported)) > LAYERS.index(room_of(x.importer))
    ]


def too_long(folders: Iterable[Path], limit: int = 400) -> list[str]:
    """One sentence for each Python file with more lines than the limit."""
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    lengths = {path: len(path.read_text().splitlines()) for path in paths}
    return [f"{path} has {count} lines, at most {limit}" for path, count in lengths.items() if count > limit]


def wordless(modules: Mapping[str, Path]) -> list[str]:
    """One sentence for each package whose ``__init__.py`` says less than two sentences about it."""
    missing = []
    for module, path in modules.items():
        if path.name == "__init__.py":
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            if (count := len(re.findall(r"[.!?](?=\s|$)", text))) < 2:
                missing.append(f"{module}: its __init__.py has {count} sentences about it, expected at least two")
    return missing


def graph_of(modules: Iterable[str], imports: Iterable[Import]) -> Graph:
    """What the picture shows.

    Returns:
        ``modules``: room -> number of modules; ``imports``: room -> room below -> number of (module, module) pairs of
        which the first imports the second. The public names of ``vgs`` are looked up when used, so it is left out.
    """
    sizes = Counter(room_of(module) for module in modules)
    pairs = {(x.importer, x.imported) for x in imports}
    arrows = Counter((room_of(first), room_of(second)) for first, second in pairs)
    rooms = [room for room in LAYERS if sizes[room] and room != "vgs"]
    return {
        "modules": {room: sizes[room] for room in rooms},
        "imports": {
            room: {below: arrows[room, below] for below in rooms if below != room and arrows[room, below]}
            for room in rooms
        },
    }


def current_graph(root: Path = ROOT) -> Graph:
    """The graph of the code as it is."""
    modules = find_modules(root)
    return graph_of(modules, find_imports(modules)[0])


def recorded_graph(picture: Path = PICTURE) -> Graph:
    """The graph that a drawn picture was made from, out of the PNG's own text."""
    from PIL import Image

    with Image.open(picture) as image:
        return json.loads(image.text["rooms"])


#: What the picture says about each room.
ABOUT = {
    "cli": "the command vgs: one YAML file, one run",
    "digits": "the built-in task, its demo and studies",
    "reports": "runs side by side, as a page",
    "planning": "memory and work of a run, predicted",
    "integrations": "inside other people's trainers",
    "trainers": "distillation, self-distillation, GRPO",
    "teachers": "hidden states: a model here, a cache, a server",
    "evaluation": "accuracy, rewards, per-token terms",
    "one_step": "vgs_step: the whole method, one batch",
    "data": "from files to prompts, with and without images",
    "objectives": "what is minimised, by name",
    "models": "families, packed rows, heads",
    "errors": "errors, warnings, results kept on disk",
    "vgs_kernels": "from hidden states to loss and gradients",
}
COLOURS = {
    "cli": "#7a5195",
    "digits": "#bc5090",
    "reports": "#5c6bc0",
    "planning": "#8d6e63",
    "integrations": "#c2185b",
    "trainers": "#e8685d",
    "teachers": "#b5651d",
    "evaluation": "#f08a24",
    "one_step": "#d9a400",
    "data": "#7aa32c",
    "objectives": "#2f9e6e",
    "models": "#1f8fa8",
    "errors": "#6b7280",
    "vgs_kernels": "#2f4b7c",
}
WIDTH, HEIGHT = 5.6, 0.74  # of a room's box, whose neighbours are 1 apart


def _ports(graph: Graph, places: Mapping[str, float]) -> dict[tuple[str, str, str], float]:
    """(room, "in" or "out", other room) -> where on the box's right side that arrow ends.

    Arrows come in above and go out below; of both the longest is innermost, so that no two cross at a box.
    """
    ports = {}
    for room, y in places.items():
        above = [other for other in places if room in graph["imports"][other]]
        below = list(graph["imports"][room])
        order = [
            *(("in", other) for other in sorted(above, key=lambda other: places[other])),
            *(("out", other) for other in sorted(below, key=lambda other: places[other])),
        ]
        step = HEIGHT * 0.9 / max(len(order), 1)
        for index, (side, other) in enumerate(order):
            ports[room, side, other] = y + HEIGHT * 0.45 - step * (index + 0.5)
    return ports


def draw(graph: Graph, picture: Path = PICTURE) -> None:
    """Draw the rooms as a stack of boxes, with an arrow from each to every room below that it imports from."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path as Curve

    rooms = list(graph["modules"])
    places = {room: float(index) for index, room in enumerate(rooms)}
    ports = _ports(graph, places)
    figure = Figure(figsize=(11, 0.8 * len(rooms) + 1.0), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    axes.set_axis_off()
    axes.set_xlim(-0.2, WIDTH + 0.8 + 0.465 * len(rooms))  # a curve reaches three quarters of its control points
    axes.set_ylim(-0.95, len(rooms) + 0.15)

    for room, y in places.items():
        for below, count in graph["imports"][room].items():
            start, end = ports[room, "out", below], ports[below, "in", room]
            reach = 0.55 + 0.62 * (y - places[below])
            curve = Curve(
                [(WIDTH, start), (WIDTH + reach, start), (WIDTH + reach, end), (WIDTH + 0.06, end)],
                [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4],
            )
            axes.add_patch(
                FancyArrowPatch(
                    path=curve,
                    arrowstyle="-|>,head_length=5,head_width=2.6",
                    color=COLOURS[room],
                    linewidth=0.9 + 0.09 * min(count, 20),
                    alpha=0.85,
                    shrinkA=0,
                    shrinkB=0,
                )
            )
            axes.text(
                WIDTH + 0.75 * reach,
                (start + end) / 2,
                str(count),
                ha="center",
                va="center",
                fontsize=8.5,
                color=COLOURS[room],
                weight="bold",
                bbox={"boxstyle": "round,pad=0.18", "facecolor": "white", "edgecolor": "none"},
                zorder=5,
            )
    for room, y in places.items():
        axes.add_patch(
            FancyBboxPatch(
                (0, y - HEIGHT / 2),
                WIDTH,
                HEIGHT,
                boxstyle="round,pad=0,rounding_size=0.12",
                facecolor=COLOURS[room] + "1c",
                edgecolor=COLOURS[room],
                linewidth=1.4,
                zorder=4,
            )
        )
        modules = graph["modules"][room]
        title = {"x": 0.2, "va": "center", "zorder": 6}
        axes.text(y=y + 0.13, s=room, fontsize=12.5, weight="bold", color=COLOURS[room], **title)
        axes.text(y=y - 0.15, s=ABOUT[room], fontsize=9.5, color="#333333", **title)
        size = f"{modules} file{'s' if modules > 1 else ''}"
        axes.text(WIDTH - 0.2, y + 0.13, size, fontsize=9, color="#777777", ha="right", va="center", zorder=6)
    axes.text(
        0, len(rooms) - 0.25, "The rooms, and which of them uses which", fontsize=15, weight="bold", color="#222222"
    )
    axes.text(
        0,
        -0.75,
        "An arrow points from a room to one that it imports from, with the number of imports. None points upward.",
        fontsize=9.5,
        color="#555555",
    )
    figure.savefig(picture, metadata={"rooms": json.dumps(graph), "Software": None})


if __name__ == "__main__":
    draw(current_graph())
    print(f"drew {PICTURE}")
