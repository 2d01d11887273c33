"""The faults: lines that a careless editor could leave behind, and where a test should notice."""

from __future__ import annotations

from .kernel_faults import DRIVERS, ROWS
from .mutation import Mutation

STUDENT = ("models", "trainers", "evaluation")
TRAINERS = ("trainers",)

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
        "micro-batches-count-alike",
        "The guard of gamma weighs the micro-batches of a step alike, whatever their tokens.",
        "vgs/trainers/collapse_watch.py",
        "self._step.append([tokens, *(tokens * x for x in (*terms, seen))])",
        "self._step.append([1.0, *terms, seen])",
        ("test_gamma_guard",),
        TRAINERS,
    ),
    Mutation(
        "eta-of-the-whole-gamma",
        "With a part of gamma in force, eta is that of the whole.",
        "vgs/objectives/eta.py",
        "return ratio / (ratio + share * (1.0 - ratio))",
        "return ratio",
        ("test_eta", "test_gamma_guard"),
        TRAINERS,
    ),
    Mutation(
        "documents-stay-in-the-text-view",
        "The text-only view lacks pictures alone, and marked texts stay in it.",
        "vgs/data/messages.py",
        "return bool(mark)",
        "return False",
        ("test_evidence",),
        ("data", "cli"),
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
