"""Compare the objectives of stage 1 on the tiny world, at one budget.

    python benchmarks/stage1_objectives.py --output benchmarks/results/stage1_objectives.json

Takes the base out of `hub_configs/tiny`, trains fresh glimpse weights on it by each objective over
the same pages, seed and number of steps, chooses a threshold for each on validation pages by one
rule (the highest whose accuracy is within a point of the base's; if there is none, the most
accurate), and measures on test pages. `none` is an untrained predictor, which keeps as many of its
best tokens as the trained one that keeps most. What lies in the working folder is not made again.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin, Qwen2_5_VLForConditionalGeneration

from benchmarks.versions import versions
from glimpseprune.data.visual_cot import VisualCoTRow, read_visual_cot
from glimpseprune.data.visual_cot_collator import VisualCoTCollator, repeat_visuals
from glimpseprune.loading import REPOSITORY, TINY_MODEL
from glimpseprune.tiny_world.dataset import write_pages
from glimpseprune.training.base import load_for_training, start_glimpse_as
from glimpseprune.training.checkpoints import last_checkpoint
from glimpseprune.training.recipe import read_recipe
from glimpseprune.training.stage1 import train_stage1
from glimpseprune.training.stage1_config import Stage1Recipe
from glimpseprune.training.stage1_losses import mask_figures
from modeling_glimpseprune.glimpse_fields import GLIMPSE_FIELDS
from modeling_glimpseprune.stock import cache_of

RECIPE = REPOSITORY / "recipes" / "stage1_tiny.yaml"
OBJECTIVES = {
    "grounding": {},
    "distillation": {"grounding_weight": 0.0, "distillation_weight": 1.0},
    "both": {"distillation_weight": 1.0, "answer_weight": 0.0},
}
THRESHOLDS = (0.5, 0.2, 0.05, 0.02, 0.005, 0.002, 0.0005)
TOLERANCE = 0.01
QUESTIONS_A_PAGE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--work", type=Path, default=Path("runs/stage1_objectives"))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pages", type=int, default=600, help="pages to train on")
    parser.add_argument("--images", type=int, default=2, help="pages a step, 8 questions each")
    parser.add_argument("--validation", type=int, default=256, help="questions")
    parser.add_argument("--test", type=int, default=512, help="questions")
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    report = compare(arguments)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def compare(arguments: argparse.Namespace) -> dict:
    """Train, choose, measure; the content of the JSON file."""
    base, pages = stock_base(arguments.work / "base"), make_pages(arguments)
    validation, test = pages["validation"], pages["test"]
    training = {name: train(name, base, arguments) for name in arguments.objectives}
    results: dict[str, dict] = {}
    model, processor = untrained(base, arguments.seed)
    results["base"] = {
        "validation": measure(model, processor, validation, prune=False),
        "test": measure(model, processor, test, prune=False),
    }
    wanted = results["base"]["validation"]["accuracy"] - TOLERANCE
    for name in arguments.objectives:
        model, processor, _ = load_for_training(str(arguments.work / name))
        threshold, curve = choose_threshold(model.eval(), processor, validation, wanted)
        results[name] = {
            "training": training[name],
            "prune_threshold": threshold,
            "validation": curve,
            "test": measure(model, processor, test, prune_threshold=threshold),
        }
        print(name, json.dumps(results[name]["test"]), flush=True)
    most = max(results[name]["test"]["retention"] for name in arguments.objectives)
    model, processor = untrained(base, arguments.seed)
    forced = {"prune_threshold": 0.0, "max_keep_ratio": most}
    results["none"] = {"test": measure(model, processor, test, **forced)} | forced
    return {"settings": describe(arguments), "results": results}


def stock_base(folder: Path) -> Path:
    """The tiny repository without its glimpse weights: a stock model."""
    if not folder.is_dir():
        model, processor, dtype = load_for_training(str(TINY_MODEL))
        fields = model.config.to_dict()
        own = {"model_type", "architectures", "auto_map", "transformers_version", *GLIMPSE_FIELDS}
        config = Qwen2_5_VLForConditionalGeneration.config_class(
            **{name: value for name, value in fields.items() if name not in own}
        )
        stock = Qwen2_5_VLForConditionalGeneration(config)
        weights = model.state_dict()
        stock.load_state_dict({name: weights[name] for name in stock.state_dict()})
        stock.generation_config = model.generation_config
        stock.to(dtype).save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def make_pages(arguments: argparse.Namespace) -> dict[str, list[VisualCoTRow]]:
    """Pages of each split; of those to measure on, the questions asked."""
    sizes = {
        "train": arguments.pages,
        "validation": arguments.validation // QUESTIONS_A_PAGE * 2,
        "test": arguments.test // QUESTIONS_A_PAGE * 2,
    }
    rows = {}
    for split, pages in sizes.items():
        path = arguments.work / split / f"{split}.jsonl"
        if not path.exists():
            numbers = tqdm(range(pages), unit="page", desc=split)
            write_pages(path.parent, split, numbers, 0, questions_a_kind=QUESTIONS_A_PAGE)
        rows[split] = read_visual_cot(path)
    for split in ("validation", "test"):
        wanted = getattr(arguments, split)
        if len(rows[split]) < wanted:
            raise ValueError(f"{len(rows[split])} questions on the {split} pages, want {wanted}")
        rows[split] = rows[split][:wanted]
    return rows


def train(name: str, base: Path, arguments: argparse.Namespace) -> dict:
    """Train by an objective, unless it was done; what the training summary says of it."""
    recipe = recipe_of(name, base, arguments)
    summary_file = Path(recipe.output) / "training_summary.json"
    if not summary_file.exists():
        train_stage1(recipe, resume=last_checkpoint(recipe.checkpoint_folder) is not None)
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    return {key: summary[key] for key in ("steps", "metrics")}


def recipe_of(name: str, base: Path, arguments: argparse.Namespace) -> Stage1Recipe:
    training = OBJECTIVES[name] | {
        "max_steps": arguments.steps,
        "per_device_train_batch_size": arguments.images,
        "seed": arguments.seed,
        "logging_steps": 10,
    }
    fields = {f"training.{field}": value for field, value in training.items()}
    fields |= {
        "base": str(base),
        "data": str(arguments.work / "train" / "train.jsonl"),
        "output": str(arguments.work / name),
    }
    return read_recipe(Stage1Recipe, RECIPE, fields)


def untrained(base: Path, seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    """What training starts from; its choice is let through."""
    recipe = read_recipe(
        Stage1Recipe, RECIPE, {"base": str(base), "data": "none", "output": "none"}
    )
    transformers.set_seed(seed)
    model, processor, _ = load_for_training(str(base), recipe.glimpse)
    start_glimpse_as(model, processor, recipe.start_text)
    model.model.glimpse.trained.fill_(True)
    return model.eval(), processor


def choose_threshold(
    model: PreTrainedModel, processor: ProcessorMixin, rows: list[VisualCoTRow], wanted: float
) -> tuple[float, dict[str, dict[str, float]]]:
    """The highest threshold of the list with the wanted accuracy, and what each tried one gave."""
    curve: dict[str, dict[str, float]] = {}
    for threshold in THRESHOLDS:
        curve[str(threshold)] = measure(model, processor, rows, prune_threshold=threshold)
        if curve[str(threshold)]["accuracy"] >= wanted:
            return threshold, curve
    best = max(curve, key=lambda threshold: (curve[threshold]["accuracy"], float(threshold)))
    return float(best), curve


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Sequence[VisualCoTRow],
    batch_size: int = 32,
    **options: object,
) -> dict[str, float]:
    """Exact-match accuracy of greedy answers; retention, recall and IoU with evidence.

    Means are over questions; those of the mask are left out with `prune=False`.
    """
    collator = VisualCoTCollator(processor)
    sums: dict[str, float] = {"accuracy": 0.0}
    by_size = sorted(rows, key=lambda row: (row.width, row.height))
    for start in tqdm(range(0, len(rows), batch_size), leave=False):
        chunk = by_size[start : start + batch_size]
        batch = collator([[row] for row in chunk])
        prompt_length = batch["prompt_length"]
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
        generated = model.generate(
            **{name: batch[name][:, :prompt_length] for name in names if name in batch},
            **repeat_visuals(batch["visuals"], batch["image_index"]),
            **options,
            max_new_tokens=8,
            do_sample=False,
            return_dict_in_generate=True,
        )
        completions = generated.sequences[:, prompt_length:]
        answers = processor.batch_decode(completions, skip_special_tokens=True)
        sums["accuracy"] += sum(
            answer.strip() == row.answer for answer, row in zip(answers, chunk, strict=True)
        )
        if options.get("prune") is False:
            continue
        record = cache_of(generated).glimpse
        figures = mask_figures(record.keep_mask, batch["evidence_mask"], record.rows, len(chunk))
        for name in ("retention", "recall", "iou"):
            sums[name] = sums.get(name, 0.0) + figures[name].sum().item()
    return {"questions": len(rows)} | {name: total / len(rows) for name, total in sums.items()}


def describe(arguments: argparse.Namespace) -> dict[str, object]:
    """The settings all objectives share, and versions."""
    names = ("steps", "pages", "images", "validation", "test", "seed")
    return {
        **{name: getattr(arguments, name) for name in names},
        "questions_a_page": QUESTIONS_A_PAGE,
        "recipe": str(RECIPE.relative_to(REPOSITORY)),
        "base": str(TINY_MODEL.relative_to(REPOSITORY)),
        "objectives": OBJECTIVES,
        "thresholds": THRESHOLDS,
        "tolerance": TOLERANCE,
        **versions(),
    }


if __name__ == "__main__":
    main()
