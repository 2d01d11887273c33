"""A training step by count: FLOPs by phase, bytes of the optimizer, memory. Nothing here is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean

from transformers import PretrainedConfig

from vgs.models.groups import PromptGroup, response_lengths
from vgs.planning.model_size import FORWARD, ModelSize, Work
from vgs_kernels import DEFAULT_WORKSPACE_BYTES

from .hybrid_size import HybridSize
from .jobs import JOBS, Phase
from .problem import Shape
from .step_hybrids import HYBRIDS
from .step_methods import PHASES, Method
from .step_problem import PAIRS, Load, make_groups, micro_batches, response_tokens

#: Bytes that eager's formula holds for each response token and vocabulary entry, at its peak, under autocast: four rows
#: of 16-bit logits and eleven of float32 (log-probabilities, probabilities, gaps). Seen on a CPU: 52.5.
EAGER_BYTES = 4 * 2 + 11 * 4
#: Of a trainable parameter: float32 weight, gradient and two moments.
STATE_BYTES = 16
#: The optimizer reads those four and writes three; clipping reads the gradient twice and writes it once.
STREAMED_BYTES = 7 * 4 + 3 * 4
_RECOMPUTING = Work(recompute=True)
LONGEST = 131_072  # response that is asked about
_STEPS = 64  # that an average is taken over: a few lengths would decide a single one


@cache
def sizes(pair: str) -> tuple[ModelSize | HybridSize, ModelSize | HybridSize]:
    """Student and teacher."""
    kind = HybridSize if pair in HYBRIDS else ModelSize
    student, teacher = (kind.of(make()) for make in PAIRS[pair])
    return student, teacher


def steps(load: Load) -> list[Load]:
    """Steps that differ in their responses' lengths."""
    return [replace(load, seed=seed) for seed in range(_STEPS)]


@cache
def _config(pair: str) -> PretrainedConfig:
    return PAIRS[pair][0]()


@cache
def _groups(load: Load, pair: str) -> list[PromptGroup]:
    return make_groups(load, _config(pair))


@dataclass(frozen=True)
class View:
    """One view of one micro-batch as it runs through a model: rows of the decoder, (query, key) pairs that attend (of
    causal sequences: kind to padded batches, whose mask makes a kernel compute all pairs), patches of each image."""

    tokens: int
    pairs: int
    images: tuple[int, ...] = ()


def view(method: Method, batch: Sequence[PromptGroup], *, text: bool, patches: int) -> View:
    """What ``method`` runs of a micro-batch.

    Args:
        method: tells packed from padded, and shared prompts from copies.
        batch: the prompts with their responses.
        text: the text-only view instead of the multimodal one.
        patches: of an image.
    """
    lengths = response_lengths(batch)
    prompts = [len(group.text_prompt_ids if text else group.prompt_ids) for group in batch]
    images = () if text else (patches,) * len(batch if method.shared else lengths)
    if not method.packed:
        width = max(prompts) + max(lengths)
        return View(len(lengths) * width, len(lengths) * _causal(width), images)
    tokens = pairs = 0
    for group, prompt in zip(batch, prompts, strict=True):
        copies = 1 if method.shared else len(group.responses)
        inputs = [length - 1 for length in group.response_lengths]  # the last token predicts nothing
        tokens += copies * prompt + sum(inputs)
        pairs += copies * _causal(prompt) + sum(_causal(x) + x * prompt for x in inputs)
    return View(tokens, pairs, images)


def _causal(length: int) -> int:
    return length * (length + 1) // 2


def _flops(size: ModelSize, views: Sequence[View], work: Work) -> float:
    decoder = sum(size.decoder_flops(x.tokens, x.pairs, work) for x in views)
    return decoder + sum(size.vision_flops(x.images, work) for x in views if x.images)


def head_phases(method: Method) -> dict[str, list[Phase]]:
    """Products with the heads (objective.md, section 5) by phase. The fused losses form their gradients at once. Plain
    distillation is counted at its floor, whatever its loss recomputes."""
    if not method.text:
        return {"loss": [Phase(1, 1, 1, 1, 1)]}
    if not method.fused:
        return {"loss": [Phase(1, 2, 2, 0, 0)], "backward": [Phase(1, 0, 0, 2, 2)]}
    shape = Shape(1, 1, 1)  # the cheapest phases are the same for every shape with a trainable head
    if method.objective.lam == 0:
        return {"loss": JOBS["vgs-folded"].phases(shape)}
    return {"loss": [Phase(1, 0, 2, 0, 0), *JOBS["vgs-threshold"].phases(shape)]}  # first the gate of the whole step


def flops(method: Method, load: Load, pair: str) -> dict[str, float]:
    """FLOPs of one step by phase, rollout aside."""
    student, teacher = sizes(pair)
    groups = _groups(load, pair)
    total = dict.fromkeys(PHASES, 0.0)
    for batch in micro_batches(groups, load):
        image = view(method, batch, text=False, patches=load.patches)
        text = [view(method, batch, text=True, patches=load.patches)] if method.text else []
        # Without the language term the text-only view is a constant; with it, about every response has gated tokens.
        backward = [image, *(text if method.objective.lam > 0 else [])]
        total["teacher"] += _flops(teacher, [image, *text], FORWARD)
        total["student"] += _flops(student, [image, *text], FORWARD)
        total["backward"] += _flops(student, backward, _RECOMPUTING) - _flops(student, backward, FORWARD)
    shape = Shape(student.vocabulary, student.text.hidden, teacher.text.hidden)
    for name, phases in head_phases(method).items():
        total[name] += sum(2.0 * shape.vocab * response_tokens(groups) * phase.columns(shape) for phase in phases)
    return total


def mean_flops(method: Method, load: Load, pair: str) -> dict[str, float]:
    """As ``flops``, on average over many steps."""
    counted = [flops(method, one, pair) for one in steps(load)]
    return {phase: fmean(one[phase] for one in counted) for phase in PHASES}


@dataclass(frozen=True)
class Rollout:
    """Sampling all responses of a step at once: FLOPs of the prompts, and of and bytes behind the tokens after them."""

    prefill_flops: float
    decode_flops: float
    decode_bytes: float

    @classmethod
    def mean(cls, load: Load, pair: str) -> Rollout:
        """On average over many steps."""
        counted = [vars(rollout(one, pair)) for one in steps(load)]
        return cls(**{name: fmean(one[name] for one in counted) for name in counted[0]})

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        decode = max(self.decode_flops / flops_per_second, self.decode_bytes / bytes_per_second)
        return self.prefill_flops / flops_per_second + decode


def rollout(load: Load, pair: str) -> Rollout:
    """As ``generate`` runs it: every sequence until the longest ends; a token reads 16-bit weights and all keys."""
    student, _ = sizes(pair)
    groups = _groups(load, pair)
    lengths, prompt = response_lengths(groups), len(groups[0].prompt_ids)
    count, longest = len(lengths), max(lengths)
    prefill = _flops(student, [View(count * prompt, count * _causal(prompt), (load.patches,) * count)], FORWARD)
    context = longest * prompt + _causal(longest)  # of one sequence, over all its tokens
    decode = student.decoder_flops(count * longest, count * context) + student.head_flops(count * longest)
    read = 2 * (student.text.weights + student.embeddings) * longest + student.kv_cache_bytes(count * context)
    return Rollout(prefill, decode, float(read))


def optimizer_bytes(pair: str) -> float:
    return float(STREAMED_BYTES * sizes(pair)[0].parameters)


def activation_bytes(method: Method, load: Load, pair: str) -> dict[str, int]:
    """Memory by phase beyond weights, gradients and optimizer state, of the step's largest micro-batch."""
    counted = [_activations(method, batch, load, pair) for batch in micro_batches(_groups(load, pair), load)]
    return {phase: max(one[phase] for one in counted) for phase in counted[0]}


def peak_bytes(method: Method, load: Load, pair: str, *, offloaded: bool = False) -> int:
    """Largest memory of a step, everything included.

    Args:
        method, load, pair: what runs.
        offloaded: whether the teacher's weights, but for its head, rest in host memory outside its phase.
    """
    student, teacher = sizes(pair)
    kept = 2 * (teacher.head if offloaded else teacher.parameters)
    activations = activation_bytes(method, load, pair)
    teaching = 2 * teacher.parameters + activations.pop("teacher")
    return STATE_BYTES * student.parameters + max(teaching, kept + max(activations.values()))


def _activations(method: Method, batch: Sequence[PromptGroup], load: Load, pair: str) -> dict[str, int]:
    student, teacher = sizes(pair)
    image = view(method, batch, text=False, patches=load.patches)
    views = [image, *([view(method, batch, text=True, patches=load.patches)] if method.text else [])]
    kept = views if not method.text or method.objective.lam > 0 else [image]
    tokens, patches = sum(x.tokens for x in kept), sum(image.images)
    options = {"autocast": True, "checkpointing": True}
    backward = student.activation_bytes(tokens, patches, **options)
    layers = student.text.layer_bytes(True, rms=True) * tokens, student.tower.layer_bytes(True, rms=False) * patches
    stored = backward - max(layers)
    # Autocast's 16-bit copies last as long as the forward.
    weights = 2 * (student.text.weights + student.tower.weights + student.mergers)
    n, head = response_tokens(batch), 4 * student.vocabulary * student.text.hidden
    if method.text and not method.fused:
        loss = EAGER_BYTES * n * student.vocabulary
    else:
        loss = DEFAULT_WORKSPACE_BYTES + head + head // 2  # a gradient of the head and its 16-bit copy
    rows = (sum if method.packed else max)(x.tokens for x in views)  # of one pass
    return {
        "teacher": teacher.text.working_bytes(False) * rows,
        "student": stored + weights + student.text.working_bytes(True) * rows,
        "loss": stored + loss,
        "backward": backward + head,
    }


def largest(fits: Callable[[int], bool], limit: int, step: int) -> int:
    """The largest multiple of ``step`` up to ``limit`` that fits, of those below which everything fits."""
    low, high = 0, limit // step + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def longest_response(method: Method, load: Load, pair: str, memory: float, *, offloaded: bool = False) -> int:
    """Tokens of the longest responses, all of one length, whose step fits into ``memory`` bytes; at most 131,072."""

    def fits(length: int) -> bool:
        equal = replace(load, shortest=length, longest=length)
        return peak_bytes(method, equal, pair, offloaded=offloaded) <= memory

    return largest(fits, LONGEST, 256)
