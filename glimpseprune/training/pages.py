"""The different images of a batch of stage 1, each looked at once for all that asks about it."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from modeling_glimpseprune.glimpse_prefix import GlimpsePrefix
from modeling_glimpseprune.later_turns import past_length
from modeling_glimpseprune.stock import given_cache
from modeling_glimpseprune.visual_features import VisualFeatures

from ..data.visual_cot_collator import ROW_INPUTS, TEXT_INPUTS


@dataclass(frozen=True)
class Pages:
    """U different images, encoded once, and the prompts that first ask about each.

    Attributes:
        prompts: `(U, ...)` what `look` takes.
        features: the encoded images.
        image_index: which of them each row of the batch shows.
    """

    prompts: dict[str, torch.Tensor]
    features: VisualFeatures
    image_index: list[int]

    @classmethod
    def of_batch(cls, inputs: dict, features: VisualFeatures) -> "Pages":
        """The images of a `VisualCoTCollator` batch.

        Args:
            features: what the vision encoder made of its `visuals`.
        """
        index = inputs["image_index"].tolist()
        first = [index.index(image) for image in range(len(features.pooler_output))]
        start = inputs["prompt_length"]
        prompts = {name: inputs[name][first, :start] for name in TEXT_INPUTS if name in inputs}
        prompts |= {name: inputs[name][first] for name in ROW_INPUTS if name in inputs}
        return cls(prompts, features, index)

    def look(self, model: PreTrainedModel, in_place: bool = False) -> GlimpsePrefix:
        """Look at each image once: a prefix with a row for each row of the batch.

        Gradients pass where they are switched on.

        Args:
            model: that looks, and goes on to ask.
            in_place: for questions that shall run in place.
        """
        encoded = {"image": self.features}
        prefix = model.look(
            **self.prompts, mm_encoder_outputs=encoded, differentiable=True, in_place=in_place
        )
        return prefix.select_rows(self.image_index)


def behind_pages(inputs: dict, prefix: GlimpsePrefix) -> dict:
    """A batch's tokens behind the pages that its prompts begin with, as `forward` takes them.

    Args:
        inputs: of a `VisualCoTCollator` batch; prompts are padded behind the prefix afterwards.
        prefix: of `Pages.look`.
    """
    start, past = inputs["prompt_length"], past_length(prefix)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    prompts = prefix.prompts(ids[:, :start], mask[:, :start])
    behind = prompts["input_ids"][:, past:]
    return {
        "input_ids": torch.cat([behind, ids[:, start:]], dim=1),
        "attention_mask": torch.cat([prompts["attention_mask"], mask[:, start:]], dim=1),
        "prompt_length": behind.shape[1],
        **given_cache(prefix),
    }
