"""Stage 2 on LLaVA and LLaVA-NeXT: scores as in generation, and a run on a stock base."""

import pytest
import torch
from stage2_data import compare_with_generation, share
from test_llava import base, data, family  # noqa: F401 (fixtures)
from transformers import set_seed

from glimpseprune.training.base import load_for_training
from glimpseprune.training.recipe import read_recipe
from glimpseprune.training.sampled_masks import draw_masks, glimpse_at
from glimpseprune.training.stage2 import train_stage2
from glimpseprune.training.stage2_config import Stage2Recipe


def test_training_scores_completions_as_generation_does(base, data):  # noqa: F811
    set_seed(0)
    model, processor, _ = load_for_training(str(base), {"glimpse_layer": 1})
    processor.tokenizer.padding_side = "left"
    loaded = model.eval(), processor
    prompts = share(loaded, data, [0, 1])
    keep = torch.arange(sum(prompts.visual_counts)) % 3 == 0
    compare_with_generation(model, prompts.with_masks(keep), [0, 1, 0, 1])


def test_masks_are_drawn_and_completions_scored_over_them(base, data):  # noqa: F811
    set_seed(0)
    model, processor, _ = load_for_training(str(base), {"glimpse_layer": 1})
    processor.tokenizer.padding_side = "left"
    model.eval().model.glimpse.trained.fill_(True)
    prompts = share((model, processor), data, [0, 1])
    with torch.no_grad():
        record = glimpse_at(model, prompts, [0, 1])
    copies = [0, 0, 1, 1]
    masks = draw_masks(record, model.config, prompts.visual_counts, copies)
    repeated = prompts.repeated(copies).with_masks(masks)
    assert not torch.equal(*repeated.keep_masks[:2])
    compare_with_generation(model, repeated, [0, 1, 2, 3])


def test_a_stock_base_is_trained_with_evidence_masks(base, data, tmp_path):  # noqa: F811
    """LLaVA's square cuts all evidence of these pages off, so nothing of it stays."""
    training = {
        "bf16": False, "use_cpu": True, "num_generations": 2, "per_device_train_batch_size": 4,
        "max_completion_length": 2, "max_steps": 1, "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    fields = {"base": str(base), "data": str(data), "output": str(tmp_path / "adapter")}
    fields |= {"mask": "evidence", "training": training, "lora": {"rank": 2, "alpha": 4}}
    summary = train_stage2(read_recipe(Stage2Recipe, None, fields))
    assert summary["steps"] == 1 and 0 <= summary["metrics"]["retention"] < 1
    assert summary["metrics"]["kl"] == pytest.approx(0, abs=1e-6)
