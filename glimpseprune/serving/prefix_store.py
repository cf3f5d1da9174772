"""Prefixes of images that were asked about lately, bounded in bytes."""

import hashlib
from collections import OrderedDict
from threading import Lock
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from modeling_glimpseprune.given_visuals import GivenVisual
from modeling_glimpseprune.glimpse_prefix import GlimpsePrefix


class Found(NamedTuple):
    """What a store has for a prompt.

    Attributes:
        prefix: what `look` returned; None for a prompt without images.
        inputs: the prompt's inputs without pixels that the prefix holds.
        reused: tokens of the prompt that had been looked at before.
    """

    prefix: GlimpsePrefix | None
    inputs: dict
    reused: int


class PrefixStore:
    """Looks at the images of prompts, and keeps what was seen for the next question.

    A prefix belongs to its prompt's tokens up to an image, the hashes of the pixels, and the prune
    layer. Where only the first images of a prompt are known, the prefix grows by the others.

    Args:
        limit: bytes of all prefixes kept; those that were not asked for longest go first.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._prefixes: OrderedDict[str, GlimpsePrefix] = OrderedDict()
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        with self._lock:
            return sum(prefix.nbytes for prefix in self._prefixes.values())

    def __len__(self) -> int:
        return len(self._prefixes)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._prefixes.clear()

    def find(self, model: PreTrainedModel, inputs: dict, prune_layer: int | None) -> Found:
        """A prefix of one prompt, looked at now unless it is known.

        Args:
            inputs: of a prompt without padding, `input_ids` `(1, length)` among them.
            prune_layer: what `look` takes.
        """
        ids = inputs["input_ids"]
        visuals = model.model.place_visuals(ids, inputs)
        if not visuals:
            return Found(None, inputs, 0)
        names = _names(ids[0], visuals, prune_layer)
        prefix, known = self._longest(names)
        reused = 0 if prefix is None else prefix.get_seq_length()
        if known < len(names):
            prefix = model.look(**inputs, cache=prefix, prune_layer=prune_layer)
            self._keep(names[-1], prefix)
        behind = model.model.keep_visuals(inputs, visuals, [False] * len(visuals))
        return Found(prefix, behind, reused)

    def _longest(self, names: list[str]) -> tuple[GlimpsePrefix | None, int]:
        """The prefix that takes most of the visuals, and how many it takes."""
        with self._lock:
            for count in range(len(names), 0, -1):
                if (name := names[count - 1]) in self._prefixes:
                    self._prefixes.move_to_end(name)
                    return self._prefixes[name], count
        return None, 0

    def _keep(self, name: str, prefix: GlimpsePrefix) -> None:
        with self._lock:
            self._prefixes[name] = prefix
            while sum(each.nbytes for each in self._prefixes.values()) > self.limit:
                self._prefixes.popitem(last=False)


def _names(ids: torch.LongTensor, visuals: list[GivenVisual], prune_layer: int | None) -> list[str]:
    """What tells the prefix up to each visual of a prompt, in prompt order."""
    digest = hashlib.sha256(repr(prune_layer).encode())
    names, start = [], 0
    for visual in sorted(visuals, key=lambda visual: visual.first):
        digest.update(ids[start : visual.last + 1].cpu().numpy().tobytes())
        digest.update(visual.hash.encode())
        names.append(digest.copy().hexdigest())
        start = visual.last + 1
    return names
