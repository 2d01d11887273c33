"""Whether two models mean the same by every token id, which a loss over their logits takes for granted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

SHOWN = 3
MEDIA_WORDS = ("image", "img", "video", "vision", "audio", "boi", "eoi", "soft_token")
SPECIAL_TOKENS = ("eos_token", "image_token", "video_token")


def load_tokenizer(section: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model, of a config's ``student`` or ``teacher`` section; None where there is none."""
    options = {key: section[key] for key in ("revision", "trust_remote_code") if key in section}
    try:
        cached_file(section["path"], "tokenizer_config.json", revision=section.get("revision"))
    except OSError:  # a library that finds no file would make an empty tokenizer
        return None
    return AutoTokenizer.from_pretrained(section["path"], **options)


def tokenizer_of(processor: Any) -> Any:
    """A processor's tokenizer; a tokenizer is returned as it is."""
    return getattr(processor, "tokenizer", processor)


def media_tokens(processor: Any) -> list[str]:
    """The texts that a processor or its tokenizer reads as (part of) an image, video or sound: no prompt may say them.

    They are its attributes ``*_token``, ``*_token_id`` and ``*_token_ids`` with one of ``MEDIA_WORDS`` in their name,
    and special tokens with such a word in their text.
    """
    tokenizer = tokenizer_of(processor)
    tokens: set[str] = set()
    for owner in (processor, tokenizer):
        for name in {*vars(owner), *(key for key in dir(type(owner)) if "_token" in key)}:
            if "_token" not in name or name.startswith("_") or not any(word in name for word in MEDIA_WORDS):
                continue
            value = getattr(owner, name, None)
            values = value if isinstance(value, (list, tuple)) else [value]
            ids = [item for item in values if isinstance(item, int) and not isinstance(item, bool)]
            if name.endswith(("_token_id", "_token_ids")):
                tokens |= {token for token in tokenizer.convert_ids_to_tokens(ids) if isinstance(token, str)}
            elif name.endswith("_token"):
                tokens |= {item for item in values if isinstance(item, str)}
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens |= {token for token in special if any(word in token.lower() for word in MEDIA_WORDS)}
    return sorted(token for token in tokens if len(token) > 2)


def check_same_tokens(student: Any, teacher: Any, vocab_size: int | None = None) -> None:
    """Stop where a token id means different things to student and teacher.

    Ids that only one of them knows count too: their columns are in both padded heads, so the loss would teach the
    student ids that it cannot spell, or ask the teacher about ids that it never saw.

    Args:
        student, teacher: tokenizers, or processors with one.
        vocab_size: number of leading columns that the loss uses; None: all of them.

    Raises:
        ValueError: an id with different strings, an id that only one of them has, or different special tokens.
    """
    student, teacher = (tokenizer_of(x) for x in (student, teacher))
    names = [{index: token for token, index in x.get_vocab().items()} for x in (student, teacher)]
    used = [{index for index in x if vocab_size is None or index < vocab_size} for x in names]
    different = sorted(index for index in used[0] & used[1] if names[0][index] != names[1][index])
    if different:
        pairs = ", ".join(f"{i} is {names[0][i]!r} and {names[1][i]!r}" for i in different[:SHOWN])
        raise ValueError(
            f"student and teacher must have the same tokens, but {len(different)} ids differ (student's, teacher's): "
            f"{pairs}."
        )
    for name, own, others, table in (("student", *used, names[0]), ("teacher", *used[::-1], names[1])):
        if single := sorted(own - others):
            tokens = ", ".join(f"{i} {table[i]!r}" for i in single[:SHOWN])
            raise ValueError(
                f"student and teacher must have the same tokens, but only the {name} has {len(single)} of them: "
                f"{tokens}. Set vocab_size to at most {single[0]} to leave them out of the loss."
            )
    for name in SPECIAL_TOKENS:
        values = [getattr(x, name, None) for x in (student, teacher)]
        if None not in values and values[0] != values[1]:
            raise ValueError(f"student and teacher must have the same {name}, got {values[0]!r} and {values[1]!r}.")
