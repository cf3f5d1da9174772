"""Figures that a run logs beside its losses, averaged over questions and processes."""

from collections import defaultdict

import torch

from modeling_glimpseprune.glimpse_record import GlimpseRecord

from .stage1_losses import mask_figures

OF_EVIDENCE = ("precision", "recall", "iou")  # figures of questions that have any


def figures_of(
    record: GlimpseRecord, evidence: torch.Tensor, num_rows: int
) -> dict[str, torch.Tensor]:
    """Figures of the model's choice; those about evidence for the rows that have any."""
    figures = mask_figures(record.keep_mask, evidence, record.rows, num_rows)
    located = torch.zeros(num_rows, dtype=torch.bool, device=evidence.device)
    located[record.rows[evidence]] = True
    return figures | {name: figures[name][located] for name in OF_EVIDENCE}


class FigureMeans:
    """Running sums of figures; they wait for the device only when the means are read."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, figures: dict[str, torch.Tensor]) -> None:
        """Add figures of a batch, each `(rows,)` or of those rows that have it."""
        for name, values in figures.items():
            self._sums[name] = self._sums[name].to(values.device) + values.detach().float().sum()
            self._counts[name] += len(values)

    def clear(self) -> None:
        self._sums.clear()
        self._counts.clear()

    def means(self, accelerator) -> dict[str, float]:
        """The mean of each figure over all rows of all processes that have it."""
        names = list(self._sums)
        if not names:
            return {}
        counts = torch.tensor([self._counts[name] for name in names], dtype=torch.float32)
        sums = torch.stack([self._sums[name] for name in names])
        totals = torch.stack([sums, counts.to(sums.device)]).to(accelerator.device)
        sums, counts = accelerator.reduce(totals, "sum").tolist()
        figures = zip(names, sums, counts, strict=True)
        return {name: value / count for name, value, count in figures if count}
