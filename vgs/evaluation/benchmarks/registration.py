"""The entry point ``lmms_eval.models``: makes the model ``vgs`` known to lmms-eval."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """lmms-eval's ``ModelManifest`` of the model ``vgs``; its code is imported when it is used."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vgs", chat_class_path="vgs.evaluation.benchmarks.lmms_model.VGSModel")
