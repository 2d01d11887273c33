"""What test_swift.py starts: ``swift rlhf`` with the plugin, three steps of a tiny Qwen3-VL with its real processor.

python tests/hosts/swift/swift_run.py FOLDER CASE
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
os.environ |= {"USE_HF": "1", "HF_HUB_OFFLINE": "1", "MODELSCOPE_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
os.environ["IMAGE_MIN_TOKEN_NUM"] = "1"

import torch  # noqa: E402
from tiny import SPECIAL, WORDS, save_tiny_checkpoint, tiny_image, tiny_tokenizer  # noqa: E402

#: Of each case, what differs: sampled on policy; given responses in two micro-batches, or in one; a loss without gate.
CASES: dict[str, dict[str, Any]] = {
    "sampled": {"lmbda": 1.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "split": {"lmbda": 0.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "whole": {"lmbda": 0.0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
}
OBJECTIVE = {"gamma": 2.0, "lam": 0.5, "eta": 0.41}
STEPS = 3


def save(folder: Path) -> None:
    """Models, their processor, pictures and rows, of which responses have different lengths."""
    save_tiny_checkpoint(folder / "student", seed=0)
    save_tiny_checkpoint(folder / "teacher", seed=1, hidden=48)
    save_tiny_checkpoint(folder / "other_tokens", seed=1, hidden=48)
    swapped = [{"red": "blue", "blue": "red"}.get(word, word) for word in WORDS]
    tiny_tokenizer(swapped).save_pretrained(folder / "other_tokens")
    with open(folder / "data.jsonl", "w") as file:
        for number in range(12):
            tiny_image(number, width=32 * (1 + number % 2)).save(folder / f"{number}.png")
            answer = " ".join(["a", "b", "red", "two"][: 1 + number % 4])
            messages = [
                {"role": "user", "content": "<image> what is in the picture ?"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages, "images": [str(folder / f"{number}.png")]}) + "\n")


def train(folder: Path, case: str) -> dict[str, Any]:
    """The run; returns its log, the student's weights, and how far packed states are from swift's own encodings."""
    from swift.arguments import RLHFArguments
    from swift.pipelines import rlhf_main
    from swift.rlhf_trainers import gkd_trainer
    from swift.template.templates import qwen

    tokens = {token: index for index, token in enumerate(SPECIAL)}
    for template in (qwen.Qwen2VLTemplate, qwen.Qwen3VLTemplate):  # the ids of the real vocabulary stand there
        template.image_token_id, template.video_token_id = tokens["<|image_pad|>"], tokens["<|video_pad|>"]
    options = {
        "objective": OBJECTIVE,
        "loss_reduction": "token",
        **json.loads(os.environ.get("VGS_TEST_OPTIONS", "{}")),
    }
    os.environ["VGS_OPTIONS"] = json.dumps(options)
    seen: dict[str, Any] = {}
    arguments = RLHFArguments(
        rlhf_type="gkd",
        model=str(folder / "student"),
        teacher_model=str(folder / os.environ.get("VGS_TEST_TEACHER", "teacher")),
        model_type="qwen3_vl",
        teacher_model_type="qwen3_vl",
        template="qwen3_vl",
        dataset=[str(folder / "data.jsonl")],
        external_plugins=[str(ROOT / "configs" / "hosts" / "swift" / "vgs_plugin.py")],
        tuner_type="full",
        torch_dtype="float32",
        attn_impl="sdpa",
        max_steps=STEPS,
        learning_rate=1e-2,
        optim="sgd",  # Adam would enlarge rounding
        lr_scheduler_type="constant",
        max_completion_length=6,
        output_dir=str(folder / f"out_{case}"),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        gradient_checkpointing=False,
        split_dataset_ratio=0,
        dataset_num_proc=1,
        dataloader_num_workers=0,
        dataset_shuffle=False,
        train_dataloader_shuffle=False,
        seed=0,
        freeze_vit=False,
        freeze_aligner=False,
        **CASES[case],
    )
    from vgs.integrations.swift import VGSTrainer

    prepare, log, loss = VGSTrainer._prepare_batch_inputs, VGSTrainer.log, VGSTrainer.compute_loss

    def prepared(self: Any, samples: list[Any]) -> Any:
        batches = prepare(self, samples)
        seen["responses"] = [*seen.get("responses", []), *(list(x.response_token_ids) for x in samples)]
        if "gaps" not in seen:
            seen["gaps"] = gaps(self, samples, batches[0]["vgs"].scored.batch)
            seen["trainer"] = type(self).__name__
        return batches

    def logged(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        log(self, logs, start_time)
        seen["log"] = [dict(entry) for entry in self.state.log_history]

    VGSTrainer._prepare_batch_inputs, VGSTrainer.log = prepared, logged
    trained: list[Any] = []

    def kept(self: Any, model: Any, *rest: Any, **options: Any) -> Any:
        trained[:] = [self.accelerator.unwrap_model(model)]
        return loss(self, model, *rest, **options)

    VGSTrainer.compute_loss = kept
    assert gkd_trainer.GKDTrainer in VGSTrainer.__mro__
    rlhf_main(arguments)
    return {**seen, "weights": {name: x.detach().clone() for name, x in trained[0].state_dict().items()}}


@torch.no_grad()
def gaps(trainer: Any, samples: list[Any], batch: Any) -> dict[str, float]:
    """Largest relative difference of our packed states from forwards of swift's own padded encodings."""
    from swift.rlhf_trainers.gkd_trainer import GKDTrainer

    from vgs.integrations.swift import _without_images
    from vgs.models.forward import score_groups

    found = {}
    for name, model in (("student", trainer.model), ("teacher", trainer.teacher_model)):
        model = trainer.accelerator.unwrap_model(model)
        training = model.training
        model.eval()
        for view, rows, chosen in zip(
            ("image", "text"),
            score_groups(model, batch.rows),
            (samples, [_without_images(sample) for sample in samples]),
            strict=True,
        ):
            theirs = []
            for part in GKDTrainer._prepare_batch_inputs(trainer, chosen):
                inputs = dict(part["model_inputs"])
                labels = inputs.pop("labels")
                inputs = {k: v for k, v in inputs.items() if k not in ("loss_scale", "length", "text_position_ids")}
                states = model(**inputs, output_hidden_states=True).hidden_states[-1]
                theirs.append(states[:, :-1][labels[:, 1:] != -100])
            live = torch.cat(batch.live)
            expected = torch.cat(theirs)
            found[f"{name} {view}"] = float((rows[live] - expected).abs().max() / expected.abs().max())
        model.train(training)
    return found


if __name__ == "__main__":
    path, chosen = Path(sys.argv[1]), sys.argv[2]
    if not (path / "data.jsonl").exists():
        save(path)
    torch.save(train(path, chosen), path / f"{chosen}.pt")
