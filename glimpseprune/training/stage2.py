"""A run of stage 2 from its recipe: data, base, rewards, training, adapter."""

import logging
import time
from pathlib import Path

import accelerate
import peft
import torch
import transformers
import trl

from ..data.visual_cot import read_visual_cot
from ..data.visual_cot_collator import VisualCoTCollator
from ..hub.folders import vacant_sibling
from ..judge import JudgeError
from ..portable import write_json
from .base import load_for_training
from .checkpoints import checkpoint_to_resume, last_checkpoint, save_glimpse
from .repository import SUMMARY_FILE
from .rewards import build_rewards
from .run_plot import PLOT, plot_run
from .stage2_config import Lora, Stage2Recipe
from .stage2_trainer import Stage2Trainer

logger = logging.getLogger(__name__)


def train_stage2(recipe: Stage2Recipe, resume: bool = False) -> dict | None:
    """Train by a recipe and write the result as a LoRA adapter.

    Checkpoints lie in `recipe.checkpoint_folder` and stay there, and so does a plot of the run.

    Args:
        recipe: what to train, on what and how.
        resume: go on from the last complete checkpoint, if there is one.

    Returns:
        What `training_summary.json` holds; None in all processes but the main one.

    Raises:
        ValueError: for settings or data that cannot be, an output that exists, a loss that is no
            number, or, without `resume`, checkpoints of an earlier run.
        OSError: for files or models that cannot be read, or a judge that cannot be asked, after
            saving a checkpoint.
    """
    config, lora = recipe.training_config(), Lora(**recipe.lora)
    checkpoint = checkpoint_to_resume(recipe, resume)
    rewards = build_rewards(recipe.rewards, recipe.judge)
    questions = read_visual_cot(
        recipe.data,
        recipe.image_folder,
        recipe.skip_rows_without_boxes,
        need_boxes=recipe.mask == "evidence" and not recipe.learn_rows_without_boxes,
    )[: recipe.max_questions]
    if not questions:
        raise ValueError(f"there are no questions to train on in {recipe.data}")
    logger.info("%d questions in %s", len(questions), recipe.data)
    model, processor, _ = load_for_training(
        recipe.base, bf16=config.bf16, attn_implementation=recipe.attn_implementation
    )
    if recipe.mask in ("model", "sampled") and not model.model.glimpse.trained:
        raise ValueError(
            f"{recipe.base} has no trained glimpse to choose masks: train stage 1 first, or set "
            "mask to evidence"
        )
    collator = VisualCoTCollator(processor, recipe.min_pixels, recipe.max_pixels)
    trainer = Stage2Trainer(
        model, config, rewards, questions, collator, recipe.mask, lora, recipe.masks_per_prompt
    )
    if resume:
        logger.info("resuming from %s", checkpoint or "nothing: there is no checkpoint yet")
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except JudgeError as error:
        raise JudgeError(f"{error}; {_save_before_stopping(trainer)}") from None
    seconds = time.monotonic() - started
    summary = None
    if trainer.is_world_process_zero():
        summary = _summary(recipe, trainer, seconds)
        with vacant_sibling(recipe.output) as folder:
            adapted = trainer.accelerator.unwrap_model(trainer.model)
            adapted.save_pretrained(folder)
            if recipe.mask == "sampled":
                save_glimpse(adapted.get_base_model(), folder)
            write_json(folder / SUMMARY_FILE, summary)
        plot_run(trainer.state.log_history, recipe.checkpoint_folder / PLOT)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return summary


def _save_before_stopping(trainer: Stage2Trainer) -> str:
    """Save a checkpoint of the last finished step; returns what to say of it."""
    step = trainer.state.global_step
    if step == 0:
        return "no step was finished, so there is nothing to save"
    folder = Path(trainer.args.output_dir) / f"checkpoint-{step}"
    saved = last_checkpoint(Path(trainer.args.output_dir))
    if saved != folder:
        trainer._save_checkpoint(trainer.model, trial=None)
    return f"{folder} is saved: go on with --resume"


def _summary(recipe: Stage2Recipe, trainer: Stage2Trainer, seconds: float) -> dict:
    """What is worth knowing of a run later: settings, versions, data, figures."""
    history = trainer.state.log_history
    logged = [entry for entry in history if "reward" in entry]
    return {
        "stage": 2,
        "recipe": recipe.to_dict(),
        "training": trainer.args.to_sanitized_dict(),
        "seed": trainer.args.seed,
        "processes": trainer.args.world_size,
        "questions": len(trainer.questions),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "minutes_since_start_or_resume": round(seconds / 60, 2),
        "trained_parameters": sum(
            weight.numel() for weight in trainer.model.parameters() if weight.requires_grad
        ),
        "metrics": logged[-1] if logged else {},
        "versions": {
            "accelerate": accelerate.__version__,
            "peft": peft.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
    }
