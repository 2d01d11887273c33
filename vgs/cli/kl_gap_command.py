"""``vgs kl-gap``: the KL gap of a config's student, before and after training."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..trainers.kinds import trainer_kind
from .output import report
from .runs import load_for_eval


def run(options: argparse.Namespace, config: Mapping[str, Any]) -> dict[str, Any]:
    """The command: the gap before and, with ``--after``, after; each on the model's own sampled responses.

    Args:
        options: ``model``, ``after``, ``control``, ``samples``, ``batch_size`` and ``out`` of the command line.
        config: of ``load_config``.

    Returns:
        ``before`` and ``after`` as of ``kl_gap``, ``after`` with ``to_before``: KL(the model before with context || the
        model after without); ``closed``: the part of the gap that is gone.

    Raises:
        ConfigError: a config without self-distillation, or without eval data.
    """
    from ..data.privileged import check_columns
    from ..evaluation.kl_gap import kl_gap, on_policy
    from ..evaluation.sampling import Sampling

    if trainer_kind(config) != "self":
        raise ConfigError("kl-gap needs an objective with privileged context: visual_opsd, opsd or vision_opd.")
    before = load_for_eval(config, options.model)
    if "" not in before.sets:
        raise ConfigError(f"kl-gap measures one set, but data.eval has {len(before.sets)}: {', '.join(before.sets)}.")
    model, processor, samples, args = before.model, before.processor, before.sets[""], before.args
    check_columns(samples, "data.eval", "kl-gap", options.control)
    samples = [samples[i] for i in range(min(options.samples or len(samples), len(samples)))]
    sampling = Sampling.from_settings(args, greedy=False)
    knobs = {
        "mode": args.privileged_mode,
        "control": options.control,
        "batch_size": options.batch_size,
        "vocab_size": args.vocab_size,
        **before.template_options,
    }
    with before.as_trained():
        answers = on_policy(model, processor, samples, sampling, batch_size=options.batch_size)
        result: dict[str, Any] = {"before": kl_gap(model, processor, samples, answers, **knobs)}
        if options.after is not None:
            trained = load_for_eval(config, options.after).model
            answers = on_policy(trained, processor, samples, sampling, batch_size=options.batch_size)
            result["after"] = kl_gap(trained, processor, samples, answers, **knobs)
            result["after"]["to_before"] = kl_gap(trained, processor, samples, answers, teacher=model, **knobs)["gap"]
            result["closed"] = 1.0 - result["after"]["gap"] / result["before"]["gap"]
    report(result, options.out)
    return result
