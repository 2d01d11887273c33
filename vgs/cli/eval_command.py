"""``vgs eval RUN --benchmarks paper``: a model, and another one before it, on the paper's benchmarks."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .numbers import count, positive, whole
from .output import check_folder

ABOUT = (
    "accuracy of a model: on a config's own questions, or on benchmarks",
    "Without --benchmarks: greedy accuracy on the config's data.eval. With them: through lmms-eval, in an environment "
    "of its own, with the prompts and generation settings of the run; see docs/evaluation.md.",
)
#: Options that need --benchmarks, with their defaults.
DEFAULTS = {
    "repeats": 1,
    "backend": "hf",
    "gpus": 1,
    "lmms_eval": None,
    "baseline": None,
    "system_prompt": None,
    "max_tokens": None,
    "temperature": None,
    "seed": None,
    "limit": None,
    "overwrite": False,
}


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of ``vgs eval``.

    Args:
        command: its parser.
    """
    command.add_argument("config", metavar="CONFIG.yaml|RUN", help="a config; of --benchmarks: a run, or any model")
    command.add_argument("--model", help="evaluate this model instead of the config's student")
    command.add_argument("--batch-size", type=count, default=8)
    command.add_argument(
        "--out", type=Path, help="write the result to this JSON file; of --benchmarks: folder for results (RUN/eval)"
    )
    group = command.add_argument_group("benchmarks")
    group.add_argument("--benchmarks", metavar="paper|NAMES", help="the paper's seven, or some by name (a,b)")
    group.add_argument("--repeats", type=count, metavar="K", help="also Acc@K: the mean over K sampled responses (16)")
    group.add_argument("--backend", choices=("hf", "vllm"), help="what runs the model (hf)")
    group.add_argument("--gpus", type=count, help="GPUs that vllm spreads the model over (1)")
    group.add_argument("--lmms-eval", metavar="PYTHON", help="the Python that has lmms-eval (.venv-eval, this one)")
    group.add_argument(
        "--baseline", nargs="?", const="", metavar="RUN|MODEL", help="test against this model; alone: the run's start"
    )
    group.add_argument("--system-prompt", metavar="TEXT", help="system message (the run's)")
    group.add_argument("--max-tokens", type=count, help="longest response (2048, or the run's if that is longer)")
    group.add_argument("--temperature", type=positive, help="of the sampled responses (the run's, else 1)")
    group.add_argument("--seed", type=whole, help="of sampling (0)")
    group.add_argument("--limit", type=count, help="ask the first so many questions of each benchmark: a trial")
    group.add_argument("--overwrite", action="store_true", help="delete what is in the folder of results")
    command.set_defaults(**DEFAULTS)


def check_unused(options: argparse.Namespace) -> None:
    """Stop at options that only benchmarks have.

    Raises:
        ConfigError: there is one.
    """
    for name, default in DEFAULTS.items():
        if getattr(options, name) != default:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect without --benchmarks.")
    if Path(options.config).is_dir():
        raise ConfigError(f"expected a config, got the folder {options.config!r}; --benchmarks paper evaluates a run.")


def _short(model: str) -> str:
    """A model's name as that of a folder."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """The command; returns the exit status: 1 where lmms-eval has failed.

    Args:
        options: of the command line. overrides: what it did not know.

    Raises:
        ConfigError: options, models, folders or an environment that cannot be used, found before a model is loaded.
    """
    from ..evaluation.benchmarks import evaluate, harness, tables
    from ..evaluation.benchmarks.paper import find_benchmarks
    from ..evaluation.benchmarks.settings import EvalSettings, initial_student, settings_of

    if overrides:
        raise ConfigError(f"{overrides[0]!r} has no effect with --benchmarks, which reads no config.")
    if options.model is not None:
        raise ConfigError("--model has no effect with --benchmarks: name the model in place of the run.")
    if options.gpus > 1 and options.backend != "vllm":
        raise ConfigError(f"--gpus {options.gpus} needs --backend vllm.")
    if options.temperature is not None and options.repeats == 1:
        raise ConfigError("--temperature has no effect without --repeats: Acc@1 is greedy.")
    names = find_benchmarks(options.benchmarks)
    settings = settings_of(
        options.config,
        backend=options.backend,
        system_prompt=options.system_prompt,
        max_new_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        limit=options.limit,
    )
    baseline: EvalSettings | None = None
    if options.baseline is not None:
        baseline = settings.of_other_model(options.baseline or initial_student(options.config))
        if baseline.model == settings.model:
            raise ConfigError(f"--baseline must be another model than {settings.model!r}.")
    for asked in filter(None, (settings, baseline)):
        harness.check_backend(asked)
    evaluate.check_statistics()
    local = Path(settings.model)
    out = options.out or (local / "eval" if local.is_dir() else Path("runs") / f"eval-{_short(settings.model)}")
    check_folder(out)
    work: list[tuple[EvalSettings, Path]] = [(settings, out / "model")]
    if baseline is not None:
        work.append((baseline, out / f"baseline-{_short(Path(baseline.model).name)}"))
    python = None
    if options.overwrite or any(evaluate.missing(folder, names, options.repeats) for _, folder in work):
        python = harness.find_python(options.lmms_eval)
        harness.environment(python, options.backend)
    for asked, folder in work:  # --overwrite deletes, and so only once it is known that something can run
        evaluate.claim(folder, asked, options.overwrite)
    try:
        scores = [
            evaluate.run_model(
                folder, asked, names, options.repeats, python, batch_size=options.batch_size, gpus=options.gpus
            )
            for asked, folder in work
        ]
    except harness.HarnessError as error:
        print(f"vgs: error: {error}", file=sys.stderr)
        return 1
    before: dict[str, Any] = {} if baseline is None else {"baseline": baseline, "before": scores[1]}
    results = evaluate.summarise(settings, scores[0], **before)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / "results.md").write_text(tables.report(results, markdown=True))
    print(tables.report(results, markdown=False), end="")
    return 0
