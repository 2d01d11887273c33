"""The two models of a run as their files describe them: whether the teacher can read the student's prompts.

No weights are read here: configs, processors, tokenizers and chat templates.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..errors import ConfigError, config_errors
from ..evaluation.rewards import prompt_opening
from ..models.pictures import check_pictures, reads_pictures
from ..models.tokenizers import check_same_tokens, load_tokenizer, tokenizer_of
from ..models.vocabulary import common_vocabulary, head_rows
from .keys import unknown_key
from .resolved import LOADING

logger = logging.getLogger(__name__)

PIXEL_FIELDS = ("image_mean", "image_std", "rescale_factor")
SIDES = ((224, 224), (480, 640), (1000, 300))  # (height, width) of pictures whose image tokens are compared


def _files(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: section[key] for key in ("revision", "trust_remote_code") if key in section}


def load_processor(config: Mapping[str, Any], text_only: bool = False) -> Any:
    """The student's processor, padding on the left; the ``processor`` section (e.g. ``max_pixels``) goes to it.

    Args:
        config: of ``load_config``.
        text_only: the student has no pictures to read; its tokenizer will do.

    Raises:
        ConfigError: there is none, one without an image processor, or a key in ``processor`` that it does not have.
    """
    student, options = config["student"], dict(config.get("processor") or {})
    files = _files(student)
    with config_errors(f"The processor of student.path {student['path']!r} cannot be loaded", *LOADING):
        if options:
            plain = AutoProcessor.from_pretrained(student["path"], **files)
            known = processor_keys(plain)
            for key in options:
                if key not in known:
                    raise unknown_key(key, known, "section 'processor'")
        found = AutoProcessor.from_pretrained(
            student["path"], padding_side="left", truncation_side="left", **files, **options
        )
    if not isinstance(found, ProcessorMixin) and not (text_only and isinstance(found, PreTrainedTokenizerBase)):
        raise ConfigError(
            f"student.path must be a vision-language model with a processor, got {student['path']!r} with a "
            f"{type(found).__name__}."
        )
    return found


def processor_keys(processor: Any) -> set[str]:
    """The settings of a processor, its image processor and its chat template: what a ``processor`` section may set."""
    keys = {name for name in inspect.signature(type(processor).__init__).parameters if "processor" not in name}
    keys -= {"self", "args", "kwargs", "tokenizer"}
    image = getattr(processor, "image_processor", None)
    for owner in () if image is None else (image,):
        keys |= set(owner.to_dict()) | set(inspect.signature(type(owner).__init__).parameters)
        keys |= set(getattr(getattr(owner, "valid_kwargs", None), "__annotations__", ()))
        keys |= {"min_pixels", "max_pixels"} if "size" in keys and hasattr(owner, "patch_size") else set()
    return {key for key in keys if not key.startswith("_") and not key.endswith("_type")} - {"self", "kwargs"}


def auto_class(text_only: bool) -> type:
    """What loads a vision-language model, or a text-only one."""
    return AutoModelForCausalLM if text_only else AutoModelForImageTextToText


def model_class(config: Any) -> type:
    """The class by which a model of this config is loaded.

    Args:
        config: a transformers config of the library's own.
    """
    return auto_class(not reads_pictures(config))._model_mapping[type(config)]


def model_config(section: Mapping[str, Any], name: str, needs_pictures: bool = True) -> Any:
    """The transformers config of a ``student`` or ``teacher`` section.

    Args:
        section: of the config. name: of the section, for the message.
        needs_pictures: the objective compares prompts with and without images.

    Raises:
        ConfigError: it cannot be loaded, or is of no vision-language model where one is needed.
    """
    with config_errors(f"{name}.path {section['path']!r} cannot be loaded", *LOADING, KeyError):
        found = AutoConfig.from_pretrained(section["path"], **_files(section))
    if needs_pictures and not reads_pictures(found):
        raise no_pictures(section, name, found)
    return found


def no_pictures(section: Mapping[str, Any], name: str, config: Any) -> ConfigError:
    """The error for a text-only model where a vision-language model is needed; as of ``model_config``, whose ``config``
    it is."""
    return ConfigError(
        f"{name}.path must be a vision-language model, got {section['path']!r} of the type {config.model_type!r} "
        "(objectives that compare nothing with the image, such as opd and gkd, take text-only models; others do where "
        "data mark texts as evidence, with evidence_column or in chat messages)."
    )


def check_weights(section: Mapping[str, Any], name: str) -> None:
    """See that the weights of a model on this machine are there and whole, without reading them.

    Args:
        section: of the config. name: of the section, for the message.

    Raises:
        ConfigError: a file that is missing or cut off.
    """
    folder = Path(section["path"]).expanduser()
    if not folder.is_dir():
        return  # on the hub
    what = f"{name}.path {section['path']!r}"
    files = sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("*.bin")):
        raise ConfigError(f"{what} has no weights: expected *.safetensors files, as save_pretrained writes them.")
    for index in folder.glob("*.safetensors.index.json"):
        with config_errors(f"{what}: {index.name} cannot be read", ValueError, KeyError, AttributeError, OSError):
            named = set(json.loads(index.read_text())["weight_map"].values())
        if missing := sorted(named - {file.name for file in files}):
            raise ConfigError(f"{what} lacks {missing[0]}, which {index.name} names.")
    for file in files:
        with config_errors(f"{what}: {file.name} is not whole", SafetensorError, OSError), safe_open(file, "pt"):
            pass


def _teacher_processor(section: Mapping[str, Any]) -> Any:
    """The teacher's own processor; None where it has none that can be loaded."""
    try:
        found = AutoProcessor.from_pretrained(section["path"], **_files(section))
    except Exception as error:  # it is not needed: the student's makes the prompts of both
        logger.debug("The teacher's processor cannot be loaded: %s", error)
        return None
    return found if isinstance(found, ProcessorMixin) else None


def _check_counts(student: Any, teacher: Any) -> None:
    """Image tokens of a few pictures, as both processors count them."""
    if not all(hasattr(x, "_get_num_multimodal_tokens") for x in (student, teacher)):
        return
    for sides in SIDES:
        try:
            counts = [x._get_num_multimodal_tokens(image_sizes=[sides]).num_image_tokens[0] for x in (student, teacher)]
        except Exception as error:  # a count that a processor does not offer for its own settings
            logger.debug("Image tokens cannot be counted: %s", error)
            return
        if counts[0] != counts[1]:
            height, width = sides
            logger.warning(
                "A picture of %d x %d pixels has %d image tokens by the student's processor, which makes the prompts "
                "of both models, and %d by the teacher's own.",
                *(width, height, *counts),
            )
            return


def _check_pixels(student: Any, teacher: Any) -> None:
    images = [getattr(x, "image_processor", None) for x in (student, teacher)]
    for name in PIXEL_FIELDS:
        values = [getattr(image, name, None) for image in images]
        values = [list(value) if isinstance(value, (list, tuple)) else value for value in values]
        if None not in values and values[0] != values[1]:
            logger.warning(
                "The teacher's own processor has %s %s, the student's, which makes the pixels for both, %s.",
                *(name, values[1], values[0]),
            )


def check_templates(student: Any, teacher: Any, **template_options: Any) -> None:
    """Warn where a model was trained on other prompts than the run will show it; both are shown.

    Args:
        student, teacher: processors with chat templates; a teacher without one says nothing.
        **template_options: passed to ``apply_chat_template``.
    """
    if teacher is None or not getattr(teacher, "chat_template", None):
        return
    messages = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    texts, opened = [], []
    for processor in (student, teacher):
        with config_errors("The chat template cannot be rendered", Exception):
            texts.append(
                processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template_options)
            )
            opened.append(prompt_opening(processor, **template_options).strip())
    if opened[0] != opened[1]:
        logger.warning(
            "The prompts of student and teacher end differently: the student's chat template, which both models see in "
            "this run, gives %r, the teacher's own %r. chat_template_kwargs may bring them together.",
            *texts,
        )
    elif texts[0] != texts[1]:
        logger.warning(
            "The chat templates differ: the student's, which both models see in this run, gives %r, the teacher's own "
            "%r.",
            *texts,
        )


def check_pair(
    config: Mapping[str, Any], processor: Any, student: Any, section: Mapping[str, Any], where: str = "teacher"
) -> int | None:
    """Whether student and teacher fit each other; the number of vocabulary columns that both have, None for all.

    Args:
        config: of ``load_config``.
        processor: the student's. student: its transformers config.
        section: the teacher's. where: its name in the config.

    Raises:
        ConfigError: other tokens, patches or image tokens, or a ``vocab_size`` that is too large.
    """
    training = config.get("training", {})
    teacher = model_config(section, where, needs_pictures=reads_pictures(student))
    if reads_pictures(student):
        check_pictures(student, teacher, (config["student"]["path"], f"{where}.path {section['path']!r}"))
    vocab_size = common_vocabulary(student, teacher, training.get("vocab_size"))
    with config_errors(f"{where}.path {section['path']!r}", *LOADING):
        tokenizer = load_tokenizer(section)
        if tokenizer is not None:
            check_same_tokens(processor, tokenizer, vocab_size)
    size = len(tokenizer_of(processor).get_vocab())
    if vocab_size is None and size > head_rows(student):
        logger.warning("The tokenizer has %d tokens, the heads %d rows.", size, head_rows(student))
    own = _teacher_processor(section)
    if own is not None:
        _check_counts(processor, own)
        _check_pixels(processor, own)
    check_templates(processor, own, **(training.get("chat_template_kwargs") or {}))
    return vocab_size
