"""What some states of the decoder are taught to hold: the letters of a key that is to be said.

Which label lies on the left of which is a loss about the page alone. The decoder's own visual
tokens learn it: those of a label are taught, some layers up, to say the key of the label in the
slot on its left. So a label can be asked for by way of another one. No question takes part in it.

The letter after the next is a loss about answers (see `AheadHead`).
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


class AheadHead(nn.Module):
    """Reads the second letter of a key off the state that is to say the first.

    A model of this size otherwise looks the second letter up by the first one said, and takes
    another key where several of the page begin alike. Looked up together, the second is at hand
    when it is its turn. Predicting tokens further ahead is known from
    Gloeckle et al., "Better & Faster Large Language Models via Multi-token Prediction", 2024.

    A letter is said by a fixed vector: its embedding, turned by a random rotation.
    """

    def __init__(self, letters: torch.Tensor, tokens: torch.Tensor, seed: int) -> None:
        """Take the letters' embeddings `(letters, width)` and their tokens `(letters,)`."""
        super().__init__()
        width = letters.shape[1]
        generator = torch.Generator().manual_seed(seed + 2)
        turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
        codes = letters.detach() @ turn * SHARPNESS / (CODE_SCALE * width)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("tokens", tokens, persistent=False)

    def figures(self, states: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss and accuracy of states `(batch, length, width)` that are to say `labels`.

        Of `labels` `(batch, length)`, each letter that another letter follows is one to look
        behind; without such letters the loss is zero and there is no accuracy.
        """
        is_letter = torch.isin(labels, self.tokens)
        first = is_letter[:, :-1] & is_letter[:, 1:]
        if not first.any():
            return {"ahead_loss": states.new_zeros(())}
        wanted = (labels[:, 1:][first][:, None] == self.tokens).int().argmax(-1)
        states = states[:, :-1][first].float()
        logits = functional.layer_norm(states, states.shape[-1:]) @ self.codes.T
        hits = (logits.argmax(-1) == wanted).float()
        return {
            "ahead_loss": functional.cross_entropy(logits, wanted),
            "ahead_accuracy": hits.mean().detach(),
        }
