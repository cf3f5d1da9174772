"""Turn a LLaVA-1.5 base as its authors publish it into the layout of the Hugging Face Hub.

    glimpseprune convert-llava-base --base BASE --vision-tower CLIP --output HUB_BASE

BASE and CLIP are folders whose weights are safetensors; HUB_BASE is what `convert-official` and
stage 1 take as a base. Tensors are renamed by the key map of transformers' own conversion. It
writes no tokenizer and no processor: take those of the corresponding Hub base.

The vocabulary gets an image token and a padding token behind its words and is filled up to a
multiple of 64. New rows are the mean of the old ones: no prompt reads them, no answer picks them.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conversion.publishing import run_script
from glimpseprune.hub.folders import check_vacant, vacant_sibling
from glimpseprune.hub.shards import INDEX_FILE, ConversionError, find_shards, read_json
from glimpseprune.portable import write_json

# Name in the authors' layout -> name in the Hub's; the first pattern that fits. None leaves it out.
BASE_NAMES = {
    r"^model\.mm_projector\.0\.": "multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "multi_modal_projector.linear_2.",
    r"^model\.vision_tower\.vision_tower\.": "vision_tower.",
    r"^model\.": "language_model.model.",
    r"^lm_head\.": "language_model.lm_head.",
}
TOWER_NAMES = {r"position_ids$": None, r"^vision_model\.": "vision_tower.vision_model.", r"": None}
WORDS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "bos_token_id",
    "eos_token_id",
)
ONLY = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch"}
MULTIPLE = 64


def convert_base(base: Path, tower: Path, output: Path) -> None:
    """Write the Hub's layout of a base; one shard is in memory at a time.

    Raises:
        ConversionError: when the base is of another kind or its files are damaged.
    """
    check_vacant(output)
    config = hub_config(read_json(base / "config.json"), read_json(tower / "config.json"))
    vocabulary = config["text_config"]["vocab_size"]
    sources = [(shard, BASE_NAMES) for shard in find_shards(base)]
    own_tower = any("vision_tower" in name for shard, _ in sources for name in shard.tensors)
    if not own_tower:
        sources += [(shard, TOWER_NAMES) for shard in find_shards(tower)]
    weight_map = {}
    with vacant_sibling(output) as folder:
        for index, (shard, names) in enumerate(sources, start=1):
            tensors = rename_all(load_file(shard.path), names)
            for name in set(WORDS) & set(tensors):
                tensors[name] = with_new_words(tensors[name], vocabulary)
            file_name = f"model-{index:05d}-of-{len(sources):05d}.safetensors"
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file_name)
        write_json(folder / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
        write_json(folder / "config.json", config)


def hub_config(base: dict, tower: dict) -> dict:
    """The Hub's configuration of a base and its vision tower.

    Raises:
        ConversionError: naming the setting that is not LLaVA-1.5's.
    """
    for name, supported in ONLY.items():
        if base.get(name) != supported:
            raise ConversionError(f"{name} must be {supported!r}, got {base.get(name)!r}")
    words = base["vocab_size"]
    text = {name: base[name] for name in TEXT_FIELDS if name in base}
    text |= {
        "model_type": "llama",
        "vocab_size": -(-(words + 2) // MULTIPLE) * MULTIPLE,
        "pad_token_id": words + 1,
    }
    vision = tower.get("vision_config", tower) | {"model_type": "clip_vision_model"}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": words,
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": base["mm_vision_select_layer"],
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision,
    }


def rename_all(
    tensors: dict[str, torch.Tensor], names: dict[str, str | None]
) -> dict[str, torch.Tensor]:
    """Tensors under the Hub's names."""
    renamed = {}
    for name, tensor in tensors.items():
        pattern = next(pattern for pattern in (*names, r"") if re.search(pattern, name))
        replacement = names.get(pattern, "")
        if replacement is not None:
            renamed[re.sub(pattern, replacement, name, count=1)] = tensor
    return renamed


def with_new_words(rows: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """`(words, hidden)` to `(vocabulary, hidden)`, see the module's docstring."""
    mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
    return torch.cat([rows, mean.expand(vocabulary - len(rows), -1)]).contiguous()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.add_argument("--base", required=True, type=Path, help="folder of the authors' base")
    parser.add_argument("--vision-tower", required=True, type=Path, help="folder of its CLIP")
    parser.add_argument("--output", required=True, type=Path, help="folder to create")


def run(arguments: argparse.Namespace) -> int:
    """Convert what the arguments name."""
    convert_base(arguments.base, arguments.vision_tower, arguments.output)
    print(f"wrote {arguments.output}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 1 after saying what is wrong."""
    return run_script(__doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
