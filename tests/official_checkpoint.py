"""A base and an official checkpoint, tiny and random, in the layout of the published ones: flat
configuration, old tensor names, byte-level tokenizer, pickle of added modules."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

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


def change_json(path: Path, **changes) -> None:
    write_json(path, json.loads(path.read_text()) | changes)
