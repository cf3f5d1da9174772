"""What only the LLaVA families promise, and their way from a stock folder to users' hands."""

import copy
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import FAMILIES, TEXT_INPUTS, TRANSFORMERS_5, build_batch, build_models, randomise
from fresh_process import run_fresh
from llava_prompts import PATCH, PINPOINTS, SIDE, TILE, config_fields, next_config_fields
from PIL import Image
from safetensors.torch import load_file, save_file
from stage1_data import assert_same_step, collate, step, trainer_that_learns
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from glimpseprune.cli import main
from glimpseprune.data.visual_cot import read_visual_cot
from glimpseprune.data.visual_cot_collator import VisualCoTCollator
from glimpseprune.loading import prepare
from glimpseprune.training.base import load_for_training
from glimpseprune.training.recipe import read_recipe
from glimpseprune.training.repository import UNDER_OWN_NAMES, write_repository
from glimpseprune.training.stage1 import train_stage1
from glimpseprune.training.stage1_config import Stage1Recipe
from modeling_glimpseprune.configuration_glimpseprune import GlimpsePruneLlavaConfig
from modeling_glimpseprune.stock import cache_of

NAMES = ("llava", "llava_next")
TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
GLIMPSE = {
    "glimpse_layer": 1,
    "predictor_hidden_size": 16,
    "predictor_condition_size": 16,
    "predictor_num_heads": 2,
}
FRESH_PROCESS = """
import json, sys, torch, transformers
from PIL import Image
folder, page, auto_class, output = sys.argv[1:]
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
for loaded in (model, processor):
    assert type(loaded).__module__.startswith("transformers_modules"), type(loaded)
assert "glimpseprune" not in sys.modules and "modeling_glimpseprune" not in sys.modules
message = {"role": "user", "content": [
    {"type": "image", "image": Image.open(page).convert("RGB")}, {"type": "text", "text": "What?"}]}
inputs = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True,
                                       return_dict=True, return_tensors="pt")
record = model.glimpse(**inputs)
torch.save((record.importance, record.keep_mask), output)
settings = {"max_new_tokens": 4, "do_sample": False}
generated = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1]:]
pipe = transformers.pipeline("image-text-to-text", model=folder, trust_remote_code=True)
spoken = pipe(text=[message], generate_kwargs=settings, return_full_text=False)
assert spoken[0]["generated_text"] == processor.batch_decode(generated, skip_special_tokens=True)[0]
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and LLaVA's special tokens; a prompt begins with `<s>`."""
    special = ["<pad>", "<s>", "</s>", "<image>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = models.BPE({word: index for index, word in enumerate(words)}, [])
    tokenizer = Tokenizer(bytes_only)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def build_processor(family: str):
    parts = {
        "tokenizer": build_tokenizer(), "patch_size": PATCH, "chat_template": TEMPLATE,
        "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
    }  # fmt: skip
    sizes = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
    if family == "llava":
        return LlavaProcessor(image_processor=CLIPImageProcessor(**sizes), **parts)
    images = LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **sizes)
    return LlavaNextProcessor(image_processor=images, **parts)


@pytest.fixture(params=NAMES)
def family(request):
    return request.param


@pytest.fixture
def base(family, tmp_path):
    """A folder with a tiny stock model and its processor."""
    classes, vocabulary = FAMILIES[family], 264
    fields = (config_fields if family == "llava" else next_config_fields)(vocabulary, 0)
    fields["image_token_index"] = 3
    fields["text_config"] |= {"bos_token_id": 1, "eos_token_id": 2}
    stock = classes.stock_class(classes.stock_config_class(**fields)).eval()
    randomise(stock, 0)
    stock.lm_head.weight.data[:4] = 0  # answers are text
    stock.save_pretrained(tmp_path / "base")
    build_processor(family).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path):
    """Four questions about a wide and a tall page."""
    generator, lines = np.random.default_rng(0), []
    for name, width, height in (("wide", 40, 20), ("tall", 16, 48)):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        for number, answer in enumerate(("7", "413")):
            lines.append(
                {"question": f"Which {number}?", "answer": answer, "image": f"{name}.png",
                 "bboxs": [[4, 8, 12, 16]], "dataset": "test", "width": width, "height": height}
            )  # fmt: skip
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_stage_1_ends_in_a_repository_that_a_fresh_process_loads(base, data, tmp_path):
    training = {
        "bf16": False, "use_cpu": True, "learning_rate": 0.01, "per_device_train_batch_size": 2,
        "max_steps": 3, "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    fields = {"base": str(base), "data": str(data), "output": str(tmp_path / "out")}
    overrides = {f"glimpse.{name}": value for name, value in GLIMPSE.items()}
    overrides |= {f"training.{name}": value for name, value in training.items()}
    summary = train_stage1(
        read_recipe(Stage1Recipe, None, fields | overrides | {"questions_per_image": 2})
    )
    assert summary["questions"] == 4 and summary["steps"] == 3
    fresh = load_for_training(str(base), GLIMPSE)[0].state_dict()
    model, processor, _ = load_for_training(str(tmp_path / "out"))
    after = model.state_dict()
    changed = {name for name in fresh if not torch.equal(fresh[name], after[name])}
    assert changed and all(name.startswith("model.glimpse.") for name in changed)
    with Image.open(tmp_path / "wide.png") as page:
        inputs = prepare(processor, [page.convert("RGB")], ["What?"])
    expected = model.eval().glimpse(**inputs)
    auto_class = "AutoModelForImageTextToText" if TRANSFORMERS_5 else "AutoModelForVision2Seq"
    arguments = [tmp_path / "out", tmp_path / "wide.png", auto_class, tmp_path / "scores.pt"]
    site = str(Path(transformers.__file__).parents[1])
    variables = {"PYTHONPATH": site, "HF_HOME": str(tmp_path / "cache")}
    completed = run_fresh("-c", FRESH_PROCESS, *arguments, cwd=tmp_path, env=os.environ | variables)
    assert completed.returncode == 0, completed.stderr
    importance, keep_mask = torch.load(tmp_path / "scores.pt")
    torch.testing.assert_close(importance, expected.importance)
    assert torch.equal(keep_mask, expected.keep_mask)


def test_a_training_prompt_is_the_processors(family, base, data):
    model, processor, _ = load_for_training(str(base), GLIMPSE)
    rows = read_visual_cot(data)[1:3]
    batch = VisualCoTCollator(processor)([[row] for row in rows])
    images = [Image.open(row.image).convert("RGB") for row in rows]
    expected = prepare(processor, images, [row.question for row in rows])
    for row in range(2):
        start = batch["attention_mask"][row].argmax()
        found = batch["input_ids"][row, start : batch["prompt_length"]].tolist()
        real = expected["input_ids"][row][expected["attention_mask"][row].bool()]
        assert found == real.tolist()
    assert torch.equal(batch["visuals"]["pixel_values"], expected["pixel_values"])
    counts = model.model.visual_counts(**expected)
    assert len(batch["evidence_mask"]) == sum(counts)
    if family == "llava":  # the middle square of the wide page begins at x = 10, of the tall at 16
        wide, tall = (part.view(SIDE, SIDE) for part in batch["evidence_mask"].split(counts))
        assert wide.tolist() == [[False] * 3, [True, False, False], [True, False, False]]
        assert not tall.any()


@pytest.mark.parametrize("glimpse", [{}, {"prune_layer": 0, "stale_rank": 2}])
def test_stage_1_over_looks_learns_the_same(base, data, glimpse):
    settings = {"answer_weight": 0.0} if glimpse else {}
    trainer = trainer_that_learns(base, GLIMPSE | glimpse, settings)
    batch = collate(data, trainer.processor, [1, 0, 3, 2])
    expected, found = (step(trainer, batch, look_once) for look_once in (False, True))
    assert_same_step(found, expected)


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_fresh_weights_are_drawn_and_not_found_in_memory(base, norm):
    glimpse = load_for_training(str(base), GLIMPSE | {"glimpse_norm": norm})[0].model.glimpse
    norms = [module for module in glimpse.modules() if "Norm" in type(module).__name__]
    assert len(norms) == 1 + 2 * len(glimpse.predictor.layers)
    assert all((module.weight == 1).all() for module in norms)
    assert norm == "rms_norm" or not glimpse.token.norm.bias.any()
    for name, weight in glimpse.named_parameters():
        assert weight.isfinite().all() and weight.abs().max() <= 1, name
        assert weight.ndim == 1 or 0.005 < weight.std() < 0.05, name


def published_name(name: str) -> str:
    """The name that a parameter has in published checkpoints."""
    name = name.replace("model.language_model.", "language_model.model.")
    name = "language_model.lm_head.weight" if name == "lm_head.weight" else name
    return name.removeprefix("model.")


@pytest.mark.parametrize("layout", ["published", "nested", "own"])
def test_bases_load_under_old_and_new_names(family, base, layout):
    stock = FAMILIES[family].stock_class.from_pretrained(base)
    tower = "model.vision_tower.vision_model."
    weights = {
        name.replace("model.vision_tower.", tower) if TRANSFORMERS_5 else name: weight
        for name, weight in stock.state_dict().items()
    }
    if layout == "published":
        weights = {published_name(name): weight for name, weight in weights.items()}
    elif layout == "own":  # as transformers 5 keeps them in memory
        weights = {
            name.replace(tower, "model.vision_tower."): each for name, each in weights.items()
        }
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    model, _, _ = load_for_training(str(base), GLIMPSE)
    ours = model.state_dict()
    for name, weight in stock.state_dict().items():
        assert torch.equal(ours[name], weight), name


@pytest.mark.parametrize("options", [{}, UNDER_OWN_NAMES])
@pytest.mark.parametrize("tower", ["model.vision_tower.", "model.vision_tower.vision_model."])
def test_saved_models_load_under_either_generations_names(family, tmp_path, options, tower):
    model = build_models(5, family=family).pruned
    model.save_pretrained(tmp_path, **options)
    saved = load_file(tmp_path / "model.safetensors")
    plain = {
        name.replace("vision_tower.vision_model.", "vision_tower."): saved[name] for name in saved
    }
    renamed = {name.replace("model.vision_tower.", tower): plain[name] for name in plain}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


@torch.no_grad()
def compare_with_stock(models, batch, **options) -> None:
    """Keeping all is the stock model; dropping some is something else."""
    expected = models.stock(**batch.inputs, **options).logits
    keep = torch.ones(batch.num_visual, dtype=torch.bool)
    kept = models.pruned(**batch.inputs, visual_keep_mask=keep, **options).logits
    real = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(kept[real], expected[real], rtol=0, atol=1e-5)
    some = models.pruned(**batch.inputs, max_keep_ratio=0.3, **options).logits
    assert (some[:, -1] - expected[:, -1]).abs().max() > 1e-3


def test_a_mistral_decoder(family):
    models = build_models(6, family=family, text_model_type="mistral")
    compare_with_stock(models, build_batch([[2, (3, 5), 3], [4, (2, 2), 1]], family=family))


def test_features_of_several_layers(family):
    classes = FAMILIES[family]
    fields = classes.config_fields() | {"vision_feature_layer": [-1, -2]}
    models = build_models(7, family=family)
    stock = classes.stock_class(classes.stock_config_class(**copy.deepcopy(fields))).eval()
    pruned = type(models.pruned)(type(models.pruned.config)(**fields, **GLIMPSE)).eval()
    randomise(stock, 7)
    pruned.load_state_dict(stock.state_dict(), strict=False)
    randomise(pruned.model.glimpse, 8)
    pruned.model.glimpse.trained.fill_(True)
    batch = build_batch([[2, (3, 5), 3]], family=family)
    compare_with_stock(type(models)(stock, pruned), batch)


@torch.no_grad()
def test_the_class_token_is_kept_and_not_scored():
    """With the strategy `full` an image has a placeholder more, in front."""
    models, batch = build_models(8, family="llava"), build_batch([[2, (3, 3), 3]], family="llava")
    ids = batch.inputs["input_ids"]
    ids = torch.cat([ids[:, :2], torch.full((1, 1), 190), ids[:, 2:]], dim=1)
    inputs = batch.inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"vision_feature_select_strategy": "full"}
    compare_with_stock(models, batch._replace(inputs=inputs), **options)
    nothing = torch.zeros(SIDE**2, dtype=torch.bool)
    outputs = models.pruned(**inputs, visual_keep_mask=nothing, use_cache=True, **options)
    assert cache_of(outputs).layers[0].keys.shape[-2] == 2 + 1 + 3


@torch.no_grad()
def test_newline_tokens_always_stay():
    """A LLaVA-NeXT prompt without visual tokens keeps its text and a newline a row of the grid."""
    models = build_models(9, family="llava_next")
    batch = build_batch([[2, (3, 5), 3]], family="llava_next")
    nothing = torch.zeros(batch.num_visual, dtype=torch.bool)
    outputs = models.pruned(**batch.inputs, visual_keep_mask=nothing, use_cache=True)
    *_, (_, _, (_, rows, _)) = batch.visuals
    assert cache_of(outputs).layers[0].keys.shape[-2] == 2 + rows + 3


# Bad input


@pytest.mark.parametrize("num_images", [1, 3])
def test_images_and_placeholders_differ(family, num_images):
    model = build_models(10, family=family).pruned
    build = partial(build_batch, family=family)
    batch, other = build([[3, (2, 3), 2, (2, 2)]]), build([[1, *[(2, 3)] * num_images, 1]])
    pixels = {name: other.inputs[name] for name in other.inputs if name not in TEXT_INPUTS}
    for options in ({}, {"prune": False}):
        with pytest.raises(ValueError, match="[Ii]mage.*do not match"):
            model(**(batch.inputs | pixels), **options)
    with pytest.raises(ValueError, match="[Ii]mage.*do not match"):
        model.generate(**(batch.inputs | pixels), max_new_tokens=1, num_beams=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_layers": [4]}, r"vision_layers must be hidden states 0\.\.3 .*\[4\]"),
        ({"vision_layers": [-1]}, r"vision_layers must .*\[-1\]"),
        ({"vision_layers": []}, "vision_layers must"),
        ({"predictor_windowed": True}, "predictor_windowed must be False"),
        ({"glimpse_layer": 3}, r"glimpse_layer must .*0\.\.2.* 3"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "must be a clip_vision_model"),
        ({"text_config": {"model_type": "gpt2"}}, "text_config must be one of .*gpt2"),
        (
            {"text_config": {"model_type": "mistral", "sliding_window": 8}},
            "sliding_window must be None, got 8",
        ),
    ],
)
def test_bases_that_do_not_fit(family, fields, message):
    config_class = FAMILIES[family].family.config_class
    with pytest.raises(ValueError, match=message):
        config_class(**(FAMILIES[family].config_fields() | fields))


def test_llava_next_keeps_no_class_token():
    config_class = FAMILIES["llava_next"].family.config_class
    fields = FAMILIES["llava_next"].config_fields()
    with pytest.raises(ValueError, match="vision_feature_select_strategy must be 'default'"):
        config_class(**fields, vision_feature_select_strategy="full")


def test_a_recipe_for_a_tower_without_the_layers(base):
    with pytest.raises(ValueError, match=r"vision_layers must .*\[23, 17, 11, 5\]"):
        load_for_training(str(base), GLIMPSE | {"vision_layers": [23, 17, 11, 5]})


def test_default_vision_layers_are_the_official_ones():
    assert GlimpsePruneLlavaConfig().vision_layers == [23, 17, 11, 5]
    assert GlimpsePruneLlavaConfig().glimpse_layer == 21


def test_the_processor_names_an_image_that_is_missing(base):
    _, processor, _ = load_for_training(str(base), GLIMPSE)
    with pytest.raises(ValueError, match="2 image placeholder.*1 image"):
        processor(images=[Image.new("RGB", (20, 20))], text="<image> and <image>")
    with pytest.raises(ValueError, match="image 0 has no pixels"):
        processor(images=[Image.new("RGB", (0, 20))], text="<image>")


def test_ask_draws_what_the_model_sees(family, base, tmp_path, capsys):
    """LLaVA's picture is of the image's middle square; LLaVA-NeXT's has a row for each view."""
    model, processor, dtype = load_for_training(str(base), GLIMPSE)
    model.model.glimpse.trained.fill_(True)
    write_repository(model, processor, tmp_path / "model", dtype, {})
    Image.effect_noise((40, 20), 100).save(tmp_path / "wide.png")
    picture = tmp_path / "picture.png"
    arguments = ["--model", str(tmp_path / "model"), "--image", str(tmp_path / "wide.png")]
    assert main(["ask", *arguments, "--max-new-tokens", "3", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    expected = {"llava": (2 * 20, 20), "llava_next": (2 * 40, 2 * 20)}
    assert Image.open(picture).size == expected[family]
    assert ("seen of the image: (10, 0, 30, 20)" in printed) == (family == "llava")


def test_evaluate_counts_retention_a_question(base, data, tmp_path, capsys):
    model, processor, dtype = load_for_training(str(base), GLIMPSE)
    model.model.glimpse.trained.fill_(True)
    write_repository(model, processor, tmp_path / "model", dtype, {})
    arguments = ["--model", str(tmp_path / "model"), "--data", str(data), "--batch-size", "2"]
    output = tmp_path / "results.json"
    assert main(["evaluate", *arguments, "--output", str(output)]) == 0
    results = json.loads(output.read_text())["results"]
    assert results["all tokens"]["all"]["retention"] == 1.0
    for name in ("pruned, max_keep_ratio 0.111", "random, keep ratio 0.111"):
        assert results[name]["all"]["questions"] == 4
        assert 0 < results[name]["all"]["retention"] <= 0.112
