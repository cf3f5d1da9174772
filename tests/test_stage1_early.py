"""Stage 1 of a glimpse that is read ahead (P < K): start, teacher, gradients, files, refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage1_data import GLIMPSE, collate, recipe_of
from transformers import DynamicCache, PretrainedConfig

from glimpseprune.hub.inspection import inspect_repository
from glimpseprune.hub.shards import ConversionError
from glimpseprune.training.base import load_for_training
from glimpseprune.training.checkpoints import last_checkpoint
from glimpseprune.training.late_glimpse import (
    check_late_configuration,
    late_backbone,
    read_glimpse,
    start_glimpse_from,
)
from glimpseprune.training.recipe import read_recipe
from glimpseprune.training.stage1 import train_stage1
from glimpseprune.training.stage1_config import Stage1Config, Stage1Recipe
from glimpseprune.training.stage1_losses import bce_loss, dice_loss
from glimpseprune.training.stage1_trainer import Stage1Trainer
from modeling_glimpseprune.configuration_glimpseprune import (
    GlimpsePruneLlavaConfig,
    GlimpsePruneQwen2_5_VLConfig,
    GlimpsePruneQwen3VLConfig,
)
from modeling_glimpseprune.modeling_qwen2_5_vl import GlimpsePruneQwen2_5_VLForConditionalGeneration
from modeling_glimpseprune.stock import given_cache

REPOSITORY = Path(__file__).resolve().parents[1]
RANKS = {"glimpse_lora_rank": 2, "stale_rank": 2}
EARLY = GLIMPSE | RANKS | {"prune_layer": 0}
OVERRIDES = {f"glimpse.{name}": value for name, value in EARLY.items()}
OVERRIDES["training.answer_weight"] = 0.0


@pytest.fixture(scope="module")
def early(base, data, late, tmp_path_factory):
    """The recipe of a finished run that started from the late glimpse and learned from it."""
    output = tmp_path_factory.mktemp("early") / "trained"
    given = {"late_glimpse": late, "training.late_weight": 0.5}
    recipe = recipe_of(base, data, output, **OVERRIDES, **given)
    train_stage1(recipe)
    return recipe


@pytest.fixture
def make_recipe(base, data, tmp_path):
    def make(output="trained", **overrides):
        return recipe_of(base, data, tmp_path / output, **(OVERRIDES | overrides))

    return make


@pytest.fixture
def copied(early, tmp_path):
    """A copy of the early repository that a test may damage."""
    return Path(shutil.copytree(early.output, tmp_path / "copied"))


def trainer_of(model, late=None, **settings):
    settings = {"answer_weight": 0.0, **settings}
    config = Stage1Config(output_dir="unused", bf16=False, use_cpu=True, **settings)
    return Stage1Trainer(model, config, late=late)


def prompts_of(trainer, batch) -> dict:
    """A collated batch as the model takes it, without its answers."""
    inputs = trainer._without_pixels(dict(batch), None)
    for name in ("names", "evidence_mask"):
        inputs.pop(name)
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    length = inputs["prompt_length"]
    return inputs | {name: inputs[name][:, :length] for name in names if name in inputs}


def importance_of(model, inputs) -> torch.Tensor:
    cache = DynamicCache()
    model(**inputs, only_glimpse=True, use_cache=True, **given_cache(cache))
    return cache.glimpse.importance


def test_what_is_trained_and_written(early, base):
    fresh = load_for_training(str(base), EARLY)[0].state_dict()
    trained = load_file(Path(early.output) / "model.safetensors")
    assert set(trained) == set(fresh)
    others = [name for name in fresh if not name.startswith("model.glimpse.")]
    assert all(torch.equal(fresh[name], trained[name]) for name in others)
    written = {
        name: bool(trained[name].any())
        for name in trained
        if "_additions." in name and name.endswith("up.weight")
    }
    # Of layer K = 1 the glimpse's query and the keys of stale states are read, and nothing else.
    unread = [f"token_additions.1.{name}" for name in "k_proj v_proj o_proj".split()]
    unread += [f"token_additions.1.{name}_proj" for name in ("gate", "up", "down")]
    unread += ["stale_additions.1.v_proj"]
    unread = {f"model.glimpse.{name}.up.weight" for name in unread}
    assert {name for name, learned in written.items() if not learned} == unread
    config = json.loads((Path(early.output) / "config.json").read_text())
    assert {name: config[name] for name in ("prune_layer", *RANKS)} == {"prune_layer": 0, **RANKS}
    model = GlimpsePruneQwen2_5_VLForConditionalGeneration.from_pretrained(early.output)
    assert model.model.glimpse.trained


@torch.no_grad()
def test_it_starts_as_the_late_glimpse(base, data, late):
    """Read late, the fresh weights score as the late ones do; read ahead, otherwise."""
    model, processor, _ = load_for_training(str(base), EARLY)
    backbone = late_backbone(late, model)
    start_glimpse_from(model, backbone.glimpse)
    trainer = trainer_of(model.eval())
    inputs = prompts_of(trainer, collate(data, processor, [0, 1, 3]))
    expected = load_for_training(late)[0].eval()
    wanted = importance_of(expected, inputs)
    same = {"atol": 1e-6, "rtol": 1e-5}  # alignment of memory decides among kernels
    torch.testing.assert_close(importance_of(backbone, inputs), wanted, **same)
    read_late = importance_of(model, inputs | {"prune_layer": 1})
    torch.testing.assert_close(read_late, wanted, **same)
    assert not torch.allclose(importance_of(model, inputs), wanted, atol=1e-3)


def test_the_base_is_held_once(base, late):
    model = load_for_training(str(base), EARLY)[0]
    backbone = late_backbone(late, model)
    assert backbone.language_model is model.model.language_model
    assert backbone.visual is model.model.visual and model.model.glimpse is not backbone.glimpse
    shared = {id(weight) for weight in model.parameters()}
    own = {name for name, weight in backbone.named_parameters() if id(weight) not in shared}
    assert own and all(name.startswith("glimpse.") for name in own)
    stored = load_file(Path(late) / "model.safetensors")
    read = read_glimpse(late)
    assert read and all(torch.equal(read[name], stored[f"model.glimpse.{name}"]) for name in read)


def test_the_teacher_gives_soft_targets(base, data, late):
    model, processor, _ = load_for_training(str(base), EARLY)
    backbone = late_backbone(late, model)
    trainer = trainer_of(model, backbone, late_weight=0.5, grounding_weight=0.0)
    batch = collate(data, processor, [0, 1, 3])
    found = trainer.compute_loss(model, dict(batch))
    inputs = prompts_of(trainer, batch)
    cache = DynamicCache()
    model(**inputs, only_glimpse=True, use_cache=True, **given_cache(cache))
    record = cache.glimpse
    targets = importance_of(load_for_training(late)[0].eval(), inputs).sigmoid()
    located = (record.importance, targets.detach(), record.rows, 3)
    expected = 0.5 * (dice_loss(*located) + bce_loss(*located)).mean()
    torch.testing.assert_close(found, expected)


def test_gradients_reach_what_is_read_and_nothing_of_the_prompt(base, data, late):
    model, processor, _ = load_for_training(str(base), EARLY)
    trainer = trainer_of(model)
    with torch.no_grad():
        for name, weight in model.model.glimpse.named_parameters():
            if "_additions." in name:
                torch.nn.init.normal_(weight, std=0.1)  # behind zeros no gradient passes
    prompt = []
    for layer in model.model.language_model.layers[:1]:
        layer.self_attn.register_forward_hook(lambda _, __, output: prompt.append(output[0]))
    trainer.compute_loss(model.train(), collate(data, processor, [0, 1, 3])).backward()
    assert len(prompt) == 1 and not prompt[0].requires_grad
    for name, weight in model.named_parameters():
        assert weight.requires_grad == (weight.grad is not None), name
        assert not weight.requires_grad or weight.grad.any(), name
        assert not weight.requires_grad or name.startswith("model.glimpse."), name


@pytest.mark.parametrize("objective", [{}, {"training.distillation_weight": 1.0}])
def test_checkpointing_changes_nothing(make_recipe, objective):
    weights = []
    for checkpointing in (False, True):
        settings = {"training.gradient_checkpointing": checkpointing, "training.max_steps": 2}
        recipe = make_recipe(f"with_{checkpointing}", **objective, **settings)
        train_stage1(recipe)
        weights.append(load_file(Path(recipe.output) / "model.safetensors"))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-6, rtol=1e-5)


def test_resumed_training_equals_uninterrupted_training(early, make_recipe, monkeypatch):
    given = {"late_glimpse": early.late_glimpse, "training.late_weight": 0.5}
    recipe = make_recipe(**given, **{"training.save_steps": 2})
    original = Stage1Trainer.log

    def interrupt(self, *args):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Stage1Trainer, "log", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_stage1(recipe)
    assert last_checkpoint(recipe.checkpoint_folder).name == "checkpoint-2"
    train_stage1(recipe, resume=True)
    expected, found = (
        load_file(Path(each.output) / "model.safetensors") for each in (early, recipe)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_teacher_alone_needs_no_boxes_and_no_answers(make_recipe, early, data, tmp_path):
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    bare = [{**line, "bboxs": [], "answer": None} for line in lines]
    path = tmp_path / "bare.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in bare))
    weights = {"training.grounding_weight": 0.0, "training.late_weight": 1.0}
    given = {
        "late_glimpse": early.late_glimpse,
        "data": str(path),
        "image_folder": str(data.parent),
    }
    recipe = make_recipe(**given, **weights)
    assert train_stage1(recipe)["steps"] == 4


def test_a_late_repository_gains_what_it_lacks(late):
    """It goes on as it is: additions start at zero, and it stays trained."""
    model = load_for_training(late, {"prune_layer": 0, **RANKS})[0]
    weights, stored = model.state_dict(), load_file(Path(late) / "model.safetensors")
    assert all(torch.equal(weights[name], stored[name]) for name in stored)
    new = {name: weights[name] for name in set(weights) - set(stored)}
    assert new and all("_additions." in name for name in new)
    assert all(weight.any() == name.endswith("down.weight") for name, weight in new.items())
    assert model.model.glimpse.trained
    assert (model.config.prune_layer, model.config.stale_rank) == (0, 2)


def test_a_rank_that_is_there_stays(early):
    with pytest.raises(ValueError, match="stale_rank is 2 in .*, and cannot become 3"):
        load_for_training(early.output, {"stale_rank": 3})
    with pytest.raises(ValueError, match="glimpse_lora_rank is 2 in .*, and cannot become 0"):
        load_for_training(early.output, {"glimpse_lora_rank": 0})


# Refusals


@pytest.mark.parametrize("fields", [{"prune_layer": 0}, {"glimpse_lora_rank": 2}])
def test_answers_cannot_see_a_glimpse_that_runs_beside(base, fields):
    model = load_for_training(str(base), GLIMPSE | fields)[0]
    with pytest.raises(ValueError, match="answer_weight must be 0 where prune_layer is below"):
        trainer_of(model, answer_weight=1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"training.late_weight": 0.5}, "late_weight needs late_glimpse"),
        ({"late_glimpse": "BASE"}, "needs a glimpseprune_qwen2_5_vl repository; .* holds a qwen"),
        ({"late_glimpse": "EARLY"}, "needs a glimpse that is read late; .* looks ahead"),
        ({"late_glimpse": "LATE", "glimpse.glimpse_layer": 2}, "glimpse_layer is 1 in .*, and 2"),
        ({"late_glimpse": "LATE", "glimpse.vision_layers": [0]}, "vision_layers is .*, and .0."),
        ({"late_glimpse": "/nowhere"}, "nowhere"),
    ],
)
def test_a_late_glimpse_that_does_not_fit(make_recipe, base, early, given, message):
    places = {"BASE": str(base), "EARLY": early.output, "LATE": early.late_glimpse}
    given = {name: places.get(value, value) if isinstance(value, str) else value
             for name, value in given.items()}  # fmt: skip
    with pytest.raises((ValueError, OSError), match=message):
        train_stage1(make_recipe(**given))


def test_an_untrained_late_glimpse_is_refused(make_recipe, late, tmp_path):
    folder = Path(shutil.copytree(late, tmp_path / "untrained"))
    change_weights(folder, lambda weights: weights["model.glimpse.trained"].fill_(False))
    with pytest.raises(ValueError, match="the glimpse of .*untrained is not trained"):
        train_stage1(make_recipe(late_glimpse=str(folder)))


def change_weights(folder: Path, change) -> None:
    """Change the dictionary of a repository's tensors in place."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_additions(weights: dict) -> None:
    for name in [name for name in weights if "_additions." in name]:
        del weights[name]


def without_one_addition(weights: dict) -> None:
    del weights["model.glimpse.stale_additions.1.k_proj.up.weight"]


@pytest.mark.parametrize("change", [without_additions, without_one_addition])
def test_additions_that_the_file_lacks(copied, change):
    change_weights(copied, change)
    with pytest.raises(ValueError, match="lacks low-rank additions .* stale_rank 2"):
        GlimpsePruneQwen2_5_VLForConditionalGeneration.from_pretrained(copied)
    with pytest.raises(ConversionError, match="weights are missing: .*_additions"):
        inspect_repository(copied)
    with pytest.raises(ValueError, match="additions"):
        load_for_training(str(copied))


@pytest.mark.parametrize("name", RANKS)
def test_additions_that_the_configuration_does_not_know(copied, name):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {name: 0}))
    with pytest.raises(ValueError, match="glimpse weights that its configuration has no place for"):
        GlimpsePruneQwen2_5_VLForConditionalGeneration.from_pretrained(copied)
    with pytest.raises(ConversionError, match="weights are not the model's: .*_additions"):
        inspect_repository(copied)


# Recipes

EARLY_RECIPES = {
    "qwen2_5_vl_3b": (23, 6, GlimpsePruneQwen2_5_VLConfig),
    "qwen2_5_vl_7b": (18, 5, GlimpsePruneQwen2_5_VLConfig),
    "qwen3_vl_2b": (18, 4, GlimpsePruneQwen3VLConfig),
    "qwen3_vl_4b": (24, 5, GlimpsePruneQwen3VLConfig),
    "qwen3_vl_8b": (24, 5, GlimpsePruneQwen3VLConfig),
    "llava_1_5_7b": (21, 4, GlimpsePruneLlavaConfig),
}


@pytest.mark.parametrize("name", EARLY_RECIPES)
def test_early_recipes_fit_the_official_glimpse(name):
    glimpse_layer, prune_layer, config_class = EARLY_RECIPES[name]
    given = {"data": "d", "output": "o", "training.bf16": False}
    path = REPOSITORY / "recipes" / f"stage1_{name}_early.yaml"
    recipe = read_recipe(Stage1Recipe, path, given)
    training = recipe.training_config()
    assert (training.answer_weight, training.late_weight) == (0, 0.5)
    content, _ = PretrainedConfig.get_config_dict(REPOSITORY / "hub_configs" / name)
    read_late = {"prune_layer": None, "glimpse_lora_rank": 0, "stale_rank": 0}
    official = config_class(**(content | read_late))
    own = config_class(**(content | recipe.glimpse))
    assert (own.glimpse_layer, own.prune_layer) == (glimpse_layer, prune_layer)
    assert (own.glimpse_lora_rank, own.stale_rank) == (16, 16)
    check_late_configuration("official", official, own)
    # from a stock base the fields come from the recipe and the defaults alone
    stock = {part: content[part] for part in ("text_config", "vision_config") if part in content}
    if "text_config" not in stock:
        stock["text_config"] = {
            each: content[each]
            for each in ("num_hidden_layers", "hidden_size", "num_attention_heads")
        }
    check_late_configuration("official", official, config_class(**stock, **recipe.glimpse))


def test_the_tiny_early_recipe_goes_on_from_the_tiny_repository():
    tiny = str(REPOSITORY / "hub_configs" / "tiny")
    given = {"base": tiny, "late_glimpse": tiny, "data": "d", "output": "o"}
    path = REPOSITORY / "recipes" / "stage1_tiny_early.yaml"
    recipe = read_recipe(Stage1Recipe, path, given | {"training.bf16": False})
    assert recipe.training_config().loss_weights().keys() == {"dice_loss", "bce_loss", "late_loss"}
    model = load_for_training(tiny, recipe.glimpse)[0]
    assert late_backbone(tiny, model).glimpse.trained and model.config.prune_layer == 0
