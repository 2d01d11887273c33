"""``vgs serve-teacher``: a teacher that sends its hidden states to trainers elsewhere."""

from __future__ import annotations

import argparse
import logging
import signal
import threading
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig

from ..errors import ConfigError, config_errors
from ..models.pictures import reads_pictures
from ..models.tokenizers import load_tokenizer
from ..models.wrappers import to_device
from ..teachers.server import ServedModel, TeacherServer, check_address, read_token
from ..trainers.kinds import teacher_sections
from .config import load_config
from .pair import auto_class
from .resolved import LOADING, model_options

logger = logging.getLogger(__name__)


def teacher_section(model: str, name: str | None, dtype: str | None) -> Mapping[str, Any]:
    """The section of the teacher that the command line asks for.

    Args:
        model: a config's file, or a model's folder or name on the hub.
        name: of one of a config's several teachers.
        dtype: type of the weights; None: as the config says, else as they were saved.

    Raises:
        ConfigError: a config that cannot be read, without such a teacher, or whose teacher has no path.
    """
    if not model.endswith((".yaml", ".yml")):
        if name is not None:
            raise ConfigError(f"--teacher {name!r} belongs to a config with several teachers, got the model {model!r}.")
        return {"path": model, "dtype": dtype or "auto"}
    sections = teacher_sections(load_config(model))
    if name is None and len(sections) > 1:
        raise ConfigError(f"{model} has the teachers {', '.join(sections)}: say with --teacher which to serve.")
    section = next(iter(sections.values()), {}) if name is None else sections.get(name, {})
    if "path" not in section:
        raise ConfigError(f"{model} has no teacher{'' if name is None else f' {name!r}'} with a path to serve.")
    return section if dtype is None else {**section, "dtype": dtype}


def load_served(section: Mapping[str, Any], device: torch.device) -> ServedModel:
    """A teacher on its device, and its tokenizer.

    Args:
        section: of a config. device: where to put it.

    Raises:
        ConfigError: it cannot be loaded.
    """
    path, files = section["path"], {key: section[key] for key in ("revision", "trust_remote_code") if key in section}
    with config_errors(f"the teacher {path!r} cannot be loaded", *LOADING):
        config = AutoConfig.from_pretrained(path, **files)
        # As a trainer loads it: in the type in which it was saved, unless one is named.
        options = {"dtype": "auto", **model_options(section)}
        model = auto_class(not reads_pictures(config)).from_pretrained(path, **options)
        return ServedModel(to_device(model, device).eval(), load_tokenizer(section), path)


def run(options: argparse.Namespace) -> int:
    """The command: serves until SIGINT or SIGTERM; returns the exit status.

    Args:
        options: ``model``, ``teacher``, ``host``, ``port``, ``device``, ``dtype``, ``token_file``, ``max_request``.

    Raises:
        ConfigError: a model that cannot be loaded, an address beyond this machine without a token, a device that is
            not there.
    """
    token = read_token(options.token_file)
    check_address(options.host, token)  # before a model is loaded
    section = teacher_section(options.model, options.teacher, options.dtype)
    with config_errors(f"--device {options.device!r}", RuntimeError):
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(0, device=device)
    served = load_served(section, device)
    with TeacherServer(served, options.host, options.port, token, options.max_request) as server:
        logger.info("hashing the weights of %s", served.name)
        weights = served.fingerprint["weights"]
        host, port = server.server_address[:2]
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        guard = "with a token" if token else "without a token, for this machine alone"
        print(f"Serving {served.name} on {device} ({weights[:12]}) at http://{host}:{port}, {guard}.", flush=True)
        server.serve_forever()
    return 0
