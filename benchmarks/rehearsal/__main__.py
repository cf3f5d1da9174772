"""Run all steps, one after the other, and write what each took.

    python -m benchmarks.rehearsal --work FOLDER [--geometry 3b]

`WORK/rehearsal.json` is written after every step; interrupted, or when a step failed, the same
command goes on behind the last one that went well.
"""

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from glimpseprune.loading import REPOSITORY
from glimpseprune.portable import read_json, write_json

from .material import GEOMETRIES
from .measured import disk_bytes, run_measured
from .steps import INSPECT_HUB, PUSH, Step, steps

TOKEN = "hf_rehearsal"
BAR = "%|"  # in lines of progress
LINES = 3  # of a command's output that are kept
TAIL = 3000  # characters of a failed command's output
SETTINGS = (
    "geometry",
    "steps",
    "stage2_steps",
    "batch_size",
    "new_tokens",
    "questions",
    "prune_layers",
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.rehearsal", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for everything on the way")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--grid", type=int, nargs=2, default=(18, 15), help="photo to ask about, in tokens"
    )
    parser.add_argument(
        "--question-grid",
        type=int,
        nargs=2,
        default=(8, 7),
        help="photos to calibrate and train on, in tokens",
    )
    parser.add_argument("--steps", type=int, default=2, help="of each stage 1")
    parser.add_argument("--stage2-steps", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1, help="of stage 1; the recipes' is 8")
    parser.add_argument("--new-tokens", type=int, default=8, help="length of answers")
    parser.add_argument("--questions", type=int, default=3, help="to calibrate on, at most 6")
    parser.add_argument("--prune-layers", type=int, nargs="+", default=[6], help="to calibrate")
    parser.add_argument("--output", type=Path, help="a copy of WORK/rehearsal.json at the end")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run what is missing; returns 0, or 1 when a step failed."""
    arguments = parse(argv)
    arguments.work = arguments.work.absolute()
    arguments.work.mkdir(parents=True, exist_ok=True)
    report, wanted = _report(arguments), steps(arguments)
    if INSPECT_HUB not in report["steps"]:
        report["steps"].pop(PUSH, None)  # the Hub forgets with this process
    with _hub(arguments.work) as hub:
        for step in wanted:
            if step.name in report["steps"]:
                continue
            if not take(step, arguments, hub, report):
                return 1
            write_json(arguments.work / "rehearsal.json", report)
    print("\n".join(table(report)))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, report)
    return 0


def take(step: Step, arguments: argparse.Namespace, hub: Mapping[str, str], report: dict) -> bool:
    """Run one step and put its figures into the report; returns whether it went well."""
    for folder in step.writes:
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
    before = disk_bytes([arguments.work])
    head = [] if step.python else ["-m", "glimpseprune.cli"]
    taken = run_measured(
        [sys.executable, *head, *step.arguments],
        _environment(arguments) | (hub if step.with_hub else {}),
        arguments.work,
        arguments.work / "step.log",
    )
    if taken.returncode != 0:
        print(f"{step.shown}\n{taken.output[-TAIL:]}", file=sys.stderr)
        return False
    figures = {
        "command": within(arguments.work, step.shown),
        "seconds": round(taken.seconds, 1),
        "processor_seconds": round(taken.processor_seconds, 1),
        "peak_bytes": taken.peak_bytes,
        "peak_own_bytes": taken.peak_own_bytes,
        "disk_bytes": disk_bytes([arguments.work]) - before,
        "said": [
            within(arguments.work, line) for line in taken.output.splitlines() if BAR not in line
        ][-LINES:],
    }
    report["steps"][step.name] = figures
    show(step.name, figures)
    for folder in step.drops:
        shutil.rmtree(folder, ignore_errors=True)
    return True


def within(folder: Path, text: str) -> str:
    """A command or a line of output as seen from a folder, wherever it lies."""
    return text.replace(f"{folder}/", "").replace(str(folder), "FOLDER")


def show(name: str, figures: dict) -> None:
    """Print one row."""
    print(
        f"{name:20} {figures['seconds']:8.1f} s  {figures['processor_seconds']:8.1f} s of processor"
        f"  peak {figures['peak_bytes'] / 2**30:6.2f} GiB, {figures['peak_own_bytes'] / 2**30:6.2f}"
        f" without mapped files  disk {figures['disk_bytes'] / 2**30:+6.2f} GiB",
        flush=True,
    )


def table(report: dict) -> list[str]:
    """Rows of a Markdown table of what each step took."""
    head = ["step", "processor seconds", "peak memory", "of it own", "disk"]
    rows = [head, ["---"] * len(head)]
    for name, figures in report["steps"].items():
        sizes = [figures[each] for each in ("peak_bytes", "peak_own_bytes", "disk_bytes")]
        gibibytes = [f"{max(0, size) / 2**30:.1f} GiB" for size in sizes]
        rows.append([name, f"{figures['processor_seconds']:.0f}", *gibibytes])
    return [f"| {' | '.join(row)} |" for row in rows]


def _report(arguments: argparse.Namespace) -> dict:
    """The report so far.

    Raises:
        ValueError: when the folder holds one of other settings.
    """
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    settings |= {name: list(getattr(arguments, name)) for name in ("grid", "question_grid")}
    settings |= {"device": arguments.device}
    settings |= {"machine": platform.machine(), "threads": os.environ.get("OMP_NUM_THREADS")}
    settings |= {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
    path = arguments.work / "rehearsal.json"
    if not path.exists():
        return {"settings": settings, "steps": {}}
    report = read_json(path)
    if report["settings"] != settings:
        raise ValueError(f"{path} is of other settings: {report['settings']}")
    return report


def _environment(arguments: argparse.Namespace) -> dict[str, str]:
    """Of a step: this code, no network, and a cache in the folder."""
    own = {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "HF_HOME": str(arguments.work / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    if arguments.device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""
    return {name: each for name, each in os.environ.items() if not name.startswith("HF_")} | own


@contextmanager
def _hub(work: Path) -> Iterator[dict[str, str]]:
    """The tests' Hub on loopback, which keeps its files in the folder; the variables it needs."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    import hub_server

    store = work / "hub"
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir()
    with hub_server.running(store, TOKEN) as server:
        yield {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": server.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
        }


if __name__ == "__main__":
    raise SystemExit(main())
