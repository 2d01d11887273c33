"""Chat messages and their evidence: pictures put in their places, evidence taken out, listed.

Evidence is what the text-only view lacks: every picture, and every text part that is marked,
``{"type": "text", "text": ..., "evidence": True}``: a document, a tool's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]

ROLES = ("system", "user", "assistant", "tool")
PICTURE_KEYS = ("image", "url", "path", "base64")  # where a content block may have its picture


def shared_format(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The sample with all its pictures in the list ``images``, and places for them in its ``prompt``.

    Args:
        sample: ``prompt``, and pictures in ``images``, in TRL's column ``image`` (one alone), or in the prompt itself.

    Raises:
        ValueError: as ``fill_images``, where the prompt itself has pictures.
    """
    images, prompt = sample.get("images"), sample["prompt"]
    if images is None:
        images = [] if sample.get("image") is None else [sample["image"]]
    asked = [] if isinstance(prompt, str) else [message for message in prompt if message["role"] != "tool"]
    if any(picture is not None for picture in prompt_images(asked)):  # the prompt's own
        filled = fill_images(prompt, images)
        images = prompt_images([message for message in filled if message["role"] != "tool"])
        prompt = [_places_alone(message) for message in filled]
    return {**sample, "prompt": prompt, "images": list(images)}


def _places_alone(message: dict[str, Any]) -> dict[str, Any]:
    """A message of content blocks with places in place of its pictures; a tool's keeps them."""
    if message["role"] == "tool" or not message.get("content"):
        return message
    parts = [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]
    return {**message, "content": parts}


def is_evidence(part: Mapping[str, Any]) -> bool:
    """Whether a content block is a picture (or video), or marked.

    Raises:
        ValueError: a mark that is neither True nor False, or a picture that is to be none.
    """
    mark = part.get("evidence")
    if mark not in (None, True, False):
        raise ValueError(f"evidence of a content part must be true or false, got {mark!r}.")
    if part["type"] in ("image", "video"):
        if mark is False:
            raise ValueError("evidence of an image must not be false: the text-only view has no images.")
        return True
    return bool(mark)


def has_evidence(messages: Messages | str) -> bool:
    """Whether the text-only view of a conversation lacks anything."""
    contents = [] if isinstance(messages, str) else [message.get("content") for message in messages]
    return any(is_evidence(part) for parts in contents if parts and not isinstance(parts, str) for part in parts)


def unmarked(messages: Messages) -> list[dict[str, Any]]:
    """The conversation as chat templates know it, without marks of evidence."""
    return [
        {**x, "content": [{key: value for key, value in part.items() if key != "evidence"} for part in x["content"]]}
        if x.get("content") and not isinstance(x["content"], str)
        else dict(x)
        for x in messages
    ]


def remove_evidence(messages: Messages | str) -> list[dict[str, Any]] | str:
    """The conversation as content blocks, without its evidence; a plain text stays as it is.

    Args:
        messages: chat messages whose ``content`` is a string or a list of content blocks.

    Raises:
        ValueError: see ``is_evidence``.
    """
    if isinstance(messages, str):
        return messages
    stripped = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if content is not None:
            content = [part for part in content if not is_evidence(part)]
            message = {**message, "content": content}
        stripped.append(dict(message))
    return stripped


def fill_images(messages: Messages | str, images: Sequence[Any]) -> list[dict[str, Any]] | str:
    """The conversation as content blocks, with its images in their places; a plain text stays as it is.

    Args:
        messages: chat messages whose ``content`` is a string or a list of content blocks. Image blocks without an image
            are places. Where the first user message is a string, all images come before its text.
        images: as many as there are places.

    Raises:
        ValueError: another number of images, a plain text with images, a role that is none of system, user, assistant,
            tool, or a mark that ``is_evidence`` refuses.
    """
    if isinstance(messages, str):
        if images:
            raise ValueError(f"images has {len(images)} entries, but a prompt of plain text has no place for any.")
        return messages
    filled, opened = [], False
    for message in messages:
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            raise ValueError(f"A message has the role {role!r}; expected one of {', '.join(ROLES)}.")
        if isinstance(content, str):
            places = [{"type": "image"} for _ in images] if role == "user" and not opened else []
            opened = opened or role == "user"
            content = [*places, {"type": "text", "text": content}]
            message = {**message, "content": content}
        elif content:  # tables of content blocks fill up with None
            parts = [{key: value for key, value in part.items() if value is not None} for part in content]
            for part in parts:
                is_evidence(part)  # whose mark may mean nothing
            message = {**message, "content": parts}
        filled.append(dict(message))

    def is_place(message: dict[str, Any], part: dict[str, Any]) -> bool:
        return message["role"] != "tool" and part["type"] == "image" and not part.keys() & set(PICTURE_KEYS)

    count = sum(is_place(message, part) for message in filled for part in message.get("content") or ())
    if count != len(images):
        raise ValueError(f"images has {len(images)} entries, but the prompt has places for {count}.")
    rest = iter(images)
    return [
        {**x, "content": [{**part, "image": next(rest)} if is_place(x, part) else part for part in x["content"]]}
        if x.get("content")
        else x
        for x in filled
    ]


def prompt_texts(messages: Messages | str) -> Iterator[str]:
    """All texts of a conversation."""
    for message in [{"content": messages}] if isinstance(messages, str) else messages:
        content = message.get("content") or ()
        for part in [{"text": content}] if isinstance(content, str) else content:
            yield part.get("text") or ""


def prompt_images(messages: Messages | str) -> list[Any]:
    """The pictures of a conversation's image items, in their order; None for a place without one.

    Args:
        messages: chat messages, or a plain text, which has none.
    """
    return [
        next((part[key] for key in PICTURE_KEYS if part.get(key) is not None), None)
        for content in ([] if isinstance(messages, str) else [message.get("content") for message in messages])
        if content and not isinstance(content, str)
        for part in content
        if part["type"] == "image"
    ]
