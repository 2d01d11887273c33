"""A model of lmms-eval that is asked as in training: the same template, encoding, padding and generation settings.

lmms-eval's own classes add a system message, leave in force what the checkpoint's generation config says of sampling,
and sample image placeholders. Imported in lmms-eval's environment alone, through ``registration``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from transformers import AutoModelForImageTextToText, AutoProcessor

from ...data.images import to_rgb
from ...data.responses import response_texts
from ..generation import Generation
from ..sampling import Sampling, sample_responses
from .questions import eval_settings
from .settings import EvalSettings


class VGSModel(lmms):
    """The model of the settings that ``vgs eval`` has written down.

    Args:
        batch_size: questions per generation.
        device: of torch; None: a GPU if there is one.
        **unused: what lmms-eval hands to every model.

    Raises:
        ValueError: started without settings.
    """

    is_simple = False

    def __init__(self, batch_size: int | str = 1, device: str | None = None, **unused: Any) -> None:
        super().__init__()
        if not eval_settings():
            raise ValueError("The model vgs is started by `vgs eval RUN --benchmarks paper`, which names its settings.")
        self.settings = settings = EvalSettings(**eval_settings())
        files = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
        self.batch_size = int(batch_size)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.processor = AutoProcessor.from_pretrained(
            settings.model, padding_side="left", truncation_side="left", **files, **settings.processor
        )
        options = {"dtype": settings.dtype, "attn_implementation": settings.attn_implementation}
        model = AutoModelForImageTextToText.from_pretrained(settings.model, **files, **options)
        self.model = model.to(self.device).eval()

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """A response to each request, in their order; repeated requests are sampled anew."""
        found: list[GenerationResult] = []
        for generation, group in groupby(requests, key=lambda request: request.args[2]):
            found += self._answers(list(group), generation)
        return found

    def _answers(self, requests: Sequence[Any], generation: Mapping[str, Any]) -> list[GenerationResult]:
        asked = {field.name: getattr(self.settings, field.name) for field in fields(Generation)}
        asked |= {name: generation[name] for name in asked if generation.get(name) is not None}
        sampling = Sampling(greedy=not generation.get("temperature"), **asked)
        samples = _Samples(requests, self.task_dict)
        half = self.settings.bf16 and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            ids = sample_responses(self.model, self.processor, samples, sampling, batch_size=self.batch_size)
        texts = response_texts(self.processor, ids)
        return [
            GenerationResult(text=text, token_counts=TokenCounts(output_tokens=len(tokens)))
            for text, tokens in zip(texts, ids, strict=True)
        ]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("The model vgs answers questions; it does not score given answers.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("The model vgs answers questions of one round.")


class _Samples(Sequence[dict[str, Any]]):
    """Requests as samples with ``prompt`` and ``images``, each made when it is asked for."""

    def __init__(self, requests: Sequence[Any], documents: Mapping[str, Any]) -> None:
        self.requests, self.documents = requests, documents

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: int) -> dict[str, Any]:
        _, doc_to_messages, _, doc_id, task, split = self.requests[index].args
        prompt, images = [], []
        for message in doc_to_messages(self.documents[task][split][doc_id]):
            parts = []
            for part in message["content"]:
                if part["type"] == "image":
                    images.append(to_rgb(part["url"]))
                parts.append({"type": "image"} if part["type"] == "image" else part)
            prompt.append({**message, "content": parts})
        return {"prompt": prompt, "images": images}
