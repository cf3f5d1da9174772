"""A run of stage 1 from its recipe: data, base, training, evaluation, repository."""

import logging
import time
from dataclasses import asdict

import accelerate
import torch
import transformers
from transformers import PreTrainedModel, set_seed

from ..data.visual_cot import VisualCoTDataset, VisualCoTRow, read_visual_cot
from ..data.visual_cot_collator import VisualCoTCollator
from .base import config_for_training, load_for_training, start_glimpse_as
from .checkpoints import checkpoint_to_resume
from .late_glimpse import late_backbone, start_glimpse_from
from .repository import write_repository
from .run_plot import PLOT, plot_run
from .stage1_config import Stage1Config, Stage1Recipe
from .stage1_trainer import Stage1Trainer

logger = logging.getLogger(__name__)


def train_stage1(recipe: Stage1Recipe, resume: bool = False) -> dict | None:
    """Train by a recipe and write the result as a complete repository.

    Checkpoints lie in `recipe.checkpoint_folder` and stay there, and so does a plot of the run.

    Args:
        recipe: what to train, on what and how.
        resume: go on from the last complete checkpoint, if there is one.

    Returns:
        What `training_summary.json` holds; None in all processes but the main one.

    Raises:
        ValueError: for settings or data that cannot be, an output that exists, or, without
            `resume`, checkpoints of an earlier run.
        OSError: for files or models that cannot be read.
    """
    config = recipe.training_config()
    checkpoint = checkpoint_to_resume(recipe, resume)
    config.check_glimpse(config_for_training(recipe.base, recipe.glimpse))
    train, validation = _dataset(recipe, config, recipe.data), None
    if recipe.validation_data:
        validation = _dataset(recipe, config, recipe.validation_data)
    set_seed(config.seed)  # the fresh glimpse weights are drawn here
    model, processor, dtype = load_for_training(
        recipe.base, recipe.glimpse, config.bf16, recipe.attn_implementation
    )
    late = None
    if recipe.late_glimpse is not None:
        late = late_backbone(recipe.late_glimpse, model)
        if not model.model.glimpse.trained:
            start_glimpse_from(model, late.glimpse)
    elif recipe.start_text is not None and not model.model.glimpse.trained:
        start_glimpse_as(model, processor, recipe.start_text)
    trainer = Stage1Trainer(
        model,
        config,
        late=late if config.late_weight else None,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=VisualCoTCollator(processor, recipe.min_pixels, recipe.max_pixels),
    )
    if resume:
        logger.info("resuming from %s", checkpoint or "nothing: there is no checkpoint yet")
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.monotonic() - started
    metrics = _final_metrics(trainer)
    summary = None
    if trainer.is_world_process_zero():
        summary = _summary(recipe, trainer, metrics, seconds)
        model = trainer.accelerator.unwrap_model(trainer.model)
        write_repository(model, processor, recipe.output, dtype, summary)
        plot_run(trainer.state.log_history, recipe.checkpoint_folder / PLOT)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return summary


def read_questions(recipe: Stage1Recipe, config: Stage1Config, path: str) -> list[VisualCoTRow]:
    """The questions of a recipe's file, with what its settings need.

    Raises:
        VisualCoTError, FileNotFoundError: as `read_visual_cot` does.
    """
    rows = read_visual_cot(
        path,
        recipe.image_folder,
        recipe.skip_rows_without_boxes,
        need_boxes=config.needs_boxes and not recipe.learn_rows_without_boxes,
        need_answers=config.needs_answers,
    )
    return rows[: recipe.max_questions] if path == recipe.data else rows


def _dataset(recipe: Stage1Recipe, config: Stage1Config, path: str) -> VisualCoTDataset:
    rows = read_questions(recipe, config, path)
    logger.info("%d questions in %s", len(rows), path)
    return VisualCoTDataset(rows, recipe.questions_per_image)


def _final_metrics(trainer: Stage1Trainer) -> dict[str, float]:
    """Figures on held-out questions after the last step, else the training figures logged last."""
    key = "loss" if trainer.eval_dataset is None else "eval_loss"
    logged = [entry for entry in trainer.state.log_history if key in entry]
    if trainer.eval_dataset is None:
        return logged[-1] if logged else {}
    if logged and logged[-1]["step"] == trainer.state.global_step:
        return logged[-1]
    return trainer.evaluate()


def _summary(
    recipe: Stage1Recipe, trainer: Stage1Trainer, metrics: dict[str, float], seconds: float
) -> dict:
    """What is worth knowing of a run later: settings, versions, data, figures."""
    return {
        "recipe": asdict(recipe),
        "training": trainer.args.to_sanitized_dict(),
        "seed": trainer.args.seed,
        "processes": trainer.args.world_size,
        "questions": trainer.train_dataset.num_questions,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "minutes_since_start_or_resume": round(seconds / 60, 2),
        "trained_parameters": _trained_parameters(trainer.model),
        "metrics": metrics,
        "versions": {
            "accelerate": accelerate.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _trained_parameters(model: PreTrainedModel) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
