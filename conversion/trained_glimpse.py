"""The glimpse that a stage 1 run of ours trained: its configuration fields and weights."""

from dataclasses import dataclass
from pathlib import Path

import torch

from conversion.repository import SUMMARY_FILE, TRAINED_KEY, is_glimpse
from glimpseprune.families import Family, family_of
from glimpseprune.hub.shards import ConversionError, find_shards, load_tensors, read_json
from modeling_glimpseprune.glimpse_fields import GLIMPSE_FIELDS


@dataclass(frozen=True)
class TrainedGlimpse:
    """What stage 1 adds to its base.

    Attributes:
        family: of the base.
        fields: the configuration fields that GlimpsePrune adds.
        weights: every tensor under `model.glimpse.`.
        summary: content of `training_summary.json`; None where the run left none.
    """

    family: Family
    fields: dict[str, object]
    weights: dict[str, torch.Tensor]
    summary: dict | None


def read_trained_glimpse(run: Path) -> TrainedGlimpse:
    """Read the output of `glimpseprune train-stage1`; of its weights, the glimpse alone is loaded.

    Raises:
        ConversionError: when it is no such output, or its glimpse was not trained.
    """
    config = read_json(run / "config.json")
    family = family_of(config, run)
    if config["model_type"] != family.config_class.model_type:
        raise ConversionError(f"{run} is a stock {family.base_model_type}, not a stage 1 output")
    weights: dict[str, torch.Tensor] = {}
    for shard in find_shards(run):
        weights |= load_tensors(shard, [name for name in shard.tensors if is_glimpse(name)])
    if TRAINED_KEY not in weights or not bool(weights[TRAINED_KEY]):
        raise ConversionError(f"the glimpse weights of {run} are not trained")
    fields = {name: config[name] for name in GLIMPSE_FIELDS if name in config}
    summary = read_json(run / SUMMARY_FILE) if (run / SUMMARY_FILE).exists() else None
    return TrainedGlimpse(family, fields, weights, summary)
