"""What the rehearsal starts from: a base, an official glimpse, photos and questions about them.

    python -m benchmarks.rehearsal.material --geometry 3b --output FOLDER

Weights are random. Base, glimpse and photos lie in `FOLDER/base`, `FOLDER/official` and
`FOLDER/photos`; the base in files, under names and in the dtype of its repository on the Hub. It is
written tensor by tensor.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from conversion.hub_configs import BASE_CONFIGS, PUBLISHED, official_settings
from glimpseprune.hub.shards import INDEX_FILE, read_json
from glimpseprune.loading import TINY_MODEL
from glimpseprune.portable import write_json

PLAIN_TOKENS = 151_643  # of Qwen2.5's vocabulary; special tokens follow
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
SHARD_BYTES = 4 * 10**9  # as the published bases are cut
TOKEN_PIXELS = 28
QUESTIONS = ("What does the woman wear?", "Whose face is this?", "What is behind her?")
BOXES = ((0.2, 0.5, 0.8, 1.0), (0.35, 0.1, 0.7, 0.5), (0.0, 0.0, 0.3, 0.6))  # shares of the photo


@dataclass(frozen=True)
class Geometry:
    """A size at which to rehearse.

    Attributes:
        published: name in `PUBLISHED`, and of the recipes.
        changes: of the base's configuration.
        vision_changes: of its vision encoder's.
        shards: files that the base is cut into at least.
    """

    published: str
    changes: dict = field(default_factory=dict)
    vision_changes: dict = field(default_factory=dict)
    shards: int = 1


NARROW = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
}
NARROW_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
GEOMETRIES = {
    "tiny": Geometry("qwen2_5_vl_3b", NARROW, NARROW_VISION, shards=2),  # as deep, but narrow
    "3b": Geometry("qwen2_5_vl_3b"),
    "7b": Geometry("qwen2_5_vl_7b"),
}


def write_base(folder: Path, geometry: Geometry) -> dict:
    """A stock base of random weights in bfloat16; returns its configuration."""
    folder.mkdir(parents=True)
    model = PUBLISHED[geometry.published]
    config = read_json(BASE_CONFIGS / model.base_config) | geometry.changes
    config["vision_config"] |= geometry.vision_changes
    write_json(folder / "config.json", config)
    _write_shards(folder, config, geometry.shards)
    _write_tokenizer(folder)
    image_processor = read_json(TINY_MODEL / "preprocessor_config.json")
    for name in ("auto_map", "size"):
        del image_processor[name]
    image_processor |= {"min_pixels": 3136, "max_pixels": 12_845_056}
    image_processor["processor_class"] = "Qwen2_5_VLProcessor"
    write_json(folder / "preprocessor_config.json", image_processor)
    template = (TINY_MODEL / "chat_template.jinja").read_text(encoding="utf-8")
    write_json(folder / "chat_template.json", {"chat_template": template})
    ends = [config["eos_token_id"], config["bos_token_id"]]
    generation = {"bos_token_id": ends[1], "pad_token_id": ends[1], "eos_token_id": ends}
    write_json(folder / "generation_config.json", generation | {"do_sample": True})
    (folder / "README.md").write_text("---\nlicense: other\n---\n\n# Random weights\n")
    return config


def write_official(folder: Path, geometry: Geometry, base: dict) -> None:
    """An official checkpoint of random weights, as the official code saves one."""
    folder.mkdir(parents=True)
    fields = official_settings(PUBLISHED[geometry.published], base["num_hidden_layers"])
    write_json(folder / "config.json", base | fields)
    torch.manual_seed(1)
    torch.save(_official_modules(fields, base), folder / "new_modules_gp.pt")


def write_photos(folder: Path, grid: Sequence[int], question_grid: Sequence[int]) -> None:
    """A photo to ask about, and two small ones with questions and boxes.

    Args:
        folder: to create.
        grid: rows and columns of the first in tokens.
        question_grid: of the others.
    """
    from matplotlib import cbook
    from PIL import Image, ImageOps

    folder.mkdir(parents=True)
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        photo = Image.open(file).convert("RGB")
    rows, columns = grid
    photo.resize((columns * TOKEN_PIXELS, rows * TOKEN_PIXELS)).save(folder / "photo.jpg")
    height, width = (length * TOKEN_PIXELS for length in question_grid)
    photo = photo.resize((width, height))
    photo.save(folder / "small.jpg")
    ImageOps.mirror(photo).save(folder / "mirrored.jpg")
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as lines:
        for name, mirrored in (("small.jpg", False), ("mirrored.jpg", True)):
            for question, (left, top, right, bottom) in zip(QUESTIONS, BOXES, strict=True):
                if mirrored:
                    left, right = 1 - right, 1 - left
                box = [left * width, top * height, right * width, bottom * height]
                row = {"question": question, "answer": "a uniform", "image": name, "bboxs": [box]}
                row |= {"dataset": "photos", "width": width, "height": height}
                lines.write(json.dumps(row) + "\n")


def published_tensors(config: dict) -> dict[str, torch.Size]:
    """Names and shapes of a base's tensors, as published checkpoints call them."""
    fields = json.loads(json.dumps(config))  # its nested fields may be changed
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**fields))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        shapes.pop("lm_head.weight")
    return {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): shape
        for name, shape in shapes.items()
    }


def _write_shards(folder: Path, config: dict, at_least: int) -> None:
    shapes = published_tensors(config)
    total = 2 * sum(math.prod(shape) for shape in shapes.values())
    limit = min(SHARD_BYTES, math.ceil(total / at_least))
    shards: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name, shape in shapes.items():
        size += 2 * math.prod(shape)
        if size > limit and shards[-1]:
            shards.append({})
            size = 2 * math.prod(shape)
        shards[-1][name] = shape
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file_name, shard, generator)
        weight_map |= dict.fromkeys(shard, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX_FILE, index)


def _write_shard(path: Path, shapes: dict[str, torch.Size], generator: torch.Generator) -> None:
    """A safetensors file, one tensor after the other."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        offsets = [end, end + 2 * math.prod(shape)]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}
        end = offsets[1]
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            random_weight(name, shape, generator).view(torch.int16).numpy().tofile(file)


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Norms of one, and of the rest what keeps the size of what passes through it."""
    if len(shape) == 1 and not name.endswith("bias"):
        return torch.ones(shape, dtype=torch.bfloat16)
    spread = 0.02 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
    weight = torch.empty(shape, dtype=torch.bfloat16)
    return weight.normal_(std=spread, generator=generator)


def _write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with as many tokens as Qwen2.5's: all pairs of bytes, and triples."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = []
    for pair in _merges(alphabet):
        if len(alphabet) + len(merges) == PLAIN_TOKENS:
            break
        merges.append(pair)
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {
        str(PLAIN_TOKENS + number): {"content": token, "special": True} | flags
        for number, token in enumerate(SPECIAL_TOKENS)
    }
    content = {
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131_072,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", content)


def _merges(alphabet: list[str]) -> Iterator[tuple[str, str]]:
    pairs = [(first, second) for first in alphabet for second in alphabet]
    yield from pairs
    for first, second in pairs:
        for third in alphabet:
            yield first + second, third


def _official_modules(fields: dict, base: dict) -> dict[str, object]:
    """Random tensors as the official code names and nests them."""
    width, condition = fields["attn_fuse_size"], fields["visual_cond_size"]
    joint, hidden = width + condition, base["hidden_size"]
    vision_width, taps = base["vision_config"]["hidden_size"], fields["selected_visual_layers"]
    shapes = {"attn_in_proj": (width, base["num_attention_heads"])}
    shapes[f"attn_out_projs.{len(taps) - 1}"] = (1, width)
    tensors = {}
    for layer in range(len(taps)):
        shapes[f"cond_in_projs.{layer}"] = (condition, vision_width)
        for name in ("gate_proj", "up_proj"):
            shapes[f"layers.{layer}.mlp.{name}"] = (2 * width, width)
        shapes[f"layers.{layer}.mlp.down_proj"] = (width, 2 * width)
        for name, size in (("q", joint), ("k", joint), ("v", width), ("o", width)):
            tensors[f"layers.{layer}.attn.{name}_proj.weight"] = _normal(size, size)
        for name in ("norm1", "norm2"):
            tensors[f"layers.{layer}.{name}.weight"] = torch.ones(width)
    for name, shape in shapes.items():
        tensors |= {f"{name}.weight": _normal(*shape), f"{name}.bias": torch.zeros(shape[0])}
    return {
        "attn_fuser": tensors,
        "learnable_embeddings": torch.randn(len(fields["le_layers"]), 1, hidden),
        "le_proj": {"weight": _normal(hidden, hidden), "bias": torch.zeros(hidden)},
        "le_norm": {"weight": torch.ones(hidden)},
    }


def _normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns) * columns**-0.5


def main(argv: list[str] | None = None) -> int:
    """Write everything; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, required=True)
    parser.add_argument("--grid", type=int, nargs=2, required=True, help="of the photo, in tokens")
    parser.add_argument("--question-grid", type=int, nargs=2, required=True, help="of small ones")
    parser.add_argument("--output", type=Path, required=True, help="folder; what is there stays")
    arguments = parser.parse_args(argv)
    geometry = GEOMETRIES[arguments.geometry]
    config = write_base(arguments.output / "base", geometry)
    write_official(arguments.output / "official", geometry, config)
    write_photos(arguments.output / "photos", arguments.grid, arguments.question_grid)
    print(f"wrote {geometry.published} to {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
