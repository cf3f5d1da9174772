"""The automatic classes: which loads what, and a backbone's weights in a whole repository."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import FAMILIES, TRANSFORMERS_5
from fresh_process import run_fresh
from safetensors.torch import load_file, save_file
from transformers.models.auto import modeling_auto

from glimpseprune.package_files import SAMPLE_PAGE, TINY_MODEL

# Our names -> those of published bases, which a repository's key_mapping turns back.
PUBLISHED_NAMES = {
    "qwen2_5_vl": {r"^model\.visual\.": "visual.", r"^model\.language_model\.": "model."},
    "qwen3_vl": {},
    "llava": {
        r"^lm_head\.": "language_model.lm_head.",
        r"^model\.language_model\.": "language_model.model.",
        r"^model\.(vision_tower)\.(?:vision_model\.)?": r"\1.vision_model.",
        r"^model\.(multi_modal_projector\.|image_newline)": r"\1",
    },
}
PUBLISHED_NAMES["llava_next"] = PUBLISHED_NAMES["llava"]
FRESH_PROCESS = """
import json, sys, torch, transformers
from PIL import Image
folder, page, output = sys.argv[1:]
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
backbone, report = transformers.AutoModel.from_pretrained(
    folder, trust_remote_code=True, output_loading_info=True)
text = processor.apply_chat_template(
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is CS?"}]}],
    add_generation_prompt=True, tokenize=False)
inputs = processor(text=[text], images=[Image.open(page).convert("RGB")], return_tensors="pt")
with torch.no_grad():
    states = backbone.eval()(**inputs, prune=False).last_hidden_state
torch.save({"inputs": dict(inputs), "states": states}, output)
spoken = None
if hasattr(transformers, "AutoModelForMultimodalLM"):
    speaker = transformers.pipeline("any-to-any", model=folder, trust_remote_code=True)
    message = {"role": "user", "content": [
        {"type": "image", "path": page}, {"type": "text", "text": "What is CS?"}]}
    spoken = speaker(text=[message], max_new_tokens=4, return_full_text=False)[0]
    spoken = [type(speaker.model).__name__, spoken["generated_text"]]
print(json.dumps({"module": type(backbone).__module__, "class": type(backbone).__name__,
                  "missing": list(report["missing_keys"]), "spoken": spoken,
                  "unexpected": list(report["unexpected_keys"])}))
"""


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def publish(folder: Path, family: str) -> None:
    """Give a saved model's weights the names of a published base's, as a conversion leaves them."""
    file = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        if ".glimpse." not in name:
            for pattern, published in PUBLISHED_NAMES[family].items():
                name, found = re.subn(pattern, published, name)
                if found:
                    break
        tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    key_mapping = dict(FAMILIES[family].family.base_key_map)
    base = {"repository": None, "revision": None, "included": True, "key_mapping": key_mapping}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"glimpse_base": base}))


@pytest.mark.parametrize("published", [False, True])
def test_a_backbone_finds_its_weights_in_a_whole_repository(
    build_models, family, published, tmp_path
):
    model = build_models(80).pruned
    model.save_pretrained(tmp_path)
    if published:
        publish(tmp_path, family)
    backbone, report = type(model.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and backbone.glimpse.trained
    expected, found = model.model.state_dict(), backbone.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_backbone_saved_by_itself_is_reloaded(build_models, tmp_path):
    backbone = build_models(80).pruned.model
    backbone.save_pretrained(tmp_path)
    reloaded, report = type(backbone).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert reloaded.glimpse.trained
    expected, found = backbone.state_dict(), reloaded.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_our_classes_stand_where_the_stock_ones_do(family):
    """Classes that generate from images load the whole model, AutoModel the backbone."""
    classes, stock_type = FAMILIES[family].family, FAMILIES[family].family.base_model_type
    ours, stock = classes.auto_map, FAMILIES[family].stock_class
    mappings = {
        "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
        "AutoModelForVision2Seq": "MODEL_FOR_VISION_2_SEQ_MAPPING_NAMES",
    }
    for name, mapping in mappings.items():
        assert ours[name].endswith(f".{classes.model_class.__name__}")
        if (names := vars(modeling_auto).get(mapping)) is not None:
            assert names[stock_type] == stock.__name__
    assert modeling_auto.MODEL_MAPPING_NAMES[stock_type] == type(stock_backbone(stock)).__name__
    assert ours["AutoModel"].endswith(f".{classes.model_class.backbone_class.__name__}")
    assert issubclass(classes.model_class.backbone_class, type(stock_backbone(stock)))


def stock_backbone(stock_class):
    """The backbone that a stock class builds."""
    family = next(each for each in FAMILIES.values() if each.stock_class is stock_class)
    return stock_class(family.stock_config_class(**family.config_fields())).model


def test_automatic_classes_in_a_fresh_process(tmp_path):
    """The tiny repository's backbone sees what its whole model sees; `any-to-any` answers."""
    site = str(Path(transformers.__file__).parents[1])
    arguments = "-c", FRESH_PROCESS, TINY_MODEL, SAMPLE_PAGE, tmp_path / "seen.pt"
    variables = {"PYTHONPATH": site, "HF_HOME": str(tmp_path / "cache")}
    completed = run_fresh(*arguments, cwd=tmp_path, env=os.environ | variables)
    assert completed.returncode == 0, completed.stderr
    found = json.loads(completed.stdout.splitlines()[-1])
    assert found["module"].startswith("transformers_modules")
    assert found["class"] == "GlimpsePruneQwen2_5_VLModel"
    assert found["missing"] == [] and found["unexpected"] == ["lm_head.weight"]
    if TRANSFORMERS_5:
        assert found["spoken"][0] == "GlimpsePruneQwen2_5_VLForConditionalGeneration"
        assert found["spoken"][1]
    seen = torch.load(tmp_path / "seen.pt")
    classes = FAMILIES["qwen2_5_vl"].family
    dtype = seen["states"].dtype
    model = classes.model_class.from_pretrained(TINY_MODEL, dtype=dtype).eval()
    with torch.no_grad():
        expected = model.model(**seen["inputs"], prune=False).last_hidden_state
    torch.testing.assert_close(seen["states"], expected)
