"""The folders `hub_configs/NAME` of published models, without their weights.

    python conversion/hub_configs.py

writes the configuration and card of every model in `PUBLISHED`, as publishing them would. The code
is the same for all and joins them when they are published. `base_configs/` holds the stock
configurations, written from what is publicly known of these bases: compare them with the base at
hand before publishing. Tokenizer, processor files and generation configuration are the base's and
come with it.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conversion.convert_official import convert_config
from conversion.model_card import ModelCard, render_card
from conversion.repository import Publication, build_config
from glimpseprune.families import family_of
from glimpseprune.hub.shards import read_json
from glimpseprune.portable import write_json

REPOSITORY = Path(__file__).resolve().parents[1]
BASE_CONFIGS = Path(__file__).with_name("base_configs")
HUB_CONFIGS = REPOSITORY / "hub_configs"
# The official settings, as its configurations state them (arXiv 2508.01548 and its code).
OFFICIAL_SETTINGS = {
    "attn_fuse_type": "AttnFuserV1",
    "attn_fuse_size": 256,
    "attn_fuse_global": True,
    "attn_fuse_num_heads": 4,
    "attn_fuse_hidden_act": "silu",
    "visual_cond_size": 512,
    "le_length": 1,
    "le_norm_type": "rmsnorm",
    "reduce_threshold": 0.5,
    "min_remain_num": 1,
}
QWEN_SETTINGS = {"use_attention_logits": True, "selected_visual_layers": [31, 23, 15, 7]}
QWEN_3_SETTINGS = {"use_attention_logits": True, "selected_visual_layers": [23, 17, 11, 5]}
EARLY = {"glimpse_lora_rank": 16, "stale_rank": 16}  # of a glimpse that is read ahead
LLAVA_SETTINGS = {"use_attention_logits": False, "selected_visual_layers": [23, 17, 11, 5]}
QWEN_RESEARCH = {
    "license": "other",
    "license_name": "qwen-research",
    "license_link": "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE",
}
LLAMA_2 = {"license": "llama2"}
CONVERTED = "The official glimpse weights, converted."
PLUS = "Stage 2 (reinforcement learning on pruned sequences) of the base, merged, then stage 1."
STAGE_1 = "Stage 1; there is no official checkpoint of this base."
NOT_TRAINED = (
    "None so far. `recipes/stage1_{name}.yaml` trains a glimpse that is read late, and "
    "`recipes/stage1_{name}_early.yaml` goes on from it to this one; neither has been run."
)


@dataclass(frozen=True)
class PublishedModel:
    """One model that is published.

    Attributes:
        base: Hub id of its base.
        base_config: file of the base's configuration in `base_configs/`.
        glimpse_layer: K.
        licence: what the base's card says of its licence.
        settings: the official settings in which families differ.
        training: how its glimpse comes about, a sentence; None where it is not trained.
        prune_layer: P, or None for K.
    """

    base: str
    base_config: str
    glimpse_layer: int
    licence: Mapping[str, str]
    settings: Mapping[str, object]
    training: str | None = CONVERTED
    prune_layer: int | None = None

    @property
    def title(self) -> str:
        """Headline of its card."""
        method = "GlimpsePrune+" if self.training == PLUS else "GlimpsePrune"
        return f"{method}, {self.base.partition('/')[2]}"


QWEN_3B = PublishedModel(
    "Qwen/Qwen2.5-VL-3B-Instruct", "qwen2_5_vl_3b.json", 23, QWEN_RESEARCH, QWEN_SETTINGS
)
QWEN_7B = PublishedModel(
    "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen2_5_vl_7b.json",
    18,
    {"license": "apache-2.0"},
    QWEN_SETTINGS,
)
LLAVA_7B = PublishedModel(
    "llava-hf/llava-1.5-7b-hf", "llava_1_5_7b.json", 21, LLAMA_2, LLAVA_SETTINGS
)
LLAVA_13B = PublishedModel(
    "llava-hf/llava-1.5-13b-hf", "llava_1_5_13b.json", 26, LLAMA_2, LLAVA_SETTINGS
)
QWEN_3_2B = PublishedModel(
    "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3_vl_2b.json",
    18,
    {"license": "apache-2.0"},
    QWEN_3_SETTINGS,
    training=None,
    prune_layer=4,
)
PUBLISHED = {
    "qwen2_5_vl_3b": QWEN_3B,
    "qwen2_5_vl_3b_plus": replace(QWEN_3B, training=PLUS),
    "qwen2_5_vl_7b": QWEN_7B,
    "qwen2_5_vl_7b_plus": replace(QWEN_7B, training=PLUS),
    "llava_1_5_7b": LLAVA_7B,
    "llava_1_5_7b_plus": replace(LLAVA_7B, training=PLUS),
    "llava_1_5_13b": LLAVA_13B,
    "llava_1_5_13b_plus": replace(LLAVA_13B, training=PLUS),
    "llava_v1_6_vicuna_7b": PublishedModel(
        "llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava_v1_6_vicuna_7b.json",
        21,
        LLAMA_2,
        LLAVA_SETTINGS,
        training=STAGE_1,
    ),
    "qwen3_vl_2b": QWEN_3_2B,
    "qwen3_vl_4b": replace(
        QWEN_3_2B,
        base="Qwen/Qwen3-VL-4B-Instruct",
        base_config="qwen3_vl_4b.json",
        glimpse_layer=24,
        prune_layer=5,
    ),
    "qwen3_vl_8b": replace(
        QWEN_3_2B,
        base="Qwen/Qwen3-VL-8B-Instruct",
        base_config="qwen3_vl_8b.json",
        glimpse_layer=24,
        prune_layer=5,
        settings=QWEN_3_SETTINGS | {"selected_visual_layers": [26, 24, 16, 8]},
    ),
}


def official_settings(model: PublishedModel, num_layers: int) -> dict[str, object]:
    """What the official configuration of a model says of its glimpse."""
    return {
        **OFFICIAL_SETTINGS,
        **model.settings,
        "num_hidden_layers": num_layers,
        "selected_layers": [model.glimpse_layer],
        "reduce_layer": model.glimpse_layer,
        "le_layers": list(range(num_layers)),
    }


def published_config(model: PublishedModel) -> dict:
    """What conversion writes to the config.json of a published model."""
    base = read_json(BASE_CONFIGS / model.base_config)
    layers = base.get("text_config", base)["num_hidden_layers"]
    official = official_settings(model, layers)
    family = family_of(base, model.base_config)
    publication = Publication(base_repository=model.base)
    fields = convert_config(official)
    if model.prune_layer is not None:
        fields |= {"prune_layer": model.prune_layer, **EARLY}
    return build_config(base, family, fields, publication)


def published_card(model: PublishedModel) -> str:
    """The card of a published model before anything was measured with its files."""
    training, trained = model.training, model.training is not None
    if not trained:
        training = NOT_TRAINED.format(name=model.base_config.removesuffix(".json"))
    card = ModelCard(title=model.title, training=training, trained=trained)
    return render_card(card, published_config(model), model.licence)


def write_folder(name: str, model: PublishedModel, parent: Path = HUB_CONFIGS) -> None:
    """Write one folder; what is in it already is replaced."""
    folder = parent / name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", published_config(model))
    (folder / "README.md").write_text(published_card(model), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Write all folders."""
    parser = argparse.ArgumentParser(prog="hub_configs.py", description=main.__doc__)
    parser.parse_args(argv)
    for name, model in PUBLISHED.items():
        write_folder(name, model)
        print(f"wrote {HUB_CONFIGS.name}/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
