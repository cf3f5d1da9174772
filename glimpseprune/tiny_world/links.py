"""What the labels of a page have to do with one another, for a loss that is about the page alone.

Where labels lie beside one another, or share a colour, one may be asked for by way of the other.
The decoder's own visual tokens learn the links: those of a label are taught, some layers up, to say
the key of the label in the slot on its left and of the label of its colour before it in reading
order. No question takes part in it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .pages import LETTERS, TOKEN, Label, Page, in_next_slot

LINKS = 2  # the label on the left, the label of the same colour before
CLASSES = 1 + len(LETTERS)


def link_targets(page: Page) -> np.ndarray:
    """Classes `(tokens, 2 * LINKS)` of the letters of linked keys.

    0 stands for no such label; -1 for a token without a character, which says nothing.
    """
    links = np.full((page.rows, page.columns, 2 * LINKS), -1, dtype=np.int64)
    last_of: dict[str, Label] = {}
    for label in page.labels:
        left = next((each for each in page.labels if in_next_slot(each, label)), None)
        before = last_of.get(label.colour)
        letters = [*_classes(left), *_classes(before)]
        for mark in label.marks:
            x, y = mark.centre
            links[int(y / TOKEN), int(x / TOKEN)] = letters
        last_of[label.colour] = label
    return links.reshape(page.rows * page.columns, 2 * LINKS)


def _classes(label: Label | None) -> list[int]:
    return [0, 0] if label is None else [1 + LETTERS.index(letter) for letter in label.key]


class LinkHead(nn.Module):
    """Reads the letters of linked keys off visual tokens."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.letters = nn.Linear(width, 2 * LINKS * CLASSES)
        nn.init.normal_(self.letters.weight, std=0.1 * width**-0.5, generator=generator)
        nn.init.zeros_(self.letters.bias)

    def figures(self, states: torch.Tensor, links: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss and accuracies of states `(tokens, width)` against classes `(tokens, 2 * LINKS)`.

        Accuracies are over tokens with such a label.
        """
        states = functional.layer_norm(states, states.shape[-1:])
        logits = self.letters(states).float().view(-1, 2 * LINKS, CLASSES)
        loss = functional.cross_entropy(logits.flatten(0, 1), links.flatten(), ignore_index=-1)
        hits = (logits.argmax(-1) == links).float()
        left, before = (
            hits[:, part][links[:, part] > 0].mean().detach() for part in (slice(0, 2), slice(2, 4))
        )
        return {"link_loss": loss, "left_accuracy": left, "before_accuracy": before}
