"""Which label lies on the left of which, for a loss that is about the page alone.

The decoder's own visual tokens learn it: those of a label are taught, some layers up, to say the
key of the label in the slot on its left. So a label can be asked for by way of another one. No
question takes part in it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .model import CODE_SCALE
from .pages import LETTERS, TOKEN, Label, Page, in_next_slot

KEY_LETTERS = 2
SHARPNESS = 30.0  # the logit of a state that is one letter's vector


def link_targets(page: Page) -> np.ndarray:
    """Classes `(tokens, 2)` of the letters of the key on the left.

    0 stands for no such label; -1 for a token without a character, which says nothing.
    """
    links = np.full((page.rows, page.columns, KEY_LETTERS), -1, dtype=np.int64)
    for label in page.labels:
        left = next((each for each in page.labels if in_next_slot(each, label)), None)
        letters = _classes(left)
        for mark in label.marks:
            x, y = mark.centre
            links[int(y / TOKEN), int(x / TOKEN)] = letters
    return links.reshape(page.rows * page.columns, KEY_LETTERS)


def _classes(label: Label | None) -> list[int]:
    return [0, 0] if label is None else [1 + LETTERS.index(letter) for letter in label.key]


class LinkHead(nn.Module):
    """Reads the letters of the key on the left off visual tokens.

    A letter is said by a fixed vector: its embedding, turned by a random rotation of its place, as
    on the cards. What moves through the decoder is so related to the words of questions.
    """

    def __init__(self, letters: torch.Tensor, seed: int) -> None:
        """Take the embeddings `(letters, width)`."""
        super().__init__()
        width = letters.shape[1]
        generator = torch.Generator().manual_seed(seed + 1)
        codes = []
        for _ in range(KEY_LETTERS):
            turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
            codes.append(functional.pad(letters.detach() @ turn, (0, 0, 1, 0)))
        self.register_buffer("codes", torch.stack(codes) * SHARPNESS / (CODE_SCALE * width))
        self.bias = nn.Parameter(torch.zeros(self.codes.shape[:2]))

    def figures(self, states: torch.Tensor, links: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss and accuracy of states `(tokens, width)` against classes `(tokens, 2)`.

        The accuracy is over tokens with a label on their left.
        """
        states = functional.layer_norm(states.float(), states.shape[-1:])
        logits = torch.einsum("td,lcd->tlc", states, self.codes) + self.bias
        loss = functional.cross_entropy(logits.flatten(0, 1), links.flatten(), ignore_index=-1)
        hits = (logits.argmax(-1) == links).float()
        return {"link_loss": loss, "left_accuracy": hits[links > 0].mean().detach()}
