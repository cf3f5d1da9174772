"""Conversion of official checkpoints: what is written, what loads, and what is refused.

A base and an official checkpoint are made here, tiny and random, in the layout of the published
ones: flat configuration, old tensor names, byte-level tokenizer, pickle of added modules.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from conftest import TRANSFORMERS_5
from fresh_process import run_fresh
from PIL import Image
from reference import score_slowly
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from conversion import repository
from conversion.convert_official import convert, convert_config, main
from glimpseprune.hub.shards import ConversionError
from modeling_glimpseprune.modeling_qwen2_5_vl import (
    GlimpsePruneQwen2_5_VLForConditionalGeneration,
)
from modeling_glimpseprune.processing_glimpseprune import GlimpsePruneQwen2_5_VLProcessor

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "conversion" / "convert_official.py"
HIDDEN, LAYERS, HEADS, VISION_HIDDEN = 32, 3, 4, 16
FUSE, CONDITION = 16, 32
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TOKEN_IDS = {token: 256 + index for index, token in enumerate(SPECIAL_TOKENS)}
BASE_CONFIG = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "vocab_size": 272,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_sliding_window": False,
    "image_token_id": TOKEN_IDS["<|image_pad|>"],
    "video_token_id": TOKEN_IDS["<|video_pad|>"],
    "vision_start_token_id": TOKEN_IDS["<|vision_start|>"],
    "vision_end_token_id": TOKEN_IDS["<|vision_end|>"],
    "bos_token_id": TOKEN_IDS["<|endoftext|>"],
    "eos_token_id": TOKEN_IDS["<|im_end|>"],
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 2,
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    },
}
IMAGE_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
OFFICIAL_FIELDS = {
    "selected_layers": [1],
    "use_attention_logits": True,
    "attn_fuse_type": "AttnFuserV1",
    "attn_fuse_size": FUSE,
    "attn_fuse_global": True,
    "attn_fuse_num_heads": 2,
    "attn_fuse_hidden_act": "silu",
    "selected_visual_layers": [1, 0],
    "visual_cond_size": CONDITION,
    "ori_attn_supervision": False,
    "deep_supervision": False,
    "le_layers": [0, 1, 2],
    "le_length": 1,
    "le_dropout_prob": 0.0,
    "le_norm_type": "rmsnorm",
    "reduce_threshold": 0.5,
    "reduce_layer": 1,
    "min_remain_num": 1,
    "max_remain_ratio": None,
    "anchor_positions": [],
}


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


def build_stock(**changes) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    config = json.loads(json.dumps(BASE_CONFIG | changes))  # its nested fields may be changed
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model


def published_name(name: str) -> str:
    return re.sub(r"^model\.visual\.", "visual.", name).replace("model.language_model.", "model.")


def base_tensors(stock, published_names: bool = True) -> dict[str, torch.Tensor]:
    tensors = stock.state_dict()
    if stock.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    rename = published_name if published_names else str
    return {rename(name): tensor.clone() for name, tensor in tensors.items()}


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int) -> None:
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for index in range(num_shards):
        file_name = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[index::num_shards]}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_tokenizer(folder: Path) -> None:
    vocabulary = {byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {str(i): {"content": name, "special": True} | flags for name, i in TOKEN_IDS.items()}
    tokenizer = {
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 512,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", tokenizer)


def write_base(folder: Path, stock=None, num_shards: int = 1, published_names: bool = True) -> Path:
    """A stock base with its tokenizer and processor."""
    folder.mkdir()
    stock = stock or build_stock()
    tied = stock.config.tie_word_embeddings
    write_json(folder / "config.json", BASE_CONFIG | {"tie_word_embeddings": tied})
    write_json(folder / "generation_config.json", {"do_sample": False, "pad_token_id": 256})
    write_weights(folder, base_tensors(stock, published_names), num_shards)
    write_tokenizer(folder)
    processor = IMAGE_PROCESSOR | {"processor_class": "Qwen2_5_VLProcessor"}
    write_json(folder / "preprocessor_config.json", processor)
    return folder


def official_modules(fuse: int = FUSE, condition: int = CONDITION, with_vision=True) -> dict:
    """Random tensors as the official code names and nests them."""
    torch.manual_seed(1)
    joint, attention_width = fuse + condition * with_vision, HEADS
    shapes = {
        "attn_in_proj.weight": (fuse, attention_width),
        "attn_in_proj.bias": (fuse,),
        "attn_out_projs.1.weight": (1, fuse),
        "attn_out_projs.1.bias": (1,),
    }
    for layer in (0, 1):
        shapes[f"cond_in_projs.{layer}.weight"] = (condition, VISION_HIDDEN)
        shapes[f"cond_in_projs.{layer}.bias"] = (condition,)
        for name, shape in {
            "norm1.weight": (fuse,),
            "norm2.weight": (fuse,),
            "attn.q_proj.weight": (joint, joint),
            "attn.k_proj.weight": (joint, joint),
            "attn.v_proj.weight": (fuse, fuse),
            "attn.o_proj.weight": (fuse, fuse),
            "mlp.gate_proj.weight": (2 * fuse, fuse),
            "mlp.gate_proj.bias": (2 * fuse,),
            "mlp.up_proj.weight": (2 * fuse, fuse),
            "mlp.up_proj.bias": (2 * fuse,),
            "mlp.down_proj.weight": (fuse, 2 * fuse),
            "mlp.down_proj.bias": (fuse,),
        }.items():
            shapes[f"layers.{layer}.{name}"] = shape
    return {
        "attn_fuser": {name: torch.randn(shape) for name, shape in shapes.items()},
        "learnable_embeddings": torch.randn(LAYERS, 1, HIDDEN),
        "le_proj": {"weight": torch.randn(HIDDEN, HIDDEN), "bias": torch.randn(HIDDEN)},
        "le_norm": {"weight": torch.randn(HIDDEN)},
    }


def write_official(folder: Path, modules: object = None, **changes) -> Path:
    folder.mkdir()
    write_json(folder / "config.json", BASE_CONFIG | OFFICIAL_FIELDS | changes)
    torch.save(official_modules() if modules is None else modules, folder / "new_modules_gp.pt")
    return folder


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


def change_json(path: Path, **changes) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def change_modules(official: Path, change: Callable[[dict], object]) -> None:
    modules = official_modules()
    change(modules)
    torch.save(modules, official / "new_modules_gp.pt")


def truncate(path: Path, kept: float = 0.9) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])


def change_base_tensor(base: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


PICKLE = "new_modules_gp.pt"
REFUSALS = {
    "deep supervision": (
        lambda base, official: change_json(official / "config.json", deep_supervision=True),
        "deep_supervision=True is not supported",
    ),
    "supervised attention": (
        lambda base, official: change_json(official / "config.json", ori_attn_supervision=True),
        "ori_attn_supervision=True is not supported",
    ),
    "other kernel in the predictor": (
        lambda base, official: change_json(official / "config.json", attn_fuse_use_flash_attn=True),
        "attn_fuse_use_flash_attn=True is not supported; supported is only False",
    ),
    "dummy predictor": (
        lambda base, official: change_json(official / "config.json", attn_fuse_type="AttnFuserX"),
        "attn_fuse_type='AttnFuserX' is not supported",
    ),
    "unknown corner": (
        lambda base, official: change_json(official / "config.json", anchor_positions=["mid"]),
        "anchor_positions='mid' is not supported",
    ),
    "K below the decoder": (
        lambda base, official: change_json(official / "config.json", reduce_layer=-1),
        "glimpse_layer must be one of the decoder's layers 0..2, got -1",
    ),
    "attention above the decoder": (
        lambda base, official: change_json(
            official / "config.json", selected_layers=[7], reduce_layer=7
        ),
        r"selected_layers must be layers of the decoder \(0..2\), got \[7\]",
    ),
    "attention above K": (
        lambda base, official: change_json(official / "config.json", selected_layers=[2]),
        "attention_layers must lie in 0..glimpse_layer",
    ),
    "vision layer": (
        lambda base, official: change_json(official / "config.json", selected_visual_layers=[9, 0]),
        "vision_layers must be vision blocks",
    ),
    "other base": (
        lambda base, official: change_json(official / "config.json", hidden_size=48),
        "hidden_size is 32 in the base's configuration and 48 in the glimpse's",
    ),
    "other family": (
        lambda base, official: change_json(base / "config.json", model_type="qwen2_vl"),
        "base is a 'qwen2_vl' model; known are qwen2_5_vl, qwen3_vl, llava, llava_next",
    ),
    "no official config": (
        lambda base, official: (official / "config.json").unlink(),
        "official.*config.json cannot be read",
    ),
    "official config of something else": (
        lambda base, official: write_json(official / "config.json", BASE_CONFIG),
        "official configuration lacks the field 'selected_layers'",
    ),
    "broken base config": (
        lambda base, official: (base / "config.json").write_text("{"),
        "base.*config.json is not a JSON file",
    ),
    "no pickle": (
        lambda base, official: (official / PICKLE).unlink(),
        f"{PICKLE} is missing",
    ),
    "empty pickle": (
        lambda base, official: truncate(official / PICKLE, 0),
        f"{PICKLE} is truncated or not a pickle of tensors",
    ),
    "truncated pickle": (
        lambda base, official: truncate(official / PICKLE),
        f"{PICKLE} is truncated or not a pickle of tensors",
    ),
    "text instead of a pickle": (
        lambda base, official: (official / PICKLE).write_text("version https://git-lfs\n"),
        f"{PICKLE} is truncated or not a pickle of tensors",
    ),
    "pickle with code": (
        lambda base, official: torch.save({"le_norm": os.getcwd}, official / PICKLE),
        f"{PICKLE} is truncated or not a pickle of tensors",
    ),
    "pickle of a list": (
        lambda base, official: torch.save([1, 2], official / PICKLE),
        "must hold named tensors",
    ),
    "pickle of numbers": (
        lambda base, official: torch.save({"le_proj": {"weight": 1}}, official / PICKLE),
        "must hold named tensors, got le_proj.weight",
    ),
    "missing official tensor": (
        lambda base, official: change_modules(official, lambda held: held.pop("le_norm")),
        "missing: model.glimpse.token.norm.weight$",
    ),
    "unexpected official tensor": (
        lambda base, official: change_modules(
            official, lambda held: held.update(le_gate=torch.ones(1))
        ),
        "unexpected tensor: le_gate",
    ),
    "output projection of an inner layer": (
        lambda base, official: change_modules(
            official,
            lambda held: held["attn_fuser"].update({"attn_out_projs.0.bias": torch.ones(1)}),
        ),
        "more than once, again as attn_fuser.attn_out_projs.0.bias",
    ),
    "official tensor of a wrong shape": (
        lambda base, official: change_modules(
            official, lambda held: held.update(learnable_embeddings=torch.ones(3, 2, HIDDEN))
        ),
        r"of a wrong shape: model.glimpse.token.embeddings \(3, 2, 32\) instead of \(3, 1, 32\)",
    ),
    "missing shard": (
        lambda base, official: (base / "model.safetensors").rename(base / "elsewhere.safetensors"),
        "holds neither model.safetensors nor model.safetensors.index.json",
    ),
    "index names a missing shard": (
        lambda base, official: write_json(
            base / "model.safetensors.index.json", {"weight_map": {"a": "model-00001.safetensors"}}
        ),
        "model-00001.safetensors is missing",
    ),
    "index without a map": (
        lambda base, official: write_json(base / "model.safetensors.index.json", {}),
        "has no weight_map",
    ),
    "truncated shard": (
        lambda base, official: truncate(base / "model.safetensors"),
        "model.safetensors is truncated or damaged: .* bytes where its header announces",
    ),
    "shard cut in its header": (
        lambda base, official: truncate(base / "model.safetensors", 0.001),
        "model.safetensors is truncated or not a safetensors file",
    ),
    "shard that is no safetensors file": (
        lambda base, official: (base / "model.safetensors").write_bytes(
            b"\x02" + b"\0" * 7 + b"[]"
        ),
        "model.safetensors is not a safetensors file",
    ),
    "missing base tensor": (
        lambda base, official: change_base_tensor(base, "model.norm.weight", None),
        "missing: model.language_model.norm.weight$",
    ),
    "unexpected base tensor": (
        lambda base, official: change_base_tensor(base, "model.extra", torch.ones(1)),
        "unexpected: model.language_model.extra$",
    ),
    "base tensor of a wrong shape": (
        lambda base, official: change_base_tensor(base, "model.norm.weight", torch.ones(5)),
        r"of a wrong shape: model.language_model.norm.weight \(5,\) instead of \(32,\)",
    ),
    "base tensor under two names": (
        lambda base, official: change_base_tensor(
            base, "model.language_model.norm.weight", torch.ones(HIDDEN)
        ),
        "the same tensors under old and new names",
    ),
}


@pytest.mark.parametrize("damage, sentence", REFUSALS.values(), ids=REFUSALS)
def test_bad_inputs_are_named_and_nothing_is_written(tmp_path, base, official, damage, sentence):
    damage(base, official)
    with pytest.raises(ConversionError, match=sentence):
        convert(base, official, tmp_path / "results" / "out")
    assert not any((tmp_path / "results").rglob("*"))


def test_a_failure_while_writing_leaves_nothing(tmp_path, base, official, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(repository, "place_file", fail)
    with pytest.raises(OSError, match="no space left"):
        convert(base, official, tmp_path / "results" / "out")
    assert not any((tmp_path / "results").rglob("*"))


def test_output_must_be_absent_or_empty(tmp_path, base, official):
    (tmp_path / "empty").mkdir()
    convert(base, official, tmp_path / "empty")
    with pytest.raises(ValueError, match="empty exists and is not an empty folder"):
        convert(base, official, tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file exists and is not an empty folder"):
        convert(base, official, tmp_path / "file")


def test_command_says_what_is_wrong(tmp_path, base, official, capsys):
    change_json(base / "config.json", model_type="qwen2_vl")
    arguments = ["--base", str(base), "--glimpse", str(official)]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    known = "known are qwen2_5_vl, qwen3_vl, llava, llava_next"
    assert printed.err == f"error: {base} is a 'qwen2_vl' model; {known}\n"
    assert not printed.out and not (tmp_path / "out").exists()


def test_command_fetches_hub_ids(tmp_path, base, official, monkeypatch):
    asked = []

    def fetch(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision))
        assert "config.json" in allow_patterns
        return str(base if repo_id == "some/base" else official)

    monkeypatch.setattr(repository, "snapshot_download", fetch)
    sources = ["--base", "some/base", "--base-revision", "v1", "--glimpse", "some/glimpse"]
    assert main([*sources, "--output", str(tmp_path / "out"), "--no-verify"]) == 0
    assert asked == [("some/base", "v1"), ("some/glimpse", None)]
    assert (tmp_path / "out" / "config.json").exists()


def test_command_names_a_base_that_is_nowhere(tmp_path, official, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ["--glimpse", str(official), "--output", str(tmp_path / "out")]
    assert main(["--base", str(tmp_path / "absent"), *arguments]) == 1
    assert "absent is no folder here" in capsys.readouterr().err
