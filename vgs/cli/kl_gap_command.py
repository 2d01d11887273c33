"""``vgs kl-gap``: the KL gap of a config's student, before and after training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..trainers.kinds import trainer_kind
from .runs import load_for_eval


def add_parser(commands: Any, overrides: str) -> None:
    """Add ``vgs kl-gap`` to the subcommands of a command line; ``overrides`` explains what else it takes."""
    about = "what privileged context changes in a model, in nats per token"
    command = commands.add_parser("kl-gap", help=about, description=f"{about}. {overrides}", allow_abbrev=False)
    command.add_argument("config", metavar="CONFIG.yaml")
    command.add_argument("--model", help="the model before (the config's student)")
    command.add_argument("--after", help="the same after training")
    command.add_argument("--control", choices=("noise",), help="show the model noise instead of privileged images")
    command.add_argument("--samples", type=int, help="measure on the first so many samples")
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--out", help="write the result to this JSON file")


def run(options: argparse.Namespace, config: Mapping[str, Any]) -> dict[str, Any]:
    """The command: the gap before and, with ``--after``, after; each on the model's own sampled responses.

    Returns:
        ``before`` and ``after`` as of ``kl_gap``, ``after`` with ``to_before``: KL(the model before with context || the
        model after without); ``closed``: the part of the gap that is gone.

    Raises:
        ConfigError: a config without self-distillation, or without eval data.
    """
    from ..data.privileged import check_columns
    from ..evaluation.kl_gap import kl_gap, on_policy

    if trainer_kind(config) != "self":
        raise ConfigError("kl-gap needs an objective with privileged context: visual_opsd, opsd or vision_opd.")
    model, processor, samples, _ = load_for_eval(config, options.model)
    try:
        check_columns(samples, "data.eval", "kl-gap", options.control)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    samples = [samples[i] for i in range(min(options.samples or len(samples), len(samples)))]
    training = config.get("training", {})
    template = training.get("chat_template_kwargs") or {}
    sampling = {"max_new_tokens": training.get("max_completion_length", 512), **template}
    knobs = {
        "mode": training.get("privileged_mode", "add"),
        "control": options.control,
        "batch_size": options.batch_size,
        "vocab_size": training.get("vocab_size"),
        **template,
    }
    answers = on_policy(model, processor, samples, batch_size=options.batch_size, **sampling)
    result: dict[str, Any] = {"before": kl_gap(model, processor, samples, answers, **knobs)}
    if options.after is not None:
        trained, *_ = load_for_eval(config, options.after)
        answers = on_policy(trained, processor, samples, batch_size=options.batch_size, **sampling)
        result["after"] = kl_gap(trained, processor, samples, answers, **knobs)
        result["after"]["to_before"] = kl_gap(trained, processor, samples, answers, teacher=model, **knobs)["gap"]
        result["closed"] = 1.0 - result["after"]["gap"] / result["before"]["gap"]
    if options.out is not None:
        Path(options.out).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return result
