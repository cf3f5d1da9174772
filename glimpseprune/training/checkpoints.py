"""Where an interrupted run goes on, and what it knows of the glimpse."""

import json
import logging
import os
import re
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..hub.folders import check_vacant
from ..hub.shards import GLIMPSE_WEIGHTS
from .recipe import TrainingRecipe

logger = logging.getLogger(__name__)


def checkpoint_to_resume(recipe: TrainingRecipe, resume: bool) -> Path | None:
    """The checkpoint that a run goes on from, or None for a fresh one.

    Raises:
        ValueError: when the output exists, or, without `resume`, checkpoints of an earlier run.
    """
    check_vacant(recipe.output)
    checkpoint = last_checkpoint(recipe.checkpoint_folder)
    if checkpoint is not None and not resume:
        raise ValueError(
            f"{recipe.checkpoint_folder} holds checkpoints of an earlier run: go on with --resume, "
            "or remove the folder"
        )
    return checkpoint


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end, or None.

    The trainer's state is written last, so a checkpoint without a readable one was interrupted.
    """
    if not folder.is_dir():
        return None
    numbered = {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    for number in sorted(numbered, reverse=True):
        try:
            json.loads((numbered[number] / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s was interrupted while written: ignored", numbered[number])
            continue
        return numbered[number]
    return None


def save_glimpse(model: PreTrainedModel, folder: Path) -> None:
    """Write a GlimpsePrune model's glimpse weights, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: each.contiguous() for name, each in model.model.glimpse.state_dict().items()}
    partial = folder / f"{GLIMPSE_WEIGHTS}.partial"
    save_file(weights, partial)
    os.replace(partial, folder / GLIMPSE_WEIGHTS)


def load_glimpse(model: PreTrainedModel, folder: Path) -> None:
    """Take the glimpse weights that `save_glimpse` wrote."""
    model.model.glimpse.load_state_dict(load_file(folder / GLIMPSE_WEIGHTS))
