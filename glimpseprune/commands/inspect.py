"""`glimpseprune inspect`: what a repository is, and whether its weights are sound."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "repository",
        nargs="?",
        help="folder or Hub id; of the latter, only headers are read (default: the tiny model)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")


def run(arguments: argparse.Namespace) -> int:
    from ..hub.inspection import inspect_repository
    from ..loading import tiny_repository

    repository = arguments.repository or tiny_repository()
    report = inspect_repository(repository, arguments.revision)
    for name, value in ({"repository": str(repository)} | describe(report)).items():
        print(f"{name:18} {value}")
    return 0


def describe(report) -> dict[str, str]:
    """The lines that are printed, by their names."""
    base = report.base or "not recorded"
    if report.base_revision:
        base += f" at {report.base_revision}"
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in report.base_dtypes.items())
    lines = {
        "family": report.family,
        "glimpse layer K": f"{report.glimpse_layer} of 0..{report.num_layers - 1}",
        "prune layer P": "K" if report.prune_layer is None else str(report.prune_layer),
        "predictor": f"{report.predictor_parameters:,} parameters, "
        f"{report.predictor_bytes / 1e6:.1f} MB",
        "glimpse weights": f"{report.glimpse_parameters:,} parameters, {report.glimpse_dtype}, "
        + ("trained" if report.trained else "NOT TRAINED: pruning will be refused"),
        "policy": f"prune_threshold {report.prune_threshold}, max_keep_ratio "
        f"{report.max_keep_ratio}, min_keep_tokens {report.min_keep_tokens}",
        "base": base,
        "contents": f"base ({dtypes} tensors) and glimpse weights"
        if report.base_included
        else "glimpse weights only: the base is fetched",
        "weights": f"sound: {report.weight_bytes / 1e6:,.1f} MB in {report.files} file(s)",
    }
    if report.commit:
        lines["commit"] = report.commit
    if report.pickles:
        lines["not read"] = f"{', '.join(report.pickles)}: pickles can run code"
    return lines
