"""The GRPO hybrid against TRL's GRPO (alpha 0), the distillation trainer (alpha 1) and the sum of both."""

from __future__ import annotations

import pytest
import torch
from grpo_runs import distillation_trainer, grpo_trainer, trl_trainer, weights
from tiny import tiny_model

#: What both log, of every step.
METRICS = ["loss", "reward", "entropy", "grad_norm", "clip_ratio/region_mean", "clip_ratio/low_min"]


def steps(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same_run(ours, theirs, metrics=()) -> None:
    start = tiny_model(0).state_dict()
    for name, value in weights(theirs).items():
        moved = (value - start[name]).norm()
        torch.testing.assert_close(weights(ours)[name], value, rtol=1e-5, atol=1e-5 * float(moved) + 1e-7, msg=name)
    assert not torch.equal(weights(theirs)["lm_head.weight"], start["lm_head.weight"])
    for entry, other in zip(steps(ours), steps(theirs), strict=True):
        expected = {key: other[key] for key in metrics if key in other}  # rewards are logged once for every batch
        assert {key: entry[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=2e-6)


def both(tmp_path, **changes):
    theirs, ours = trl_trainer(tmp_path, **changes), grpo_trainer(tmp_path, alpha=0.0, **changes)
    theirs.train()
    ours.train()
    return ours, theirs


#: Every loss type with and without masked responses, and every setting of the host at least once.
HOSTS_SETTINGS = {
    "grpo": {"loss_type": "grpo", "multi_objective_aggregation": "normalize_then_sum"},
    "bnpo": {"loss_type": "bnpo", "temperature": 0.7},
    "dr_grpo, truncated": {"loss_type": "dr_grpo", "mask_truncated_completions": True, "reward_weights": [1.0, 0.3]},
    "dapo": {"loss_type": "dapo", "pad_to_multiple_of": 8},
    "grpo, truncated": {"loss_type": "grpo", "mask_truncated_completions": True, "scale_rewards": "batch"},
    "bnpo, truncated": {"loss_type": "bnpo", "mask_truncated_completions": True},
    "dapo, truncated": {"loss_type": "dapo", "mask_truncated_completions": True, "scale_rewards": "none"},
}
#: One at a time.
ALONE = {
    **{loss_type: {"loss_type": loss_type} for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo")},
    "scaled by the batch": {"loss_type": "grpo", "scale_rewards": "batch"},
    "temperature": {"loss_type": "dapo", "scale_rewards": "none", "temperature": 0.7},
    "reward weights": {"loss_type": "dr_grpo", "reward_weights": [1.0, 0.3]},
    "dapo, truncated": {"loss_type": "dapo", "mask_truncated_completions": True},
}


@pytest.mark.parametrize("changes", HOSTS_SETTINGS.values(), ids=HOSTS_SETTINGS)
def test_alpha_0_is_grpo(tmp_path, changes: dict) -> None:
    assert_same_run(*both(tmp_path, **changes), METRICS)


@pytest.mark.slow
@pytest.mark.parametrize("changes", ALONE.values(), ids=ALONE)
def test_each_setting_of_the_host_counts(tmp_path, changes: dict) -> None:
    assert_same_run(*both(tmp_path, **changes), METRICS)


@pytest.mark.parametrize("loss_type", ["grpo", pytest.param("dr_grpo", marks=pytest.mark.slow), "dapo"])
def test_accumulated_micro_batches(tmp_path, loss_type: str) -> None:
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "loss_type": loss_type}
    assert_same_run(*both(tmp_path, **changes), ["grad_norm", "reward"])


def test_several_iterations_on_one_batch_are_clipped_alike(tmp_path) -> None:
    changes = {"num_iterations": 3, "max_steps": 3, "epsilon": 0.1, "epsilon_high": 0.15, "loss_type": "dapo"}
    ours, theirs = both(tmp_path, learning_rate=0.1, **changes)
    names = [f"clip_ratio/{name}" for name in ("low_mean", "high_mean", "high_max")]
    assert_same_run(ours, theirs, [*METRICS, *names])
    assert steps(ours)[0]["clip_ratio/region_mean"] == 0 and steps(ours)[2]["clip_ratio/region_mean"] > 0.1


def test_old_log_probabilities_are_not_computed_where_they_are_the_current_ones(tmp_path, monkeypatch) -> None:
    trainer = grpo_trainer(tmp_path, alpha=0.0)
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", None)
    trainer.train()


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_importance_ratios_of_vllm_are_factors(tmp_path, mode: str) -> None:
    changes = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 2.0}
    runs = [grpo_trainer(tmp_path, alpha=0.0, **changes), trl_trainer(tmp_path, **changes)]
    for trainer in runs:
        trainer.use_vllm = True
        trainer.train()
    ratio = "sampling/importance_sampling_ratio/mean"
    assert_same_run(*runs, [*METRICS, ratio])
    assert steps(runs[0])[0][ratio] != 1


def test_passes_of_bounded_size_give_the_same(tmp_path) -> None:
    whole = grpo_trainer(tmp_path, num_iterations=2, lam=0.5, max_prompt_length=30)
    parts = grpo_trainer(tmp_path, num_iterations=2, lam=0.5, max_prompt_length=30, max_tokens_per_pass=75)
    seen = []
    original = parts.step_scorer.pass_loss
    parts.step_scorer.pass_loss = lambda *args: seen.append(args) or original(*args)
    for trainer in (whole, parts):
        trainer.train()
    assert len(seen) > 2
    assert_same_run(parts, whole, ["loss", "reward", "entropy", "standard", "clip_ratio/region_mean"])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"lam": 0.5}, id="vgs", marks=pytest.mark.slow),
        pytest.param({"lam": 0.5, "loss_reduction": "token", "schedule": "adaptive"}, id="adaptive, by token"),
        pytest.param({"preset": "opd"}, id="plain"),
        pytest.param(
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "lam": 0.0}, id="accumulated"
        ),
    ],
)
def test_alpha_1_is_distillation(tmp_path, changes: dict) -> None:
    ours, theirs = grpo_trainer(tmp_path, alpha=1.0, **changes), distillation_trainer(tmp_path, **changes)
    ours.train()
    theirs.train()
    terms = ["divergence"] if changes.get("preset") else ["standard", "visual", "language", "vds", "vds_q70"]
    assert_same_run(ours, theirs, ["loss", "entropy", "grad_norm", *terms])


def test_the_gradient_is_the_weighted_sum_of_both(tmp_path) -> None:
    start = tiny_model(0).state_dict()
    moved = {}
    for alpha in (0.0, 0.3, 1.0):
        trainer = grpo_trainer(tmp_path, alpha=alpha, max_steps=1, lam=0.5)
        trainer.train()
        moved[alpha] = {name: value - start[name] for name, value in weights(trainer).items()}
    for name, value in moved[0.3].items():
        torch.testing.assert_close(value, 0.7 * moved[0.0][name] + 0.3 * moved[1.0][name], rtol=1e-4, atol=2e-6)


def test_the_head_is_projected_by_one_call_for_both(tmp_path, monkeypatch) -> None:
    from vgs.models import forward as scoring
    from vgs.objectives import definitions as objectives

    calls = []
    for module, name in ((scoring, "fused_linear_vgs_loss"), (objectives, "fused_linear_divergence")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, original=original, **kw: calls.append(kw["policy"]) or original(*args, **kw)
        )
    trainer = grpo_trainer(tmp_path, max_steps=1)
    trainer.train()
    assert len(calls) == 1 and float(calls[0].weights.sum()) == pytest.approx(0.7)
    plain = grpo_trainer(tmp_path, max_steps=1, preset="opd")
    plain.train()
    assert len(calls) == 2 and float(calls[1].weights.sum()) == pytest.approx(0.7)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_batch_in_which_everything_is_truncated_moves_nothing(tmp_path, monkeypatch, alpha: float) -> None:
    import grpo_runs

    monkeypatch.setattr(grpo_runs, "script", lambda prompt_ids, end: [[10, 11]] * len(prompt_ids))
    trainer = grpo_trainer(tmp_path, alpha=alpha, mask_truncated_completions=True, max_steps=1)
    trainer.train()
    assert steps(trainer)[0]["loss"] == 0 and steps(trainer)[0]["completions/clipped_ratio"] == 1
    for name, value in tiny_model(0).state_dict().items():
        assert torch.equal(weights(trainer)[name], value)
