"""What the page says under each visual token, as classes to predict and as a stand-in vector.

Two descriptions are made from a page's layout alone, never from a question:

- the characters under a token, on a grid of two rows and four columns of 7 x 14 pixels;
- the token's card: the two letters of the key that owns it, the digits of the value that lie in
  it by their place in the number, and the colour of the tile under it.

The vision encoder learns to say both. `CardCodes` turns a card into a vector, with which the
language model can learn to look things up before the vision encoder can read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .model import CODE_SCALE
from .pages import COLOUR_NAMES, LETTERS, TOKEN, Page

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGITS = "0123456789"
CHARACTERS = DIGITS + LETTERS
CELL_ROWS, CELL_COLUMNS = 2, 4
CELLS = CELL_ROWS * CELL_COLUMNS
CHARACTER_CLASSES = 1 + len(CHARACTERS)
CARD_SIZES = (1 + len(LETTERS),) * 2 + (11,) * 4 + (1 + len(COLOUR_NAMES),)
CARD_OFFSETS = tuple(int(sum(CARD_SIZES[:slot])) for slot in range(len(CARD_SIZES)))


def character_targets(page: Page) -> np.ndarray:
    """Classes `(tokens, cells)` of the characters under each token; 0 is blank."""
    grid = np.zeros((page.rows * CELL_ROWS, page.columns * CELL_COLUMNS), dtype=np.int64)
    for label in page.labels:
        for mark in label.marks:
            x, y = mark.centre
            row, column = int(y * CELL_ROWS / TOKEN), int(x * CELL_COLUMNS / TOKEN)
            grid[row, column] = 1 + CHARACTERS.index(mark.character)
    cells = grid.reshape(page.rows, CELL_ROWS, page.columns, CELL_COLUMNS)
    return cells.transpose(0, 2, 1, 3).reshape(page.rows * page.columns, CELLS)


def card_targets(page: Page) -> np.ndarray:
    """Classes `(tokens, slots)` of each token's card; 0 is blank."""
    cards = np.zeros((page.rows, page.columns, len(CARD_SIZES)), dtype=np.int64)
    for label in page.labels:
        x0, y0, x1, y1 = ((edge + TOKEN // 2) // TOKEN for edge in label.tile)
        cards[y0:y1, x0:x1, 6] = 1 + COLOUR_NAMES.index(label.colour)
        for place, mark in enumerate(label.marks):
            x, y = mark.centre
            card = cards[int(y / TOKEN), int(x / TOKEN)]
            card[:2] = [1 + LETTERS.index(letter) for letter in label.key]
            if place >= 2:
                card[place] = 1 + int(mark.character)
    return cards.reshape(page.rows * page.columns, len(CARD_SIZES))


class CardCodes(nn.Module):
    """A fixed vector for each entry of a card; the blank entries are zero.

    An entry's vector is the language model's fresh embedding of its letter, digit or colour,
    turned by a random rotation of its slot (the first letter's slot is not turned). What is
    written on the page and what is written in the question are so related from the start.
    """

    def __init__(self, embeddings: torch.Tensor, entry_ids: list[list[int]], seed: int) -> None:
        """Take embeddings `(vocabulary, width)` and, per slot, the token of each class but 0."""
        super().__init__()
        width = embeddings.shape[1]
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for slot, ids in enumerate(entry_ids):
            turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
            vectors = embeddings.detach()[ids]
            parts += [torch.zeros(1, width), vectors if slot == 0 else vectors @ turn]
        self.register_buffer("codes", torch.cat(parts))
        self.register_buffer("offsets", torch.tensor(CARD_OFFSETS), persistent=False)

    def forward(self, cards: torch.Tensor) -> torch.Tensor:
        """The sum of the codes `(..., width)` of cards `(..., slots)`."""
        return self.codes[cards + self.offsets].sum(-2)


def entry_tokens(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """For each slot of a card, the token of each class but the blank."""
    letters, digits, colours = (
        tokenizer.convert_tokens_to_ids(list(texts)) for texts in (LETTERS, DIGITS, COLOUR_NAMES)
    )
    return [letters] * 2 + [digits] * 4 + [colours]


class PageHeads(nn.Module):
    """Reads characters and cards off visual tokens, for the losses that teach seeing.

    The card classifier is the table of codes itself, so a token that says its card well also
    lies near the card's code.
    """

    def __init__(self, width: int, codes: CardCodes, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.characters = nn.Linear(width, CELLS * CHARACTER_CLASSES)
        nn.init.normal_(self.characters.weight, std=width**-0.5, generator=generator)
        nn.init.zeros_(self.characters.bias)
        self.card_bias = nn.Parameter(torch.zeros(sum(CARD_SIZES)))
        self.register_buffer("card_weight", codes.codes / (CODE_SCALE**2 * width) * 10.0)

    def losses(
        self, tokens: torch.Tensor, characters: torch.Tensor, cards: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Losses and accuracies of tokens `(tokens, width)` against both descriptions.

        Blank entries count for less in the losses; accuracies are over the others.
        """
        logits = self.characters(tokens).float().view(-1, CELLS, CHARACTER_CLASSES)
        read_loss, read_accuracy = _weighted_loss(logits, characters)
        card_logits = functional.linear(tokens, self.card_weight, self.card_bias).float()
        slots = [
            _weighted_loss(part, cards[:, slot])
            for slot, part in enumerate(card_logits.split(CARD_SIZES, dim=-1))
        ]
        return {
            "read_loss": read_loss,
            "read_accuracy": read_accuracy,
            "card_loss": torch.stack([loss for loss, _ in slots]).mean(),
            "owner_accuracy": (slots[0][1] + slots[1][1]) / 2,
            "digit_accuracy": (slots[2][1] + slots[3][1]) / 2,
            "colour_accuracy": slots[6][1],
        }


def _weighted_loss(
    logits: torch.Tensor, classes: torch.Tensor, blank_weight: float = 0.2
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = logits.new_ones(logits.shape[-1])
    weights[0] = blank_weight
    loss = functional.cross_entropy(logits.flatten(0, -2), classes.flatten(), weight=weights)
    written = classes > 0
    hits = (logits.argmax(-1) == classes)[written].float()
    return loss, hits.mean().detach() if written.any() else torch.tensor(1.0)
