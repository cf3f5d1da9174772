"""Conversion of official checkpoints: what is written, and what loads."""

import json
import os
import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from conftest import TRANSFORMERS_5
from fresh_process import run_fresh
from official_checkpoint import (
    BASE_CONFIG,
    IMAGE_PROCESSOR,
    OFFICIAL_FIELDS,
    TOKEN_IDS,
    build_stock,
    change_json,
    official_modules,
    published_name,
    write_base,
    write_json,
    write_official,
)
from PIL import Image
from reference import score_slowly
from safetensors.torch import load_file

from conversion.convert_official import convert, convert_config, main
from modeling_glimpseprune.modeling_qwen2_5_vl import (
    GlimpsePruneQwen2_5_VLForConditionalGeneration,
)
from modeling_glimpseprune.processing_glimpseprune import GlimpsePruneQwen2_5_VLProcessor

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "conversion" / "convert_official.py"


def load(folder: Path) -> GlimpsePruneQwen2_5_VLForConditionalGeneration:
    model_class = GlimpsePruneQwen2_5_VLForConditionalGeneration
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.eval()


def text_logits(model, **settings) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 40)[None], **settings).logits


@pytest.fixture
def official(tmp_path) -> Path:
    return write_official(tmp_path / "official")


@pytest.fixture
def base(tmp_path) -> Path:
    return write_base(tmp_path / "base")


@pytest.mark.parametrize("published_names", [True, False])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_base_weights_are_the_stock_models(tmp_path, official, num_shards, published_names):
    stock = build_stock()
    base = write_base(tmp_path / "base", stock, num_shards, published_names)
    convert(base, official, tmp_path / "out")
    converted = load(tmp_path / "out")
    assert torch.equal(text_logits(converted, prune=False), text_logits(stock))


def test_base_with_tied_embeddings(tmp_path):
    stock = build_stock(tie_word_embeddings=True)
    base = write_base(tmp_path / "base", stock)
    convert(base, write_official(tmp_path / "official"), tmp_path / "out")
    converted = load(tmp_path / "out")
    assert converted.lm_head.weight is converted.get_input_embeddings().weight
    assert torch.equal(text_logits(converted), text_logits(stock))


def test_glimpse_weights_are_the_official_ones(tmp_path, base, official):
    convert(base, official, tmp_path / "out")
    glimpse, modules = load(tmp_path / "out").model.glimpse, official_modules()
    assert glimpse.trained.dtype == torch.bool and bool(glimpse.trained)
    fuser, predictor = modules["attn_fuser"], glimpse.predictor
    pairs = [
        (glimpse.token.embeddings, modules["learnable_embeddings"]),
        (glimpse.token.projection.bias, modules["le_proj"]["bias"]),
        (glimpse.token.norm.weight, modules["le_norm"]["weight"]),
        (predictor.attention_projection.weight, fuser["attn_in_proj.weight"]),
        (predictor.condition_projections[1].weight, fuser["cond_in_projs.1.weight"]),
        (predictor.layers[1].attention_norm.weight, fuser["layers.1.norm1.weight"]),
        (predictor.layers[1].mlp_norm.weight, fuser["layers.1.norm2.weight"]),
        (predictor.layers[0].attention.k_proj.weight, fuser["layers.0.attn.k_proj.weight"]),
        (predictor.layers[0].mlp.up_proj.bias, fuser["layers.0.mlp.up_proj.bias"]),
        (predictor.output_projection.weight, fuser["attn_out_projs.1.weight"]),
    ]
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize(
    ("fuse", "condition", "heads", "fuser"),
    [
        (24, 40, 4, "AttnFuserV1"),  # heads of 16, though neither width is a multiple of 16
        (12, 24, 3, "AttnFuserV1"),
        (24, 30, 2, "AttnFuserV2"),  # without vision features their width does not matter
    ],
)
@torch.no_grad()
def test_widths_that_the_official_code_takes(tmp_path, fuse, condition, heads, fuser):
    """The converted predictor scores as a slow one written from the paper."""
    stock = build_stock(rope_theta=10_000.0)
    base = write_base(tmp_path / "base", stock)
    change_json(base / "config.json", rope_theta=10_000.0)
    fields = {"attn_fuse_size": fuse, "visual_cond_size": condition, "attn_fuse_num_heads": heads}
    modules = official_modules(fuse, condition, with_vision=fuser == "AttnFuserV1")
    official = write_official(
        tmp_path / "official", modules, **fields, attn_fuse_type=fuser, rope_theta=10_000.0
    )
    convert(base, official, tmp_path / "out")
    model = load(tmp_path / "out")
    ids = [5, TOKEN_IDS["<|vision_start|>"], *[TOKEN_IDS["<|image_pad|>"]] * 6]
    prompt = {
        "input_ids": torch.tensor([[*ids, TOKEN_IDS["<|vision_end|>"], 7, 8]]),
        "pixel_values": torch.randn(24, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    if TRANSFORMERS_5:
        is_image = prompt["input_ids"] == TOKEN_IDS["<|image_pad|>"]
        prompt["mm_token_type_ids"] = is_image.int()
    scores = model.glimpse(**prompt).importance
    expected = score_slowly(stock, model.model.glimpse, model.config, prompt)
    # sums of a few dozen float32 products of order one, in another order
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_index_names_every_tensor_and_its_shard(tmp_path, official):
    convert(write_base(tmp_path / "base", num_shards=3), official, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = {file.name: load_file(file) for file in (tmp_path / "out").glob("*.safetensors")}
    held = {name: file for file, tensors in shards.items() for name in tensors}
    assert index["weight_map"] == held
    state = load(tmp_path / "out").state_dict()
    glimpse = {name for name in state if name.startswith("model.glimpse.")}
    assert index["weight_map"].keys() == {published_name(name) for name in state} | glimpse
    sizes = [tensor.nbytes for tensors in shards.values() for tensor in tensors.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert len(shards) == 4 and "model.glimpse.trained" in shards["model-glimpse.safetensors"]


def test_glimpse_takes_the_dtype_of_the_base(tmp_path, official):
    base = write_base(tmp_path / "base", build_stock().to(torch.bfloat16))
    convert(base, official, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model-glimpse.safetensors")
    assert tensors.pop("model.glimpse.trained").dtype == torch.bool
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_repository_is_complete(tmp_path, base, official):
    convert(base, official, tmp_path / "out")
    out = tmp_path / "out"
    written = {path.name for path in out.iterdir()}
    assert written >= {path.name for path in base.iterdir()} - {"model.safetensors"}
    assert written >= {"modeling_qwen2_5_vl.py", "configuration_glimpseprune.py"}
    assert "model.safetensors" not in written and "__init__.py" not in written
    generation = (base / "generation_config.json").read_bytes()
    assert (out / "generation_config.json").read_bytes() == generation
    base_config = json.loads((base / "config.json").read_text())
    config = json.loads((out / "config.json").read_text())
    changed = {name for name in base_config if config[name] != base_config[name]}
    assert changed == {"architectures", "model_type"}


def test_bare_base_gets_a_generation_config_and_no_processor(tmp_path, base, official):
    for file in base.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    convert(base, official, tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 256, "eos_token_id": 257}
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()


IN_A_FRESH_PROCESS = """
import sys
import torch, transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
if hasattr(transformers, "AutoModelForVision2Seq"):
    other = transformers.AutoModelForVision2Seq.from_pretrained(folder, trust_remote_code=True)
    assert type(other) is type(model)
for loaded in (model, model.config, processor):
    assert type(loaded).__module__.startswith("transformers_modules"), type(loaded)
    assert "GlimpsePrune" in type(loaded).__name__
assert "modeling_glimpseprune" not in sys.modules
assert torch.equal(model(torch.arange(1, 40)[None], prune=False).logits, torch.load(sys.argv[2]))
text = "<|vision_start|><|image_pad|><|vision_end|>What?"
image = Image.new("RGB", (84, 112), "red")
inputs = processor(text=[text], images=[image], return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, eos_token_id=None)
record = output["cache" if "cache" in output else "past_key_values"].glimpse
assert record.visuals[0].grid == (1, 4, 3) and 1 <= record.kept <= record.total == 12
print("tokens", output.sequences.shape[1] - inputs["input_ids"].shape[1])
"""


def run_outside(*arguments: object, **environment: str) -> CompletedProcess:
    """Run python in another folder, with this repository on no search path."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    foreign = [path for path in paths if path and Path(path).resolve() != REPOSITORY]
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(foreign)}
    return run_fresh(*arguments, cwd=environment["HF_HOME"], env=os.environ | environment)


@pytest.mark.newest
def test_sources_may_be_relative_paths(base, official, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sources = (os.path.relpath(source, tmp_path) for source in (base, official))
    arguments = zip(("--base", "--glimpse", "--output"), (*sources, "out"), strict=True)
    assert main([part for pair in arguments for part in pair]) == 0
    assert "wrote out, verified" in capsys.readouterr().out


def test_repository_loads_where_the_code_is_unknown(tmp_path, official):
    stock = build_stock()
    base = write_base(tmp_path / "base", stock, num_shards=2)
    torch.save(text_logits(stock), tmp_path / "logits.pt")
    arguments = SCRIPT, "--base", base, "--glimpse", official, "--output", tmp_path / "out"
    converted = run_outside(*arguments, HF_HOME=str(tmp_path))
    assert converted.returncode == 0, converted.stderr
    assert converted.stdout == f"wrote {tmp_path / 'out'}, verified\n"
    arguments = "-c", IN_A_FRESH_PROCESS, tmp_path / "out", tmp_path / "logits.pt"
    loaded = run_outside(*arguments, HF_HOME=str(tmp_path))
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.splitlines()[-1] == "tokens 3"


def test_base_saved_by_transformers_5_loads_on_both(tmp_path, official):
    """Nested configuration with `rope_parameters`, one file for all processors."""
    stock = build_stock(tie_word_embeddings=True)
    base = write_base(tmp_path / "base", stock, published_names=False)
    config = BASE_CONFIG | {"tie_word_embeddings": True}
    outer = ["architectures", "model_type", "vision_config", "tie_word_embeddings"]
    outer += [name for name in config if re.match("(image|video|vision_.*)_token_id", name)]
    text_config = {name: value for name, value in config.items() if name not in outer}
    rotary = text_config.pop("rope_scaling") | {"rope_theta": text_config.pop("rope_theta")}
    text_config["rope_parameters"] = rotary | {"rope_type": "default"}
    nested = {name: config[name] for name in outer} | {"text_config": text_config}
    write_json(base / "config.json", nested)
    (base / "preprocessor_config.json").unlink()
    processors = {"image_processor": IMAGE_PROCESSOR, "processor_class": "Qwen2_5_VLProcessor"}
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 14}
    write_json(base / "processor_config.json", processors | {"video_processor": video})
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer["extra_special_tokens"] = tokenizer.pop("additional_special_tokens")
    write_json(base / "tokenizer_config.json", tokenizer)

    convert(base, official, tmp_path / "out")
    assert torch.equal(text_logits(load(tmp_path / "out")), text_logits(stock))
    processor = GlimpsePruneQwen2_5_VLProcessor.from_pretrained(
        tmp_path / "out", trust_remote_code=True
    )
    text = "<|vision_start|><|image_pad|><|vision_end|>What?"
    inputs = processor(text=[text], images=[Image.new("RGB", (56, 56))], return_tensors="pt")
    assert (inputs["input_ids"] == TOKEN_IDS["<|image_pad|>"]).sum() == 4
    assert list(processor.image_processor.image_mean) == [0.48, 0.46, 0.41]


@pytest.mark.parametrize(
    "official_fields, our_fields",
    [
        ({"reduce_layer": 2}, {"glimpse_layer": 2, "attention_layers": [1]}),
        ({"reduce_layer": 1000}, {"glimpse_layer": 2}),
        ({"selected_layers": [1, 0]}, {"attention_layers": [1, 0], "glimpse_layer": 1}),
        ({"use_attention_logits": False}, {"attention_scores": "log_probabilities"}),
        ({"attn_fuse_type": "AttnFuserV2"}, {"predictor_use_vision": False}),
        ({"attn_fuse_global": False}, {"predictor_windowed": True}),
        ({"le_norm_type": "layernorm"}, {"glimpse_norm": "layer_norm"}),
        ({"le_layers": []}, {"num_glimpse_tokens": 0, "glimpse_embedding_layers": []}),
        ({"le_length": 2}, {"num_glimpse_tokens": 2}),
        ({"reduce_threshold": 0.3}, {"prune_threshold": 0.3}),
        (
            {"max_remain_ratio": 0.25, "min_remain_num": 4},
            {"max_keep_ratio": 0.25, "min_keep_tokens": 4},
        ),
        ({"anchor_positions": ["tl", "br"]}, {"anchor_corners": ["top_left", "bottom_right"]}),
    ],
)
def test_config_fields(official_fields, our_fields):
    fields = convert_config(BASE_CONFIG | OFFICIAL_FIELDS | official_fields)
    assert {name: fields[name] for name in our_fields} == our_fields


def test_old_official_config_without_late_fields(tmp_path, base, official):
    config = json.loads((official / "config.json").read_text())
    for name in ("anchor_positions", "max_remain_ratio", "min_remain_num"):
        del config[name]
    write_json(official / "config.json", config)
    convert(base, official, tmp_path / "out")
    assert load(tmp_path / "out").config.min_keep_tokens == 1
