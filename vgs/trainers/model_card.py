"""The README.md of a trained student: what was trained on what, with the numbers of the run."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import cached_file

from ..log import warn_once
from ..objectives.definitions import SETTINGS, Preset
from .run_folder import RECORD, versions

logger = logging.getLogger(__name__)

FILE = "README.md"
MARK = re.compile(r"\n<!-- vgs: ([0-9a-f]{64}); a card that somebody has edited is left as it is -->\n\Z")
REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
TASK = "image-text-to-text"
#: Settings beside those that only some objectives read.
OBJECTIVE = ("temperature", "loss_reduction", "num_generations", "max_completion_length", "alpha")
OPTIMISATION = (
    *("learning_rate", "lr_scheduler_type", "optim", "weight_decay", "max_grad_norm", "warmup_steps", "bf16", "fp16"),
    *("seed", "per_device_train_batch_size", "gradient_accumulation_steps"),
)
TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ how }} Written by `vgs` ([Visual Gradient Steering](https://arxiv.org/abs/2606.00564)) from the run itself.

{{ licence }}

## What was minimised

{{ minimised }}

{{ table(objective) }}

## Data

{{ table(data) }}

## Training

{{ table(training) }}

## Evaluation

{% if evaluation %}Accuracy of greedy answers on held-out questions, at the step given. Measured by the run itself.

{{ table(evaluation) }}
{% else %}Nothing was evaluated in this run.
{% endif %}
## Versions

{{ table(versions) }}
"""


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def is_ours(text: str) -> bool:
    """Whether a card is as ``write_card`` has written it."""
    match = MARK.search(text)
    return match is not None and hashlib.sha256(text[: match.start()].encode()).hexdigest() == match[1]


@contextmanager
def untouched(trainer: Any) -> Iterator[None]:
    """The card in a trainer's folder stays as it is: PEFT writes one, and changes any, where it saves an adapter."""
    path = Path(trainer.args.output_dir, FILE)
    before = path.read_bytes() if path.exists() else None
    yield
    if not trainer.is_world_process_zero():
        return
    if before is not None:
        path.write_bytes(before)
    else:
        path.unlink(missing_ok=True)


def write_card(
    trainer: Any, name: str | None = None, datasets: str | Sequence[str] | None = None, tags: Sequence[str] = ()
) -> None:
    """Write the card of a trainer's student into its ``output_dir``, unless somebody has written or edited one there.

    Args:
        trainer: of this package.
        name: of the model; None: the folder's.
        datasets: names on the hub; None: those that the run's config names.
        tags: further ones.
    """
    path = Path(trainer.args.output_dir, FILE)
    if path.exists() and not is_ours(path.read_text()):
        warn_once(logger, f"{path} was not written by this package, or was edited: it is left as it is.")
        return
    text = str(_card(trainer, name or path.absolute().parent.name, datasets, tags)).rstrip() + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n<!-- vgs: {digest}; a card that somebody has edited is left as it is -->\n")


def _card(trainer: Any, name: str, datasets: str | Sequence[str] | None, tags: Sequence[str]) -> ModelCard:
    preset = trainer.args.preset_in_force
    base = _Base(trainer.student.config)
    data = _data(trainer)
    adapter = hasattr(trainer.student, "peft_config")
    named = [datasets] if isinstance(datasets, str) else list(datasets or ())
    source = data.get("source", "")
    if not named and REPOSITORY.fullmatch(source) and not Path(source).exists():
        named = [source]
    evaluation = _evaluation(trainer.state.log_history)
    card_data = ModelCardData(
        **{key: base.card[key] for key in ("license", "license_name", "license_link") if base.card.get(key)},
        base_model=base.id,
        base_model_relation=("adapter" if adapter else "finetune") if base.id else None,
        datasets=named or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=TASK,
        tags=sorted({"generated_from_trainer", "on-policy-distillation", *trainer._tag_names, *tags}),
        model_name=name,
        eval_results=[EvalResult(TASK, "held-out", name, "accuracy", value) for name, (value, _) in evaluation.items()]
        or None,
    )
    licence = base.card.get("license")
    return ModelCard.from_template(
        card_data,
        template_str=TEMPLATE,
        name=name,
        how=_how(trainer, base.shown),
        licence=f"The base model's card names the licence `{licence}`." if licence else NO_LICENCE,
        minimised=_minimised(trainer.args, preset),
        table=_table,
        objective=_objective(trainer, preset),
        data=data,
        training=_training(trainer),
        evaluation={name: f"{value:.4f} (step {step})" for name, (value, step) in evaluation.items()},
        versions=versions(),
    )


NO_LICENCE = "The base model's card names no licence, or has not been found: look it up before you pass this model on."


class _Base:
    """A model that a config was loaded from.

    Attributes:
        id: its name on the hub; None for a folder whose card names none.
        shown: for a sentence. card: the fields of its own card; {} if there is none.
    """

    def __init__(self, config: Any) -> None:
        path = getattr(config, "_name_or_path", "") or ""
        commit = getattr(config, "_commit_hash", None)
        folder = os.path.isdir(path)
        # Cached by a name that means the same folder from any other.
        self.card = _card_fields(os.path.abspath(path) if folder else path, commit) if path else {}
        if folder:
            own = self.card.get("base_model")
            self.id = own if isinstance(own, str) else None
            self.shown = f"A model of the folder `{Path(path).name}`" + (f" (of `{self.id}`)" if self.id else "")
        else:
            self.id = path or None
            revision = f", revision `{commit}`" if commit else ""
            self.shown = f"[{path}](https://huggingface.co/{path}){revision}" if path else "A model without a name"


@functools.cache  # a card is written with every checkpoint
def _card_fields(path: str, revision: str | None) -> dict[str, Any]:
    """Metadata of a model's own card, in its folder or in the hub's cache; {} without one."""
    found = cached_file(
        path,
        FILE,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is None:
        return {}
    try:
        return ModelCard.load(found, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError) as error:
        logger.debug("The card of %s cannot be read: %s", path, error)
        return {}


def _how(trainer: Any, student: str) -> str:
    """Who has learned, and from whom."""
    args, preset = trainer.args, trainer.args.preset_in_force
    if (alpha := getattr(args, "alpha", 1)) == 0:
        return f"{student} was trained by GRPO: of several answers, those with a higher reward became likelier."
    if preset.teacher != "separate":
        kind = getattr(args, "teacher", preset.teacher)
        teacher = f"a copy of its own weights ({kind}), which saw more,"
    else:
        teacher = teachers_of(trainer)
    said = f"it answered questions, and {teacher} said of every token what it would have expected."
    mixed = f", mixed with GRPO (`alpha` {alpha})" if alpha != 1 else ""
    return f"{student} was trained by on-policy distillation{mixed}: {said}"


def teachers_of(trainer: Any) -> str:
    """Who said what it would have expected. Addresses and folders of a run are nobody else's business."""
    found = []
    for name, opened in trainer.opened.items():
        source = opened.source
        if opened.model is not None:
            shown = _Base(trainer.accelerator.unwrap_model(opened.model).config).shown
        elif source.model is not None:  # read anew for each of its phases
            shown = _Base(SimpleNamespace(_name_or_path=source.model)).shown
        else:
            shown = "A teacher behind a server" if source.url else "A teacher whose hidden states were kept"
        found.append(shown[0].lower() + shown[1:] + (f" (`{name}`)" if name else ""))
    return " and ".join(found) + (", each for rows of its own," if len(found) > 1 else "")


def _minimised(args: Any, preset: Preset) -> str:
    alpha = getattr(args, "alpha", 1)
    rewards = "The policy gradient of GRPO on rewards"
    if alpha == 0:
        return f"{rewards}; nothing was distilled."
    link = f"[{preset.paper}](https://arxiv.org/abs/{preset.paper})"
    said = f"Objective `{preset.name}` ({link}), per token: `{preset.equation}`"
    return said if alpha == 1 else f"{said}\n\n{rewards}, with weight 1 - `alpha`."


def _objective(trainer: Any, preset: Preset) -> dict[str, Any]:
    args, divergence = trainer.args, preset.divergence
    common = {name: getattr(args, name) for name in OBJECTIVE if getattr(args, name, None) is not None}
    if named := getattr(trainer, "reward_func_names", None):
        common["rewards"] = ", ".join(named)
    if getattr(args, "alpha", 1) == 0:
        return common
    rows: dict[str, Any] = {"divergence": f"{divergence.divergence}, support {divergence.support}"}
    unread = {"prior_decay"} if args.prior == "live" else set()
    unread |= {"adaptive_quantile"} if args.schedule != "adaptive" else set()
    read = {name: getattr(args, name) for name in sorted(SETTINGS - unread) if preset.reads(name)}
    rows |= {name: value for name, value in read.items() if value is not None}
    if preset.steered:
        rows["gamma_guard"] = args.guards_gamma
        known = trainer.steering.ratios or trainer.steering.ratio is not None
        measured = f" ({args.eta})" if known else " (to be measured)"
        rows |= {"eta": f"{trainer.objective.eta:.4g}{'' if args.fixed_eta is not None else measured}"}
        rows |= {"prior": args.prior}
    return rows | common


def _data(trainer: Any) -> dict[str, Any]:
    """Where the questions come from: of the run's folder, else of the dataset itself."""
    record = Path(trainer.args.output_dir, RECORD)
    if record.exists():
        run = json.loads(record.read_text())
        if (run.get("config") or {}).get("task") == "digits":
            return {"source": "the built-in task: scikit-learn's handwritten digits", **run["config"].get("digits", {})}
        section = ((run.get("config") or {}).get("data") or {}).get("train") or {}
        source, fingerprint = section, (run.get("data") or {}).get("train")
    else:
        dataset = trainer.train_dataset
        source = vars(dataset.source) if hasattr(dataset, "source") else {}
        fingerprint = getattr(dataset, "_fingerprint", None)
    path = source.get("path", "passed to the trainer from Python")
    rows: dict[str, Any] = {"source": Path(path).name if os.path.isabs(path) else path}
    rows |= {key: source[key] for key in ("subset", "split", "revision", "limit") if source.get(key) is not None}
    if fingerprint is not None:
        rows["fingerprint"] = fingerprint
    if hasattr(trainer.train_dataset, "__len__"):
        rows["questions"] = len(trainer.train_dataset)
    return rows


def _training(trainer: Any) -> dict[str, Any]:
    args, state = trainer.args, trainer.state
    rows: dict[str, Any] = {
        "steps": state.global_step,
        "epochs": f"{state.epoch or 0:.3g}",
        "tokens of prompts and responses": int(state.num_input_tokens_seen),
        "processes": args.world_size,
        "trained weights": "a LoRA adapter" if hasattr(trainer.student, "peft_config") else "of the model itself",
    }
    plain = {name: getattr(args, name) for name in OPTIMISATION}
    return rows | {name: getattr(value, "value", value) for name, value in plain.items()}


def _evaluation(history: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, int]]:
    """Name of every held-out set -> its last accuracy, and the step at which it was measured."""
    found = {}
    for entry in history:
        for key, value in entry.items():
            if (match := re.fullmatch("eval_(?:(.*)_)?accuracy", key)) and value is not None:
                found[match[1] or "held-out questions"] = (float(value), int(entry.get("step", 0)))
    return found
