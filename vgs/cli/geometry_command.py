"""``vgs geometry``: angles and norms of the gradients of a student's terms, by visual dependency."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, config_errors
from ..trainers.run_folder import INSTRUMENTS, RECORD
from .config import check_config, load_config, override
from .numbers import count
from .output import check_folder
from .yaml_text import read_yaml

if TYPE_CHECKING:
    from ..evaluation.geometry import GeometryProbe

logger = logging.getLogger(__name__)

ABOUT = "angles and norms of the gradients of standard, language and visual, by visual dependency"
OUT = Path("runs/geometry")


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument(
        "checkpoint",
        metavar="CHECKPOINT|CONFIG.yaml",
        help="a run, a checkpoint of it, any model; or a config",
    )
    command.add_argument(
        "--config", dest="source", metavar="CONFIG.yaml", help="data and teacher of a checkpoint outside of a run"
    )
    command.add_argument("--samples", type=count, default=64, help="first so many questions of data.eval (64)")
    command.add_argument("--bins", type=count, default=10, help="bins of equal count (10)")
    command.add_argument("--batch-size", type=count, default=8, help="responses in one forward pass (8)")
    command.add_argument(
        "--projections", type=count, metavar="N", help="estimate by N random projections, in one gradient's memory"
    )
    command.add_argument("--hidden-only", action="store_true", help="at the last hidden states alone, which is quick")
    command.add_argument("--recorded", action="store_true", help="the data's recorded responses, not sampled ones")
    command.add_argument("--seed", type=int, default=0, help="of the sampled responses (0)")
    command.add_argument("--out", type=Path, metavar="DIR", help=f"(instruments in the run, else {OUT})")


def find(checkpoint: str, config: str | None, overrides: Sequence[str]) -> tuple[dict[str, Any], str | None, Path]:
    """What is measured on what: a config, a model's path (None for the config's student), and where results go.

    Args:
        checkpoint: a run's folder, a checkpoint in it, another model, or a config.
        config: the config of another model; None.
        overrides: of the config.

    Raises:
        ConfigError: a model without a config, or two configs.
    """
    path = Path(checkpoint)
    if config is not None:
        return load_config(config, overrides), checkpoint, OUT
    if not path.is_dir():
        return load_config(checkpoint, overrides), None, OUT
    for run in (path, path.resolve().parent):
        if (run / RECORD).is_file():
            with config_errors(f"{run / RECORD} cannot be read", OSError, ValueError, KeyError, TypeError):
                found = read_yaml(json.dumps(json.loads((run / RECORD).read_text())["config"]), str(run / RECORD))
                override(found, overrides)
            return check_config(found, str(run / RECORD)), str(path), run / INSTRUMENTS
    raise ConfigError(f"CHECKPOINT {checkpoint!r} is in no run (no {RECORD}): name its data and teacher by --config.")


def step_of(model: str | None) -> int:
    """The optimizer steps that a model has been trained for, by its trainer's state; 0 where nothing tells."""
    state = Path(model or "", "trainer_state.json")
    try:
        return int(json.loads(state.read_text())["global_step"]) if model else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """The command; returns the exit status.

    Args:
        options: of ``add_options``. overrides: of the config.

    Raises:
        ConfigError: a config without a separate teacher or without eval data, a model that cannot be loaded, or
            numbers out of their range.
    """
    from ..evaluation.geometry import measure
    from ..evaluation.token_values import keep
    from ..reports.png import geometry_picture
    from ..reports.write import check_own

    config, model, out = find(options.checkpoint, options.source, overrides)
    out, step = options.out or out, step_of(model)
    target, picture = (out / f"geometry-{step:06d}{ending}" for ending in (".json", ".png"))
    check_folder(out)
    for path in (target, picture):
        check_own(path, "geometry")
    with _probe(options, config, model) as probe, config_errors("vgs geometry", ValueError):
        record = measure(probe, options.bins, options.projections, not options.hidden_only)
    name = Path(model).resolve().name if model else "the config's student"
    record = {**record, "step": step, "samples": sum(map(len, probe.batches)), "model": name, "seed": options.seed}
    keep(target, record)
    try:
        picture.write_bytes(geometry_picture(record, f"{name}, step {step}"))
    except ImportError as error:
        logger.warning("No picture is drawn: %s (pip install matplotlib).", error)
    print(table(record))
    print(f"\n{target}, {picture}")
    return 0


@contextmanager
def _probe(options: argparse.Namespace, config: Mapping[str, Any], model: str | None) -> Iterator[GeometryProbe]:
    from ..evaluation.geometry import GeometryProbe
    from ..models.families import freeze
    from ..trainers.instruments import both_views
    from .scored_pair import open_pair

    if config.get("lora"):
        raise ConfigError("geometry looks at whole weights: leave section lora out.")
    pair = open_pair(config, model, "geometry")
    args, student = pair.found.args, pair.found.model
    freeze(student, vision=args.freeze_vision, embeddings=args.freeze_embeddings)
    samples = [pair.samples[index] for index in range(min(options.samples, len(pair.samples)))]
    size = options.batch_size
    with pair.scoring() as head:
        if options.recorded:
            answers = _recorded(pair.found.processor, samples, **pair.found.template_options)
        else:
            answers = [[ids] for ids in pair.answers(samples, seed=options.seed, batch_size=size)]
        groups = pair.groups(samples, answers)
        batches = [groups[first : first + size] for first in range(0, len(groups), size)]
        yield GeometryProbe(
            student,
            batches,
            both_views(pair.teacher),
            head,
            args.temperature_of_loss,
            pair.vocab_size,
            not args.disable_tqdm,
        )


def _recorded(processor: Any, samples: Sequence[Mapping[str, Any]], **template_options: Any) -> list[list[list[int]]]:
    """The first recorded response to each sample."""
    from ..data.recorded import end_of_turn, recorded_ids
    from ..models.tokenizers import tokenizer_of

    if any(sample.get("responses") is None for sample in samples):
        raise ConfigError("--recorded needs a column of responses in data.eval (data.eval.responses).")
    end, tokenizer = end_of_turn(processor, **template_options), tokenizer_of(processor)
    return [recorded_ids(tokenizer, sample["responses"], end)[:1] for sample in samples]


def table(record: Mapping[str, Any]) -> str:
    """The angles and norms as text, a row for each bin and one for all tokens.

    Args:
        record: what is stored.
    """
    blocks = []
    for space in ("parameters", "hidden"):
        if space not in record:
            continue
        part = record[space]
        names = [("angles", name) for name in part["angles"]] + [("norms", name) for name in part["norms"]]
        heads = [name.replace("-", " / ") if kind == "angles" else f"|{name}|" for kind, name in names]
        rows = [["bin", "vds", *heads]]
        for number in part["bins"]:
            rows.append(
                [
                    str(number),
                    f"{record['vds'][number]:.3f}",
                    *(_cell(kind, part[kind][name], part["errors"], name, number) for kind, name in names),
                ]
            )
        whole = part["all"]
        cells = (_cell(kind, whole[kind][name], whole["errors"], name, None) for kind, name in names)
        rows.append(["all", "", *cells])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        where = "parameters" if space == "parameters" else "last hidden states"
        method = record["method"] if space == "parameters" else "exact"
        blocks.append("\n".join([f"{where}, {method}; angles in degrees, {record['tokens']} tokens", *lines]))
    return "\n\n".join(blocks)


def _cell(kind: str, value: Any, errors: Any, name: str, number: int | None) -> str:
    value = value if number is None else value[number]
    if value is None:
        return "-"
    error = None if errors is None else errors[kind][name]
    error = error if number is None or error is None else error[number]
    text = f"{value:.1f}" if kind == "angles" else f"{value:.3g}"
    return text if error is None else f"{text} ± {error:.1g}" if kind == "norms" else f"{text} ± {error:.1f}"
