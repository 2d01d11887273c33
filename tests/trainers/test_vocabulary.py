"""Student and teacher whose heads are padded to different numbers of rows train on the columns that both have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from grpo_runs import common, options
from tiny import SPECIAL, WORDS, tiny_model, tiny_processor, tiny_samples, trainer_options

from vgs import VGSConfig, VGSTrainer
from vgs.errors import ConfigError
from vgs.models.vocabulary import common_vocabulary
from vgs.trainers.grpo import VGSGRPOTrainer
from vgs.trainers.grpo_settings import VGSGRPOConfig

TOKENS = len(SPECIAL) + len(WORDS)
PADDED = TOKENS + 9


def padded(seed: int, rows: int, **sizes) -> torch.nn.Module:
    """A tiny model whose head has more rows than there are tokens: equal ones but for the padding."""
    plain, wide = tiny_model(seed, **sizes), tiny_model(seed, vocab_size=rows, **sizes)
    weights = {name: x for name, x in plain.state_dict().items() if len(x) != TOKENS or "embed_tokens" not in name}
    wide.load_state_dict({k: v for k, v in weights.items() if v.shape == wide.state_dict()[k].shape}, strict=False)
    with torch.no_grad():
        wide.get_input_embeddings().weight[:TOKENS] = plain.get_input_embeddings().weight
        wide.get_input_embeddings().weight[TOKENS:] = 3.0
    return wide


def trained(tmp_path: Path, teacher: torch.nn.Module, **changes) -> VGSTrainer:
    args = VGSConfig(**trainer_options(tmp_path, max_steps=2, eta=1.0, **changes))
    trainer = VGSTrainer(
        model=tiny_model(0),
        teacher_model=teacher,
        args=args,
        train_dataset=tiny_samples(8),
        processing_class=tiny_processor(),
    )
    trainer.train()
    return trainer


def test_padding_of_the_teacher_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = trained(tmp_path / "a", tiny_model(1, hidden=48))
    wide = trained(tmp_path / "b", padded(1, PADDED, hidden=48))
    assert (plain.args.vocab_size, wide.args.vocab_size) == (None, TOKENS)
    assert f"student's head has {TOKENS} rows, the teacher's {PADDED}: the loss uses the first {TOKENS}" in caplog.text
    for own, other in zip(plain.model.parameters(), wide.model.parameters(), strict=True):
        torch.testing.assert_close(own, other)


def test_a_preset_cannot_look_at_more_tokens_than_both_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"likeliest tokens, but the vocabulary has {TOKENS}"):
        VGSTrainer(
            model=padded(0, PADDED),
            teacher_model=tiny_model(1, hidden=48),
            args=VGSConfig(
                **trainer_options(tmp_path, preset="gkd", divergence={"support": "teacher_top_k", "top_k": TOKENS + 1})
            ),
            train_dataset=tiny_samples(8),
            processing_class=tiny_processor(),
        )


def test_a_loaded_teacher_answers_in_eval_mode(tmp_path: Path) -> None:
    assert not trained(tmp_path, tiny_model(1, hidden=48).train()).teacher_model.training


def test_padding_of_the_student_is_never_sampled(tmp_path: Path) -> None:
    trainer = VGSTrainer(
        model=padded(0, PADDED),
        teacher_model=tiny_model(1, hidden=48),
        args=VGSConfig(**trainer_options(tmp_path, eta=1.0)),
        train_dataset=tiny_samples(8),
        processing_class=tiny_processor(),
    )
    assert set(range(TOKENS, PADDED)) <= set(trainer.generation_kwargs["suppress_tokens"])
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


@pytest.mark.parametrize("rows", [(TOKENS, PADDED), (PADDED, TOKENS)])
def test_reinforcement_takes_both(tmp_path: Path, rows: tuple[int, int]) -> None:
    changes = {"model": tiny_model(0, vocab_size=rows[0]), "teacher_model": tiny_model(1, vocab_size=rows[1])}
    given = common() | changes
    given["args"] = VGSGRPOConfig(**options(tmp_path, max_steps=1))
    trainer = VGSGRPOTrainer(**given)
    trainer.train()
    assert trainer.args.vocab_size == TOKENS


def test_what_vocab_size_may_be() -> None:
    small, large = (tiny_model(0, vocab_size=rows).config for rows in (TOKENS, PADDED))
    assert common_vocabulary(small, small, None) is None
    assert common_vocabulary(small, large, None) == common_vocabulary(large, small, None) == TOKENS
    assert common_vocabulary(small, large, TOKENS - 1) == TOKENS - 1
    with pytest.raises(ConfigError, match=f"vocab_size must be at most {TOKENS}, got {PADDED}"):
        common_vocabulary(small, large, PADDED)
