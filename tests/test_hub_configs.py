"""The folders of published models: what conversion would write, and loadable."""

import json
import shutil

import pytest
from transformers import AutoConfig

from conversion.hub_configs import HUB_CONFIGS, PUBLISHED, published_card, published_config
from conversion.repository import is_glimpse
from glimpseprune.families import FAMILIES, family_of
from glimpseprune.hub.remote_code import code_files, copy_code

# Parameters of the stock models (tied embeddings counted once).
BASE_PARAMETERS = {
    "qwen2_5_vl_3b": 3_754_622_976,
    "qwen2_5_vl_7b": 8_292_166_656,
    "qwen3_vl_2b": 2_127_532_032,
    "qwen3_vl_4b": 4_437_815_808,
    "qwen3_vl_8b": 8_767_123_696,
    "llava_1_5_7b": 7_063_427_072,
    "llava_1_5_13b": 13_351_494_656,
    "llava_v1_6_vicuna_7b": 7_063_431_168,
}
VISION_LAYERS = {
    "qwen2_5_vl": [31, 23, 15, 7],
    "qwen3_vl_2b": [23, 17, 11, 5],
    "qwen3_vl_4b": [23, 17, 11, 5],
    "qwen3_vl_8b": [26, 24, 16, 8],
    "llava": [23, 17, 11, 5],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_folder_is_what_conversion_writes(name):
    folder = HUB_CONFIGS / name
    config = json.loads((folder / "config.json").read_text())
    assert config == published_config(PUBLISHED[name])
    assert (folder / "README.md").read_text() == published_card(PUBLISHED[name])
    assert {path.name for path in folder.iterdir()} == {"config.json", "README.md"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_loads_with_its_code(name, tmp_path):
    folder = shutil.copytree(HUB_CONFIGS / name, tmp_path / name)
    copy_code(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    layers = config.get_text_config().num_hidden_layers
    two_thirds = 2 * layers // 3 if name.startswith("qwen3") else int(0.66 * layers)
    assert config.glimpse_layer == PUBLISHED[name].glimpse_layer == two_thirds
    expected = next(VISION_LAYERS[part] for part in VISION_LAYERS if name.startswith(part))
    assert config.vision_layers == expected
    is_qwen = name.startswith("qwen")
    assert config.attention_scores == ("logits" if is_qwen else "log_probabilities")
    if name.startswith("qwen3"):  # untrained, read ahead, behind the features between layers
        assert config.default_vision_layers == config.vision_layers
        added = len(config.vision_config.deepstack_visual_indexes)
        assert added <= config.prune_layer < config.glimpse_layer
        assert "not trained yet" in published_card(PUBLISHED[name])
    assert config.glimpse_embedding_layers == list(range(layers))
    assert config.glimpse_base["repository"] == PUBLISHED[name].base


@pytest.mark.parametrize("name", PUBLISHED)
def test_base_has_the_published_size(name):
    family = family_of(published_config(PUBLISHED[name]), name)
    config = family.config_class.from_pretrained(HUB_CONFIGS / name)
    model = family.without_storage(config)
    assert len(model.model.tapped_modules()) == len(config.vision_layers)
    base = {part: weight for part, weight in model.named_parameters() if not is_glimpse(part)}
    if config.tie_word_embeddings:
        base.pop("lm_head.weight", None)
    count = sum(weight.numel() for weight in base.values())
    assert count == BASE_PARAMETERS[name.removesuffix("_plus")]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.base_model_type)
def test_key_maps_leave_glimpse_weights_alone(family):
    """A published repository's map meets the names of the glimpse weights too."""
    for name in ("trained", "token.embeddings", "predictor.layers.0.mlp.up_proj.bias"):
        assert family.stored_name(f"model.glimpse.{name}") == f"model.glimpse.{name}"


@pytest.mark.parametrize(
    "name", ["qwen2_5_vl_3b", "qwen3_vl_2b", "llava_1_5_7b", "llava_v1_6_vicuna_7b"]
)
def test_entry_files_import_the_code_that_finds_the_base(name):
    """transformers 4 loads no more of a local folder than what the entry file imports itself."""
    code = {path.name for path in code_files(published_config(PUBLISHED[name]))}
    assert "base_weights.py" in code
    entry = published_config(PUBLISHED[name])["auto_map"]["AutoModelForVision2Seq"]
    assert f"{entry.partition('.')[0]}.py" in code
