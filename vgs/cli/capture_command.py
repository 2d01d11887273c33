"""``vgs capture``: the rows of a config's loss in a file, to measure losses on a user's own models and data."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..disk import write_whole
from ..errors import ConfigError
from ..models.forward import score_groups
from ..models.heads import Head, read_head
from ..teachers.wire import pack
from ..trainers.instruments import both_views
from ..trainers.kinds import teacher_sections
from ..trainers.run_folder import versions
from .scored_pair import ScoredPair, open_pair

#: What ``benchmarks/rows.py`` looks for.
KIND, FORM = "rows of the loss", 1
VIEWS = ("student", "student_text", "teacher", "teacher_text")


def run(options: argparse.Namespace, config: Mapping[str, Any]) -> None:
    """The command: writes the file, and prints one sentence about it.

    Args:
        options: ``model``, ``tokens``, ``batch_size``, ``seed`` and ``out`` of the command line.
        config: of ``load_config``.

    Raises:
        ConfigError: ``out`` exists, the student gives no token, or as ``open_pair``.
    """
    if options.out.exists():
        raise ConfigError(f"--out {str(options.out)!r} exists; name a new file.")
    pair = open_pair(config, options.model, "capture")
    student = options.model or config.get("student", {}).get("path", "the digits student")
    teacher = teacher_sections(config).get("", {})
    names = {"student": student, "teacher": teacher.get("path", teacher.get("url", "the digits teacher"))}
    with torch.no_grad(), pair.scoring() as head:
        rows = _rows(pair, options)
        heads = {"student": read_head(pair.found.model, rows["student"].dtype), "teacher": head}
        tensors, notes = _heads(heads, pair.vocab_size)
        notes = {model: {"name": str(names[model]), **note} for model, note in notes.items()}
        one_head = not any(name.startswith("teacher") for name in tensors)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
        facts = {"kind": KIND, "form": FORM, "config": digest, "versions": versions()}
        facts |= {"tokens": len(rows["student"]), "one_head": one_head, "seed": options.seed, **notes}
        content = pack({**rows, **tensors}, {**facts, "temperature": pair.found.args.temperature_of_loss})
    write_whole(options.out, content)
    print(f"{options.out}: {facts['tokens']} tokens in four views, {len(content) / 2**20:.1f} MiB.")


def _rows(pair: ScoredPair, options: argparse.Namespace) -> dict[str, Tensor]:
    """[N, D] hidden states as they enter the heads, of as many answers as give the tokens that are wanted."""
    found, states, size = pair.found, both_views(pair.teacher), options.batch_size
    parts: dict[str, list[Tensor]] = {view: [] for view in VIEWS}
    count, student = 0, found.model.eval()
    with tqdm(total=options.tokens, desc="tokens", disable=found.args.disable_tqdm) as bar:
        for first in range(0, len(pair.samples), size):
            samples = [pair.samples[index] for index in range(first, min(first + size, len(pair.samples)))]
            answers = pair.answers(samples, seed=options.seed + first, batch_size=size, progress=False)
            groups = pair.groups(samples, [[ids] for ids in answers])
            if not any(answers):
                continue
            for view, x in zip(VIEWS, (*score_groups(student, groups), *states(groups)), strict=True):
                parts[view].append(x.cpu())
            count += len(parts["student"][-1])
            bar.update(len(parts["student"][-1]))
            if count >= options.tokens:
                break
    if not count:
        raise ConfigError(f"capture needs tokens, but all {len(pair.samples)} answers of the student are empty.")
    return {view: torch.cat(found)[: options.tokens] for view, found in parts.items()}


def _heads(heads: Mapping[str, Head], vocab_size: int | None) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors of the heads in their common columns, one that both models share once; and what is no tensor."""
    tensors: dict[str, Tensor] = {}
    for model, head in heads.items():
        tensors[f"{model}_weight"] = head.weight[:vocab_size]
        if head.bias is not None:
            tensors[f"{model}_bias"] = head.bias[:vocab_size]
    pairs = [(tensors.get(f"student_{name}"), tensors.get(f"teacher_{name}")) for name in ("weight", "bias")]
    if all(a is b or (a is not None and b is not None and torch.equal(a, b.to(a))) for a, b in pairs):
        tensors = {name: x for name, x in tensors.items() if name.startswith("student")}
    return tensors, {model: {"scale": head.logit_scale, "softcap": head.softcap} for model, head in heads.items()}
