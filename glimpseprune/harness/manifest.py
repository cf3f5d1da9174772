"""Tells lmms-eval that `--model glimpseprune` exists (entry-point group `lmms_eval.models`)."""

from lmms_eval.models.registry_v2 import ModelManifest

MODEL = ModelManifest(
    model_id="glimpseprune",
    chat_class_path="glimpseprune.harness.lmms_eval_model.GlimpsePrune",
)
