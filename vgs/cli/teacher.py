"""A config's teacher outside a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ConfigError, config_errors
from ..models.wrappers import to_device
from ..teachers.local import LocalTeacher
from ..teachers.served import ServedTeacher, connect
from ..trainers.vocabulary import load_teacher
from .resolved import LOADING, model_options


def open_teacher(
    section: Mapping[str, Any], args: Any, device: torch.device, command: str
) -> LocalTeacher | ServedTeacher:
    """A teacher that computes, loaded or connected.

    Args:
        section: of the config. args: the trainer's settings. device: where it is to run.
        command: that needs it, for messages.

    Raises:
        ConfigError: it cannot be loaded or reached, or the section names a cache alone.
    """
    options = {"share_prefix": args.share_prefix, "kernel": args.packed_attention}
    if "url" in section:
        return connect(section["url"], section.get("token_file"), device, **options)
    if "path" not in section:
        raise ConfigError(f"{command} needs the teacher's path or url: a cache alone computes nothing.")
    with config_errors(f"teacher.path {section['path']!r} cannot be loaded", *LOADING):
        model = load_teacher(section["path"], args, 1, model_options(section))
    return LocalTeacher(to_device(model, device).eval(), **options)
