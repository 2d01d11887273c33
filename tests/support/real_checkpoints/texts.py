"""Tokenizers and chat templates in the manner of each family's published checkpoints, in our own words."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "what is in the picture ? which colour does the circle have ? how many squares are there ?",
    "the answer is seven . the second picture shows a red circle and three green squares .",
    "user assistant system model a short answer : left right above below between",
)
MERGES = 60  # beyond the 256 bytes


@dataclass(frozen=True)
class Speech:
    """How a family writes a conversation.

    Attributes:
        pad, bos, eos: special tokens.
        stops: tokens that end an answer beside eos.
        image: what the template writes for an image: markup with the token that the processor expands.
        turn: before a message, with ``{role}`` in it. close: behind a message. answer: before the model's answer.
        opening: at the start of every conversation.
        specials: further special tokens. words: tokens that are whole, but survive when special ones are left out.
        named: attributes of the tokenizer that hold tokens (``image_token``, ...).
        adds_bos: whether the tokenizer itself writes bos in front of any text.
        roles: names of roles in the template, where they differ from those in messages.
        images_first: whether a message's images stand before its text wherever they were.
    """

    image: str
    turn: str
    close: str
    answer: str
    pad: str = "<pad>"
    bos: str | None = None
    eos: str = "</s>"
    stops: tuple[str, ...] = ()
    opening: str = ""
    specials: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)
    adds_bos: bool = False
    roles: dict[str, str] = field(default_factory=dict)
    images_first: bool = False

    @property
    def template(self) -> str:
        """A Jinja chat template."""
        order = "m.content"
        if self.images_first:
            order = "(m.content | rejectattr('type', 'equalto', 'text') | list) + "
            order += "(m.content | selectattr('type', 'equalto', 'text') | list)"
        before, after = self.turn.split("{role}")
        return (
            f"{self.opening}{{%- set names = {self.roles} -%}}{{%- for m in messages -%}}"
            f"{{{{ {before!r} + names.get(m.role, m.role) + {after!r} }}}}"
            "{%- if m.content is string -%}{{ m.content }}{%- else -%}"
            f"{{%- for part in {order} -%}}"
            f"{{%- if part.type == 'image' -%}}{{{{ {self.image!r} }}}}"
            "{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}"
            f"{{{{ {self.close!r} }}}}{{%- endfor -%}}"
            f"{{%- if add_generation_prompt -%}}{{{{ {self.answer!r} }}}}{{%- endif -%}}"
        )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A byte-level BPE tokenizer with a few dozen merges."""
        first = [self.pad, *([self.bos] if self.bos else []), self.eos]
        specials = list(dict.fromkeys([*first, *self.specials, *self.named.values()]))
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        size = len(specials) + len(alphabet) + MERGES
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
        )
        backend.train_from_iterator(CORPUS, trainer)
        backend.add_tokens(list(self.words))
        if self.adds_bos:
            place = [(self.bos, backend.token_to_id(self.bos))]
            backend.post_processor = processors.TemplateProcessing(single=f"{self.bos} $A", special_tokens=place)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token=self.pad,
            bos_token=self.bos,
            eos_token=self.eos,
            padding_side="left",
            extra_special_tokens=list(self.specials),
            model_specific_special_tokens=self.named,
            chat_template=self.template,
        )


def chatml(image: str, *, system: str = "", answer: str = "", **options: object) -> Speech:
    opening = f"{{%- if messages[0].role != 'system' -%}}{{{{ {system!r} }}}}{{%- endif -%}}" if system else ""
    return Speech(
        image=image,
        turn="<|im_start|>{role}\n",
        close="<|im_end|>\n",
        answer="<|im_start|>assistant\n" + answer,
        opening=opening,
        pad="<|endoftext|>",
        eos="<|im_end|>",
        **options,
    )


def _qwen(**options: str) -> Speech:
    marks = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    return chatml(
        "<|vision_start|><|image_pad|><|vision_end|>", specials=marks, words=("<think>", "</think>"), **options
    )


_QWEN_SYSTEM = "<|im_start|>system\nYou answer briefly.<|im_end|>\n"
_CELLS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_COHERE = {
    "turn": "<|START_OF_TURN_TOKEN|><|{role}_TOKEN|>",
    "close": "<|END_OF_TURN_TOKEN|>",
    "answer": "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "bos": "<BOS_TOKEN>",
    "pad": "<PAD>",
    "eos": "<|END_OF_TURN_TOKEN|>",
    "opening": "{{ bos_token }}",
    "roles": {"user": "USER", "assistant": "CHATBOT", "system": "SYSTEM"},
}
_COHERE_MARKS = ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>")
_SMOL_NAMED = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
_SMOL = Speech(
    image="<image>",
    turn="{role}: ",
    close="<end_of_utterance>\n",
    answer="Assistant:",
    bos="<|im_start|>",
    pad="<|im_end|>",
    eos="<end_of_utterance>",
    opening="{{ bos_token }}",
    specials=_CELLS,
    named=_SMOL_NAMED,
    roles={"user": "User", "assistant": "Assistant", "system": "System"},
)
_MISTRAL = Speech(
    image="[IMG]",
    turn="[INST]{role}",
    close="[/INST]",
    answer="",
    bos="<s>",
    opening="{{ bos_token }}",
    specials=("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    adds_bos=True,
    roles={"user": "", "assistant": "", "system": ""},
)
_GEMMA = {"bos": "<bos>", "eos": "<eos>", "opening": "{{ bos_token }}", "roles": {"assistant": "model"}}
_GEMMA4 = Speech(
    image="<|image|>",
    turn="<|turn>{role}\n",
    close="<turn|>\n",
    answer="<|turn>model\n",
    stops=("<turn|>",),
    specials=("<|turn>", "<turn|>", "<|video|>"),
    named={
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    },
    **_GEMMA,
)

SPEECH = {
    "qwen2_vl": _qwen(system=_QWEN_SYSTEM),
    "qwen2_5_vl": _qwen(system=_QWEN_SYSTEM),
    "qwen3_vl": _qwen(),
    "qwen3_vl_moe": _qwen(),
    "qwen3_5": _qwen(answer="<think>\n\n</think>\n\n"),
    "qwen3_5_moe": _qwen(answer="<think>\n\n</think>\n\n"),
    "internvl": chatml(
        "<IMG_CONTEXT>\n",
        specials=("<|im_start|>",),
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "llava": Speech(
        image="<image>\n",
        turn="{role}: ",
        close=" ",
        answer="ASSISTANT:",
        bos="<s>",
        specials=("<image>",),
        named={"image_token": "<image>"},
        adds_bos=True,
        roles={"user": "USER", "assistant": "ASSISTANT", "system": "SYSTEM"},
        images_first=True,
    ),
    "llava_pixtral": _MISTRAL,
    "mistral3": _MISTRAL,
    "llava_next": Speech(
        image="<image>\n",
        turn="[INST] {role}",
        close=" [/INST]",
        answer="",
        bos="<s>",
        named={"image_token": "<image>"},
        adds_bos=True,
        roles={"user": "", "assistant": "", "system": ""},
        images_first=True,
    ),
    "llava_onevision": chatml(
        "<image>\n",
        specials=("<|im_start|>",),
        named={"image_token": "<image>", "video_token": "<video>"},
        images_first=True,
    ),
    "gemma3": Speech(
        image="<start_of_image>",
        turn="<start_of_turn>{role}\n",
        close="<end_of_turn>\n",
        answer="<start_of_turn>model\n",
        stops=("<end_of_turn>",),
        specials=("<start_of_turn>", "<end_of_turn>"),
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        adds_bos=True,
        **_GEMMA,
    ),
    **dict.fromkeys(("gemma4", "gemma4_small", "gemma4_moe", "gemma4_unified"), _GEMMA4),
    "smolvlm": _SMOL,
    "idefics3": _SMOL,
    "aya_vision": Speech(
        image="<image>",
        specials=(
            *_COHERE_MARKS,
            *("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL"),
            *(f"TILE_{number}" for number in range(1, 5)),
        ),
        **_COHERE,
    ),
    "cohere2_vision": Speech(
        image="<|IMG_PATCH|>",
        specials=_COHERE_MARKS,
        named={
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        **_COHERE,
    ),
}
