"""The visuals of a call as they are given: what each takes, and which of them are new."""

from dataclasses import dataclass
from itertools import accumulate, compress, groupby

import torch

from .fingerprints import pixels_hash
from .later_turns import new_visuals


@dataclass
class GivenVisual:
    """One image or video of a call.

    Attributes:
        kind: `"image"` or `"video"`.
        row: row of the batch.
        first, last: columns of its first and last placeholder.
        pixels: its part of the pixel tensor.
    """

    kind: str
    row: int
    first: int
    last: int
    pixels: torch.Tensor

    @property
    def hash(self) -> str:
        return pixels_hash(self.pixels)


class GivenVisualsMixin:
    """The part of a backbone that knows what its arguments say of images and videos."""

    def visual_sizes(self, kind: str, **inputs) -> list[int]:
        """Placeholders of each visual of a kind, from the arguments that describe it."""
        raise NotImplementedError

    def pixel_rows(self, kind: str, **inputs) -> list[int]:
        """Rows of the pixel tensor that each visual takes."""
        return [1] * len(inputs[self.visual_inputs[kind][0]])

    def drop_cached_visuals(self, input_ids: torch.LongTensor, past: int, inputs: dict) -> dict:
        """Inputs of a later turn without the visuals whose tokens the cache holds.

        Args:
            input_ids: `(batch, length)`, the whole conversation.
            past: tokens that the cache holds.
            inputs: the call's other arguments.

        Raises:
            ValueError: when images or videos and placeholders differ in number.
        """
        inputs = dict(inputs)
        for kind, names in self.visual_inputs.items():
            pixels = inputs.get(names[0])
            if pixels is None:
                continue
            sizes = self.visual_sizes(kind, **inputs)
            token_id = getattr(self.config, f"{kind}_token_id")
            inputs = self._select_visuals(
                kind, inputs, new_visuals(input_ids, token_id, past, sizes)
            )
        return inputs

    def place_visuals(self, input_ids: torch.LongTensor, inputs: dict) -> list[GivenVisual]:
        """Where the visuals of a call stand, those of all placeholders or of the last ones.

        Args:
            input_ids: `(batch, length)`.
            inputs: the call's other arguments.
        """
        found = []
        for kind, names in self.visual_inputs.items():
            if (pixels := inputs.get(names[0])) is None:
                continue
            sizes = self.visual_sizes(kind, **inputs)
            places = (input_ids == getattr(self.config, f"{kind}_token_id")).nonzero().tolist()
            first = len(places) - sum(sizes)
            starts = (first + before for before in accumulate(sizes[:-1], initial=0))
            parts = pixels.split(self.pixel_rows(kind, **inputs))
            for start, size, part in zip(starts, sizes, parts, strict=True):
                row, column = places[start]
                found.append(GivenVisual(kind, row, column, places[start + size - 1][1], part))
        return found

    def keep_visuals(self, inputs: dict, visuals: list[GivenVisual], wanted: list[bool]) -> dict:
        """A call's inputs with some of its visuals.

        Args:
            visuals: all of them, from `place_visuals`.
            wanted: which.
        """
        for kind in self.visual_inputs:
            flags = [flag for each, flag in zip(visuals, wanted, strict=True) if each.kind == kind]
            if flags:
                inputs = self._select_visuals(kind, inputs, flags)
        return inputs

    def _select_visuals(self, kind: str, inputs: dict, wanted: list[bool]) -> dict:
        """Inputs with those visuals of a kind for which `wanted` is True."""
        if all(wanted):
            return inputs
        names, inputs = self.visual_inputs[kind], dict(inputs)
        parts = inputs[names[0]].split(self.pixel_rows(kind, **inputs))
        inputs[names[0]] = torch.cat([*compress(parts, wanted)]) if any(wanted) else None
        notes = self.visual_notes.get(kind, ())
        for name in (*names[1:], *notes):
            values = inputs.get(name)
            if isinstance(values, torch.Tensor):
                inputs[name] = values[wanted] if any(wanted) else None
            elif name in notes and values is not None:
                inputs[name] = [*compress(values, wanted)] or None
        return {name: value for name, value in inputs.items() if value is not None}

    def repeat_visuals(self, input_ids: torch.LongTensor, inputs: dict, repeats: int) -> dict:
        """What describes the visuals of a batch whose rows are repeated, each row's together.

        Args:
            input_ids: `(batch, length)` with the placeholders of just these visuals.
            inputs: the call's other arguments.

        Raises:
            ValueError: when images or videos and placeholders differ in number.
        """
        repeated = {}
        for kind, names in self.visual_inputs.items():
            if (pixels := inputs.get(names[0])) is None:
                continue
            sizes = self.visual_sizes(kind, **inputs)
            rows = (input_ids == getattr(self.config, f"{kind}_token_id")).nonzero()[:, 0].tolist()
            if sum(sizes) != len(rows):
                raise ValueError(
                    f"{len(sizes)} {kind}s and the prompts' {kind} tokens do not match: they fill "
                    f"{sum(sizes)} tokens, of which there are {len(rows)}"
                )
            firsts = accumulate(sizes[:-1], initial=0)
            of_rows = groupby(range(len(sizes)), key=[rows[first] for first in firsts].__getitem__)
            order = [each for _, of_row in of_rows for each in [*of_row] * repeats]
            parts = pixels.split(self.pixel_rows(kind, **inputs))
            repeated[names[0]] = torch.cat([parts[each] for each in order])
            for name in (*names[1:], *(notes := self.visual_notes.get(kind, ()))):
                values = inputs.get(name)
                if isinstance(values, torch.Tensor):
                    repeated[name] = values[order]
                elif name in notes and values is not None:
                    repeated[name] = [values[each] for each in order]
        return repeated

    def visual_counts(self, input_ids: torch.LongTensor, **inputs) -> list[int]:
        """Visual tokens of each prompt: what a keep mask has to cover.

        Args:
            input_ids: `(batch, length)`.
            inputs: the prompts' other inputs.
        """
        visual = self.visual_token_ids.to(input_ids.device)
        return torch.isin(input_ids, visual).sum(1).tolist()

    def placeholders(
        self, input_ids: torch.LongTensor | None, masks: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor | None:
        """`(batch, length)` bool, True at placeholders of any kind; None where nobody can tell.

        Args:
            masks: by kind, where visuals were encoded, for prompts without ids.
        """
        found = list((masks or {}).values())
        if input_ids is not None:
            kinds = self.visual_inputs
            found = [input_ids == getattr(self.config, f"{kind}_token_id") for kind in kinds]
        return torch.stack(found).any(0) if found else None

    @property
    def visual_token_ids(self) -> torch.Tensor:
        """Ids of the placeholders."""
        return torch.tensor(
            [getattr(self.config, f"{kind}_token_id") for kind in self.visual_inputs]
        )
