"""Inputs of a generation that are repeated, row by row."""

import torch

from .glimpse_prefix import GlimpsePrefix
from .later_turns import past_length
from .pruning_arguments import validate_mask
from .stock import CACHE_NAME
from .visual_features import VisualFeatures, described

ENCODED = "mm_encoder_outputs"
VISUAL_MASKS = ("visual_keep_mask", "visual_encode_mask")


class RepeatedInputsMixin:
    """For the whole model: repeats what `generate` asks for, beams or several answers."""

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.LongTensor, dict]:
        """Repeat keep mask and visuals row by row, and note where the prompt ends.

        The stock method repeats a tensor's elements, and of visuals what it knows. The end of the
        prompt matters without a cache, where later steps run the prompt again with what was
        generated behind it.
        """
        names = {*VISUAL_MASKS, ENCODED}
        if expand_size > 1:
            new_ids = self.new_placeholders(input_ids, model_kwargs)
            repeated = self._repeated_visuals(new_ids, model_kwargs, expand_size)
            repeated |= self.model.repeat_visuals(new_ids, model_kwargs, expand_size)
            model_kwargs |= repeated
            names |= repeated.keys()
        held = {name: model_kwargs.pop(name, None) for name in names}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        model_kwargs |= {name: value for name, value in held.items() if value is not None}
        if input_ids.shape[1] > 0:
            model_kwargs["prompt_length"] = input_ids.shape[1]
        return input_ids, model_kwargs

    def _repeated_visuals(self, new_ids: torch.LongTensor, inputs: dict, repeats: int) -> dict:
        """A keep mask and encoded visuals of a batch whose rows are repeated.

        Args:
            new_ids: see `new_placeholders`.
        """
        repeated, counts = {}, []
        if encoded := inputs.get(ENCODED):
            prunes = inputs.get("prune") is not False
            encoded = {kind: described(kind, encoded[kind], prunes) for kind in encoded}
        masks = {name: inputs[name] for name in VISUAL_MASKS if inputs.get(name) is not None}
        if masks:
            counts = self.model.visual_counts(new_ids, **inputs)
        for name, mask in masks.items():
            of_rows, cache = counts, inputs.get(CACHE_NAME)
            if isinstance(cache, GlimpsePrefix) and name == "visual_keep_mask":
                held = cache.visual_counts(len(new_ids))
                of_rows = [sum(both) for both in zip(held, counts, strict=True)]
            validate_mask(mask, sum(of_rows), name)
            rows = [row.repeat(repeats) for row in mask.split(of_rows)]
            repeated[name] = torch.cat(rows)
        if encoded:
            self._check_placeholders(new_ids, encoded)
            repeated[ENCODED] = {
                kind: features.repeat_rows(self._placeholders(new_ids, kind).tolist(), repeats)
                for kind, features in encoded.items()
            }
        return repeated

    def _placeholders(self, input_ids: torch.LongTensor, kind: str) -> torch.Tensor:
        """`(batch,)` placeholders of each row."""
        return (input_ids == getattr(self.config, f"{kind}_token_id")).sum(1)

    def new_placeholders(self, input_ids: torch.LongTensor, inputs: dict) -> torch.LongTensor:
        """Ids `(batch, new tokens)` of the tokens that a kept cache does not hold.

        Of prompts given as embeddings only the placeholders are told.
        """
        embeddings = inputs.get("inputs_embeds")
        if embeddings is None or input_ids.shape[1] > 0:
            return input_ids[:, past_length(inputs.get(CACHE_NAME)) :]
        token_ids = self.model.visual_token_ids.to(embeddings.device)
        new_ids = torch.full(embeddings.shape[:2], -1, device=embeddings.device)
        for token_id, vector in zip(token_ids, self.get_input_embeddings()(token_ids), strict=True):
            new_ids[(embeddings == vector).all(-1)] = token_id
        return new_ids

    def _check_placeholders(
        self, input_ids: torch.LongTensor, encoded: dict[str, VisualFeatures]
    ) -> None:
        """Refuse encoded visuals and placeholders that differ, before their rows are repeated."""
        for kind, features in encoded.items():
            given = sum(len(embeddings) for embeddings in features.pooler_output)
            found = int(self._placeholders(input_ids, kind).sum())
            if found != given:
                raise ValueError(
                    f"{kind} features and {kind} tokens do not match: {given} features, "
                    f"{found} tokens"
                )
