"""The command line: ``vgs init | check | train | eval | report | geometry | capture | plan | kl-gap | ... ``, see
``build_parser``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from ..digits.studies import STUDIES
from ..errors import ConfigError
from ..log import log_to_stderr
from . import eval_command, geometry_command, report_command
from .config import load_config
from .numbers import count, port, positive
from .output import check_file, check_folder
from .runs import evaluate, train
from .start import version_line

DESCRIPTION = "Visual Gradient Steering: on-policy distillation of vision-language models."
EPILOG = "Environment: VGS_LOG=debug, info, warning or error says how much is logged (debug: an error's traceback too)."
OVERRIDES = (
    "Overrides: --section.key value, e.g. --data.train.limit 64; --objective, --task and --trainer; any other bare "
    "--key is one of section `training`. `vgs keys` lists all keys with their types, defaults and meanings, `vgs keys "
    "PATTERN` those that have a word in them."
)
#: Commands that take a config, and with it overrides.
WITH_CONFIG = ("check", "train", "eval", "geometry", "capture", "plan", "kl-gap", "cache-teacher")

logger = logging.getLogger(__name__)


class _Say(argparse.Action):
    """Prints what its ``const`` returns, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        print(self.const())
        parser.exit()


def _all_keys() -> str:
    from .keys import listing

    return listing()


def build_parser() -> argparse.ArgumentParser:
    """The command line; options that it does not know are overrides of the config."""
    parser = argparse.ArgumentParser(prog="vgs", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action=_Say, nargs=0, const=version_line, help="print the versions, and stop")
    commands = parser.add_subparsers(dest="command", required=True)

    def with_config(name: str, about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=f"{about}. {OVERRIDES}", allow_abbrev=False)
        command.add_argument("config", metavar="CONFIG.yaml")
        return command

    def on_digits(name: str, about: str, detail: str | None = None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=detail or about, allow_abbrev=False)
        command.add_argument("--cache", type=Path, help="folder for trained models (~/.cache/vgs)")
        command.add_argument("--quick", action="store_true", help="seconds, to see that everything runs")
        return command

    command = commands.add_parser("init", help="write a config for two models and a dataset", allow_abbrev=False)
    command.add_argument("--student", required=True, metavar="PATH", help="the model to train: a folder or a hub name")
    command.add_argument("--teacher", required=True, metavar="PATH", help="the model to learn from")
    command.add_argument("--data", required=True, metavar="PATH", help="questions: a file, a folder or a hub name")
    command.add_argument("--out", type=Path, default=Path("vgs.yaml"), help="the file to write (vgs.yaml)")

    command = with_config("check", "look at everything that can go wrong before a GPU is needed")
    command.add_argument("--json", action="store_true", help="for machines")

    command = with_config("train", "distil a student")
    command.add_argument(
        "--help-all", action=_Say, nargs=0, const=_all_keys, help="list every key of a config, as `vgs keys`"
    )
    command.add_argument("--print-config", action="store_true", help="print the config with its defaults, and stop")
    command.add_argument("--resume", nargs="?", const=True, help="a checkpoint; alone: the newest complete")
    command.add_argument("--allow-changes", action="store_true", help="resume with other settings or data")
    command.add_argument("--overwrite", action="store_true", help="delete the run that output_dir holds")

    command = commands.add_parser(
        "eval", help=eval_command.ABOUT[0], description=f"{eval_command.ABOUT[1]} {OVERRIDES}", allow_abbrev=False
    )
    eval_command.add_options(command)

    command = commands.add_parser(
        "geometry",
        help=geometry_command.ABOUT,
        description=f"{geometry_command.ABOUT}. {OVERRIDES}",
        allow_abbrev=False,
    )
    geometry_command.add_options(command)

    about = "several runs side by side: a page, pictures and numbers"
    report_command.add_options(commands.add_parser("report", help=about, description=about, allow_abbrev=False))

    command = with_config("plan", "predicted memory of a training run, by part")
    command.add_argument(
        "--gpu-memory", type=positive, metavar="GiB", help="memory of one GPU (this machine's, if any)"
    )
    command.add_argument("--gpus", type=count, default=1)
    command.add_argument("--sharding", choices=("ddp", "fsdp2"), default="ddp", help="how the student is spread (ddp)")
    command.add_argument("--response-tokens", type=count, help="longest response (max_completion_length)")
    command.add_argument("--prompt-tokens", type=count, default=200, help="text tokens of a prompt")
    command.add_argument("--image-tokens", type=count, default=1000, help="image tokens of a prompt")
    command.add_argument("--json", action="store_true", help="for machines: bytes")

    command = with_config("kl-gap", "what privileged context changes in a model, in nats per token")
    command.add_argument("--model", help="the model before (the config's student)")
    command.add_argument("--after", help="the same after training")
    command.add_argument("--control", choices=("noise",), help="show the model noise instead of privileged images")
    command.add_argument("--samples", type=count, help="measure on the first so many samples")
    command.add_argument("--batch-size", type=count, default=8)
    command.add_argument("--out", type=Path, help="write the result to this JSON file")

    about = "rows of the loss in a file, for `python -m benchmarks loss --rows FILE`"
    command = with_config("capture", about)
    command.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors", help="the file, a new one")
    command.add_argument("--tokens", type=count, default=2048, help="of sampled answers to data.eval, at most (2048)")
    command.add_argument("--model", help="a saved student (the config's)")
    command.add_argument("--batch-size", type=count, default=8, help="answers that are sampled and scored together (8)")
    command.add_argument("--seed", type=int, default=0, help="of the sampled answers (0)")

    command = with_config("cache-teacher", "hidden states of the teacher on recorded responses, computed once and kept")
    command.add_argument("--out", type=Path, metavar="DIR", help="the folder (teacher.cache, else runs/teacher-cache)")
    command.add_argument("--rows-per-file", type=count, default=32, help="rows that a kill can cost (32)")
    command.add_argument("--stored", choices=("bfloat16", "float16", "float32"), help="type in the files (as computed)")

    about = "send a teacher's hidden states to trainers on other GPUs or machines"
    detail = f"{about}. The token is read from VGS_TEACHER_TOKEN, or from the file that VGS_TEACHER_TOKEN_FILE names."
    command = commands.add_parser("serve-teacher", help=about, description=detail, allow_abbrev=False)
    command.add_argument("model", metavar="CONFIG.yaml|MODEL", help="a config with a teacher, or a model")
    command.add_argument("--teacher", metavar="NAME", help="one of a config's several teachers")
    command.add_argument("--host", default="127.0.0.1", help="address to bind; beyond this machine it needs a token")
    command.add_argument("--port", type=port, default=8017, help="8017; 0 takes any that is free")
    command.add_argument("--device", help="cuda, cuda:1, cpu (cuda where there is one)")
    command.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of the weights (as saved)")
    command.add_argument("--token-file", metavar="FILE", help="with the token")
    command.add_argument("--max-request", type=count, default=2**30, metavar="BYTES", help="of one request (1 GiB)")

    command = commands.add_parser("keys", help="list the keys of a config, with type, default and meaning")
    command.add_argument("pattern", nargs="?", default="", help="only keys that have this in name or meaning")

    command = on_digits("demo", "plain distillation against VGS on handwritten digits")
    command.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for results.json and pictures")

    detail = "; ".join(f"{name}: {text}" for name, text in STUDIES.items())
    command = on_digits("study", "compare methods over seeds on handwritten digits", detail)
    command.add_argument("study", choices=STUDIES)
    command.add_argument("--out", type=Path, help="folder for results.json and a picture (runs/study-NAME)")
    return parser


def _run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """The command that was asked for; returns the exit status.

    What only one of the commands needs is imported here: the help must stay cheap.
    """
    if options.command == "demo":
        from ..digits.demo import run_demo

        check_folder(options.out)
        run_demo(options.out, options.cache, options.quick)
        return 0
    if options.command == "study":
        out = options.out or Path("runs") / f"study-{options.study}"
        check_folder(out)
        module = import_module(f"vgs.digits.studies.{options.study.replace('-', '_')}")
        module.run_study(out, options.cache, options.quick)
        return 0
    if options.command == "keys":
        from .keys import listing

        print(listing(options.pattern))
        return 0
    if options.command == "geometry":
        return geometry_command.run(options, overrides)
    if options.command == "report":
        return report_command.run(options)
    if options.command == "init":
        from .init_command import run as write_config

        check_file(options.out)
        write_config(options)
        return 0
    if options.command == "eval" and options.benchmarks is not None:
        return eval_command.run(options, overrides)
    if options.command == "eval":
        eval_command.check_unused(options)
    if options.command == "serve-teacher":
        from .serve_command import run as serve

        return serve(options)
    if options.command == "cache-teacher":
        from .cache_command import run as cache

        return cache(load_config(options.config, overrides), options.out, options.rows_per_file, options.stored)
    check_file(getattr(options, "out", None))
    config = load_config(options.config, overrides)
    if options.command == "train":
        return _train(config, options)
    if options.command == "check":
        from .check_command import run as check

        return check(config, options.json)
    if options.command == "eval":
        evaluate(config, options.model, options.batch_size, options.out)
    elif options.command == "plan":
        from .plan_report import show

        show(config, options)
    elif options.command == "capture":
        from .capture_command import run as capture

        capture(options, config)
    else:
        from .kl_gap_command import run

        run(options, config)
    return 0


def _train(config: Mapping[str, object], options: argparse.Namespace) -> int:
    if options.print_config:
        from .resolved import as_yaml, resolved, training_arguments

        print(as_yaml(resolved(config, training_arguments(config))), end="")
        return 0
    if options.resume and options.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other: one goes on with a run, the other deletes it.")
    if options.allow_changes and not options.resume:
        raise ConfigError("--allow-changes has no effect without --resume.")
    trainer = train(config, options.resume, overwrite=options.overwrite, allow_changes=options.allow_changes)
    return trainer.stopped.exit_status


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the ``vgs`` command; returns the exit status: 0, 1 where lmms-eval has failed, 2 where ``check``
    has found errors, or 128 plus a signal's number where ``vgs train`` was stopped by one and has saved a checkpoint.

    Args:
        arguments: of the command line; None: this process's.

    Raises:
        SystemExit: with status 2, after one sentence on stderr, for an error that a user can mend.
    """
    parser = build_parser()
    options, overrides = parser.parse_known_args(arguments)
    if overrides and options.command not in WITH_CONFIG:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        with log_to_stderr():
            try:
                return _run(options, overrides)
            except ConfigError:
                logger.debug("the error's traceback", exc_info=True)
                raise
    except ConfigError as error:
        parser.exit(2, f"vgs: error: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        parser.exit(130, "vgs: interrupted\n")


if __name__ == "__main__":
    raise SystemExit(main())
