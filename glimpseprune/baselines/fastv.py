"""FastV (arXiv 2403.06764): drop at a shallow layer what the prompt's last token ignores there.

With the paper's K = 2 the attention of the second layer is averaged over heads, and the layers
after it work on the highest tokens. Simplified: kept tokens keep their positions, and only visual
tokens compete.
"""

from dataclasses import dataclass

from .staged_drops import StagedDrops


@dataclass(frozen=True)
class FastV(StagedDrops):
    """One drop.

    Attributes:
        full_layers: the paper's K, layers that work on all tokens.
    """

    name: str = "FastV-like"
    full_layers: int = 2

    def stages(self, layers: int) -> list[tuple[int, float]]:
        return [(self.full_layers - 1, self.ratio)]
