"""A glimpse that is read late (P = K), from which one that is read ahead starts and learns."""

import copy
import json

import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from modeling_glimpseprune.base_weights import (
    GLIMPSE_PREFIX,
    GLIMPSE_SHARD,
    INDEX_FILE,
    SINGLE_FILE,
)
from modeling_glimpseprune.glimpse import Glimpse
from modeling_glimpseprune.glimpse_fields import BUILT_IN_FIELDS
from modeling_glimpseprune.stock import file_of

RANKS = ("glimpse_lora_rank", "stale_rank")
SAME_IN_BASE = {
    "text_config": ("hidden_size", "num_hidden_layers", "num_attention_heads"),
    "vision_config": ("hidden_size", "depth", "num_hidden_layers"),
}


def late_backbone(source: str, model: PreTrainedModel) -> PreTrainedModel:
    """A repository's glimpse over another model's vision encoder and decoder, which it shares.

    Of the repository's weights only those of the glimpse are read, into float32.

    Args:
        source: folder or Hub id of a GlimpsePrune repository whose glimpse is read late.
        model: whose base it is.

    Returns:
        A backbone, in `eval` mode, that runs and prunes by the repository's configuration.

    Raises:
        OSError: when there is no such repository.
        ValueError: when it is of another family or base, its glimpse is untrained, looks ahead
            itself, or is built otherwise than the model's.
    """
    content, _ = PretrainedConfig.get_config_dict(source)
    if content.get("model_type") != model.config.model_type:
        raise ValueError(
            f"late_glimpse needs a {model.config.model_type} repository; {source} holds a "
            f"{content.get('model_type')} model"
        )
    config = type(model.config).from_pretrained(source)
    check_late_configuration(source, config, model.config)
    glimpse = Glimpse(config, config.vision_config.hidden_size)
    try:
        glimpse.load_state_dict(read_glimpse(source))
    except RuntimeError as error:
        raise ValueError(f"late_glimpse: the weights of {source} do not fit: {error}") from None
    if not glimpse.trained:
        raise ValueError(f"the glimpse of {source} is not trained, so nothing can start from it")
    backbone = copy.copy(model.model)
    backbone._modules = model.model._modules | {"glimpse": glimpse.requires_grad_(False).float()}
    backbone.config, backbone.training = config, False
    glimpse.eval()
    return backbone


def with_backbone(model: PreTrainedModel, backbone: PreTrainedModel) -> PreTrainedModel:
    """A view of a model over another backbone, which shares all else with it."""
    view = copy.copy(model)
    view._modules = model._modules | {"model": backbone}
    return view


@torch.no_grad()
def start_glimpse_from(model: PreTrainedModel, late: Glimpse) -> None:
    """Let fresh glimpse weights start as those of a late glimpse; new additions stay at zero."""
    model.model.glimpse.load_state_dict(late.state_dict(), strict=False)


def read_glimpse(source: str) -> dict[str, torch.Tensor]:
    """The glimpse weights of a repository, by their names in the module; no others are read.

    Args:
        source: a folder or a Hub id.

    Raises:
        OSError: when there are no weights.
    """
    index = file_of(source, INDEX_FILE)
    if index is not None:
        with open(index, encoding="utf-8") as file:
            weight_map = json.load(file)["weight_map"]
        files = {file for name, file in weight_map.items() if name.startswith(GLIMPSE_PREFIX)}
    else:
        files = {SINGLE_FILE if file_of(source, GLIMPSE_SHARD) is None else GLIMPSE_SHARD}
    weights = {}
    for name in sorted(files):
        with safe_open(cached_file(source, name), framework="pt") as shard:
            for key in shard.keys():
                if key.startswith(GLIMPSE_PREFIX):
                    weights[key.removeprefix(GLIMPSE_PREFIX)] = shard.get_tensor(key)
    return weights


def check_late_configuration(source: str, late: PretrainedConfig, own: PretrainedConfig) -> None:
    """Refuse a late glimpse that looks ahead, or is built otherwise or on another base."""
    if late.prune_layer not in (None, late.glimpse_layer):
        raise ValueError(f"late_glimpse needs a glimpse that is read late; {source} looks ahead")
    for name in ("glimpse_layer", *BUILT_IN_FIELDS):
        theirs, ours = getattr(late, name), getattr(own, name)
        if theirs != ours and not (name in RANKS and theirs == 0):
            raise ValueError(
                f"late_glimpse: {name} is {theirs} in {source}, and {ours} in the model"
            )
    for part, names in SAME_IN_BASE.items():
        theirs, ours = (getattr(config, part).to_dict() for config in (late, own))
        for name in names:
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"late_glimpse: {part}.{name} is {theirs.get(name)} in {source}, and "
                    f"{ours.get(name)} in the model, whose base is another"
                )
