"""`glimpseprune calibrate`: which prune layer a checkpoint can afford, and the threshold for it."""

import argparse
from pathlib import Path

from .model_arguments import add_model_arguments

ROW = "{:>3} {:>22} {:>9} {:>10} {:>10} {:>10} {:>9} {:>7} {:>13}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        type=Path,
        help="JSON lines in the Visual-CoT schema; answers and boxes may be left out "
        "(default: validation pages of the tiny world)",
    )
    parser.add_argument("--image-folder", type=Path, help="default: the data file's folder")
    parser.add_argument("--questions", type=int, default=400, help="at most so many")
    parser.add_argument("--seed", type=int, default=0, help="of the tiny world's pages")
    parser.add_argument("--prune-layers", type=int, nargs="+", help="default: spread over 0..K")
    parser.add_argument(
        "--retention", type=float, default=0.11, help="share of the visual tokens to keep"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        help="accuracy (agreement without reference answers) that the late glimpse may lose",
    )
    parser.add_argument(
        "--redundant-patches",
        type=float,
        metavar="GREY_LEVELS",
        help="leave out patches that their neighbours predict within so many grey levels of 0 to "
        "255 (default: as configured)",
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--output", type=Path, help="JSON file; a curve is drawn beside it")
    parser.add_argument(
        "--write",
        action="store_true",
        help="put the chosen prune layer and threshold, and --redundant-patches where it is given, "
        "into the configuration of --model",
    )


def run(arguments: argparse.Namespace) -> int:
    from ..calibration import calibrate, candidate_layers
    from ..loading import load_model, tiny_repository

    repository = arguments.model or tiny_repository()
    config_file = Path(repository) / "config.json"
    if arguments.write and not config_file.is_file():
        raise ValueError(f"--write needs a repository in a folder, got {repository}")
    model, processor = load_model(repository, dtype=arguments.dtype)
    layers = candidate_layers(model.config.glimpse_layer, arguments.prune_layers)
    calibration = calibrate(
        model,
        processor,
        _samples(arguments),
        layers,
        arguments.retention,
        arguments.batch_size,
        arguments.max_new_tokens,
        arguments.redundant_patches,
    )
    _print(calibration)
    chosen = calibration.choose(arguments.tolerance)
    print(f"chosen: prune_layer {chosen.prune_layer}, prune_threshold {chosen.threshold:.6g}")
    if arguments.output:
        _save(calibration, chosen, arguments)
    if arguments.write:
        _write(config_file, chosen, arguments.redundant_patches)
        print(f"written: {config_file}")
    return 0


def _samples(arguments: argparse.Namespace) -> list:
    from .evaluate import read_samples

    return read_samples(
        arguments.data,
        arguments.image_folder,
        arguments.questions,
        arguments.seed,
        split="validation",
        need_references=False,
    )


def _print(calibration) -> None:
    from ..calibration import SHARES

    recall = "late mask at " + " ".join(f"{share:.0%}" for share in SHARES)
    print(
        f"{calibration.questions} questions, all tokens: accuracy "
        f"{_figure(calibration.base_accuracy)}"
    )
    if calibration.redundant_patches is not None:
        print(
            f"redundant_patches {calibration.redundant_patches:g}: {calibration.encoded:.1%} of "
            "the tokens encoded; shares below are of all tokens"
        )
    head = ("evidence", "threshold", "retention", "agreement", "accuracy", "cost", "with encoder")
    print(ROW.format("P", recall, *head))
    for each in calibration.layers:
        print(
            ROW.format(
                each.prune_layer,
                " ".join(f"{value:.3f}" for value in each.late_recall),
                _figure(each.evidence_recall),
                f"{each.threshold:.3g}",
                _figure(each.retention),
                _figure(each.agreement),
                _figure(each.accuracy),
                _figure(each.cost),
                _figure(each.cost_with_encoder),
            )
        )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _save(calibration, chosen, arguments: argparse.Namespace) -> None:
    import json

    import torch
    import transformers

    settings = {
        "model": str(arguments.model or "hub_configs/tiny"),
        "data": str(arguments.data or "tiny world, validation pages"),
        "dtype": arguments.dtype,
        "seed": arguments.seed,
        "tolerance": arguments.tolerance,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    content = {
        "settings": settings,
        "chosen": chosen.prune_layer,
        "calibration": calibration.as_json(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    picture = arguments.output.with_suffix(".png")
    if _draw(calibration, picture):
        print(f"curve: {picture}")


def _draw(calibration, path: Path) -> bool:
    """Draw the figures over the prune layer; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no curve: matplotlib is not installed (extra `report`)")
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    layers = [each.prune_layer for each in calibration.layers]
    curves = {
        "late mask found at 11 %": [each.late_recall[1] for each in calibration.layers],
        "evidence kept": [each.evidence_recall for each in calibration.layers],
        "answers as unpruned": [each.agreement for each in calibration.layers],
        "accuracy": [each.accuracy for each in calibration.layers],
        "prefill operations": [each.cost for each in calibration.layers],
    }
    for name, values in curves.items():
        if None not in values:
            axes.plot(layers, values, "o-", label=name)
    axes.set(xlabel="prune layer P", ylim=(0, 1.02))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def _write(config_file: Path, chosen, redundant_patches: float | None) -> None:
    import json

    config = json.loads(config_file.read_text(encoding="utf-8"))
    config |= {"prune_layer": chosen.prune_layer, "prune_threshold": chosen.threshold}
    if redundant_patches is not None:
        config["redundant_patches"] = redundant_patches
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
