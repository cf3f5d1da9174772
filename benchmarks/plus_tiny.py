"""GlimpsePrune+ on the tiny world, beside the same reinforcement learning without pruning.

    python -m benchmarks.plus_tiny --work runs/plus_tiny

starts from an earlier, less trained tiny repository out of the git history, and for each seed runs
stage 2 on pruned and on whole prompts, merges, and goes on with stage 1 on both results and on the
untouched repository. What is finished is kept in the working folder and not done again. The table
goes to `benchmarks/results/plus_tiny.json`, after every measurement.
"""

import argparse
import json
import statistics
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import torch
import transformers
import trl

from glimpseprune.data.visual_cot import read_visual_cot
from glimpseprune.data.visual_cot_collator import open_image
from glimpseprune.evaluation import Options, Sample, all_tokens, evaluate, pruned
from glimpseprune.loading import REPOSITORY
from glimpseprune.tiny_world.dataset import write_pages
from glimpseprune.tiny_world.pages import PageSettings
from glimpseprune.training.base import load_for_training
from glimpseprune.training.merging import merge_stage2
from glimpseprune.training.recipe import read_recipe
from glimpseprune.training.stage1 import train_stage1
from glimpseprune.training.stage1_config import Stage1Recipe
from glimpseprune.training.stage2 import train_stage2
from glimpseprune.training.stage2_config import Stage2Recipe

TINY = "hub_configs/tiny"
RESULTS = REPOSITORY / "benchmarks" / "results" / "plus_tiny.json"
QUESTIONS_A_PAGE = 8
PROMPTS_A_STEP = 32


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for everything on the way")
    parser.add_argument("--revision", default="e223b72^", help="commit of the tiny repository")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stage2-steps", type=int, default=32)
    parser.add_argument("--stage1-steps", type=int, default=25)
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of stage 2")
    parser.add_argument("--questions", type=int, default=512, help="test questions")
    parser.add_argument("--grid", type=int, nargs=2, default=(8, 8), help="page size in tokens")
    parser.add_argument("--finished-only", action="store_true", help="train nothing: table alone")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run what is missing and write the table; returns 0."""
    arguments = parse(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    base = earlier_repository(arguments.work, arguments.revision)
    test = pages(arguments, "test", 0, arguments.questions)
    measured: dict[str, list[dict[str, float]]] = {}
    for arm in arms(arguments, base):
        if arguments.finished_only and not arm.kept(arguments.work).exists():
            continue
        measured.setdefault(arm.name, []).append(measure(arguments, arm, test))
        report = {"settings": describe(arguments), "results": summarise(measured)}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    show(summarise(measured))
    return 0


@dataclass(frozen=True)
class Arm:
    """One row of the table for one seed.

    Attributes:
        name: of the row.
        key: of the file that keeps the result.
        train: returns the repository to measure, trained if need be.
        options: of `generate` when measured.
    """

    name: str
    key: str
    train: Callable[[], Path]
    options: Options

    def kept(self, work: Path) -> Path:
        return work / f"{self.key}.json"


def arms(arguments: argparse.Namespace, base: Path) -> Iterator[Arm]:
    """Everything to measure; seeds differ in data, adapter and sampling."""
    yield Arm("base, all tokens", "base.all", lambda: base, all_tokens)
    yield Arm("stage 1", "base.pruned", lambda: base, pruned())
    for seed in range(arguments.seeds):
        again = partial(continue_stage1, arguments, seed=seed)
        yield Arm(
            "stage 1, continued", f"{seed}.stage1", partial(again, lambda: base, "stage1"), pruned()
        )
        for mask, name in (("model", "RL on pruned prompts"), ("all", "RL on whole prompts")):
            merged = partial(run_stage2, arguments, base, seed, mask)
            yield Arm(f"{name}, all tokens", f"{seed}.{mask}.all_tokens", merged, all_tokens)
            plus = partial(again, merged, f"plus-{mask}")
            yield Arm(f"{name}, stage 1 again", f"{seed}.{mask}.stage_1_again", plus, pruned())


def run_stage2(arguments: argparse.Namespace, base: Path, data: Path, seed: int, mask: str) -> Path:
    """The base with the adapter of one reinforcement learning merged in."""
    adapter = arguments.work / f"{seed}.adapter-{mask}"
    merged = arguments.work / f"{seed}.merged-{mask}"
    if not adapter.exists():
        overrides = {
            "base": str(base), "data": str(data), "output": str(adapter), "mask": mask,
            "training.max_steps": arguments.stage2_steps, "training.seed": seed,
            "training.learning_rate": arguments.learning_rate, "training.disable_tqdm": True,
        }  # fmt: skip
        recipe = read_recipe(Stage2Recipe, REPOSITORY / "recipes/stage2_tiny.yaml", overrides)
        train_stage2(recipe, resume=True)
    if not merged.exists():
        merge_stage2(str(adapter), str(base), merged)
    return merged


def continue_stage1(
    arguments: argparse.Namespace, base: Callable[[], Path], name: str, seed: int
) -> Path:
    """A repository whose glimpse was trained further on its own base."""
    data = pages(arguments, "train", 20 + seed, arguments.stage1_steps * PROMPTS_A_STEP)
    output = arguments.work / f"{seed}.{name}"
    if not output.exists():
        overrides = {
            "base": str(base()), "data": str(data), "output": str(output),
            "glimpse": {}, "training.max_steps": arguments.stage1_steps, "training.seed": seed,
            "training.learning_rate": 5e-4, "training.bf16": False, "training.disable_tqdm": True,
        }  # fmt: skip
        recipe = read_recipe(Stage1Recipe, REPOSITORY / "recipes/stage1_tiny.yaml", overrides)
        train_stage1(recipe, resume=True)
    return output


def measure(arguments: argparse.Namespace, arm: Arm, test: Path) -> dict[str, float]:
    """Greedy accuracy and mean retention of a repository over the test questions."""
    kept = arm.kept(arguments.work)
    if not kept.exists():
        model, processor, _ = load_for_training(str(arm.train()))
        processor.tokenizer.padding_side = "left"
        rows = read_visual_cot(test)[: arguments.questions]
        samples = [Sample(open_image(row.image), row.question, row.answer) for row in rows]
        result = evaluate(model.eval(), processor, samples, arm.options, 32, 6)
        kept.write_text(json.dumps(result.summary()["all"]))
    return json.loads(kept.read_text())


def earlier_repository(work: Path, revision: str) -> Path:
    """The tiny repository's weights and settings as a commit holds them."""
    folder = work / "base"
    if not folder.exists():
        command = ["git", "archive", revision, TINY]
        archive = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=BytesIO(archive)) as content:
            files = [each for each in content if each.isfile()]
            folder.mkdir()
            for file in files:
                (folder / Path(file.name).name).write_bytes(content.extractfile(file).read())
    return folder


def pages(arguments: argparse.Namespace, split: str, seed: int, questions: int) -> Path:
    """A JSON-lines file with at least so many questions."""
    folder = arguments.work / f"pages-{split}-{seed}"
    lines = folder / f"{split}.jsonl"
    if not lines.exists():
        settings = PageSettings(grids=(tuple(arguments.grid),))
        count = questions * 3 // (2 * QUESTIONS_A_PAGE) + 1
        write_pages(folder, split, range(count), seed, settings, QUESTIONS_A_PAGE)
    found = sum(1 for _ in lines.open())
    if found < questions:
        raise ValueError(f"{lines} holds {found} questions, fewer than {questions}")
    return lines


def summarise(measured: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, object]]:
    """Means over seeds, standard deviations, and accuracy as a share of the base's."""
    reference = measured["base, all tokens"][0]["accuracy"]

    def column(runs: list[dict[str, float]], name: str) -> dict:
        values = [run[name] for run in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return {"mean": statistics.mean(values), "deviation": deviation, "seeds": values}

    return {
        name: {
            "accuracy": column(runs, "accuracy"),
            "retention": column(runs, "retention"),
            "of_base": statistics.mean(run["accuracy"] for run in runs) / reference,
        }
        for name, runs in measured.items()
    }


def show(results: dict[str, dict]) -> None:
    """Print the table."""
    for name, row in results.items():
        accuracy, retention = row["accuracy"], row["retention"]
        deviation = accuracy["deviation"]
        spread = "" if deviation is None else f" ± {deviation:.4f}"
        print(
            f"{name:55} accuracy {accuracy['mean']:.4f}{spread}  "
            f"retention {retention['mean']:.4f}  of base {row['of_base']:.3f}  "
            f"seeds {len(accuracy['seeds'])}",
            flush=True,
        )


def describe(arguments: argparse.Namespace) -> dict[str, object]:
    """What the figures depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", f"{arguments.revision}"], cwd=REPOSITORY, check=True,
        capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    return {
        "base": f"{TINY} at {commit}",
        "pages": f"{arguments.grid[0]}x{arguments.grid[1]} tokens",
        "test_questions": arguments.questions,
        "recipes": ["recipes/stage2_tiny.yaml", "recipes/stage1_tiny.yaml"],
        "stage2_steps": arguments.stage2_steps,
        "stage2_prompts_a_step": PROMPTS_A_STEP,
        "stage2_completions_a_prompt": 8,
        "stage2_learning_rate": arguments.learning_rate,
        "stage1_steps": arguments.stage1_steps,
        "stage1_learning_rate": 5e-4,
        "dtype": "torch.float32",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }


if __name__ == "__main__":
    raise SystemExit(main())
