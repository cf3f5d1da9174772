"""The folders of published models: what conversion would write, and loadable."""

import json

import pytest
import torch
from transformers import AutoConfig

from conversion.families import FAMILIES
from conversion.hub_configs import HUB_CONFIGS, PUBLISHED, published_card, published_config
from conversion.repository import code_files, is_glimpse, rename
from glimpseprune.hub.inspection import _no_initialisation
from modeling_glimpseprune.modeling_qwen2_5_vl import (
    GlimpsePruneQwen2_5_VLForConditionalGeneration,
)

# Parameters of the stock models (tied embeddings counted once) and of what GlimpsePrune adds.
BASE_PARAMETERS = {"3b": 3_754_622_976, "7b": 8_292_166_656}


@pytest.mark.parametrize("name", PUBLISHED)
def test_folder_is_what_conversion_writes(name):
    folder = HUB_CONFIGS / name
    config = json.loads((folder / "config.json").read_text())
    assert config == published_config(PUBLISHED[name])
    assert (folder / "README.md").read_text() == published_card(PUBLISHED[name])
    links = {path.name: path for path in folder.glob("*.py")}
    code = {path.name: path for path in code_files(FAMILIES[0])}
    assert links.keys() == code.keys()
    for file_name, link in links.items():
        assert link.is_symlink() and link.resolve() == code[file_name].resolve()
    assert {path.name for path in folder.iterdir()} == {"config.json", "README.md", *links}


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_loads(name):
    config = AutoConfig.from_pretrained(HUB_CONFIGS / name, trust_remote_code=True)
    layers = config.get_text_config().num_hidden_layers
    assert config.glimpse_layer == PUBLISHED[name].glimpse_layer == int(0.66 * layers)
    assert config.vision_layers == [31, 23, 15, 7]
    assert config.glimpse_embedding_layers == list(range(layers))
    assert config.glimpse_base["repository"] == PUBLISHED[name].base


@pytest.mark.parametrize("name", PUBLISHED)
def test_base_has_the_published_size(name):
    model_class = GlimpsePruneQwen2_5_VLForConditionalGeneration
    config = model_class.config_class.from_pretrained(HUB_CONFIGS / name)
    with torch.device("meta"), _no_initialisation():
        model = model_class(config)
    base = {part: weight for part, weight in model.named_parameters() if not is_glimpse(part)}
    if config.tie_word_embeddings:
        base.pop("lm_head.weight", None)
    count = sum(weight.numel() for weight in base.values())
    assert count == BASE_PARAMETERS[name.removesuffix("_plus")[-2:]]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.base_model_type)
def test_key_maps_leave_glimpse_weights_alone(family):
    """A published repository's map meets the names of the glimpse weights too."""
    for name in ("trained", "token.embeddings", "predictor.layers.0.mlp.up_proj.bias"):
        assert rename(f"model.glimpse.{name}", family.base_key_map) == f"model.glimpse.{name}"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.base_model_type)
def test_entry_files_import_the_code_that_finds_the_base(family):
    """transformers 4 loads no more of a local folder than what the entry file imports itself."""
    assert "base_weights.py" in {path.name for path in code_files(family)}
