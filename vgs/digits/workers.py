"""Processes that the demo and the studies share their runs among, and what keeps their numbers the same anywhere."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import current_process, get_context, parent_process
from threading import Thread
from typing import Any


@contextmanager
def workers(count: int) -> Iterator[Callable[[Callable[..., Any], Sequence[tuple]], list[Any]]]:
    """Gives a function that computes `function(*job)` for every job, in this process (1) or in `count` others.

    The results come in the order of the jobs. Functions and jobs must be picklable for other processes.
    """
    if count == 1:
        yield lambda function, jobs: [function(*job) for job in jobs]
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(count, context, start_worker, (context.RLock(),)) as pool:
        yield lambda function, jobs: list(pool.map(function, *zip(*jobs, strict=True)))


def start_worker(lock: Any) -> None:
    """Lets the workers' progress bars take turns, and ends a worker with the process that made it."""
    from tqdm.auto import tqdm

    tqdm.set_lock(lock)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def line() -> int:
    """This process's line for progress bars (workers count up from 1)."""
    return max(0, sum(current_process()._identity) - 1)


@contextmanager
def quiet() -> Iterator[None]:
    """One thread, and no progress bars and advice of the libraries, so that the demo's stay readable."""
    import torch
    from transformers.utils import logging

    verbosity, threads = logging.get_verbosity(), torch.get_num_threads()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def versions() -> dict[str, str]:
    """Versions that the numbers depend on, read without importing the libraries."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "trl")}}
