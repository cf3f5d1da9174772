"""Stage 1: losses, recipe, loading, training, resuming and the repository it writes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fresh_process import run_fresh
from safetensors.torch import load_file, save_file
from stage1_data import GLIMPSE, collate, command_line, recipe_of
from transformers import (
    DynamicCache,
    Qwen2_5_VLForConditionalGeneration,
    set_seed,
)

from glimpseprune.hub.folders import vacant_sibling
from glimpseprune.hub.shards import GLIMPSE_WEIGHTS, find_shards
from glimpseprune.tiny_world.model import tiny_config
from glimpseprune.tiny_world.vocabulary import build_processor
from glimpseprune.training import repository
from glimpseprune.training.base import load_for_training, start_glimpse_as
from glimpseprune.training.checkpoints import last_checkpoint
from glimpseprune.training.recipe import parse_override, read_recipe
from glimpseprune.training.stage1 import train_stage1
from glimpseprune.training.stage1_config import Stage1Config, Stage1Recipe
from glimpseprune.training.stage1_losses import answer_loss, bce_loss, dice_loss, mask_figures
from glimpseprune.training.stage1_trainer import Stage1Trainer
from modeling_glimpseprune.configuration_glimpseprune import (
    GlimpsePruneLlavaConfig,
    GlimpsePruneQwen2_5_VLConfig,
    GlimpsePruneQwen3VLConfig,
)
from modeling_glimpseprune.stock import TRANSFORMERS_5, given_cache

REPOSITORY = Path(__file__).resolve().parents[1]
RELOAD = """
import sys, torch, transformers
folder, auto_class, inputs = sys.argv[1:]
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
for loaded in (model, processor):
    assert type(loaded).__module__.startswith("transformers_modules"), type(loaded)
assert "glimpseprune" not in sys.modules and "modeling_glimpseprune" not in sys.modules
record = model.glimpse(**torch.load(inputs))
torch.save((record.importance, record.keep_mask), inputs)
"""


@pytest.fixture
def make_recipe(base, data, tmp_path):
    def make(output="trained", **overrides):
        return recipe_of(base, data, tmp_path / output, **overrides)

    return make


def weights_of(recipe):
    return load_file(Path(recipe.output) / "model.safetensors")


def random_scores(seed=0, sizes=(5, 1, 9)):
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    importance = torch.randn(total, generator=generator) * 3
    evidence = torch.rand(total, generator=generator) < 0.4
    rows = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return importance, evidence, rows, list(sizes)


def test_losses_equal_slow_formulas():
    importance, evidence, rows, sizes = random_scores()
    dice, bce = (loss(importance, evidence, rows, 3) for loss in (dice_loss, bce_loss))
    parts = zip(importance.split(sizes), evidence.split(sizes), strict=True)
    for row, (logits, wanted) in enumerate(parts):
        shared = total = entropy = 0.0
        for logit, is_evidence in zip(logits.tolist(), wanted.tolist(), strict=True):
            probability = 1 / (1 + math.exp(-logit))
            shared += probability * is_evidence
            total += probability + is_evidence
            entropy -= math.log(probability if is_evidence else 1 - probability)
        assert dice[row].item() == pytest.approx(1 - (2 * shared + 1) / (total + 1), abs=1e-5)
        assert bce[row].item() == pytest.approx(entropy / len(logits), abs=1e-5)


def test_losses_are_smallest_at_the_evidence():
    _, evidence, rows, _ = random_scores()
    right = torch.where(evidence, 20.0, -20.0)
    assert dice_loss(right, evidence, rows, 3).abs().max() < 1e-5
    assert bce_loss(right, evidence, rows, 3).max() < 1e-5
    assert dice_loss(-right, evidence, rows, 3)[evidence.new_tensor([1, 0, 1])].min() > 0.5


def test_mask_figures_equal_sets():
    importance, evidence, rows, sizes = random_scores(seed=1)
    keep = importance > 0
    figures = mask_figures(keep, evidence, rows, 3)
    parts = zip(keep.split(sizes), evidence.split(sizes), strict=True)
    for row, (kept, wanted) in enumerate(parts):
        kept, wanted = ({i for i, x in enumerate(mask.tolist()) if x} for mask in (kept, wanted))
        expected = {
            "precision": len(kept & wanted) / max(1, len(kept)),
            "recall": len(kept & wanted) / max(1, len(wanted)),
            "iou": len(kept & wanted) / max(1, len(kept | wanted)),
            "retention": len(kept) / sizes[row],
        }
        assert {name: figures[name][row].item() for name in figures} == pytest.approx(expected)


def test_answer_loss_ignores_padding():
    logits = torch.randn(2, 3, 7)
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    log_probs = logits.log_softmax(-1)
    expected = -(log_probs[0, 0, 1] + log_probs[0, 1, 2] + log_probs[1, 0, 3]) / 3
    assert torch.allclose(answer_loss(logits, labels), expected)


def test_recipe_file_and_overrides(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "base: some/base\ndata: d.jsonl\noutput: out\nglimpse: {glimpse_layer: 5}\n"
        "training: {learning_rate: 1e-3, seed: 7, bf16: false}\n"
    )
    overrides = dict(
        parse_override(text) for text in ("training.seed=8", "glimpse.min_keep_tokens=2")
    )
    recipe = read_recipe(Stage1Recipe, path, overrides | {"base": "other/base"})
    config = recipe.training_config()
    assert recipe.base == "other/base"
    assert recipe.glimpse == {"glimpse_layer": 5, "min_keep_tokens": 2}
    assert (config.learning_rate, config.seed) == (0.001, 8)
    assert (config.dice_weight, config.bce_weight, config.answer_weight) == (1.0, 0.1, 1.0)
    assert config.get_warmup_steps(200) == 20
    assert recipe.checkpoint_folder == Path("out.checkpoints").absolute()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data": ""}, "data is missing"),
        ({"bases": "x"}, "unknown field bases"),
        ({"glimpse": 3}, "glimpse must be a mapping"),
        ({"training.learn": 1}, "unknown field training.learn"),
        ({"training.output_dir": "x"}, "unknown field training.output_dir"),
        ({"training.bce_weight": -1}, "bce_weight must not be negative, got -1"),
        ({"training.distillation_weight": -1}, "distillation_weight must not be negative, got -1"),
        ({"training.grounding_weight": math.nan}, "grounding_weight must not be negative, got nan"),
        ({"training.grounding_weight": 0}, "there is no objective"),
        ({"training.retention_target": 0}, r"retention_target must lie in \(0, 1\], got 0"),
        ({"training.final_mask_temperature": 0}, "final_mask_temperature must be positive, got 0"),
        ({"training.max_answer_tokens": 0}, "max_answer_tokens must be 1 or more, got 0"),
        ({"training.warmup": 1.5}, r"warmup must lie in \[0, 1\], got 1.5"),
        ({"glimpse.layer": 1}, "glimpse: unknown field layer"),
        ({"glimpse.glimpse_layer": 9}, "glimpse_layer must be one of .* got 9"),
        ({"questions_per_image": 0}, "questions_per_image must be 1 or more"),
    ],
)
def test_bad_recipes_name_the_field(make_recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        train_stage1(make_recipe(**overrides))


def test_sharded_weights_are_refused(make_recipe, monkeypatch):
    with pytest.raises(ValueError, match="FSDP shards weights by decoder layer"):
        make_recipe(**{"training.fsdp": "full_shard"}).training_config()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP shards weights by decoder layer"):
        make_recipe().training_config()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setattr("glimpseprune.training.recipe.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3 shards weights by decoder layer"):
        make_recipe().training_config()


def test_override_needs_a_value():
    with pytest.raises(ValueError, match="--set takes field=value, got 'seed'"):
        parse_override("seed")


@pytest.mark.parametrize(
    ("name", "num_layers", "expected"),
    [
        ("stage1_qwen2_5_vl_3b", 36, (23, [31, 23, 15, 7], 256, 512, 4, "logits", 0.5, 1)),
        ("stage1_qwen2_5_vl_7b", 28, (18, [31, 23, 15, 7], 256, 512, 4, "logits", 0.5, 1)),
    ],
)
def test_official_recipes(name, num_layers, expected):
    given = {"data": "d", "output": "o", "training.bf16": False}
    recipe = read_recipe(Stage1Recipe, REPOSITORY / "recipes" / f"{name}.yaml", given)
    training = recipe.training_config()
    assert (training.dice_weight, training.bce_weight, training.answer_weight) == (1.0, 0.1, 1.0)
    assert (training.learning_rate, training.lr_scheduler_type) == (1e-4, "cosine")
    assert (training.warmup, training.per_device_train_batch_size) == (0.1, 8)
    assert (training.num_train_epochs, recipe.max_questions) == (1, 20_000)
    sizes = {"text_config": {"num_hidden_layers": num_layers}, "vision_config": {"depth": 32}}
    config = GlimpsePruneQwen2_5_VLConfig(**sizes, **recipe.glimpse)
    names = "glimpse_layer vision_layers predictor_hidden_size predictor_condition_size"
    names += " predictor_num_heads attention_scores prune_threshold min_keep_tokens"
    assert tuple(getattr(config, field) for field in names.split()) == expected
    assert config.glimpse_embedding_layers == list(range(num_layers))


@pytest.mark.parametrize(("size", "glimpse_layer"), [("7b", 21), ("13b", 26)])
def test_official_llava_recipes(size, glimpse_layer):
    given = {"data": "d", "output": "o", "training.bf16": False}
    recipe = read_recipe(
        Stage1Recipe, REPOSITORY / "recipes" / f"stage1_llava_1_5_{size}.yaml", given
    )
    assert recipe.base == f"llava-hf/llava-1.5-{size}-hf"
    training, config = recipe.training_config(), GlimpsePruneLlavaConfig(**recipe.glimpse)
    assert (training.learning_rate, training.per_device_train_batch_size) == (1e-4, 8)
    assert (config.glimpse_layer, config.attention_scores) == (glimpse_layer, "log_probabilities")
    assert (config.vision_layers, recipe.max_questions) == ([23, 17, 11, 5], 20_000)


@pytest.mark.parametrize("size", ["2b", "4b", "8b"])
def test_recipes_of_qwen3_vl(size):
    """The official recipe's settings, at the layers of the published folders."""
    given = {"data": "d", "output": "o", "training.bf16": False}
    path = REPOSITORY / "recipes" / f"stage1_qwen3_vl_{size}.yaml"
    recipe = read_recipe(Stage1Recipe, path, given)
    training = recipe.training_config()
    assert (training.learning_rate, training.per_device_train_batch_size) == (1e-4, 8)
    assert (training.dice_weight, training.bce_weight, training.answer_weight) == (1.0, 0.1, 1.0)
    folder = REPOSITORY / "hub_configs" / f"qwen3_vl_{size}" / "config.json"
    published = json.loads(folder.read_text())
    assert recipe.base == published["glimpse_base"]["repository"]
    assert recipe.glimpse == {name: published[name] for name in ("glimpse_layer", "vision_layers")}
    config = GlimpsePruneQwen3VLConfig(
        text_config=published["text_config"],
        vision_config=published["vision_config"],
        **recipe.glimpse,
    )
    assert config.prune_layer is None and config.predictor_hidden_size == 256


def test_tiny_recipe_fits_the_tiny_base():
    given = {"base": "b", "data": "d", "output": "o", "training.bf16": False}
    recipe = read_recipe(Stage1Recipe, REPOSITORY / "recipes" / "stage1_tiny.yaml", given)
    assert isinstance(recipe.training_config(), Stage1Config)
    sizes = tiny_config(build_processor()).to_dict()
    GlimpsePruneQwen2_5_VLConfig(
        text_config=sizes["text_config"], vision_config=sizes["vision_config"], **recipe.glimpse
    )


def test_base_is_the_stock_model_with_a_fresh_glimpse(base):
    model, _, dtype = load_for_training(str(base), GLIMPSE)
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(base)
    ours = model.state_dict()
    for name, weight in stock.state_dict().items():
        assert torch.equal(ours.pop(name), weight), name
    assert all(name.startswith("model.glimpse.") for name in ours)
    assert dtype == torch.float32 and not model.model.glimpse.trained
    assert model.config.glimpse_layer == 1
    buffers = dict(stock.named_buffers())
    for name, buffer in model.named_buffers():
        if "glimpse" not in name:
            assert torch.equal(buffer, buffers[name]), name


def test_glimpse_starts_as_a_text(base):
    model, processor, _ = load_for_training(str(base), GLIMPSE)
    start_glimpse_as(model, processor, "7")
    (token_id,) = processor.tokenizer("7")["input_ids"]
    expected = model.get_input_embeddings().weight[token_id].float()
    torch.testing.assert_close(model.model.glimpse.token(0)[0], expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="start_text"):
        start_glimpse_as(model, processor, "")


def test_a_base_that_does_not_fit_is_refused(base, tmp_path):
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    weights["model.strange.weight"] = weights.pop(name)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing: .*layers.1.mlp.up_proj.weight; unexpected: "):
        load_for_training(str(tmp_path), GLIMPSE)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ValueError, match="is a .llama. model; known are qwen2_5_vl"):
        load_for_training(str(tmp_path), GLIMPSE)


def test_bfloat16_base_stays_and_the_glimpse_trains_in_float32(base, tmp_path):
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16)
    stock.save_pretrained(tmp_path)
    build_processor().save_pretrained(tmp_path)
    for bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        model, _, stored = load_for_training(str(tmp_path), GLIMPSE, bf16=bf16)
        assert stored == torch.bfloat16
        assert model.lm_head.weight.dtype == expected
        assert model.model.glimpse.token.embeddings.dtype == torch.float32


def repeat_images(batch):
    """The same batch as the model takes it without the trainer's help: an image for every row."""
    visuals, index = batch.pop("visuals"), batch.pop("image_index").tolist()
    del batch["names"]
    pixels = visuals["pixel_values"]
    if "image_grid_thw" in visuals:  # patches of all images in one tensor
        pixels = pixels.split(visuals["image_grid_thw"].prod(1).tolist())
        batch["pixel_values"] = torch.cat([pixels[image] for image in index])
    else:
        batch |= {name: visuals[name][index] for name in visuals}
    return batch


def test_a_row_alone_equals_the_row_in_a_batch(base, data):
    torch.manual_seed(0)
    model, processor, _ = load_for_training(str(base), GLIMPSE)
    model.eval()

    def run(rows):
        batch = repeat_images(collate(data, processor, rows))
        labels, _ = batch.pop("labels"), batch.pop("evidence_mask")
        cache, start = DynamicCache(), batch["prompt_length"] - 1
        with torch.no_grad():
            outputs = model(**batch, in_place=True, **given_cache(cache), use_cache=True)
        supervised = labels[:, start + 1 :] != -100
        logits = zip(outputs.logits[:, start:-1], supervised, strict=True)
        return [row[real] for row, real in logits], cache.glimpse.importance.split(
            cache.glimpse.sizes
        )

    rows = [0, 1, 3, 4]
    together = run(rows)
    for place, row in enumerate(rows):
        for expected, found in zip(run([row]), together, strict=True):
            torch.testing.assert_close(found[place], expected[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [[0], [0, 1, 3], [5, 0, 4]])
def test_loss_equals_one_plain_forward(base, data, rows):
    torch.manual_seed(0)
    model, processor, _ = load_for_training(str(base), GLIMPSE)
    encoded = []
    model.model.visual.patch_embed.register_forward_hook(lambda _, args, __: encoded.append(args))
    config = Stage1Config(output_dir="unused", bf16=False, use_cpu=True, bce_weight=0.3)
    trainer = Stage1Trainer(model, config)
    batch = collate(data, processor, rows)
    found = trainer.compute_loss(model, batch)
    assert sum(len(args[0]) for args in encoded) == len(batch["visuals"]["pixel_values"])

    inputs = repeat_images(batch)
    evidence, cache = inputs.pop("evidence_mask"), DynamicCache()
    outputs = model(**inputs, in_place=True, **given_cache(cache), use_cache=True)
    record = cache.glimpse
    dice, bce = (
        loss(record.importance, evidence, record.rows, len(rows)).mean()
        for loss in (dice_loss, bce_loss)
    )
    expected = dice + 0.3 * bce + outputs.loss
    torch.testing.assert_close(found, expected)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = (torch.autograd.grad(loss, weights) for loss in (found, expected))
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


def logged_training_steps(recipe):
    state = (last_checkpoint(recipe.checkpoint_folder) / "trainer_state.json").read_text()
    return [entry for entry in json.loads(state)["log_history"] if "loss" in entry]


def test_only_glimpse_weights_change_and_the_loss_falls(make_recipe, base):
    settings = {"training.max_steps": 60, "training.answer_weight": 0.1, "questions_per_image": 2}
    recipe = make_recipe(**settings)
    summary = train_stage1(recipe)
    history = logged_training_steps(recipe)
    names = {"dice_loss", "bce_loss", "answer_loss", "precision", "recall", "iou", "retention"}
    assert names <= set(history[0])
    for name, factor in (("loss", 0.8), ("dice_loss", 0.8), ("answer_loss", 0.95)):
        first, last = (sum(each[name] for each in part) for part in (history[:6], history[-6:]))
        assert last < factor * first, name
    fresh = load_for_training(str(base), GLIMPSE)[0].state_dict()
    trained = weights_of(recipe)
    assert set(trained) == set(fresh)
    changed = {name for name in fresh if not torch.equal(fresh[name], trained[name])}
    assert changed and all(name.startswith("model.glimpse.") for name in changed)
    assert trained["model.glimpse.trained"]
    assert summary["questions"] == 6 and summary["steps"] == 60
    assert json.loads((Path(recipe.output) / "training_summary.json").read_text()) == summary


def test_mixed_precision_trains_float32_weights_on_a_bfloat16_base(make_recipe, base, tmp_path):
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16)
    stock.save_pretrained(tmp_path / "half")
    build_processor().save_pretrained(tmp_path / "half")
    settings = {"base": str(tmp_path / "half"), "training.bf16": True, "training.save_steps": 4}
    recipe = make_recipe(**settings)
    train_stage1(recipe)
    checkpoint = load_file(last_checkpoint(recipe.checkpoint_folder) / GLIMPSE_WEIGHTS)
    assert checkpoint["token.embeddings"].dtype == torch.float32
    saved = weights_of(recipe)
    rounded = checkpoint["token.embeddings"].bfloat16()
    assert torch.equal(saved["model.glimpse.token.embeddings"], rounded)
    assert torch.equal(saved["lm_head.weight"], stock.lm_head.weight)


def test_validation_figures_are_means_over_all_questions(make_recipe, base, data):
    recipe = make_recipe(**{"validation_data": str(data), "training.max_steps": 1})
    recipe.training["per_device_eval_batch_size"] = 4
    metrics = train_stage1(recipe)["metrics"]
    model, processor, _ = load_for_training(recipe.output)
    trainer = Stage1Trainer(
        model.eval(), Stage1Config(output_dir="unused", bf16=False, use_cpu=True)
    )
    with torch.no_grad():
        for row in range(6):
            trainer.compute_loss(model, collate(data, processor, [row]))
    expected = trainer._figures["eval"].means(trainer.accelerator)
    for name in ("dice_loss", "bce_loss", "precision", "recall", "iou", "retention"):
        assert metrics[f"eval_{name}"] == pytest.approx(expected[name], abs=1e-5)


def test_checkpoints_hold_only_the_glimpse(make_recipe):
    recipe = make_recipe(**{"training.save_steps": 2})
    train_stage1(recipe)
    checkpoint = last_checkpoint(recipe.checkpoint_folder)
    assert checkpoint.name == "checkpoint-4"
    found = {file.name for file in checkpoint.iterdir()}
    expected = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert found == expected | {GLIMPSE_WEIGHTS}
    weights = load_file(checkpoint / GLIMPSE_WEIGHTS)
    saved = {
        name.removeprefix("model.glimpse."): weight
        for name, weight in weights_of(recipe).items()
        if name.startswith("model.glimpse.")
    }
    assert set(weights) == set(saved)
    assert all(torch.equal(weights[name], saved[name]) for name in weights)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_training_equals_uninterrupted_training(make_recipe, accumulation):
    settings = {
        "training.max_steps": 5,
        "training.gradient_accumulation_steps": accumulation,
        "glimpse.glimpse_dropout": 0.1,  # so that the random state matters
        "training.save_steps": 3,
    }
    whole, parts = make_recipe("whole", **settings), make_recipe("parts", **settings)
    train_stage1(whole)

    def interrupt(trainer):
        raise KeyboardInterrupt

    original = Stage1Trainer.log
    try:
        Stage1Trainer.log = lambda self, *args: (
            interrupt(self) if self.state.global_step == 4 else original(self, *args)
        )
        with pytest.raises(KeyboardInterrupt):
            train_stage1(parts)
    finally:
        Stage1Trainer.log = original
    assert last_checkpoint(parts.checkpoint_folder).name == "checkpoint-3"
    assert not Path(parts.output).exists()
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        train_stage1(parts)
    train_stage1(parts, resume=True)
    expected, found = weights_of(whole), weights_of(parts)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_interrupted_checkpoints_are_passed_over(tmp_path):
    assert last_checkpoint(tmp_path / "absent") is None
    for number, state in ((2, "{}"), (10, '{"glob'), (30, None)):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_an_existing_output_is_left_alone(make_recipe):
    recipe = make_recipe()
    Path(recipe.output).mkdir()
    (Path(recipe.output) / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        train_stage1(recipe)
    assert [file.name for file in Path(recipe.output).parent.iterdir()] == ["trained"]


def test_nothing_half_written_stays(tmp_path):
    with pytest.raises(RuntimeError), vacant_sibling(tmp_path / "output") as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_large_model_is_written_in_several_files(base, tmp_path, monkeypatch):
    monkeypatch.setattr(repository, "SHARD_SIZE", "40KB")
    model, processor, dtype = load_for_training(str(base))
    repository.write_repository(model, processor, tmp_path / "model", dtype, {})
    shards = find_shards(tmp_path / "model")
    assert len(shards) > 1
    assert all(shard.data_bytes <= 40_000 or len(shard.tensors) == 1 for shard in shards)
    load_for_training(str(tmp_path / "model"))


def test_training_goes_on_from_a_repository(make_recipe, tmp_path):
    first = make_recipe("first")
    train_stage1(first)
    second = make_recipe("second", base=first.output)
    train_stage1(second)
    before, after = weights_of(first), weights_of(second)
    assert set(before) == set(after)
    assert not torch.equal(
        before["model.glimpse.token.embeddings"], after["model.glimpse.token.embeddings"]
    )
    with pytest.raises(ValueError, match="glimpse_layer is 1 in .*, and cannot become 2"):
        load_for_training(first.output, {"glimpse_layer": 2})


def test_repository_reloads_in_a_fresh_process(make_recipe, data, tmp_path):
    recipe = make_recipe(**{"glimpse.prune_threshold": 0.4})
    train_stage1(recipe)
    references = json.loads((Path(recipe.output) / "config.json").read_text())["auto_map"]
    model_class = "modeling_qwen2_5_vl.GlimpsePruneQwen2_5_VLForConditionalGeneration"
    assert references == {
        "AutoConfig": "configuration_glimpseprune.GlimpsePruneQwen2_5_VLConfig",
        "AutoModel": "modeling_qwen2_5_vl.GlimpsePruneQwen2_5_VLModel",
        "AutoModelForImageTextToText": model_class,
        "AutoModelForMultimodalLM": model_class,
        "AutoModelForVision2Seq": model_class,
        "AutoProcessor": "processing_glimpseprune.GlimpsePruneQwen2_5_VLProcessor",
    }
    model, processor, _ = load_for_training(recipe.output)
    batch = repeat_images(collate(data, processor, [0, 2]))
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    inputs = {name: batch[name][:, : batch["prompt_length"]] for name in names if name in batch}
    inputs |= {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    expected = model.eval().glimpse(**inputs)
    torch.save(inputs, tmp_path / "inputs.pt")
    auto_class = "AutoModelForImageTextToText" if TRANSFORMERS_5 else "AutoModelForVision2Seq"
    arguments = "-c", RELOAD, recipe.output, auto_class, tmp_path / "inputs.pt"
    variables = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    reloaded = run_fresh(*arguments, cwd=tmp_path, env=os.environ | variables)
    assert reloaded.returncode == 0, reloaded.stderr
    importance, keep_mask = torch.load(tmp_path / "inputs.pt")
    torch.testing.assert_close(importance, expected.importance)
    assert torch.equal(keep_mask, expected.keep_mask)


def start(recipe, *launcher: str, flags: tuple[str, ...] = ()) -> subprocess.Popen:
    """Train by a recipe in processes of their own."""
    command = [sys.executable, "-m", *launcher, "glimpseprune.cli", *command_line(recipe), *flags]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", ["grounding", "distillation", "grounding, read ahead", "grounding, looked once"]
)
def test_two_processes_equal_one_with_twice_the_accumulation(make_recipe, base, objective):
    """The same losses, logged step by step, and the same weights; one process writes."""
    step = {"optim": "sgd", "max_steps": 3, "warmup": 0.0, "save_steps": 2, "mask_noise": False}
    step["per_device_train_batch_size"] = 1  # six questions: no step shorter than another
    if objective == "distillation":
        step |= {"grounding_weight": 0.0, "distillation_weight": 1.0}
    step["look_once"] = objective == "grounding, looked once"
    fields = {}
    if objective == "grounding, read ahead":
        step["answer_weight"] = 0.0
        fields = {"prune_layer": 0, "glimpse_lora_rank": 2, "stale_rank": 2}
    step = {f"training.{name}": value for name, value in step.items()}
    step |= {f"glimpse.{name}": value for name, value in fields.items()}
    alone = make_recipe("alone", **step, **{"training.gradient_accumulation_steps": 2})
    train_stage1(alone)
    pair = make_recipe("pair", **step)
    launcher = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "-m")
    assert start(pair, *launcher).wait(timeout=300) == 0
    steps = zip(logged_training_steps(alone), logged_training_steps(pair), strict=True)
    for ours, theirs in steps:
        for name in ("loss", *(name for name in ours if name.endswith("_loss")), "retention"):
            assert theirs[name] == pytest.approx(ours[name], abs=1e-4), name
    expected, found = weights_of(alone), weights_of(pair)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)
    set_seed(3)
    fresh = load_for_training(str(base), GLIMPSE | fields)[0].state_dict()
    moved = [(fresh[name] - found[name]).abs().max() for name in fresh if "glimpse.token" in name]
    assert max(moved) > 1e-4
    for number in (2, 3):
        files = {file.name for file in (pair.checkpoint_folder / f"checkpoint-{number}").iterdir()}
        random_states = {"rng_state_0.pth", "rng_state_1.pth"}
        others = {"optimizer.pt", "scheduler.pt", "trainer_state.json", GLIMPSE_WEIGHTS}
        assert files == random_states | others


def test_only_one_process_writes_weights(base, tmp_path, monkeypatch):
    model, _, _ = load_for_training(str(base), GLIMPSE)
    config = Stage1Config(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    trainer = Stage1Trainer(model, config)
    monkeypatch.setattr(Stage1Config, "should_save", False)
    trainer._save(str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    monkeypatch.undo()
    trainer._save(str(tmp_path / "main"))
    assert [file.name for file in (tmp_path / "main").iterdir()] == [GLIMPSE_WEIGHTS]


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_weights(make_recipe):
    """SIGKILL after the second checkpoint, at no chosen point of what follows."""
    settings = {"training.max_steps": 40, "training.save_steps": 2, "training.save_total_limit": 3}
    settings |= {"glimpse.glimpse_dropout": 0.1, "training.distillation_weight": 1.0}
    whole, parts = make_recipe("whole", **settings), make_recipe("parts", **settings)
    train_stage1(whole)
    process = start(parts)
    deadline = time.monotonic() + 240
    while not (parts.checkpoint_folder / "checkpoint-4").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    reached = int(last_checkpoint(parts.checkpoint_folder).name.split("-")[1])
    assert 2 <= reached < 40 and not Path(parts.output).exists()
    assert start(parts, flags=("--resume",)).wait(timeout=300) == 0
    expected, found = weights_of(whole), weights_of(parts)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
