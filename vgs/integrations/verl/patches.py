"""verl's own forwards of some families, put aside while ours run.

verl replaces methods of transformers' classes in the whole process. Its forward of Qwen3-VL, for one, makes no rotary
positions of images: verl sends them along. Teacher and student are scored by the library's own methods.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel
from verl.utils.model import get_hf_auto_model_class

from ...errors import ConfigError

#: (class, name of a method) -> the library's own, of every family that this process builds.
_LIBRARY: dict[tuple[type, str], Callable[..., Any]] = {}


def remember(config: AutoConfig) -> None:
    """Keep the methods of a family as the library has them; to be called before verl builds a model.

    Args:
        config: of the model.

    Raises:
        ConfigError: verl has replaced one already.
    """
    kind = get_hf_auto_model_class(hf_config=config)._model_mapping[type(config)]
    for owner in vars(sys.modules[kind.__module__]).values():
        if not (inspect.isclass(owner) and issubclass(owner, nn.Module) and owner.__module__ == kind.__module__):
            continue
        for name, method in vars(owner).items():
            if not inspect.isfunction(method) or (owner, name) in _LIBRARY:
                continue
            if method.__module__.split(".")[0] == "verl":
                raise ConfigError(f"verl had replaced {owner.__name__}.{name} before VGS could keep the library's own.")
            _LIBRARY[owner, name] = method


def replaced() -> list[tuple[type, str]]:
    """The classes and names of the methods that verl has replaced now."""
    return [key for key, method in _LIBRARY.items() if vars(key[0]).get(key[1]) is not method]


def in_layers() -> bool:
    """Whether verl has replaced a method below the models as a whole, which gradient checkpointing runs once more."""
    return any(not issubclass(owner, PreTrainedModel) for owner, _ in replaced())


@contextmanager
def library_methods() -> Iterator[None]:
    """Inside, all methods are the library's own."""
    theirs = current()
    _set({key: _LIBRARY[key] for key in theirs})
    try:
        yield
    finally:
        _set(theirs)


@contextmanager
def verl_methods(theirs: dict[tuple[type, str], Callable[..., Any]]) -> Iterator[None]:
    """Inside ``library_methods``, verl's again.

    Args:
        theirs: of ``current``, taken outside.
    """
    _set(theirs)
    try:
        yield
    finally:
        _set({key: _LIBRARY[key] for key in theirs})


def current() -> dict[tuple[type, str], Callable[..., Any]]:
    """verl's methods, as they are in force now."""
    return {key: vars(key[0])[key[1]] for key in replaced()}


def _set(methods: dict[tuple[type, str], Callable[..., Any]]) -> None:
    for (owner, name), method in methods.items():
        setattr(owner, name, method)
