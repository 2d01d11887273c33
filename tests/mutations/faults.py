"""The faults: lines that a careless editor could leave behind, and where a test should notice."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One changed line.

    Attributes:
        name: short, unique.
        breaks: what is wrong then, in one sentence.
        file: where the line is. If it has moved, it is searched for in the whole package.
        line: as it stands there, without indentation; it must occur exactly once.
        mutated: what replaces it.
        tests: files (``test_x``) that should notice, the cheapest first. Those that do not exist are left out.
        rooms: folders of ``tests`` that are tried where none of these files notices.
    """

    name: str
    breaks: str
    file: str
    line: str
    mutated: str
    tests: tuple[str, ...]
    rooms: tuple[str, ...]


KERNELS = ("kernels",)
STUDENT = ("models", "trainers", "evaluation")
TRAINERS = ("trainers",)

ROWS = [
    Mutation(
        "triton-sum-not-rescaled",
        "The online softmax keeps its sum when a later block raises the maximum.",
        "vgs_kernels/rows/rows_triton.py",
        "s_sum = s_sum * s_discount + lane_sum(p_s)",
        "s_sum = s_sum + lane_sum(p_s)",
        ("test_loss_values", "test_loss_gradients", "test_rows_triton"),
        KERNELS,
    ),
    Mutation(
        "triton-columns-behind-the-end",
        "What a wide load reads behind the vocabulary counts as logits.",
        "vgs_kernels/rows/triton_common.py",
        'return tl.where(columns < n_columns, x, float("-inf") if MASKED else NOTHING)',
        "return x",
        ("test_loss_values", "test_rows_triton", "test_loss_logits"),
        KERNELS,
    ),
    Mutation(
        "triton-offset-of-32-bits",
        "The offset of a row is an int32 and overflows behind 2^31 logits.",
        "vgs_kernels/rows/rows_triton.py",
        "row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31",
        "row = tl.program_id(0)",
        ("test_row_tiles",),
        KERNELS,
    ),
    Mutation(
        "triton-steered-maximum-sign",
        "The maxima of the steered target are merged with the wrong sign of the teacher's text-only shift.",
        "vgs_kernels/rows/rows_triton.py",
        "q_max += a_shift + t_shift - w_shift",
        "q_max += a_shift + t_shift + w_shift",
        ("test_loss_values", "test_rows_triton", "test_loss_options"),
        KERNELS,
    ),
    Mutation(
        "triton-zero-gamma-times-infinity",
        "With gamma 0 a masked column of the prior makes the gradient NaN.",
        "vgs_kernels/rows/entries_triton.py",
        "prior_gap = tl.where(gamma > 0, prior_gap, 0.0)",
        "prior_gap = tl.where(gamma >= 0, prior_gap, 0.0)",
        ("test_loss_logits",),
        KERNELS,
    ),
    Mutation(
        "triton-softcap-of-the-wrong-row",
        "The text-only gradient passes through the soft-cap of the multimodal row.",
        "vgs_kernels/rows/entries_triton.py",
        "d_a *= cap_slope(a, student_cap, inv_temperature)",
        "d_a *= cap_slope(s, student_cap, inv_temperature)",
        ("test_rows_triton", "test_loss_options"),
        KERNELS,
    ),
    Mutation(
        "torch-sampled-column-offset",
        "The policy's sampled column is not counted from the block's first column.",
        "vgs_kernels/rows/entries_torch.py",
        "d_s.add_(one_hot(here.chosen - columns.start, p).sub_(p).mul_(here.policy))",
        "d_s.add_(one_hot(here.chosen, p).sub_(p).mul_(here.policy))",
        ("test_row_tiles",),
        KERNELS,
    ),
    Mutation(
        "torch-top-k-boundary",
        "The last column inside the student's top k takes the tail's gradient.",
        "vgs_kernels/rows/entries_torch.py",
        "outside = student < here.limit",
        "outside = student <= here.limit",
        ("test_divergence_supports", "test_divergence_edges", "test_divergence_family"),
        KERNELS,
    ),
    Mutation(
        "triton-tail-not-rescaled",
        "The tail outside of a support keeps its sum when a later block raises the maximum.",
        "vgs_kernels/rows/entries_triton.py",
        "return higher, total * exp(maximum - higher) + lane_sum(exp(x - higher[:, None]))",
        "return higher, total + lane_sum(exp(x - higher[:, None]))",
        ("test_row_tiles",),
        KERNELS,
    ),
    Mutation(
        "jsd-share-of-the-wrong-side",
        "A JSD with a beta other than 1/2 mixes the two rows the other way round.",
        "vgs_kernels/rows/entries_torch.py",
        "share = beta if beta == 0.5 else (r < 0).to(r.dtype).mul_(1 - 2 * beta).add_(beta)",
        "share = beta if beta == 0.5 else (r > 0).to(r.dtype).mul_(1 - 2 * beta).add_(beta)",
        ("test_divergence_family", "test_divergence_supports"),
        KERNELS,
    ),
]

DRIVERS = [
    Mutation(
        "temperature-twice",
        "A row of a composed target that is formed on its own is divided by a temperature of its own.",
        "vgs_kernels/sources.py",
        "logits = times(factor, head.transform()(logits))",
        "logits = times(factor, head.transform(2.0)(logits))",
        ("test_divergence_targets", "test_divergence", "test_divergence_family"),
        KERNELS,
    ),
    Mutation(
        "gate-not-strict",
        "Tokens whose visual dependency equals the quantile pass the gate.",
        "vgs_kernels/steering.py",
        "gate = vds > limits[-1][rows]",
        "gate = vds >= limits[-1][rows]",
        ("test_loss_values", "test_properties", "test_loss_options"),
        KERNELS,
    ),
    Mutation(
        "gated-tokens-of-the-first-block",
        "Gated tokens of later gradient blocks are looked up in the first one.",
        "vgs_kernels/gradients.py",
        "tokens = at if view.tokens is None else view.tokens[at]",
        "tokens = at if view.tokens is None else view.tokens[: at.stop - at.start]",
        ("test_phases",),
        KERNELS,
    ),
    Mutation(
        "bias-gradient-without-lambda",
        "The language term's part of the bias gradient lacks its coefficient.",
        "vgs_kernels/gradients.py",
        "self._d_bias[columns].add_(d_logits.sum(0, dtype=self._d_bias.dtype), alpha=view.alpha)",
        "self._d_bias[columns].add_(d_logits.sum(0, dtype=self._d_bias.dtype))",
        ("test_loss_gradients", "test_loss_options", "test_phases"),
        KERNELS,
    ),
    Mutation(
        "misjudged-tokens-stay",
        "A language term that was formed by a guess of the gate is not taken back.",
        "vgs_kernels/steering.py",
        "missing = missing - torch.cat(self._formed).to(self.dtype)",
        "missing = (missing - torch.cat(self._formed).to(self.dtype)).clamp(min=0)",
        ("test_phases",),
        KERNELS,
    ),
    Mutation(
        "guessed-threshold-unchecked",
        "A threshold guessed from a sample of the columns is taken without summing what it leaves out.",
        "vgs_kernels/active_columns.py",
        "failed = ~(_sum_below(failing, scale, lowest) <= allowed * (here * scale))",
        "failed = _sum_below(failing, scale, lowest) < 0",
        ("test_gradient_tolerance",),
        KERNELS,
    ),
    Mutation(
        "columns-of-one-token",
        "Of a block, the columns are multiplied that its last token needs.",
        "vgs_kernels/active_columns.py",
        "torch.minimum(lowest[columns], scaled.amin(0), out=lowest[columns])",
        "lowest[columns] = scaled[-1]",
        ("test_gradient_tolerance",),
        KERNELS,
    ),
    Mutation(
        "heads-of-other-scales-folded",
        "Rows of one weight are folded into one product although their heads scale logits differently.",
        "vgs_kernels/heads.py",
        "linear = self.softcap is None and other.softcap is None and self.scale == other.scale",
        "linear = self.softcap is None and other.softcap is None",
        ("test_divergence_targets",),
        KERNELS,
    ),
    Mutation(
        "text-gradient-not-reduced",
        "Ranks that share a vocabulary do not add up the gradient of the text-only hidden states.",
        "vgs_kernels/steering.py",
        'shard.sum(gradients.by_name["student_hidden"], of_text)',
        'shard.sum(gradients.by_name["student_hidden"])',
        ("test_vocab_parallel",),
        KERNELS,
    ),
    Mutation(
        "global-ids-on-a-shard",
        "A rank looks up sampled tokens as if its shard began at column 0.",
        "vgs_kernels/parallel.py",
        "return ids if ids is None or self.start == 0 else ids - self.start",
        "return ids",
        ("test_vocab_parallel",),
        KERNELS,
    ),
    Mutation(
        "clipped-tokens-keep-their-gradient",
        "A token's value is clipped, its gradient is not.",
        "vgs_kernels/divergence_loss.py",
        "return value.clamp(max=limit), torch.where(value > limit, 0, weight)",
        "return value.clamp(max=limit), weight",
        ("test_divergence_family",),
        KERNELS,
    ),
    Mutation(
        "quantile-of-one-rank",
        "The gate's quantile over all ranks is taken over this rank's tokens alone.",
        "vgs_kernels/gating.py",
        'if objective.vds_scope == "ranks":',
        "if False:",
        ("test_loss_ranks", "test_vocab_parallel"),
        (*KERNELS, "trainers"),
    ),
    Mutation(
        "unreduced-loss-without-weights",
        "A loss that is not reduced forgets its token weights.",
        "vgs_kernels/operators.py",
        "fixed = [*fixed[:at], fixed[at] * upstream, *fixed[at + 1 :]]",
        "fixed = [*fixed[:at], upstream, *fixed[at + 1 :]]",
        ("test_divergence_reductions",),
        KERNELS,
    ),
    Mutation(
        "ignored-tokens-in-the-mean",
        "Ignored tokens add nothing to a mean and still count in its number of tokens.",
        "vgs_kernels/tokens.py",
        "weights = weights / torch.where(total == 0, 1, total)",
        "weights = weights / max(n, 1)",
        ("test_ignored_tokens", "test_edges"),
        KERNELS,
    ),
]

MODELS_AND_TRAINERS = [
    Mutation(
        "position-behind-the-prompt",
        "A packed response counts on from the prompt's length instead of its largest rotary position.",
        "vgs/models/packing.py",
        "positions.append((stem.positions.max() + 1 + count).expand(len(stem.positions), -1))",
        "positions.append((prompt + count).expand(len(stem.positions), -1))",
        ("test_forward", "test_families", "test_distillation"),
        STUDENT,
    ),
    Mutation(
        "padded-off-by-one",
        "In padded batches a token is scored by the hidden state of itself instead of the one before.",
        "vgs/models/padding.py",
        "scored = rows([torch.zeros_like(x[1:]) for x in prompts], [torch.ones_like(x) for x in tails], 0).bool()",
        "scored = rows([torch.zeros_like(x) for x in prompts], [torch.ones_like(x) for x in tails], 0).bool()",
        ("test_families",),
        STUDENT,
    ),
    Mutation(
        "plain-loss-without-eta",
        "The loss of the multimodal view alone is not scaled by eta.",
        "vgs/models/forward.py",
        "token_weights=objective.eta * weights,",
        "token_weights=weights,",
        ("test_forward",),
        (*STUDENT, "objectives"),
    ),
    Mutation(
        "rare-language-term-not-stronger",
        "A language term of every k-th step counts once instead of k times.",
        "vgs/trainers/distillation.py",
        "return replace(objective, lam=0.0 if self.state.global_step % every else every * objective.lam)",
        "return replace(objective, lam=0.0 if self.state.global_step % every else objective.lam)",
        ("test_distillation",),
        TRAINERS,
    ),
    Mutation(
        "tokens-of-a-trajectory-count-alike",
        "Averaged by trajectory, tokens are not divided by their response's length.",
        "vgs/objectives/weighting.py",
        "return [(1.0 / (items if by_token else items * max(length, 1))).expand(length) for length in lengths]",
        "return [(1.0 / items).expand(length) for length in lengths]",
        ("test_distillation",),
        ("objectives", "trainers"),
    ),
    Mutation(
        "last-pass-not-synchronised",
        "Under DDP no pass of a micro-batch averages the gradients over the ranks, the last included.",
        "vgs/trainers/passes.py",
        "with nullcontext() if last or not training else unsynchronised(accelerator, model):",
        "with unsynchronised(accelerator, model) if training else nullcontext():",
        ("test_processes", "test_one_step"),
        TRAINERS,
    ),
    Mutation(
        "average-of-the-wrong-share",
        "The averaged prior takes the decay's share of the student instead of the rest.",
        "vgs/models/averaged.py",
        "kept.lerp_(parameter.to(kept.dtype), 1.0 - self.decay)",
        "kept.lerp_(parameter.to(kept.dtype), self.decay)",
        ("test_averaged", "test_self_distillation"),
        ("models", "trainers"),
    ),
    Mutation(
        "resumed-log-counts-other-steps",
        "After a resume the next logged loss is averaged over the steps since then only.",
        "vgs/trainers/host_hooks.py",
        'self._globalstep_last_logged = state["last_logged"]',
        "self._globalstep_last_logged = self.state.global_step",
        ("test_resume",),
        TRAINERS,
    ),
    Mutation(
        "image-tokens-may-be-sampled",
        "A user's own suppressed tokens replace the image tokens instead of joining them.",
        "vgs/trainers/rollouts.py",
        "suppressed = sorted({*token_ids, *user})",
        "suppressed = sorted(user or token_ids)",
        ("test_rollouts", "test_grpo_runs"),
        TRAINERS,
    ),
    Mutation(
        "greedy-after-evaluation",
        "After an evaluation training goes on decoding greedily.",
        "vgs/trainers/rollouts.py",
        "trainer.generation_config = copy(trainer.generation_config)",
        "trainer.generation_config = trainer.generation_config",
        ("test_rollouts", "test_grpo_runs"),
        TRAINERS,
    ),
    Mutation(
        "newest-checkpoint-by-step",
        "A resume takes the checkpoint of the highest step instead of the one that was saved last.",
        "vgs/trainers/checkpoints.py",
        "return _read_manifest(item[1])[0], item[0]",
        "return item[0], _read_manifest(item[1])[0]",
        ("test_checkpoints",),
        TRAINERS,
    ),
    Mutation(
        "damage-of-equal-size-unseen",
        "A checkpoint whose file has the right size and another checksum passes for complete.",
        "vgs/trainers/checkpoints.py",
        "if found != checksum:",
        "if found is None:",
        ("test_checkpoints",),
        TRAINERS,
    ),
]

MUTATIONS = [*ROWS, *DRIVERS, *MODELS_AND_TRAINERS]
