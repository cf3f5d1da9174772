"""The commands of a user's whole way, from an official checkpoint to a published GlimpsePrune+."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .material import GEOMETRIES

HUB_NAME = "org/rehearsal"
PUSH, INSPECT_HUB = "push", "inspect, of the Hub"
LOAD = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__module__, model.dtype, f"{model.num_parameters():,} parameters")
"""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of the row in the table.
        arguments: of `glimpseprune`, or of Python where `python` is true.
        writes: folders that it makes.
        drops: folders that nothing needs afterwards, removed to save disk.
        with_hub: whether it talks to a Hub.
        python: see `arguments`.
    """

    name: str
    arguments: Sequence[str]
    writes: tuple[Path, ...] = ()
    drops: tuple[Path, ...] = ()
    with_hub: bool = False
    python: bool = False

    @property
    def shown(self) -> str:
        """The command as a user types it."""
        words = ["python" if self.python else "glimpseprune", *self.arguments]
        return " ".join("..." if "\n" in word else str(word) for word in words)


def steps(arguments: argparse.Namespace) -> list[Step]:
    """All steps in their order; each needs what those before it wrote."""
    work, recipe = arguments.work, GEOMETRIES[arguments.geometry].published
    base, official, photos = work / "base", work / "official", work / "photos"
    late, stage1, early = work / "late", work / "stage1", work / "early"
    adapter, merged, again, plus = (work / n for n in ("adapter", "merged", "again", "plus"))
    questions = photos / "questions.jsonl"
    photo = ["--image", photos / "photo.jpg", "--question", "What does the woman wear?"]
    photo += ["--max-keep-ratio", "0.25"]  # random weights may want to keep all
    tokens = ["--max-new-tokens", arguments.new_tokens]
    held = ["--dtype", "bfloat16"]
    material = ["-m", "benchmarks.rehearsal.material", "--geometry", arguments.geometry]
    size = ["--grid", *arguments.grid, "--question-grid", *arguments.question_grid]
    found = [
        Step(
            "material", [*material, *size, "--output", work], (base, official, photos), python=True
        ),
        Step(
            "convert-official",
            ["convert-official", "--base", base, "--glimpse", official, "--output", late],
            (late,),
        ),
        Step("inspect", ["inspect", late]),
        Step(PUSH, ["push", "--folder", late, "--push-to-hub", HUB_NAME], with_hub=True),
        Step(INSPECT_HUB, ["inspect", HUB_NAME], with_hub=True),
        Step("load", ["-c", LOAD, late], python=True),
        Step("ask", ["ask", "--model", late, *photo, *tokens, *held, "--output", work / "ask.png"]),
        _stage1("stage 1", f"stage1_{recipe}", base, stage1, arguments, drops=(stage1,)),
        Step(
            "stage 2",
            [
                *("train-stage2", "--recipe", f"stage2_{recipe}", "--base", base),
                *("--data", questions, "--output", adapter),
                *_set(
                    max_steps=arguments.stage2_steps,
                    logging_steps=1,
                    max_completion_length=arguments.new_tokens,
                    gradient_accumulation_steps=1,
                ),
            ],
            (adapter, _checkpoints(adapter)),
            (_checkpoints(adapter),),
        ),
        Step("merge", ["merge", "--adapter", adapter, "--output", merged], (merged,)),
        _stage1("stage 1 again", f"stage1_{recipe}", merged, again, arguments),
        Step(
            "convert-stage2",
            [
                *("convert-stage2", "--merged", merged, "--stage1", again, "--output", plus),
                *("--push-to-hub", f"{HUB_NAME}-plus"),
            ],
            (plus,),
            (merged, again, plus),
            with_hub=True,
        ),
        Step(
            "calibrate",
            [
                *("calibrate", "--model", late, "--data", questions, "--batch-size", 1, *held),
                *("--questions", arguments.questions, *tokens),
                *("--prune-layers", *arguments.prune_layers),
                *("--output", work / "calibration.json"),
            ],
        ),
        _stage1(
            "stage 1, early",
            f"stage1_{recipe}_early",
            base,
            early,
            arguments,
            ["--set", f"late_glimpse={late}"],
            drops=(early, late, base),
        ),
    ]
    return [_as_text(step) for step in found]


def _stage1(
    name: str,
    recipe: str,
    base: Path,
    output: Path,
    arguments: argparse.Namespace,
    others: Sequence[str] = (),
    drops: tuple[Path, ...] = (),
) -> Step:
    command = ["train-stage1", "--recipe", recipe, "--base", base, "--output", output]
    command += ["--data", arguments.work / "photos" / "questions.jsonl", *others]
    command += _set(
        max_steps=arguments.steps,
        logging_steps=1,
        per_device_train_batch_size=arguments.batch_size,
    )
    return Step(name, command, (output, _checkpoints(output)), (*drops, _checkpoints(output)))


def _set(**fields: int) -> list[str]:
    """Flags that set fields of a recipe's training."""
    return [
        word for name, value in fields.items() for word in ("--set", f"training.{name}={value}")
    ]


def _checkpoints(output: Path) -> Path:
    return output.with_name(f"{output.name}.checkpoints")


def _as_text(step: Step) -> Step:
    arguments = [str(word) for word in step.arguments]
    return Step(step.name, arguments, step.writes, step.drops, step.with_hub, step.python)
