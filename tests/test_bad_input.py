"""Wrong settings, masks, checkpoints, prompts and images are refused in a sentence."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from conftest import PATCH, TRANSFORMERS_5, build_config_fields
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen2TokenizerFast
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from modeling_glimpseprune.configuration_glimpseprune import GlimpsePruneQwen2_5_VLConfig
from modeling_glimpseprune.modeling_qwen2_5_vl import (
    GlimpsePruneQwen2_5_VLForConditionalGeneration,
)
from modeling_glimpseprune.processing_glimpseprune import GlimpsePruneQwen2_5_VLProcessor

PROMPTS = [[3, (2, 3), 2], [(2, 2), 4]]
OUTPUT_WEIGHT = "model.glimpse.predictor.output_projection.weight"
PREDICTOR_SIZES = {
    "predictor_hidden_size": 16,
    "predictor_condition_size": 16,
    "predictor_num_heads": 2,
}


@pytest.fixture
def model(shared_models):
    return shared_models(20).pruned


@pytest.fixture
def batch(build_batch):
    return build_batch(PROMPTS)


def answer(model, batch, **options):
    return model.generate(**batch.inputs, max_new_tokens=2, do_sample=False, **options)


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prune_threshold", -0.1),
        ("prune_threshold", 1.5),
        ("prune_threshold", math.nan),
        ("max_keep_ratio", 0.0),
        ("max_keep_ratio", -0.5),
        ("max_keep_ratio", 1.01),
        ("min_keep_tokens", -1),
        ("min_keep_tokens", 1.5),
    ],
)
def test_selection_settings_out_of_range(model, batch, name, value):
    for use in (
        lambda: GlimpsePruneQwen2_5_VLConfig(**build_config_fields(), **{name: value}),
        lambda: answer(model, batch, **{name: value}),
        lambda: model.glimpse(**batch.inputs, **{name: value}),
    ):
        with pytest.raises(ValueError, match=f"{name} must.*{value}"):
            use()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"glimpse_layer": 3}, r"glimpse_layer must .*0\.\.2.* 3"),
        ({"glimpse_layer": -1}, r"glimpse_layer must .*-1"),
        ({"glimpse_layer": 1, "attention_layers": [2]}, r"attention_layers must .*\[2\]"),
        ({"vision_layers": [3]}, r"vision_layers must .*\[3\]"),
        ({"vision_layers": []}, "vision_layers must"),
        ({"glimpse_embedding_layers": [1]}, r"glimpse_embedding_layers must .*\[1\]"),
        ({"glimpse_embedding_layers": [0, 3]}, r"glimpse_embedding_layers must .*3"),
        ({"attention_scores": "softmax"}, "attention_scores must .*softmax"),
        ({"predictor_hidden_size": 30}, "predictor_hidden_size .*30"),
    ],
)
def test_model_settings_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        GlimpsePruneQwen2_5_VLConfig(**build_config_fields(), **(PREDICTOR_SIZES | fields))


def test_unknown_generate_argument(model, batch):
    with pytest.raises(ValueError, match="prune_treshold"):
        answer(model, batch, prune_treshold=0.3)


# Masks


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(9, dtype=torch.bool), r"shape \(10,\).*\(9,\)"),
        (torch.ones(11, dtype=torch.bool), r"shape \(10,\).*\(11,\)"),
        (torch.ones(1, 10, dtype=torch.bool), r"shape \(10,\).*\(1, 10\)"),
        (torch.ones(10), "bool tensor.*float32"),
        (torch.ones(10, dtype=torch.long), "bool tensor.*int64"),
        ([True] * 10, "bool tensor.*list"),
    ],
)
def test_keep_mask_that_does_not_fit(model, batch, mask, message):
    with pytest.raises(ValueError, match=f"visual_keep_mask must .*{message}"):
        answer(model, batch, visual_keep_mask=mask)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True}])
def test_keep_mask_of_the_wrong_type_with_repeated_rows(model, batch, options):
    options = options | ({"num_return_sequences": 2} if "do_sample" in options else {})
    with pytest.raises(ValueError, match="visual_keep_mask must"):
        model.generate(
            **batch.inputs, max_new_tokens=2, visual_keep_mask=torch.ones(20).bool(), **options
        )


# Untrained and damaged checkpoints


def test_untrained_weights_never_prune(build_models, batch):
    model = build_models(21).pruned
    model.model.glimpse.trained.fill_(False)
    for use in (
        lambda: answer(model, batch),
        lambda: answer(model, batch, prune_threshold=0.1),
        lambda: model.glimpse(**batch.inputs),
    ):
        with pytest.raises((ValueError, RuntimeError), match="trained.*prune=False"):
            use()


def test_untrained_weights_still_answer_without_them(build_models, build_batch, batch):
    models = build_models(21)
    models.pruned.model.glimpse.trained.fill_(False)
    expected = answer(models.stock, batch)
    keep_all = torch.ones(batch.num_visual, dtype=torch.bool)
    assert torch.equal(answer(models.pruned, batch, prune=False), expected)
    assert torch.equal(answer(models.pruned, batch, visual_keep_mask=keep_all), expected)
    text_only = build_batch([[5]])
    assert torch.equal(answer(models.pruned, text_only), answer(models.stock, text_only))


@pytest.fixture
def checkpoint(build_models, tmp_path):
    """A saved checkpoint with trained weights."""
    build_models(22).pruned.save_pretrained(tmp_path)
    return tmp_path


def load(folder, **options):
    return GlimpsePruneQwen2_5_VLForConditionalGeneration.from_pretrained(folder, **options).eval()


def rewrite(folder, change) -> None:
    """Change the dictionary of a checkpoint's tensors in place."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def log(monkeypatch):
    """Messages of every logger, transformers' own (which do not propagate) included."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(), logging.getLogger("transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield messages
    for logger in loggers:
        logger.removeHandler(handler)


def test_a_complete_checkpoint_prunes(checkpoint, build_models, batch):
    model = load(checkpoint)
    expected = answer(build_models(22).pruned, batch, max_keep_ratio=0.4)
    assert torch.equal(answer(model, batch, max_keep_ratio=0.4), expected)


@pytest.mark.parametrize("missing", ["model.glimpse.", OUTPUT_WEIGHT, "model.glimpse.trained"])
def test_a_checkpoint_without_glimpse_weights_says_so(checkpoint, batch, log, missing):
    """Without any, without one of them, and without the word that they were trained."""

    def remove(weights):
        for name in [name for name in weights if name.startswith(missing)]:
            del weights[name]

    rewrite(checkpoint, remove)
    model = load(checkpoint)
    assert any("refuses to prune" in message for message in log)
    with pytest.raises((ValueError, RuntimeError), match="trained.*prune=False"):
        answer(model, batch)
    assert answer(model, batch, prune=False).shape[0] == 2


def test_every_untrained_load_says_so(checkpoint, log):
    """The second incomplete checkpoint of a process is announced as the first is."""
    rewrite(checkpoint, lambda weights: weights.pop(OUTPUT_WEIGHT))
    for _ in range(2):
        log.clear()
        load(checkpoint)
        assert any("refuses to prune" in message for message in log)


def test_a_complete_checkpoint_loads_without_a_warning(checkpoint, log):
    load(checkpoint)
    assert not any("refuses to prune" in message for message in log)


def test_a_glimpse_weight_of_the_wrong_shape(checkpoint, batch):
    rewrite(checkpoint, lambda weights: weights.update({OUTPUT_WEIGHT: torch.zeros(1, 7)}))
    with pytest.raises((ValueError, RuntimeError), match="size mismatch|ignore_mismatched_sizes"):
        load(checkpoint)
    model = load(checkpoint, ignore_mismatched_sizes=True)
    with pytest.raises((ValueError, RuntimeError), match="trained.*prune=False"):
        answer(model, batch)


def test_a_truncated_checkpoint(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match="(?i)incomplete|invalid|not fully covered|header|corrupt"):
        load(checkpoint)


# Prompts


@pytest.mark.parametrize("num_images", [1, 3])
def test_images_and_placeholders_differ(model, build_batch, batch, num_images):
    other = build_batch([[1, *[(2, 3), (2, 2), (1, 1)][:num_images], 1]])
    inputs = batch.inputs | {
        name: other.inputs[name] for name in ("pixel_values", "image_grid_thw")
    }
    inputs.pop("mm_token_type_ids", None)  # the count is checked before positions are computed
    for options in ({}, {"prune": False}, {"visual_keep_mask": torch.ones(10).bool()}):
        with pytest.raises(ValueError, match="[Ii]mage.*do not match"):
            model(**inputs, **options)


@pytest.mark.parametrize("prompt_length", [0, 12, -3])
def test_prompt_length_outside_the_sequence(model, build_batch, prompt_length):
    batch = build_batch([[1, (2, 2), 1]])
    assert batch.inputs["input_ids"].shape[1] == 8
    with pytest.raises(ValueError, match=f"prompt_length must .*{prompt_length}"):
        model(**batch.inputs, prompt_length=prompt_length)


def test_a_glimpse_at_nothing(model, build_batch):
    with pytest.raises(ValueError, match="no image or video"):
        model.glimpse(**build_batch([[4]]).inputs)


# Images


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """The real classes over a tokenizer of single bytes."""
    vocabulary = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    if TRANSFORMERS_5:
        tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=special)
    else:
        folder = tmp_path_factory.mktemp("tokenizer")
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
        tokenizer = Qwen2TokenizerFast(*files, additional_special_tokens=special)
    return GlimpsePruneQwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=PATCH, merge_size=2, min_pixels=64),
        video_processor=Qwen2VLVideoProcessor(patch_size=PATCH, merge_size=2),
        tokenizer=tokenizer,
    )


def page(width: int = 24, height: int = 16) -> Image.Image:
    return Image.new("RGB", (width, height), "white")


@pytest.mark.parametrize(
    "image",
    [page(0, 8), page(8, 0), np.zeros((0, 8, 3), np.uint8), torch.zeros(3, 8, 0)],
    ids=["no_width", "no_height", "array", "tensor"],
)
def test_an_image_without_pixels(processor, image):
    with pytest.raises(ValueError, match="image 1 has no pixels"):
        processor(images=[page(), image], text="<|image_pad|><|image_pad|>")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_more_or_fewer_placeholders_than_images(processor, count):
    with pytest.raises(ValueError, match=f"{count} image placeholder.*2 image"):
        processor(images=[page(), page()], text="see " + "<|image_pad|>" * count)


def test_an_image_may_be_a_path_as_in_the_stock_processor(processor, tmp_path):
    page().save(tmp_path / "page.png")
    from_path = processor(images=[str(tmp_path / "page.png")], text="<|image_pad|>")
    assert from_path["input_ids"] == processor(images=[page()], text="<|image_pad|>")["input_ids"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "not_an_image"])
def test_an_unreadable_image_file(processor, tmp_path, damage):
    path = tmp_path / "page.png"
    if damage != "missing":
        page().save(path)
        path.write_bytes(path.read_bytes()[:40] if damage == "truncated" else b"no image")
    with pytest.raises((ValueError, OSError, RuntimeError), match="(?i)image"):
        processor(images=[str(path)], text="<|image_pad|>")


def test_nested_and_gray_images_work(processor):
    text = ["<|image_pad|> one", "<|image_pad|> two"]
    images = [[page()], [Image.new("L", (8, 8))]]
    prepared = processor(images=images, text=text, padding=True, return_tensors="pt")
    assert prepared["image_grid_thw"].shape == (2, 3)
