"""Greedy or sampled answers to a batch of prompts, with what each cost."""

import time
from dataclasses import asdict, dataclass

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
)

from modeling_glimpseprune.stock import cache_of, given_cache

from ..evaluation import retention_by_row


@dataclass(frozen=True)
class Cost:
    """What one answer took.

    Attributes:
        prompt_tokens: all tokens of the prompt, visual ones counted.
        visual_tokens, kept_visual_tokens: before and after pruning.
        retention: their ratio; 1 without visual tokens.
        output_tokens: tokens of the answer.
        seconds_to_first_token: from the call to the first token of the batch.
        seconds_of_look: of those, for looks at the batch's images; 0 where it was asked afresh.
        tokens_per_second: of this answer, after its first token; 0 for answers of one token.
    """

    prompt_tokens: int
    visual_tokens: int
    kept_visual_tokens: int
    retention: float
    output_tokens: int
    seconds_to_first_token: float
    tokens_per_second: float
    seconds_of_look: float = 0.0

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass
class LookedPrompts:
    """Whole prompts some of which begin with the same images and words.

    Attributes:
        texts: all of them, as the chat template made them.
        begins_with: for each of them, which of the prompts looked at it begins with.
    """

    texts: list[str]
    begins_with: list[int]


class _Clock(LogitsProcessor):
    """Notes when logits arrive; changes nothing."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times = [self.now()]

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(self.now())
        return scores


@torch.inference_mode()
def generate_measured(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    inputs: dict,
    looked: LookedPrompts | None = None,
    **options: object,
) -> tuple[list[str], list[Cost]]:
    """Answer left-padded prompts.

    Args:
        inputs: what the processor made.
        looked: how many prompts begin alike, to be looked at once (see `LookedPrompts`); `inputs`
            are of one prompt each of those then.
        options: of `generate`.

    Returns:
        The answers without special tokens, and their costs.
    """
    counts = model.model.visual_counts(**inputs)
    clock = _Clock(model.device)
    seconds_of_look = 0.0
    if looked is not None:
        settings = {"redundant_patches": False} if options.get("prune") is False else {}
        prefix = model.look(**inputs, **settings, prune_layer=options.get("prune_layer"))
        prefix = prefix.select_rows(looked.begins_with)
        counts = [counts[row] for row in looked.begins_with]
        prompts = processor(text=looked.texts, prefix=prefix).to(model.device)
        inputs = dict(prompts) | given_cache(prefix)
        seconds_of_look = clock.now() - clock.times[0]
    generated = model.generate(
        **inputs,
        **options,
        logits_processor=LogitsProcessorList([clock]),
        return_dict_in_generate=True,
    )
    start = inputs["input_ids"].shape[1]
    completions = generated.sequences[:, start:].tolist()
    retention = [1.0] * len(counts)
    if hasattr(cache := cache_of(generated), "glimpse"):
        retention = retention_by_row(cache.glimpse, counts)
    ends = _as_set(model.generation_config.eos_token_id)
    costs = []
    for row, completion in enumerate(completions):
        length = next((i + 1 for i, token in enumerate(completion) if token in ends), start)
        length = min(length, len(completion))
        seconds = clock.times[min(length, len(clock.times) - 1)] - clock.times[1]
        costs.append(
            Cost(
                int(inputs["attention_mask"][row].sum()),
                counts[row],
                round(retention[row] * counts[row]),
                retention[row],
                length,
                clock.times[1] - clock.times[0],
                (length - 1) / seconds if length > 1 else 0.0,
                seconds_of_look,
            )
        )
    return processor.batch_decode(completions, skip_special_tokens=True), costs


def _as_set(token_ids: int | list[int] | None) -> set[int]:
    if token_ids is None:
        return set()
    return set(token_ids) if isinstance(token_ids, list) else {token_ids}
