"""A picture of a training run from what its trainer logged."""

import logging
import re
from pathlib import Path

PLOT = "training.png"
LOSSES = re.compile(r".*loss|kl|entropy")
SHARES = re.compile(r"retention|precision|recall|iou|accuracy|rewards/.+/mean")
EVALUATION = "eval_"

logger = logging.getLogger(__name__)


def plot_run(log_history: list[dict[str, float]], path: Path) -> bool:
    """Draw losses and divergences, and the figures that are shares, over the steps.

    Args:
        log_history: a trainer's; of its entries `step`, those that `LOSSES` and `SHARES` name, of
            evaluations as dots.
        path: of the PNG file to write.

    Returns:
        Whether there was something to draw, and matplotlib (of the extra `train`) to draw it.
    """
    losses, shares = (_curves(log_history, names) for names in (LOSSES, SHARES))
    if not losses and not shares:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no plot of the run: matplotlib is not installed (extra `train`)")
        return False
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, curves, title in zip(
        figure.subplots(1, 2), (losses, shares), ("loss", "share"), strict=True
    ):
        for name, points in curves.items():
            dots = name.startswith(EVALUATION)
            axes.plot(*zip(*points, strict=True), "o" if dots else "-", label=name)
        axes.set(xlabel="step", title=title)
        if curves:
            axes.legend(fontsize="small")
    figure.axes[1].set_ylim(0, 1)
    figure.savefig(path, dpi=120)
    return True


def _curves(
    log_history: list[dict[str, float]], drawn: re.Pattern
) -> dict[str, list[tuple[int, float]]]:
    """`(step, value)` points by name."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if drawn.fullmatch(name.removeprefix(EVALUATION)) and name != "train_loss":
                curves.setdefault(name, []).append((entry["step"], value))
    return curves
