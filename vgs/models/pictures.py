"""Whether two models read the same pixels: what their configs say of patches and image tokens."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError

# Fields that say how pixels become image tokens; models with others cannot read the same pixels.
VISION_FIELDS = ("patch_size", "spatial_merge_size", "temporal_patch_size", "image_size", "num_channels", "in_channels")
TOP_FIELDS = ("downsample_ratio", "image_seq_length", "scale_factor", "mm_tokens_per_image")
TOP_FIELDS += ("vision_feature_select_strategy", "image_grid_pinpoints")


def reads_pictures(config: Any) -> bool:
    """Whether a transformers config is of a vision-language model."""
    return getattr(config, "vision_config", None) is not None


def _differences(own: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    found = {}
    for names, pair in ((VISION_FIELDS, (own.vision_config, other.vision_config)), (TOP_FIELDS, (own, other))):
        for name in names:
            values = tuple(getattr(config, name, None) for config in pair)
            if None not in values and values[0] != values[1]:
                found[name] = values
    return found


def check_pictures(student: Any, teacher: Any, names: tuple[str, str]) -> None:
    """Stop where the teacher's vision tower cannot read the pixels that the student's processor makes.

    Args:
        student, teacher: their transformers configs.
        names: the student's path, and what the teacher is, for the message.

    Raises:
        ConfigError: other patch sizes, merge sizes or image tokens per picture.
    """
    if differ := _differences(student, teacher):
        listed = ", ".join(f"{name} {own!r} and {other!r}" for name, (own, other) in differ.items())
        raise ConfigError(
            f"{names[1]} reads pictures otherwise than student.path {names[0]!r} (student's, teacher's: "
            f"{listed}), so it cannot read the student's prompts; use a teacher of the same family."
        )
