"""A picture of a training run from what its trainer logged."""

import logging
from pathlib import Path

SHARES = ("retention", "precision", "recall", "iou", "accuracy")
EVALUATION = "eval_"

logger = logging.getLogger(__name__)


def plot_run(log_history: list[dict[str, float]], path: Path) -> bool:
    """Draw the loss and its parts, and the figures that are shares, over the steps.

    Args:
        log_history: a trainer's; of its entries `step`, what ends in `loss`, and shares are drawn,
            those of evaluations as dots.
        path: of the PNG file to write.

    Returns:
        Whether there was something to draw, and matplotlib (of the extra `train`) to draw it.
    """
    losses = _curves(log_history, lambda name: name.endswith("loss"))
    shares = _curves(log_history, lambda name: name in SHARES)
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


def _curves(log_history: list[dict[str, float]], is_drawn) -> dict[str, list[tuple[int, float]]]:
    """`(step, value)` points by name."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if is_drawn(name.removeprefix(EVALUATION)) and name != "train_loss":
                curves.setdefault(name, []).append((entry["step"], value))
    return curves
