"""lmms-eval in an environment of its own: found, started with one benchmark at a time, and read.

Its pins (wandb 0.25.0, av below 16, ...) and those of training need not agree, so it is another Python's. A benchmark
that has run is a folder with ``samples.jsonl``, ``results.json`` and ``log.txt``; it appears whole or not at all, so an
interrupted evaluation goes on after the last one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vgs_kernels import __version__

from ...errors import ConfigError
from .questions import SETTINGS_VARIABLE
from .settings import EvalSettings

TASKS = Path(__file__).parent / "tasks"
TESTED = "0.7.3"
USUAL_PLACE = Path(".venv-eval/bin/python")  # of `make lmms-eval`
HOW = f"`make lmms-eval` makes one in {USUAL_PLACE.parent.parent} (docs/evaluation.md has the commands for pip)"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
STOP_SECONDS = 20.0  # for a child that was told to stop
#: Prints what is installed, without importing any of it.
PROBE = """
import importlib.metadata as m, json
found = {}
for name in ("lmms_eval", "vgs-kernels", "transformers", "torch", "vllm"):
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


class HarnessError(RuntimeError):
    """lmms-eval has failed; the message names its log."""


def find_python(given: str | None = None) -> str:
    """The Python that has lmms-eval.

    Args:
        given: the path of its executable; None: the one that ``make lmms-eval`` makes, else this process's own.

    Raises:
        ConfigError: there is none.
    """
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file() or not os.access(path, os.X_OK):
            raise ConfigError(f"--lmms-eval must be the Python of an environment with lmms-eval, got {given!r}; {HOW}.")
        return str(path.absolute())
    if USUAL_PLACE.is_file():
        return str(USUAL_PLACE.absolute())
    if importlib.util.find_spec("lmms_eval") is None:
        raise ConfigError(f"lmms-eval is not installed here: {HOW}, and --lmms-eval PYTHON names any other.")
    return sys.executable


def environment(python: str, backend: str) -> dict[str, str]:
    """Versions of what an environment has.

    Args:
        python: of ``find_python``. backend: what it is to run.

    Raises:
        ConfigError: lmms-eval, this package or the backend is missing in it, or this package has another version.
    """
    try:
        output = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, timeout=120, check=True).stdout
        found = json.loads(output)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(f"--lmms-eval {python!r} is no Python that runs ({type(error).__name__}); {HOW}.") from error
    if "lmms_eval" not in found:
        raise ConfigError(f"{python!r} has no lmms-eval: {HOW}.")
    if found.get("vgs-kernels") != __version__:
        raise ConfigError(
            f"{python!r} must have vgs-kernels {__version__}, as here, for prompts and scores, got "
            f"{found.get('vgs-kernels', 'none')}: {HOW}."
        )
    if backend == "vllm" and "vllm" not in found:
        raise ConfigError(f"--backend vllm needs vllm in the environment of {python!r}, which has none.")
    return found


def check_backend(settings: EvalSettings) -> None:
    """Stop at what lmms-eval's vLLM backend cannot be told.

    Raises:
        ConfigError: options of the chat template, generation settings of transformers, an adapter, or a model whose
            name lmms-eval would cut at a comma.
    """
    if settings.backend != "vllm":
        return
    for name, meaning in (("template_options", "chat_template_kwargs"), ("generation_kwargs", "generation_kwargs")):
        if getattr(settings, name):
            raise ConfigError(f"--backend vllm cannot take the run's {meaning} {getattr(settings, name)!r}; use hf.")
    folder = Path(settings.model)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(f"--backend vllm cannot load the adapter in {settings.model!r}; use hf, or merge it first.")
    if re.search("[,=]", settings.model):
        raise ConfigError(f"--backend vllm cannot take a model whose path has a comma or '=', got {settings.model!r}.")


def model_arguments(settings: EvalSettings, gpus: int = 1) -> dict[str, Any]:
    """lmms-eval's ``--model_args``; the model ``vgs`` reads its settings from a file."""
    if settings.backend == "hf":
        return {}
    found: dict[str, Any] = {
        "model": settings.model,
        "dtype": "bfloat16" if settings.bf16 else settings.dtype,
        "trust_remote_code": settings.trust_remote_code,
        # The backend takes the larger of this (4096 if left out) and the task's.
        "max_new_tokens": settings.max_new_tokens,
        "tensor_parallel_size": gpus,
    }
    if settings.revision:
        found["revision"] = settings.revision
    if settings.processor:
        found["mm_processor_kwargs"] = json.dumps(dict(settings.processor))
    return found


def command(
    python: str, settings: EvalSettings, task: str, out: Path, *, repeats: int = 1, batch_size: int = 8, gpus: int = 1
) -> list[str]:
    """The command line of one benchmark.

    Args:
        python: of ``find_python``.
        task: name of lmms-eval's task.
        out: folder for what it writes.
        repeats: responses to each question; 1: one greedy one.
        batch_size: questions per generation. gpus: that vLLM spreads a model over.
    """
    generation = settings.generation(greedy=repeats == 1)
    arguments = model_arguments(settings, gpus)
    line = [python, "-m", "lmms_eval", "--model", {"hf": "vgs", "vllm": "vllm"}[settings.backend]]
    if arguments:
        line += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    line += ["--tasks", task, "--include_path", str(TASKS), "--batch_size", str(batch_size)]
    line += ["--gen_kwargs", ",".join(f"{name}={value}" for name, value in generation.items())]
    line += ["--repeats", str(repeats), "--seed", str(settings.seed), "--output_path", str(out)]
    # Scoring in the main thread keeps math-verify's time limits; our own extraction reads the reasoning tags.
    line += ["--process_docs_parallel", "1", "--reasoning_tags", "none"]
    line += [] if settings.limit is None else ["--limit", str(settings.limit)]
    return [*line, "--log_samples"]


def follow(line: Sequence[str], log: Path, variables: Mapping[str, str]) -> int:
    """Run a command; what it says goes to stderr as it comes and to a log.

    Args:
        line: the command and its arguments.
        log: the file.
        variables: of the environment, beside this process's.

    Returns:
        Its exit status.
    """
    child = subprocess.Popen(
        list(line), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **variables}
    )
    try:
        with log.open("wb") as file:
            while chunk := os.read(child.stdout.fileno(), 65536):
                file.write(chunk)
                file.flush()
                sys.stderr.write(chunk.decode("utf-8", "replace"))
                sys.stderr.flush()
        return child.wait()
    finally:
        child.stdout.close()
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def last_words(log: Path) -> str:
    """What a log says of why it ended: the last error in it, else its last line."""
    lines = COLOURS.sub("", log.read_text(errors="replace")).replace("\r", "\n").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if re.search(r"Error during evaluation: |^[\w.]*(Error|Exception)\b", line)]
    said = (errors or lines or ["nothing"])[-1]
    return (said.partition("Error during evaluation: ")[2].partition(" Please set `--verbosity")[0] or said).rstrip(".")


def run_task(line: Sequence[str], written: Path, folder: Path, settings_file: Path) -> None:
    """Run one benchmark's ``command``, and keep what it has written.

    lmms-eval exits with 0 where an evaluation has failed, so what counts is that samples and results are there.

    Args:
        line: of ``command``, with ``written`` as its output folder.
        written: a folder of this call's alone; deleted when it is done.
        folder: where the result appears.
        settings_file: as ``evaluate.claim`` has written it.

    Raises:
        HarnessError: it has failed.
    """
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    log = written / "log.txt"
    status = follow(line, log, {SETTINGS_VARIABLE: str(settings_file.absolute()), "PYTHONUNBUFFERED": "1"})
    samples, results = list(written.rglob("*_samples_*.jsonl")), list(written.rglob("*_results.json"))
    if status != 0 or len(samples) != 1 or len(results) != 1:
        kept = folder.with_suffix(".failed.txt")
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(log, kept)
        shutil.rmtree(written)
        raise HarnessError(f"lmms-eval failed on {folder.name} (exit status {status}): {last_words(kept)}; see {kept}")
    staged = written / "done"
    staged.mkdir()
    for source, name in ((samples[0], "samples.jsonl"), (results[0], "results.json"), (log, "log.txt")):
        source.rename(staged / name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged.rename(folder)
    shutil.rmtree(written)
    folder.with_suffix(".failed.txt").unlink(missing_ok=True)
