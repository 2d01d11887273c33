"""Tokenizers and chat templates of the families in ``field_recipes``."""

from __future__ import annotations

from .texts import Speech, chatml

_MINICPM = chatml(
    "<|image_pad|>",
    specials=("<|im_start|>",),
    named={
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    },
)
_STEP = ("<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>")
_MOLMO = ("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<im_end>", "<im_low>")
_FRAMES = ("<frame_start>", "<frame_end>")
_NEMOTRON = ("<image>", "<video>", "<so_embedding>", "<so_start>", "<so_end>", "<img>", "</img>")

FIELD_SPEECH: dict[str, Speech] = {
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
    "molmo2": chatml("<|image|>", specials=("<|im_start|>", "<|image|>", "<|video|>", *_MOLMO, *_FRAMES)),
    "step3p7": chatml("<im_patch>", specials=("<|im_start|>", *_STEP)),
    "nemotron_h_omni": chatml("<image>", specials=("<|im_start|>", *_NEMOTRON)),
}
