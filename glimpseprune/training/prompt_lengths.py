"""Where prompts end, for trainers that keep the labels from the model.

trl's `SFTTrainer` and `DPOTrainer` call the backbone and compute the loss themselves, and
`Trainer` takes the labels away for label smoothing. The answer must have no part in choosing the
visual tokens, so the batch itself says where it begins.
"""

from collections.abc import Callable, MutableMapping, Sequence

import torch

from modeling_glimpseprune.row_boundaries import IGNORED_LABEL, first_labelled


class PromptLengthCollator:
    """Adds `prompt_length` to the batches of another collator.

    Args:
        collator: makes batches with `labels` (-100 over prompts and padding) or, as trl does for
            preferences, with a `completion_mask` (1 at completions), each `(batch, length)`.

    Calling it returns the collator's batch with `prompt_length` in it: `(batch,)`, the tokens of
    each row before its completion, padding on the left counted. A row without a completion, as
    where a long one was cut, is all prompt.

    Raises:
        ValueError: when a batch has neither, or a completion begins at a row's first token.
    """

    def __init__(self, collator: Callable[[Sequence], MutableMapping]):
        self.collator = collator

    def __call__(self, examples: Sequence) -> MutableMapping:
        batch = self.collator(examples)
        batch["prompt_length"] = prompt_lengths(batch)
        return batch


def prompt_lengths(batch: MutableMapping) -> torch.Tensor:
    """`(batch,)` tokens before each row's completion; see `PromptLengthCollator`."""
    if "completion_mask" in batch:
        mask = batch["completion_mask"]
        labels = torch.where(mask.bool(), 0, IGNORED_LABEL)
    elif "labels" in batch:
        labels = batch["labels"]
    else:
        raise ValueError(
            "nothing tells where completions begin: the batch has neither labels nor a "
            f"completion_mask, but {', '.join(sorted(batch))}"
        )
    return torch.as_tensor(first_labelled(labels)).expand(len(labels)).clone()
