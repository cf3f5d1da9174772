"""Prompts that several completions share: encoded once, pruned once, prefilled once.

Sampling and scoring go the same two steps: the prompt is pruned in a prefill of its own, and its
cache is repeated for the prompt's completions, which then run over what was kept. The masks of one
prompt may share a look: layers 0..P over all of it but its last token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from modeling_glimpseprune.glimpse_prefix import GlimpsePrefix
from modeling_glimpseprune.later_turns import past_length
from modeling_glimpseprune.stock import cache_of, given_cache
from modeling_glimpseprune.visual_features import VisualFeatures

from ..data.visual_cot_collator import ROW_INPUTS, TEXT_INPUTS


@dataclass(frozen=True)
class SharedPrompts:
    """U different prompts with one image each.

    Attributes:
        inputs: `(U, ...)` tensors that the model takes; prompts of P tokens, padded on the left.
        features: the encoded images.
        image_index: which of the images each prompt shows.
        keep_masks: one bool tensor a prompt over its visual tokens; None before they are chosen.
        sources: which of the prompts that were repeated each is, see `repeated`.
        prefix: a look with a row for each prompt, all but its last token; None: whole prompts run.
    """

    inputs: dict[str, torch.Tensor]
    features: VisualFeatures
    image_index: list[int]
    keep_masks: list[torch.Tensor] | None = None
    sources: list[int] | None = None
    prefix: GlimpsePrefix | None = None

    @property
    def visual_counts(self) -> list[int]:
        """Visual tokens of each prompt."""
        sizes = [visual for _, visual in self.features.sizes]
        return [sizes[image] for image in self.image_index]

    @property
    def retention(self) -> list[float]:
        """Kept share of each prompt's visual tokens."""
        return [mask.float().mean().item() for mask in self.keep_masks]

    def with_masks(self, keep_mask: torch.Tensor) -> "SharedPrompts":
        """The same with the keep mask `(N,)` of all visual tokens, prompt after prompt."""
        return replace(self, keep_masks=list(keep_mask.split(self.visual_counts)))

    def part(self, prompts: list[int]) -> "SharedPrompts":
        """Some of the prompts, in any order and as often as named."""
        masks, sources = self.keep_masks, self.sources
        return SharedPrompts(
            {name: values[prompts] for name, values in self.inputs.items()},
            self.features,
            [self.image_index[prompt] for prompt in prompts],
            None if masks is None else [masks[prompt] for prompt in prompts],
            None if sources is None else [sources[prompt] for prompt in prompts],
            None if self.prefix is None else self.prefix.select_rows(prompts),
        )

    def repeated(self, copies: list[int]) -> "SharedPrompts":
        """One prompt for each of `copies`, so that each can have a mask of its own."""
        return replace(self.part(copies), keep_masks=None, sources=copies)

    def looked_at(self, model: PreTrainedModel) -> "SharedPrompts":
        """The same over a look, one for all repetitions of a prompt.

        Gradients pass where they are switched on.

        Args:
            model: that looks, and goes on with the prompts.
        """
        sources = list(range(len(self.image_index))) if self.sources is None else self.sources
        different = list(dict.fromkeys(sources))
        first = [sources.index(source) for source in different]
        inputs = replace(self, keep_masks=None, prefix=None).model_inputs(first)
        lengths = inputs["attention_mask"].sum(1) - 1
        prefix = model.look(**inputs, prefix_length=lengths.tolist(), differentiable=True)
        return replace(self, prefix=prefix.select_rows([*map(different.index, sources)]))

    def model_inputs(self, prompts: list[int]) -> dict[str, object]:
        """What `generate` takes of some of the prompts."""
        inputs = {name: values[prompts] for name, values in self.inputs.items()}
        if self.prefix is None:
            images = [self.image_index[prompt] for prompt in prompts]
            inputs["mm_encoder_outputs"] = {"image": self.features.select(images)}
        else:
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            inputs |= given_cache(self.prefix.select_rows(prompts))
        if self.keep_masks is not None:
            masks = [self.keep_masks[prompt] for prompt in prompts]
            inputs["visual_keep_mask"] = torch.cat(masks)
        return inputs

    def forward_inputs(self, prompts: list[int]) -> dict[str, object]:
        """The same as `forward` takes it: over a look only what stands behind it, and a cache."""
        inputs = self.model_inputs(prompts)
        if self.prefix is not None:
            inputs["input_ids"] = inputs["input_ids"][:, past_length(self.prefix) :]
        return given_cache(DynamicCache()) | inputs


@torch.no_grad()
def share_prompts(model: PreTrainedModel, batch: dict) -> SharedPrompts:
    """Encode the images of a `VisualCoTCollator` batch and leave its completions out.

    Args:
        model: a GlimpsePrune model.
        batch: the batch, on any device.
    """
    device = model.device
    visuals = {name: values.to(device) for name, values in batch["visuals"].items()}
    if torch.is_floating_point(visuals["pixel_values"]):
        visuals["pixel_values"] = visuals["pixel_values"].to(model.dtype)
    prompt_length = batch["prompt_length"]
    inputs = {name: batch[name][:, :prompt_length] for name in TEXT_INPUTS if name in batch}
    inputs |= {name: batch[name] for name in ROW_INPUTS if name in batch}
    return SharedPrompts(
        {name: values.to(device) for name, values in inputs.items()},
        model.model.encode_telling("image", **visuals),
        batch["image_index"].tolist(),
    )


@torch.no_grad()
def sample_completions(
    model: nn.Module, prompts: SharedPrompts, copies: list[int], config: GenerationConfig
) -> tuple[torch.Tensor, SharedPrompts]:
    """Sample completions with the model's own `generate`, which prunes each prompt once.

    `generate` runs twice: for one token of each prompt, whose cache and next-token scores all its
    completions share, and from there on for each completion.

    Args:
        model: a GlimpsePrune model, or its PEFT wrapper.
        prompts: without masks, the model chooses them itself.
        copies: the prompt of each completion to be sampled, R in all.
        config: its `max_new_tokens` is C.

    Returns:
        Token ids `(R, at most C)`, padded after their ends, and the prompts with the masks used,
        without a look.
    """
    one_token = copy(config)
    one_token.max_new_tokens = 1
    one_token.return_dict_in_generate = one_token.output_scores = True
    every_prompt = list(range(len(prompts.image_index)))
    start = model.generate(**prompts.model_inputs(every_prompt), generation_config=one_token)
    cache = cache_of(start)
    prompts = replace(prompts.with_masks(cache.glimpse.keep_mask), prefix=None)
    index = torch.tensor(copies, device=start.sequences.device)
    first = torch.multinomial(start.scores[0].float().softmax(-1)[index], num_samples=1)
    if config.max_new_tokens == 1:
        return first, prompts
    cache.batch_select_indices(index)
    rest = copy(config)
    rest.max_new_tokens = config.max_new_tokens - 1
    prompt_mask = prompts.inputs["attention_mask"][index]
    sequences = model.generate(
        input_ids=torch.cat([prompts.inputs["input_ids"][index], first], dim=1),
        attention_mask=torch.cat([prompt_mask, torch.ones_like(first)], dim=1),
        **given_cache(cache),
        generation_config=rest,
    )
    return sequences[:, prompt_mask.shape[1] :], prompts


def completion_logits(
    model: nn.Module,
    prompts: SharedPrompts,
    rows: list[int],
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
) -> torch.Tensor:
    """Logits of every completion token, computed as when it was sampled.

    A prefill with the prompts' masks, once for each different prompt, then the completions as one
    block over the pruned caches. Gradients reach the prompts too.

    Args:
        model: a GlimpsePrune model, or a wrapper of it.
        prompts: with the masks used when sampling.
        rows: the prompt of each completion.
        completion_ids: `(R, C)`, padded on the right.
        completion_mask: `(R, C)`, 1 at real tokens.

    Returns:
        `(R, C, vocabulary)`, each predicting the token in its place.
    """
    different = sorted(set(rows))
    index = torch.tensor([different.index(row) for row in rows], device=completion_ids.device)
    inputs = prompts.forward_inputs(different)
    whole = {"prompt_length": inputs["input_ids"].shape[1]}  # the completions follow below
    prefill = model(**inputs, **whole, use_cache=True, logits_to_keep=1)
    first = prefill.logits[:, -1:][index]
    if completion_ids.shape[1] == 1:
        return first
    cache = cache_of(prefill)
    cache.batch_select_indices(index)
    mask = torch.cat([inputs["attention_mask"][index], completion_mask[:, :-1]], dim=1)
    with _without_checkpointing(model):
        block = model(
            input_ids=completion_ids[:, :-1],
            attention_mask=mask,
            **given_cache(cache),
            use_cache=True,
        )
    return torch.cat([first, block.logits], dim=1)


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Keep activations: the stock layers' checkpointing would take the cache away."""
    switched = [each for each in model.modules() if getattr(each, "gradient_checkpointing", False)]
    for module in switched:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True
