"""GlimpsePrune+ on the tiny world, beside the same reinforcement learning without pruning.

    python -m benchmarks.plus_tiny --work runs/plus_tiny

makes a base with head-room by training the tiny one on at a high rate and stopping there
(`recipes/tiny_base_stopped.yaml`), runs stage 1 on it, and for each seed stage 2 on pruned prompts,
on whole ones, and with sampled masks. Results are merged, and go on with stage 1, as the untouched
repository does; sampled masks do not need it. What is finished is kept in the working folder and
not done again, so that several processes may each do some of the seeds or masks. The table goes to
`benchmarks/results/plus_tiny.json` after every measurement.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trl

from benchmarks.versions import versions
from glimpseprune.baselines.method import Method, OwnPruning
from glimpseprune.commands.evaluate import read_samples
from glimpseprune.evaluation import evaluate
from glimpseprune.loading import REPOSITORY, TINY_MODEL
from glimpseprune.portable import write_json
from glimpseprune.sample import Sample
from glimpseprune.tiny_world.dataset import write_pages
from glimpseprune.tiny_world.pages import PageSettings
from glimpseprune.tiny_world.recipe import load_recipe
from glimpseprune.tiny_world.training import BaseTrainer
from glimpseprune.tiny_world.vocabulary import build_processor
from glimpseprune.training.base import load_for_training
from glimpseprune.training.merging import merge_stage2
from glimpseprune.training.recipe import read_recipe
from glimpseprune.training.stage1 import train_stage1
from glimpseprune.training.stage1_config import Stage1Recipe
from glimpseprune.training.stage2 import train_stage2
from glimpseprune.training.stage2_config import Stage2Recipe

RECIPES = REPOSITORY / "recipes"
BASE_RECIPE, STAGE1_RECIPE = RECIPES / "tiny_base_stopped.yaml", RECIPES / "stage1_tiny.yaml"
STAGE2_RECIPE, SAMPLED_RECIPE = (
    RECIPES / f"{name}.yaml" for name in ("stage2_tiny", "stage2_tiny_sampled")
)
RECIPES_USED = (BASE_RECIPE, STAGE1_RECIPE, STAGE2_RECIPE, SAMPLED_RECIPE)
TINY_SEED = 1  # of the training of hub_configs/tiny
RESULTS = REPOSITORY / "benchmarks" / "results" / "plus_tiny.json"
BASE = "base, all tokens"
QUESTIONS_A_PAGE = 8
PROMPTS_A_STEP = 32
AGAIN = {"training.learning_rate": 5e-4}  # of a glimpse that is there already
MASKS = {
    "model": "RL on pruned prompts",
    "all": "RL on whole prompts",
    "sampled": "RL with sampled masks",
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for everything on the way")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--masks", choices=MASKS, nargs="+", default=list(MASKS))
    parser.add_argument("--stage2-steps", type=int, default=120)
    parser.add_argument("--stage1-steps", type=int, default=150)
    parser.add_argument("--again-steps", type=int, default=50, help="of stage 1 after stage 2")
    parser.add_argument("--questions", type=int, default=1000, help="test questions")
    parser.add_argument("--grid", type=int, nargs=2, default=(10, 10), help="page size in tokens")
    parser.add_argument("--finished-only", action="store_true", help="train nothing: table alone")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run what is missing and write the table; returns 0."""
    arguments = parse(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    measured: dict[str, list[dict]] = {}
    for arm in arms(arguments):
        if arguments.finished_only and not arm.kept(arguments.work).exists():
            continue
        measured.setdefault(arm.name, []).append(measure(arguments, arm))
        report = {"settings": describe(arguments), "results": table(measured)}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, report)
    show(table(measured))
    return 0


@dataclass(frozen=True)
class Arm:
    """One row of the table for one seed.

    Attributes:
        name: of the row.
        key: of the file that keeps the result.
        train: returns the repository to measure, trained if need be.
        method: how it answers when measured.
    """

    name: str
    key: str
    train: Callable[[], Path]
    method: Method

    def kept(self, work: Path) -> Path:
        return work / f"{self.key}.json"


def arms(arguments: argparse.Namespace) -> Iterator[Arm]:
    """Everything to measure; seeds differ in data, adapter and sampling."""
    start = partial(first_stage1, arguments)
    whole, pruned = Method(), OwnPruning()
    yield Arm(BASE, "base.whole", start, whole)
    yield Arm("stage 1", "base.pruned", start, pruned)
    for seed in arguments.seeds:
        again = partial(stage1_again, arguments, seed)
        yield Arm("stage 1, continued", f"{seed}.stage1", partial(again, start, "stage1"), pruned)
        for mask in arguments.masks:
            name = MASKS[mask]
            merged = partial(run_stage2, arguments, seed, mask)
            yield Arm(f"{name}, all tokens", f"{seed}.{mask}.whole", merged, whole)
            yield Arm(f"{name}, pruned", f"{seed}.{mask}.pruned", merged, pruned)
            if mask != "sampled":
                plus = partial(again, merged, f"plus-{mask}")
                yield Arm(f"{name}, stage 1 again", f"{seed}.{mask}.plus", plus, pruned)


def stopped_base(arguments: argparse.Namespace) -> Path:
    """A stock model: the tiny base trained on at a high rate, and stopped."""
    trainer = BaseTrainer(
        load_recipe(BASE_RECIPE), build_processor(), arguments.work / "base", TINY_SEED
    )
    if not trainer.resume():
        trainer.start_from(TINY_MODEL)
    trainer.train()
    return trainer.output


def first_stage1(arguments: argparse.Namespace) -> Path:
    """The stopped base with a glimpse trained on it."""
    output = arguments.work / "stage1"
    if not output.exists():
        settings = {"training.max_steps": arguments.stage1_steps, "training.seed": 0}
        data = pages(arguments, "train", 0, arguments.stage1_steps * PROMPTS_A_STEP)
        run_stage1(stopped_base(arguments), data, output, settings)
    return output


def stage1_again(
    arguments: argparse.Namespace, seed: int, base: Callable[[], Path], name: str
) -> Path:
    """A repository whose glimpse was trained further on its own base."""
    output = arguments.work / f"{seed}.{name}"
    if not output.exists():
        data = pages(arguments, "train", 20 + seed, arguments.again_steps * PROMPTS_A_STEP)
        settings = {"glimpse": {}, "training.max_steps": arguments.again_steps} | AGAIN
        run_stage1(base(), data, output, settings | {"training.seed": seed})
    return output


def run_stage1(base: Path, data: Path, output: Path, settings: dict[str, object]) -> None:
    """Stage 1 by the tiny recipe with some settings of its own."""
    folders = {"base": str(base), "data": str(data), "output": str(output)}
    overrides = folders | settings | {"training.disable_tqdm": True}
    train_stage1(read_recipe(Stage1Recipe, STAGE1_RECIPE, overrides), resume=True)


def run_stage2(arguments: argparse.Namespace, seed: int, mask: str) -> Path:
    """The first stage 1's result with the adapter of one reinforcement learning merged in."""
    adapter = arguments.work / f"{seed}.adapter-{mask}"
    merged = arguments.work / f"{seed}.merged-{mask}"
    base = first_stage1(arguments)
    if not adapter.exists():
        data = pages(arguments, "train", 10 + seed, arguments.stage2_steps * PROMPTS_A_STEP)
        overrides = {
            "base": str(base), "data": str(data), "output": str(adapter), "mask": mask,
            "training.max_steps": arguments.stage2_steps, "training.seed": seed,
            "training.disable_tqdm": True,
        }  # fmt: skip
        path = SAMPLED_RECIPE if mask == "sampled" else STAGE2_RECIPE
        train_stage2(read_recipe(Stage2Recipe, path, overrides), resume=True)
    if not merged.exists():
        merge_stage2(str(adapter), str(base), merged)
    return merged


def measure(arguments: argparse.Namespace, arm: Arm) -> dict:
    """Each test question's score by greedy decoding, and the mean retention."""
    kept = arm.kept(arguments.work)
    if not kept.exists():
        model, processor, _ = load_for_training(str(arm.train()))
        processor.tokenizer.padding_side = "left"
        samples = test_samples(arguments)
        answers = evaluate(model.eval(), processor, samples, [arm.method], 32, 6).answers[0]
        retention = statistics.mean(answer.kept for answer in answers)
        write_json(kept, {"scores": [each.score for each in answers], "retention": retention})
    return json.loads(kept.read_text())


def test_samples(arguments: argparse.Namespace) -> list[Sample]:
    """The test questions with their images."""
    lines = pages(arguments, "test", 0, arguments.questions)
    return read_samples(lines, None, arguments.questions, seed=0)


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


def table(measured: dict[str, list[dict]]) -> dict[str, dict[str, object]]:
    """What each row amounts to.

    `difference` is from the base's accuracy, and `difference_error` its standard error over the
    questions, which are the same in all rows; `deviation` is that of the seeds' accuracies.
    """
    reference = measured[BASE][0]["scores"]
    rows = {}
    for name, runs in measured.items():
        accuracies = [statistics.mean(run["scores"]) for run in runs]
        by_question = zip(*(run["scores"] for run in runs), strict=True)
        of_questions = [statistics.mean(scores) for scores in by_question]
        gains = [own - base for own, base in zip(of_questions, reference, strict=True)]
        accuracy, base = statistics.mean(accuracies), statistics.mean(reference)
        rows[name] = {
            "accuracy": accuracy,
            "deviation": statistics.stdev(accuracies) if len(runs) > 1 else None,
            "seeds": accuracies,
            "difference": accuracy - base,
            "difference_error": statistics.stdev(gains) / len(gains) ** 0.5,
            "of_base": accuracy / base,
            "retention": statistics.mean(run["retention"] for run in runs),
        }
    return rows


def show(rows: dict[str, dict]) -> None:
    """Print the table."""
    for name, row in rows.items():
        spread = "" if row["deviation"] is None else f" ± {row['deviation']:.4f}"
        print(
            f"{name:42} accuracy {row['accuracy']:.4f}{spread:9}  "
            f"difference {row['difference']:+.4f} ± {row['difference_error']:.4f}  "
            f"of base {row['of_base']:.3f}  retention {row['retention']:.4f}  "
            f"seeds {len(row['seeds'])}",
            flush=True,
        )


def describe(arguments: argparse.Namespace) -> dict[str, object]:
    """What the figures depend on."""
    names = ("stage2_steps", "stage1_steps", "again_steps", "questions", "seeds", "masks", "grid")
    return {
        **{name: getattr(arguments, name) for name in names},
        "recipes": [path.name for path in RECIPES_USED],
        "prompts_a_step": PROMPTS_A_STEP,
        "stage_1_again": AGAIN,
        **versions(),
        "trl": trl.__version__,
    }


if __name__ == "__main__":
    raise SystemExit(main())
