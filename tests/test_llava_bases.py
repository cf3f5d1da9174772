"""LLaVA bases as published: their tokenizer's name, and names of tensors of either generation."""

import itertools
import json
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import FAMILIES, Models
from llava_base import PROMPTS, build_base, expected_ids, glimpse_of, write_base
from official_checkpoint import write_base as write_qwen_base
from official_checkpoint import write_official
from safetensors.torch import load_file, save_file

from conversion import processor_files
from conversion.convert_official import convert
from conversion.repository import write_repository
from glimpseprune.hub.shards import ConversionError
from glimpseprune.training.base import load_for_training
from glimpseprune.training.repository import write_repository as write_trained

NAMES = ("llava", "llava_next")
PICTURE = np.zeros((40, 30, 3), np.uint8)


@pytest.fixture(params=NAMES)
def family(request) -> str:
    return request.param


@pytest.fixture
def models(family) -> Models:
    return build_base(family)


@pytest.fixture
def base(family, models, tmp_path):
    return write_base(tmp_path / "base", family, models.stock)


def convert_llava(base, models, output):
    write_repository(output, base, family_of(models), *glimpse_of(models.pruned))
    return output


def family_of(models: Models):
    (found,) = (each.family for each in FAMILIES.values() if each.stock_class is type(models.stock))
    return found


def load_processor(folder, models):
    return family_of(models).processor_class.from_pretrained(folder, trust_remote_code=False)


def assert_ids_of_the_file(processor) -> None:
    for prompt in PROMPTS:
        images = [PICTURE] if processor.image_token in prompt else None
        inputs = processor(text=[prompt], images=images)
        assert "token_type_ids" not in inputs  # which no LLaVA model takes
        ids = inputs["input_ids"][0]
        placeholders = ids.count(processor.image_token_id)
        assert ids == expected_ids(prompt, placeholders), prompt
    assert processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize("named", ["LlamaTokenizer", "LlamaTokenizerFast", "TokenizersBackend"])
def test_a_conversion_keeps_the_ids_of_its_base(base, models, tmp_path, named):
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": named}))
    out = convert_llava(base, models, tmp_path / "out")
    assert_ids_of_the_file(load_processor(out, models))


def test_training_keeps_the_ids_of_its_base(base, models, tmp_path):
    model, processor, dtype = load_for_training(str(base), {"glimpse_layer": 1})
    assert_ids_of_the_file(processor)
    write_trained(model, processor, tmp_path / "out", dtype, {})
    assert_ids_of_the_file(load_processor(tmp_path / "out", models))


def test_a_base_without_a_tokenizer_file_is_told_how_to_get_one(base, models, tmp_path):
    (base / "tokenizer.json").unlink()
    with pytest.raises(ConversionError, match="holds no tokenizer.json, .* AutoTokenizer"):
        convert_llava(base, models, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_processor_that_cannot_be_loaded_is_named(base, models, tmp_path):
    (base / "preprocessor_config.json").unlink()
    with pytest.raises(ConversionError, match="processor cannot be loaded: "):
        convert_llava(base, models, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def exchange_words(vocabulary: dict[str, int]) -> None:
    vocabulary["W"], vocabulary["h"] = vocabulary["h"], vocabulary["W"]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "llava_next"])
def test_other_ids_than_the_bases_are_refused(tmp_path, monkeypatch, name):
    """Before anything is written."""
    copy = processor_files.copy_processor_files

    def copy_and_exchange(folder, base) -> None:
        copy(folder, base)
        file = folder / ("vocab.json" if name == "qwen2_5_vl" else "tokenizer.json")
        content = json.loads(file.read_text())
        exchange_words(content if name == "qwen2_5_vl" else content["model"]["vocab"])
        file.write_text(json.dumps(content))

    monkeypatch.setattr(processor_files, "copy_processor_files", copy_and_exchange)
    with pytest.raises(ConversionError, match="tokenizer is not its base's: .* becomes .* instead"):
        if name == "qwen2_5_vl":
            base = write_qwen_base(tmp_path / "base")
            convert(base, write_official(tmp_path / "official"), tmp_path / "out")
        else:
            models = build_base(name)
            base = write_base(tmp_path / "base", name, models.stock)
            convert_llava(base, models, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def names_of(name: str) -> list[str]:
    """How either generation of transformers, or a mix of both, calls a published tensor."""
    for prefix, others in (
        ("language_model.model.", ["model.language_model."]),
        ("language_model.lm_head.", ["lm_head."]),
        ("vision_tower.vision_model.", [
            "vision_tower.", "model.vision_tower.", "model.vision_tower.vision_model."
        ]),
        ("multi_modal_projector.", ["model.multi_modal_projector."]),
        ("image_newline", ["model.image_newline"]),
    ):  # fmt: skip
        if name.startswith(prefix):
            return [other + name.removeprefix(prefix) for other in (prefix, *others)]
    raise AssertionError(f"{name} is no published name")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_names_of_both_generations_in_one_base(base, models, tmp_path, seed):
    choice = random.Random(seed).choice
    weights = load_file(base / "model.safetensors")
    mixed = {choice(names_of(name)): tensor for name, tensor in weights.items()}
    assert any(a != b for a, b in itertools.zip_longest(sorted(mixed), sorted(weights)))
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    trained, _, _ = load_for_training(str(base), {"glimpse_layer": 1})
    out = convert_llava(base, models, tmp_path / "out")
    shutil.rmtree(base)  # the repository stands for itself
    converted, report = type(models.pruned).from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, weight in models.stock.state_dict().items():
        assert torch.equal(trained.state_dict()[name], weight), name
        assert torch.equal(converted.state_dict()[name], weight), name
