"""What GRPO's settings refuse at start-up, and what they take."""

from __future__ import annotations

import pytest
from grpo_runs import common, options
from tiny import tiny_model, tiny_samples

from vgs.trainers.grpo import VGSGRPOTrainer, as_dataset
from vgs.trainers.grpo_settings import NEUTRAL, VGSGRPOConfig


def config(tmp_path, **changes) -> VGSGRPOConfig:
    return VGSGRPOConfig(**options(tmp_path, **changes))


OTHER = {
    "beta": 0.04,
    "delta": 1.5,
    "importance_sampling_level": "sequence",
    "top_entropy_quantile": 0.2,
    "entropy_coef": 0.01,
    "use_adaptive_entropy": True,
    "off_policy_mask_threshold": 0.5,
    "sync_ref_model": True,
    "cast_lm_head_to_fp32": True,
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_terms_that_the_fused_loss_lacks_are_refused(tmp_path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be {NEUTRAL[name]!r}, got {OTHER[name]!r}"):
        config(tmp_path, **{name: OTHER[name]})


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "luspo", "vespo"])
def test_other_policy_losses_are_refused(tmp_path, loss_type: str) -> None:
    with pytest.raises(ValueError, match="loss_type must be one of grpo, bnpo, dr_grpo, dapo"):
        config(tmp_path, loss_type=loss_type)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ({"eta": 0.41}, "eta must be 1, got 0.41"),
        ({"eta": "measure"}, "eta must be 1, got 'measure'"),
        ({"lp_every": 2}, "lp_every must be 1"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"prior": "frozen"}, "prior must be 'live'"),
        ({"preset": "vcsd"}, "expected one of gkd, opd, vgs, vgs_adaptive, language_steering"),
        ({"preset": "opsd"}, "preset='opsd'"),
        ({"preset": "va_opd"}, "preset='va_opd'"),
        ({"divergence": {"support": "teacher_top_k", "top_k": 4}, "preset": "opd"}, "the whole vocabulary"),
        ({"rewards": ["exact"]}, "Did you mean 'exact_match'"),
        ({"num_generations_eval": 4}, "num_generations_eval must be 1 with eval_greedy"),
        ({"save_strategy": "steps", "save_steps": 3, "num_iterations": 2}, "save_steps=3 must be a multiple of 2"),
        ({"gamma": -1.0}, "gamma"),
    ],
)
def test_refused_settings(tmp_path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_responses_to_a_prompt_stay_on_one_process(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(VGSGRPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match=r"num_generations=8 must divide .* = 4"):
        config(tmp_path, per_device_train_batch_size=4, num_generations=8)


def test_defaults_are_the_papers(tmp_path) -> None:
    args = config(tmp_path)
    assert (args.alpha, args.beta, args.eta, args.gamma, args.lam) == (0.3, 0.0, 1.0, 2.0, 0.01)
    assert args.num_generations_eval == 1 and args.objective(1.0).eta == 1
    assert config(tmp_path, eval_greedy=False).num_generations_eval is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"teacher_model": None}, ValueError, "teacher_model is needed for alpha=0.3"),
        ({"tools": [print]}, ValueError, "tools is not supported"),
        ({"rollout_func": print}, ValueError, "rollout_func is not supported"),
        ({"environment_factory": dict}, ValueError, "environment_factory is not supported"),
        ({"args": None}, TypeError, "args must be a VGSGRPOConfig"),
        (
            {"train_dataset": [{k: v for k, v in x.items() if k != "answer"} for x in tiny_samples(4)]},
            ValueError,
            "no column 'answer' or 'solution', only images, prompt",
        ),
    ],
)
def test_refused_arguments(tmp_path, arguments: dict, error: type, message: str) -> None:
    given = {**common(), "teacher_model": tiny_model(1), "args": config(tmp_path), **arguments}
    with pytest.raises(error, match=message):
        VGSGRPOTrainer(**given)


def test_rewards_are_named_or_given(tmp_path) -> None:
    args = config(tmp_path, rewards=["format"], alpha=0.0)
    with pytest.raises(ValueError, match="both given"):
        VGSGRPOTrainer(args=args, reward_funcs=[lambda completions, **columns: [0.0]], **common())
    trainer = VGSGRPOTrainer(args=args, **common())
    assert trainer.reward_func_names == ["boxed_format"]
    trainer = VGSGRPOTrainer(args=config(tmp_path, alpha=0.0), scorer=str.startswith, **common())
    assert trainer.reward_func_names == ["exact_match"] and trainer.reward_funcs[0].keywords == {
        "scorer": str.startswith
    }


def test_any_sequence_of_samples_is_a_dataset() -> None:
    samples = tiny_samples(3)
    rows = as_dataset(samples)
    assert len(rows) == 3 and rows[1] == samples[1] and [row["answer"] for row in rows] == ["a", "b", "c"]
    assert as_dataset(rows) is rows and as_dataset(None) is None and as_dataset({"x": samples})["x"][2] == samples[2]
