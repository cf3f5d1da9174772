"""One request's way through the model: over a prefix of its images, with its own settings."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from modeling_glimpseprune.pruning_arguments import CALL_SETTINGS
from modeling_glimpseprune.stock import cache_of, given_cache

from .prefix_store import PrefixStore

SETTINGS = ("prune", *CALL_SETTINGS)  # what a request may say beside the protocol's fields


@dataclass
class PromptCounts:
    """What became of a prompt's tokens.

    Attributes:
        visual: visual tokens of all its images.
        kept: those that stayed behind layer P.
        reused: tokens of the prompt that an earlier request's look had run.
    """

    visual: int
    kept: int
    reused: int


def settings_of(request: dict, config: PretrainedConfig) -> dict:
    """The settings of the pruning in a request; null means the configuration's.

    Raises:
        ValueError: naming a setting and its value that cannot be.
    """
    settings = {name: request[name] for name in SETTINGS if request.get(name) is not None}
    for name, value in settings.items():
        if name != "prune":
            config.validate_field(name, value)
        elif not isinstance(value, bool):
            raise ValueError(f"prune must be true or false, got {value!r}")
    return settings


def answer(
    model: PreTrainedModel, prefixes: PrefixStore, inputs: dict, settings: dict, **options
) -> tuple[torch.LongTensor, PromptCounts]:
    """Generate the answer to one prompt.

    With `prune` false the stock model answers, without a prefix.

    Args:
        inputs: what the processor made of it.
        settings: from `settings_of`.
        options: further arguments of `generate`.

    Returns:
        `(1, prompt + answer)` ids, and what became of the prompt.
    """
    total = sum(model.model.visual_counts(**inputs))
    over, reused = {}, 0
    if prefixes.limit and settings.get("prune") is not False:
        found = prefixes.find(model, inputs, settings.get("prune_layer"))
        inputs, reused = found.inputs, found.reused
        over = given_cache(found.prefix)
    generated = model.generate(
        **inputs, **over, **settings, **options, return_dict_in_generate=True
    )
    record = getattr(cache_of(generated), "glimpse", None)
    kept = total if record is None else record.kept
    return generated.sequences, PromptCounts(total, kept, reused)
