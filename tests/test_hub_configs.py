"""The folders of published repositories that come without weights."""

import json

import pytest
import torch
from transformers.dynamic_module_utils import get_relative_import_files

from conversion.families import LLAVA, LLAVA_NEXT
from glimpseprune.loading import REPOSITORY

CODE = REPOSITORY / "modeling_glimpseprune"
FOLDERS = {
    "llava-1.5-7b": (LLAVA, 32, 4096, 21),
    "llava-1.5-13b": (LLAVA, 40, 5120, 26),
    "llava-v1.6-vicuna-7b": (LLAVA_NEXT, 32, 4096, 21),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_code_files_are_links_and_complete(name):
    folder = REPOSITORY / "hub_configs" / name
    references = json.loads((folder / "config.json").read_text())["auto_map"].values()
    entries = {CODE / f"{reference.partition('.')[0]}.py" for reference in references}
    needed = {file for entry in entries for file in [entry, *get_relative_import_files(entry)]}
    links = {link.name: link.resolve() for link in folder.glob("*.py") if link.is_symlink()}
    assert links == {path.name: path.resolve() for path in map(CODE.joinpath, needed)}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_model_is_built_from_the_configuration(name):
    """On the meta device: official sizes, glimpse layer and tapped hidden states."""
    family, layers, width, glimpse_layer = FOLDERS[name]
    folder = REPOSITORY / "hub_configs" / name
    config = family.config_class.from_pretrained(folder)
    with torch.device("meta"):
        model = family.model_class(config)
    assert len(model.model.language_model.layers) == layers
    assert model.lm_head.weight.shape == (32064, width)
    assert config.glimpse_layer == glimpse_layer and config.attention_layers == [glimpse_layer]
    assert config.vision_layers == [23, 17, 11, 5] and len(model.model.tapped_modules()) == 4
    assert config.attention_scores == "log_probabilities"
    token = model.model.glimpse.token
    assert token.embeddings.shape == (layers, 1, width)
