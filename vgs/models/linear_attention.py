"""Exact packed rows for layers that carry a state from token to token.

Linear attention (the delta rules), state spaces (Mamba 2) and short convolutions know no mask: in a row of many
sequences they would go on from the end of the one before. Here every prompt starts from nothing and every response from
the state of its own prompt, so gradients of a state that several responses share add up.

The models of transformers hand the argument ``seq_idx`` down to the functions that do this work. A ``StateTree`` goes
under that name, and around each of the functions stands one of ours, which changes nothing for any other value. The
tree is an argument of the layers, so gradient checkpointing recomputes with the same one.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from .attention import RowLayout
from .families import backbone
from .packing import PackedRow

ARGUMENT = "seq_idx"
CHUNK = 64  # tokens that a rule takes at once; sequences of about as many chunks share a batch
#: Kinds of layers, in a config's ``layer_types``, that carry a state, or choose or sum up tokens by their place.
CARRYING = frozenset({"linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding", "recurrent"})
CARRYING |= {"indexed_attention", "compressed_sparse_attention", "heavily_compressed_attention", "minimax_m3_sparse"}
#: Functions of modeling files that decode single tokens from a cache: a packed row never comes there.
DECODING = frozenset(
    {
        "causal_conv1d_update",
        "torch_recurrent_gated_delta_rule",
        "recurrent_kimi_delta_attention",
        "mamba2_selective_state_update",
    }
)
#: Functions with such names carry something too, as far as one can guess.
GUESSED = re.compile(r"conv1d|delta_rule|delta_attention|selective|mamba|_scan|wkv")


class Segment(NamedTuple):
    """A sequence in a row: its first place, its tokens, and of a response the prompt that it goes on from."""

    start: int
    length: int
    parent: Segment | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """Segments of a row that one call takes.

    Attributes:
        places: [B, L] int64, the token of the row at each place of the batch; T where there is padding.
        parents: [S] int64, the prompt whose state each response goes on from; empty for prompts.
        offsets: None for one segment in each of the B rows; else B is 1, and these are the [S + 1] int64 places where
            a segment begins, and L.
    """

    places: Tensor
    parents: Tensor
    offsets: Tensor | None

    @classmethod
    def of(cls, segments: Sequence[Segment], size: int, ranks: dict[Segment, int], by_length: bool) -> Batch:
        """A batch of these segments; arguments as in ``StateTree.plan``."""
        parents = torch.tensor([ranks[x.parent] for x in segments if x.parent is not None], dtype=torch.int64)
        tokens = [torch.arange(x.start, x.start + x.length) for x in segments]
        if by_length:
            lengths = torch.tensor([0, *[x.length for x in segments]])
            return cls(torch.cat(tokens)[None], parents, lengths.cumsum(0))
        width = max(x.length for x in segments)
        return cls(torch.stack([pad(x, (0, width - len(x)), value=size) for x in tokens]), parents, None)

    def to(self, device: torch.device) -> Batch:
        offsets = None if self.offsets is None else self.offsets.to(device)
        return Batch(self.places.to(device), self.parents.to(device), offsets)

    def gather(self, value: Any, size: int, blank: bool) -> Any:
        """[1, T, ...] -> [B, L, ...]; what is no tensor of the row's T tokens stays as it is.

        Padding is zero if ``blank``, and else repeats some token.
        """
        if not isinstance(value, Tensor) or value.ndim < 3 or value.shape[:2] != (1, size):
            return value
        rows = value[0]
        if blank and self.offsets is None:
            rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
        return rows.index_select(0, self.places.flatten().clamp(max=len(rows) - 1)).unflatten(0, self.places.shape)


class Plan(NamedTuple):
    """The calls that compute a row: those of its prompts, then those of its responses.

    Attributes:
        prompts, responses: one batch for each call.
        order: [T] int64, the place of every token in all batches, flattened, one behind the other.
    """

    prompts: list[Batch]
    responses: list[Batch]
    order: Tensor


class StateTree:
    """Which segment of a packed row goes on from which.

    Args:
        layout: of the row.
    """

    def __init__(self, layout: RowLayout) -> None:
        self.size, self.device = layout.starts[-1], layout.prompt.device
        self.prompts, self.responses = [], []
        for start, (length, *branches) in zip(layout.starts, layout.lengths, strict=False):
            prompt = Segment(start, length)
            self.prompts.append(prompt)
            place = start + length
            for tokens in branches:
                if tokens:
                    self.responses.append(Segment(place, tokens, prompt))
                place += tokens
        self._plans: dict[bool, Plan] = {}
        self._halos: dict[int, tuple[Tensor, Tensor]] = {}

    def halo(self, taps: int) -> tuple[Tensor, Tensor]:
        """The row with ``taps - 1`` more tokens in front of each segment: what a convolution there reaches back to.

        Args:
            taps: of the convolution.

        Returns:
            [E] int64, the tokens of this longer row (T for none), and [T] int64, where the row's own tokens are in it.
        """
        if taps not in self._halos:
            back, tokens, kept, end = taps - 1, [], [], 0
            for start, length, parent in sorted(self.prompts + self.responses):
                before = torch.full((back,), self.size)
                if parent is not None:
                    reached = torch.arange(-back, 0) + parent.start + parent.length
                    before = torch.where(reached < parent.start, before, reached)
                tokens += [before, torch.arange(start, start + length)]
                kept.append(torch.arange(end + back, end + back + length))
                end += back + length
            self._halos[taps] = torch.cat(tokens).to(self.device), torch.cat(kept).to(self.device)
        return self._halos[taps]

    def plan(self, by_length: bool) -> Plan:
        """The calls that compute the row.

        Args:
            by_length: True for a function that takes the lengths of segments in one row: two calls. False for padded
                batches of segments that are about equally long.
        """
        if by_length not in self._plans:
            groups = [_similar(x, by_length) for x in (self.prompts, self.responses)]
            ranks = {segment: rank for rank, segment in enumerate(x for group in groups[0] for x in group)}
            batches = [[Batch.of(x, self.size, ranks, by_length) for x in part] for part in groups]
            flat = torch.cat([batch.places.flatten() for part in batches for batch in part])
            order = torch.empty(self.size + 1, dtype=torch.int64)
            order[flat] = torch.arange(len(flat))
            prompts, responses = ([batch.to(self.device) for batch in part] for part in batches)
            self._plans[by_length] = Plan(prompts, responses, order[:-1].to(self.device))
        return self._plans[by_length]


def _similar(segments: Sequence[Segment], by_length: bool) -> list[list[Segment]]:
    """Segments in groups: all in one, or those that differ in length by less than a factor of two, above a chunk."""
    if by_length:
        return [list(segments)] if segments else []
    groups: dict[int, list[Segment]] = {}
    for segment in segments:
        groups.setdefault((-(-segment.length // CHUNK) - 1).bit_length(), []).append(segment)
    return list(groups.values())


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Around ``causal_conv1d_fn``, [1, C, T] -> [1, C, T]."""

    def convolve(hidden_states: Tensor, weight: Tensor, *arguments: Any, **options: Any) -> Tensor:
        tree = options.get(ARGUMENT)
        if not isinstance(tree, StateTree):
            return function(hidden_states, weight, *arguments, **options)
        tokens, kept = (x.to(hidden_states.device) for x in tree.halo(weight.shape[-1]))
        del options[ARGUMENT]
        rows = hidden_states.transpose(1, 2)  # as a row lies in memory
        longer = torch.cat([rows, rows.new_zeros(1, 1, rows.shape[2])], dim=1).index_select(1, tokens)
        out = function(longer.transpose(1, 2), weight, *arguments, **options)
        return out.transpose(1, 2).index_select(1, kept).transpose(1, 2)

    return convolve


def _run(
    function: Callable[..., Any],
    tree: StateTree,
    arguments: Sequence[Any],
    options: dict[str, Any],
    start: str,
    end: str,
    by_length: bool,
) -> Tensor:
    """[1, T, H, D] of a rule whose options ``start`` and ``end`` take the first state, and ask for the last.

    Options that are zero leave the state alone, whatever the ``arguments`` are.
    """
    plan, device = tree.plan(by_length), arguments[0].device

    def call(batch: Batch, state: Tensor | None) -> Any:
        own = {name: batch.gather(value, tree.size, blank=True) for name, value in options.items()}
        if batch.offsets is not None:
            own["cu_seqlens"] = batch.offsets
        own |= {start: state, end: state is None}
        return function(*[batch.gather(value, tree.size, blank=False) for value in arguments], **own)

    # A model can lie on several devices.
    prompts, responses = ([batch.to(device) for batch in part] for part in (plan.prompts, plan.responses))
    rows, states = zip(*[call(batch, None) for batch in prompts], strict=True)
    state = torch.cat(states)
    found = [call(batch, state.index_select(0, batch.parents)) for batch in responses]
    rows = [*rows, *[x[0] if isinstance(x, tuple) else x for x in found]]
    return torch.cat([x.flatten(0, 1) for x in rows]).index_select(0, plan.order.to(device))[None]


def _delta_rule(function: Callable[..., Any]) -> Callable[..., Any]:
    """Around a chunked delta rule, [1, T, H, D] each -> ([1, T, H, D], no state)."""
    apart: dict[str, bool] = {}

    def rule(query: Tensor, *arguments: Any, **options: Any) -> Any:
        tree = options.get(ARGUMENT)
        if not isinstance(tree, StateTree):
            return function(query, *arguments, **options)
        kind = query.device.type
        if kind not in apart:
            apart[kind] = _takes_lengths(function, options["g"])
        options = {name: value for name, value in options.items() if name not in (ARGUMENT, "cu_seqlens")}
        states = ("initial_state", "output_final_state")
        return _run(function, tree, (query, *arguments), options, *states, by_length=apart[kind]), None

    return rule


@torch.no_grad()
def _takes_lengths(rule: Callable[..., Any], decay: Tensor) -> bool:
    """Whether a rule computes several sequences in one row, as flash-linear-attention's does, by their offsets.

    PyTorch's own says that it does not, or does as if it had not heard.
    """
    device = decay.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    values = torch.linspace(0.5, 1.0, 32, device=device).reshape(1, 2, 1, 16).to(dtype)
    ones = torch.ones(1, 2, *[1] * (decay.ndim - 2), device=device)
    g = -0.1 * (ones.expand(1, 2, 1, 16) if decay.ndim == 4 else ones)
    parts = {"g": g, "beta": 0.5 * torch.ones(1, 2, 1, device=device, dtype=dtype)}
    try:
        together, _ = rule(values, values, values, cu_seqlens=torch.tensor([0, 1, 2], device=device), **parts)
    except (TypeError, ValueError):
        return False
    second = values[:, 1:]
    alone, _ = rule(second, second, second, **{name: x[:, 1:] for name, x in parts.items()})
    return torch.allclose(together[:, 1:].float(), alone.float(), rtol=1e-2, atol=1e-3)


def _scan(function: Callable[..., Any]) -> Callable[..., Any]:
    """Around Mamba 2's ``mamba2_chunk_scan``, [1, T, H, D] -> [1, T, H, D]."""

    def scan(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> Any:
        tree = options.get(ARGUMENT)
        if not isinstance(tree, StateTree):
            return function(hidden_states, dt, A, B, C, **options)
        del options[ARGUMENT]
        # Padding must not move the state: there a step takes no time, whatever bias and limits say.
        bias, softened = options.pop("dt_bias", None), options.pop("dt_softplus", False)
        least, most = options.pop("dt_limit", (0.0, float("inf")))
        steps = dt.to(torch.promote_types(dt.dtype, torch.float32))
        steps = steps if bias is None else steps + bias
        steps = (softplus(steps) if softened else steps).clamp(least, most)
        states = ("initial_states", "return_final_states")
        options |= {"dt": steps, "A": A, "B": B, "C": C}
        return _run(function, tree, (hidden_states,), options, *states, by_length=False)

    return scan


def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Around Mamba 2's kernel for convolution and scan at once, which knows no tree: None asks for one by one."""

    def fused(*arguments: Any, **options: Any) -> Any:
        return None if isinstance(options.get(ARGUMENT), StateTree) else function(*arguments, **options)

    return fused


#: Functions of modeling files that carry something from token to token, and ours around them.
HANDLED: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _scan,
    "mamba2_split_conv1d_scan_combined": _fused,
}


@functools.cache
def _functions(kind: type[nn.Module]) -> tuple[dict[str, Any], frozenset[str]]:
    """The globals of a module's forward, and the names in it of functions that carry something, as we know or guess."""
    forward = inspect.unwrap(kind.forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    found = getattr(forward, "__globals__", {})
    called = {x for x in names if callable(found.get(x)) and not isinstance(found[x], type)}
    return found, frozenset(x for x in called if x in HANDLED or GUESSED.search(x))


def _mixers(decoder: nn.Module) -> list[nn.Module]:
    """The modules of a text stack that call functions which carry something."""
    return [module for module in decoder.modules() if _functions(type(module))[1]]


def _strangers(decoder: nn.Module, mixers: list[nn.Module]) -> list[nn.Module]:
    """Modules that carry something, or seem to, in a way that we do not know."""
    known = {
        module
        for module in mixers
        if _functions(type(module))[1] <= HANDLED.keys() | DECODING and _takes_argument(type(module))
    }
    inside = {part for mixer in mixers for part in mixer.modules()}
    alone = [x for x in decoder.modules() if isinstance(x, (nn.Conv1d, nn.RNNBase)) and x not in inside]
    kinds = getattr(decoder.config, "layer_types", None) or ()
    layers = zip(getattr(decoder, "layers", ()), kinds, strict=False)
    empty = [layer for layer, kind in layers if kind in CARRYING and known.isdisjoint(layer.modules())]
    return [*[module for module in mixers if module not in known], *alone, *empty]


@functools.cache
def _takes_argument(kind: type[nn.Module]) -> bool:
    parameters = inspect.signature(kind.forward).parameters.values()
    return any(x.name == ARGUMENT or x.kind is x.VAR_KEYWORD for x in parameters)


def state_layers(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Modules of the text stack that carry something from token to token beside attention, as far as can be seen.

    Args:
        model: an unwrapped (possibly PEFT) model.

    Returns:
        Those that call functions which do, and those (some among the first) of which we do not know how.
    """
    decoder = backbone(model).get_decoder()
    mixers = _mixers(decoder)
    return mixers, _strangers(decoder, mixers)


def carried_states(model: nn.Module, row: PackedRow) -> dict[str, StateTree]:
    """Further arguments of the body's forward for a packed row; none for a model that carries no state.

    Args:
        model: an unwrapped (possibly PEFT) model.
        row: what its body will be called with.

    Raises:
        ValueError: a layer carries something in a way that we do not know.
    """
    mixers, strangers = state_layers(model)
    if strangers:
        raise ValueError(
            f"{type(strangers[0]).__name__} carries something from token to token in a way that packed rows do not know"
        )
    for kind in {type(mixer) for mixer in mixers}:
        found, names = _functions(kind)
        for name in names & HANDLED.keys():
            if not hasattr(found[name], "knows_trees"):
                found[name] = HANDLED[name](found[name])
                found[name].knows_trees = True
    return {ARGUMENT: StateTree(row.layout)} if mixers else {}
