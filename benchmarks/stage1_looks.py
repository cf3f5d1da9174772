"""Measure steps of stage 1 over looks beside steps by whole prompts, step by step in turns.

    python -m benchmarks.stage1_looks --output benchmarks/results/stage1_looks.json

takes forward and backward passes of the tiny recipes on the tiny model and pages of its world, each
batch both ways, and says how far losses and gradients differ. Processor time is what counts: other
work on the machine does not enter it.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.efficiency.__main__ import describe_machine
from glimpseprune.data.visual_cot import VisualCoTDataset, read_visual_cot
from glimpseprune.data.visual_cot_collator import VisualCoTCollator
from glimpseprune.loading import TINY_MODEL
from glimpseprune.portable import write_json
from glimpseprune.tiny_world.dataset import write_pages
from glimpseprune.training.base import load_for_training
from glimpseprune.training.late_glimpse import late_backbone
from glimpseprune.training.recipe import read_recipe
from glimpseprune.training.stage1_config import Stage1Recipe
from glimpseprune.training.stage1_trainer import Stage1Trainer

WAYS = {"whole prompts": False, "over looks": True}
OBJECTIVES = {
    "grounding": ("stage1_tiny", {}),
    "grounding without answers": ("stage1_tiny", {"answer_weight": 0.0}),
    "distillation": ("stage1_tiny", {"grounding_weight": 0.0, "distillation_weight": 1.0}),
    "read ahead, with a late teacher": ("stage1_tiny_early", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=4, help="pages a step")
    parser.add_argument("--questions", type=int, nargs="+", default=[8, 1], help="a page")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        numbers = range((arguments.steps + 1) * arguments.images)
        data = write_pages(Path(folder), "train", numbers)
        for name in OBJECTIVES:
            for questions in arguments.questions:
                found = compare(name, data, arguments.steps, arguments.images, questions)
                results[f"{name}, {questions} a page"] = found
                print(f"{name}, {questions} a page: {found['ratio']:.3f}")
    settings = {"model": "hub_configs/tiny", "steps": arguments.steps, "images": arguments.images}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    machine = describe_machine("cpu") | {"threads": torch.get_num_threads()}
    write_json(arguments.output, {"machine": machine, "settings": settings, "results": results})


def compare(name: str, data: Path, steps: int, images: int, questions: int) -> dict:
    """Processor seconds of both ways over the same batches, and how far they differ.

    Args:
        name: of one of `OBJECTIVES`.
        data: questions about one page after the other.
        images: pages a step.
        questions: about each page.
    """
    recipe_name, training = OBJECTIVES[name]
    trainer, collator = build(recipe_name, training | {"bf16": False, "use_cpu": True})
    groups = first_of_each(VisualCoTDataset(read_visual_cot(data), questions))
    seconds, differences = {way: [] for way in WAYS}, []
    for turn in tqdm(range(steps + 1), leave=False):
        batch = collator(groups[turn * images : (turn + 1) * images])
        found = {}
        for way in sorted(WAYS, reverse=bool(turn % 2)):
            start = time.process_time()
            found[way] = step(trainer, batch, WAYS[way])
            seconds[way].append(time.process_time() - start)
        differences.append(difference(*found.values()))
    sums = {way: sum(each[1:]) for way, each in seconds.items()}  # the first is a warm-up
    return {
        "seconds": sums,
        "ratio": sums["over looks"] / sums["whole prompts"],
        "largest difference of a gradient, of the largest one": max(differences),
    }


def build(recipe_name: str, training: dict) -> tuple[Stage1Trainer, VisualCoTCollator]:
    """A trainer of the tiny model by a recipe, and the collator of its batches."""
    tiny = str(TINY_MODEL)
    fields = {"base": tiny, "data": "none", "output": "none"}
    fields |= {f"training.{field}": value for field, value in training.items()}
    if recipe_name == "stage1_tiny_early":
        fields["late_glimpse"] = tiny
    recipe = read_recipe(Stage1Recipe, recipe_name, fields)
    model, processor, _ = load_for_training(tiny, recipe.glimpse)
    late = recipe.late_glimpse and late_backbone(recipe.late_glimpse, model)
    return Stage1Trainer(model, recipe.training_config(), late), VisualCoTCollator(processor)


def first_of_each(dataset: VisualCoTDataset) -> list[list]:
    """The first group of questions about each page."""
    groups = {dataset[number][0].image: dataset[number] for number in reversed(range(len(dataset)))}
    return list(reversed(groups.values()))


def step(trainer: Stage1Trainer, batch: dict, look_once: bool) -> dict[str, torch.Tensor]:
    """Forward and backward of one step: the gradients."""
    trainer.args.look_once = look_once
    trainer.model.train().zero_grad()
    torch.manual_seed(0)  # the noise of soft masks
    trainer.compute_loss(trainer.model, batch).backward()
    weights = trainer.model.named_parameters()
    return {name: each.grad.clone() for name, each in weights if each.grad is not None}


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of two steps' gradients, as a share of the largest gradient."""
    largest = max(each.abs().max() for each in expected.values())
    return max((found[name] - expected[name]).abs().max() / largest for name in expected).item()


if __name__ == "__main__":
    main()
