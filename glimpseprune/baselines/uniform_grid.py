"""Tokens spread evenly over the image."""

import math

import torch

from .prompt_tokens import PromptTokens
from .scorer import Scorer


class UniformGrid(Scorer):
    """Keeps the tokens nearest to the points of a regular grid with as many points as the budget.

    Each view (image, frame) of a prompt gets points in proportion to its tokens. Rows of the grid
    have equal numbers of points or one more; within a row points are evenly spaced.
    """

    def scores(self, prompt: PromptTokens) -> torch.Tensor:
        scores = torch.zeros(len(prompt), device=prompt.geometry.device)
        starts = (prompt.geometry[:, 1:3].sum(1) == 0).nonzero()[:, 0].tolist()
        ends = [*starts[1:], len(prompt)]
        for start, end in zip(starts, ends, strict=True):
            height, width = prompt.geometry[start, 4:].tolist()
            share = end * prompt.budget // len(prompt) - start * prompt.budget // len(prompt)
            for row, column in grid_points(height, width, share):
                scores[start + row * width + column] = 1.0
        return scores


def grid_points(height: int, width: int, number: int) -> list[tuple[int, int]]:
    """`number` different cells of a height x width grid, evenly spread.

    The number of rows is the one whose spacing is nearest to the columns' spacing.
    """
    if number == 0:
        return []
    rows = round(math.sqrt(number * height / width))
    rows = min(max(rows, math.ceil(number / width), 1), height, number)
    points = []
    for row in range(rows):
        columns = (row + 1) * number // rows - row * number // rows
        y = int((row + 0.5) * height / rows)
        points += [(y, int((place + 0.5) * width / columns)) for place in range(columns)]
    return points
