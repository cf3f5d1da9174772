"""PyramidDrop (arXiv 2410.17247): four equal stages, each passing on a fixed share of its tokens.

Tokens are ranked by the attention of the prompt's last token in the last layer of a stage.
Simplified: the share is chosen so that the last stage works on the wanted ratio (the paper uses one
half); kept tokens keep their positions.
"""

from dataclasses import dataclass

from .staged_drops import StagedDrops


@dataclass(frozen=True)
class PyramidDrop(StagedDrops):
    """Several drops.

    Attributes:
        parts: stages that the decoder is divided into.
    """

    name: str = "PyramidDrop-like"
    parts: int = 4

    def stages(self, layers: int) -> list[tuple[int, float]]:
        share = self.ratio ** (1 / (self.parts - 1))
        ends = [int(layers * part / self.parts + 0.5) for part in range(1, self.parts)]
        return [(end - 1, share ** (index + 1)) for index, end in enumerate(ends)]
