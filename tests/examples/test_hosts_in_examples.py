"""The examples in other people's trainers: the step that a host takes is that of ``vgs_step`` on the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from example_runs import PLAIN, Recorder, assert_same_weights, one_step, run_example

RATE = 0.05
TRAIN = ["--learning_rate", str(RATE), "--max_steps", "2", "--per_device_train_batch_size", "2"]
TRAIN += ["--gradient_accumulation_steps", "2", *PLAIN]
LENGTH = {
    "hf_trainer.py": ["--max_new_tokens", "5"],
    "trl_distillation.py": ["--max_completion_length", "5"],
    "trl_gkd.py": ["--max_new_tokens", "5", "--lmbda", "0.5", "--seed", "1"],
}


@pytest.mark.parametrize("name", LENGTH)
@pytest.mark.slow
def test_accumulated_steps_of_a_host_are_steps_on_the_whole_batch(name: str, inside: Path, recorder: Recorder) -> None:
    names = run_example(name, *LENGTH[name], *TRAIN)
    assert len(recorder.calls) == 4
    losses, weights = one_step([recorder.joined(0, 2), recorder.joined(2, 2)], RATE)
    assert_same_weights(names["trainer"].model.state_dict(), weights)
    logged = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-4)
    assert (inside / "runs" / Path(name).stem / "model.safetensors").exists()
    assert (inside / "runs" / Path(name).stem / "processor_config.json").exists()


def test_gkd_mixes_its_own_answers_with_those_of_the_data(inside: Path, recorder: Recorder) -> None:
    tokenizer = run_example("trl_gkd.py", *LENGTH["trl_gkd.py"], *TRAIN)["processor"].tokenizer
    given = [[tokenizer("seven" + tokenizer.eos_token, add_special_tokens=False).input_ids]] * 2
    assert {responses == given for _, responses in recorder.calls} == {True, False}


def test_accelerate_accumulates(inside: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr))
    words = ["--batch_size", "2", "--accumulate", "2", "--learning_rate", str(RATE), "--max_new_tokens", "5"]
    names = run_example("accelerate_loop.py", *words)
    assert len(recorder.calls) == 4
    losses, weights = one_step([recorder.joined(0, 2), recorder.joined(2, 2)], RATE, clip=1.0)
    assert_same_weights(names["student"].state_dict(), weights)
    assert torch.tensor(recorder.losses).view(2, 2).mean(1).tolist() == pytest.approx(losses, rel=1e-5)
