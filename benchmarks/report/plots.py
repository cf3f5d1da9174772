"""Plots of a report."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402  (the backend is chosen first)

from .figures import Figures, Line  # noqa: E402

PERCENT = matplotlib.ticker.PercentFormatter(xmax=1, decimals=0)
OURS = ("GlimpsePrune", "GlimpsePrune, capped")


def plot_all(figures: Figures, folder: Path) -> dict[str, str]:
    """Write the plots; returns what each file shows."""
    shown = {}
    for name, title, value in (
        ("kept", "visual tokens kept after pruning", lambda line: line.kept),
        ("layers", "visual tokens a layer, averaged over layers", lambda line: line.over_layers),
        ("flops", "counted prefill operations, decoder and scoring", lambda line: line.flops),
    ):
        file = f"accuracy_over_{name}.png"
        _plot_accuracy(figures, value, f"{title} (share of all tokens')", folder / file)
        shown[file] = f"Accuracy over {title}."
    return shown


def _plot_accuracy(figures: Figures, value, title: str, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(8.5, 4.6))
    by_name: dict[str, list[Line]] = {}
    for line in figures.lines.values():
        by_name.setdefault(line.name, []).append(line)
    markers = "os^vDP*X<>hp"
    colours = pyplot.get_cmap("tab20").colors
    for index, (name, lines) in enumerate(by_name.items()):
        lines = sorted(lines, key=value)
        middle = [line.accuracy.mean for line in lines]
        low = [line.accuracy.mean - line.accuracy.low for line in lines]
        high = [line.accuracy.high - line.accuracy.mean for line in lines]
        axes.errorbar(
            [value(line) for line in lines],
            middle,
            yerr=[low, high],
            label=name,
            marker=markers[index % len(markers)],
            color="black" if name in OURS else colours[index % len(colours)],
            linewidth=2.0 if name in OURS else 1.0,
            markersize=7 if name in OURS else 5,
            capsize=2,
        )
    axes.set_xlabel(title)
    axes.set_ylabel("accuracy (95 % interval)")
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
