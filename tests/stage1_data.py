"""A tiny random base, questions about it, and recipes for it: what tests of stage 1 train on."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from glimpseprune.data.visual_cot import read_visual_cot
from glimpseprune.data.visual_cot_collator import VisualCoTCollator
from glimpseprune.tiny_world.vocabulary import build_processor
from glimpseprune.training.base import load_for_training
from glimpseprune.training.late_glimpse import late_backbone
from glimpseprune.training.recipe import read_recipe
from glimpseprune.training.stage1_config import Stage1Config, Stage1Recipe
from glimpseprune.training.stage1_trainer import Stage1Trainer

GLIMPSE = {
    "glimpse_layer": 1,
    "predictor_hidden_size": 16,
    "predictor_condition_size": 16,
    "predictor_num_heads": 2,
}
TRAINING = {
    "bf16": False, "learning_rate": 0.01, "per_device_train_batch_size": 2, "max_steps": 4,
    "logging_steps": 1, "save_steps": 100, "disable_tqdm": True, "seed": 3, "use_cpu": True,
}  # fmt: skip


def write_base(folder: Path) -> Path:
    """A tiny stock model and its processor."""
    processor = build_processor()
    ids = processor.tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=len(processor.tokenizer), hidden_size=32, intermediate_size=64,
        num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, rope_theta=10_000.0,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>"),
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32,
        window_size=56, fullatt_block_indexes=[1],
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"), vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"), tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "embed_tokens" not in name:
            torch.nn.init.normal_(weight, std=1 / math.sqrt(weight[0].numel()))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_data(folder: Path) -> Path:
    """A JSON-lines file with six questions about three images of 4 x 3, 3 x 2 and 2 x 2 tokens."""
    generator = np.random.default_rng(0)
    lines = []
    for name, columns, rows in (("a", 4, 3), ("b", 3, 2), ("c", 2, 2)):
        width, height = 28 * columns, 28 * rows
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        for number, answer in enumerate(("7", "4135")):
            box = [28 * number, 0, 28 * number + 28, 28]
            lines.append(
                {"question": f"What is the value of {name}{number}?" + " now" * number,
                 "answer": answer, "image": f"{name}.png", "bboxs": [box], "dataset": "test",
                 "width": width, "height": height}
            )  # fmt: skip
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_page(folder: Path) -> Path:
    """Eight questions about one page of 8 x 6 tokens."""
    pixels = np.random.default_rng(0).integers(0, 256, (168, 224, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "page.png")
    row = {"answer": "7", "image": "page.png", "bboxs": [[28, 0, 84, 56]], "dataset": "test"}
    rows = [row | {"question": f"What is the value of a{number}?"} for number in range(8)]
    path = folder / "page.jsonl"
    lines = [json.dumps(row | {"width": 224, "height": 168}) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def recipe_of(base: Path, data: Path, output: Path, /, **overrides) -> Stage1Recipe:
    """A recipe of four steps; overrides as `read_recipe` takes them."""
    fields = {"base": str(base), "data": str(data), "output": str(output)}
    training = {f"training.{name}": value for name, value in TRAINING.items()}
    glimpse = {f"glimpse.{name}": value for name, value in GLIMPSE.items()}
    return read_recipe(Stage1Recipe, None, fields | training | glimpse | overrides)


def command_line(recipe: Stage1Recipe) -> list[str]:
    """Arguments of `glimpseprune` that train by the same recipe."""
    settings = {name: getattr(recipe, name) for name in ("base", "data", "output")}
    settings |= {f"training.{name}": value for name, value in recipe.training.items()}
    settings |= {f"glimpse.{name}": value for name, value in recipe.glimpse.items()}
    flags = [flag for name in settings for flag in ("--set", f"{name}={settings[name]}")]
    return ["train-stage1", *flags]


def collate(data, processor, rows):
    """A batch of the questions `rows` of a data file."""
    questions = read_visual_cot(data, need_boxes=False, need_answers=False)
    return VisualCoTCollator(processor)([[questions[row] for row in rows]])


def trainer_that_learns(
    base: Path, glimpse: dict, settings: dict, late: str | None = None
) -> Stage1Trainer:
    """A trainer whose additions, if there are any, are not zero: behind zeros nothing learns."""
    torch.manual_seed(0)
    model, processor, _ = load_for_training(str(base), glimpse)
    config = Stage1Config(output_dir="unused", bf16=False, use_cpu=True, **settings)
    trainer = Stage1Trainer(model, config, late=late and late_backbone(late, model))
    trainer.processor, trainer.state.max_steps = processor, 10
    for name, weight in model.model.glimpse.named_parameters():
        if "_additions." in name:
            torch.nn.init.normal_(weight, std=0.1)
    return trainer


def step(trainer, batch, look_once) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a training step, and its gradients by weight."""
    trainer.args.look_once = look_once
    trainer.model.train().zero_grad()
    torch.manual_seed(5)  # the same noise
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    weights = trainer.model.named_parameters()
    return loss.detach(), {name: each.grad for name, each in weights if each.grad is not None}


def assert_same_step(found, expected) -> None:
    """Within 1e-5, a hundred float32 roundings of the largest gradient.

    Sums over a prompt's keys are cut in two, and rows that share a page add to its gradients in
    another order.
    """
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    assert found[1].keys() == expected[1].keys()
    largest = max(each.abs().max() for each in expected[1].values())
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= 1e-5 * max(1, largest), name
