"""Convert an official GlimpsePrune checkpoint into a Hub repository.

An official checkpoint is a stock base beside a folder with a pickle of the added modules and their
configuration:

    glimpseprune convert-official --base BASE --glimpse OFFICIAL --output REPOSITORY

BASE and OFFICIAL are local folders or Hub ids. The pickle is read as plain tensors: no code in it
is run.
"""

import argparse
import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conversion.publishing import (
    add_publishing_arguments,
    publication_from,
    publish,
    resolve_base,
    run_script,
)
from conversion.repository import TRAINED_KEY, resolve_folder, write_repository
from conversion.verification import Source
from glimpseprune.families import Family, family_of
from glimpseprune.hub.folders import check_vacant
from glimpseprune.hub.shards import ConversionError, read_json

WEIGHTS_FILE = "new_modules_gp.pt"

# Official tensor name (a whole match) -> ours.
KEY_MAP = {
    r"learnable_embeddings": r"model.glimpse.token.embeddings",
    r"le_proj\.(\w+)": r"model.glimpse.token.projection.\1",
    r"le_norm\.(\w+)": r"model.glimpse.token.norm.\1",
    r"attn_fuser\.attn_in_proj\.(\w+)": r"model.glimpse.predictor.attention_projection.\1",
    r"attn_fuser\.cond_in_projs\.(\d+\.\w+)": r"model.glimpse.predictor.condition_projections.\1",
    r"attn_fuser\.layers\.(\d+)\.norm1\.(\w+)": (
        r"model.glimpse.predictor.layers.\1.attention_norm.\2"
    ),
    r"attn_fuser\.layers\.(\d+)\.attn\.(\w+\.\w+)": (
        r"model.glimpse.predictor.layers.\1.attention.\2"
    ),
    r"attn_fuser\.layers\.(\d+)\.norm2\.(\w+)": r"model.glimpse.predictor.layers.\1.mlp_norm.\2",
    r"attn_fuser\.layers\.(\d+)\.mlp\.(\w+\.\w+)": r"model.glimpse.predictor.layers.\1.mlp.\2",
    # One projection a layer exists under deep supervision; otherwise only the last layer's.
    r"attn_fuser\.attn_out_projs\.\d+\.(\w+)": r"model.glimpse.predictor.output_projection.\1",
}

# Official configuration field -> ours, where the value stays.
CONFIG_MAP = {
    "selected_layers": "attention_layers",
    "selected_visual_layers": "vision_layers",
    "attn_fuse_size": "predictor_hidden_size",
    "visual_cond_size": "predictor_condition_size",
    "attn_fuse_num_heads": "predictor_num_heads",
    "attn_fuse_hidden_act": "predictor_hidden_act",
    "le_layers": "glimpse_embedding_layers",
    "le_dropout_prob": "glimpse_dropout",
    "reduce_threshold": "prune_threshold",
    "max_remain_ratio": "max_keep_ratio",
    "min_remain_num": "min_keep_tokens",
}
USES_VISION = {"AttnFuserV1": True, "AttnFuserV2": False}
NORMS = {"rmsnorm": "rms_norm", "layernorm": "layer_norm"}
CORNERS = {"tl": "top_left", "tr": "top_right", "bl": "bottom_left", "br": "bottom_right"}

# Settings of ablations and experiments, with the one value that is supported.
ONLY = {
    "deep_supervision": False,
    "ori_attn_supervision": False,
    "use_ref_masks": False,
    "use_zero_masks": False,
    "fixed_remain_ratio": None,
    "attn_fuse_use_flash_attn": False,  # it splits the values among heads differently
}
# Fields that older official configurations and those of LLaVA lack, with the value they imply.
DEFAULTS = ONLY | {
    "anchor_positions": [],
    "attn_fuse_global": True,
    "le_norm_type": "rmsnorm",
    "le_dropout_prob": 0.0,
    "reduce_threshold": 0.5,
    "max_remain_ratio": None,
    "min_remain_num": 1,
}
# What base and official configuration must agree on: the text model's, then the vision encoder's.
TEXT_SHAPE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
VISION_SHAPE = ("hidden_size", "depth", "spatial_merge_size")
LLAVA_VISION_WIDTH = "mm_hidden_size"  # only official LLaVA configurations state it

logger = logging.getLogger(__name__)


def convert(base: Path, glimpse: Path, output: Path) -> None:
    """Write the repository of one official checkpoint.

    Args:
        base: folder of the stock base.
        glimpse: official folder, holding `new_modules_gp.pt` and `config.json`.
        output: folder to create; it may exist if it is empty.

    Raises:
        ConversionError: when the checkpoint cannot be converted; nothing is written then.
        ValueError: when `output` is not empty.
    """
    check_vacant(output)
    write_repository(output, base, *read_official(base, glimpse))


def read_official(
    base: Path, glimpse: Path
) -> tuple[Family, dict[str, object], dict[str, torch.Tensor]]:
    """Family, configuration fields and weights of an official checkpoint.

    Raises:
        ConversionError: when the checkpoint cannot be converted.
    """
    base_config = read_json(base / "config.json")
    official = read_json(glimpse / "config.json")
    check_same_architecture(base_config, official)
    fields = convert_config(official)
    logger.info("glimpse taken at layer %d", fields["glimpse_layer"])
    weights = convert_weights(
        read_official_weights(glimpse / WEIGHTS_FILE), fields["predictor_use_vision"]
    )
    return family_of(base_config, base), fields, weights


def check_same_architecture(base: dict, official: dict) -> None:
    """Raise a ConversionError when the glimpse was trained on a base of other sizes."""
    texts = [config | config.get("text_config", {}) for config in (base, official)]
    visions = [config.get("vision_config", {}) for config in (base, official)]
    pairs = [("", name, *(text.get(name) for text in texts)) for name in TEXT_SHAPE]
    pairs += [("vision ", name, *(vision.get(name) for vision in visions)) for name in VISION_SHAPE]
    if LLAVA_VISION_WIDTH in official:  # its base may have been given more words for images
        pairs = [pair for pair in pairs if pair[1] != "vocab_size"]
        width = visions[0].get("hidden_size")
        pairs.append(("vision ", "hidden_size", width, official[LLAVA_VISION_WIDTH]))
    for kind, name, ours, theirs in pairs:
        if None not in (ours, theirs) and ours != theirs:
            raise ConversionError(
                f"base and glimpse do not belong together: {kind}{name} is {ours} in the base's "
                f"configuration and {theirs} in the glimpse's"
            )


def convert_config(official: Mapping[str, object]) -> dict[str, object]:
    """Our configuration fields.

    Raises:
        ConversionError: naming a field that is missing, or a setting that is not supported.
    """
    official = {**DEFAULTS, **official}
    for name, supported in ONLY.items():
        if official[name] != supported:
            raise ConversionError(
                f"{name}={official[name]} is not supported; supported is only {supported}"
            )
    try:
        fields = {ours: official[theirs] for theirs, ours in CONFIG_MAP.items()}
        fields["glimpse_layer"] = _glimpse_layer(official)
        fields["attention_scores"] = (
            "logits" if official["use_attention_logits"] else "log_probabilities"
        )
        fields["num_glimpse_tokens"] = official["le_length"] if official["le_layers"] else 0
        fields["predictor_windowed"] = not official["attn_fuse_global"]
        fields["glimpse_norm"] = _lookup("le_norm_type", official["le_norm_type"], NORMS)
        fuse_type = official["attn_fuse_type"]
        fields["predictor_use_vision"] = _lookup("attn_fuse_type", fuse_type, USES_VISION)
        corners = official["anchor_positions"] or []
        fields["anchor_corners"] = [_lookup("anchor_positions", name, CORNERS) for name in corners]
    except KeyError as error:
        raise ConversionError(f"the official configuration lacks the field {error}") from error
    return fields


def _glimpse_layer(official: Mapping[str, object]) -> int:
    """The layer at which tokens are dropped; one beyond the decoder means its last.

    Raises:
        ConversionError: when a layer whose attention is read is none of the decoder's.
    """
    num_layers = official["num_hidden_layers"]
    selected = official["selected_layers"]
    if not selected or not all(0 <= layer < num_layers for layer in selected):
        raise ConversionError(
            f"selected_layers must be layers of the decoder (0..{num_layers - 1}), got {selected}"
        )
    return min(official["reduce_layer"], num_layers - 1)


def _lookup(field: str, value: object, values: Mapping[str, object]) -> object:
    if value not in values:
        raise ConversionError(
            f"{field}={value!r} is not supported; supported are {', '.join(values)}"
        )
    return values[value]


def read_official_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of `new_modules_gp.pt` under dotted names.

    Raises:
        ConversionError: when the file is missing, damaged, or holds anything but tensors.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing") from error
    except Exception as error:  # damaged bytes make the unpickler raise almost anything
        first_line = str(error).partition("\n")[0]
        raise ConversionError(
            f"{path} is truncated or not a pickle of tensors: {first_line}"
        ) from error
    weights = _flatten(saved) if isinstance(saved, Mapping) else {"": saved}
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise ConversionError(f"{path} must hold named tensors, got {name} {type(value)}")
    return weights


def _flatten(saved: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in saved.items():
        nested = isinstance(value, Mapping)
        flat |= _flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def convert_weights(
    official: Mapping[str, torch.Tensor], uses_vision: bool
) -> dict[str, torch.Tensor]:
    """Our names for official tensors, and the mark that they are trained.

    Args:
        official: tensors by official name.
        uses_vision: False for the predictor without vision features, whose condition projections
            are saved but unused, and dropped here.

    Raises:
        ConversionError: naming tensors that no pattern of `KEY_MAP` knows.
    """
    weights = {TRAINED_KEY: torch.tensor(True)}
    for name, tensor in official.items():
        patterns = (pattern for pattern in KEY_MAP if re.fullmatch(pattern, name))
        pattern = next(patterns, None)
        if pattern is None:
            raise ConversionError(f"{WEIGHTS_FILE} holds an unexpected tensor: {name}")
        ours = re.sub(pattern, KEY_MAP[pattern], name)
        if ours in weights:
            raise ConversionError(f"{WEIGHTS_FILE} holds {ours} more than once, again as {name}")
        if uses_vision or "condition_projections" not in ours:
            weights[ours] = tensor
    return weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.add_argument("--base", required=True, help="stock base: a folder or a Hub id")
    parser.add_argument(
        "--glimpse", required=True, help=f"folder or Hub id with {WEIGHTS_FILE} and config.json"
    )
    parser.add_argument("--glimpse-revision", help="revision of the glimpse, likewise")
    add_publishing_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Convert, verify and upload what the arguments name."""
    check_vacant(arguments.output)
    base = resolve_base(arguments.base, arguments.base_revision)
    glimpse = resolve_folder(
        arguments.glimpse, (WEIGHTS_FILE, "config.json"), arguments.glimpse_revision
    )
    family, fields, weights = read_official(base, glimpse)
    training = f"The official glimpse weights `{arguments.glimpse}`, converted."
    publication = publication_from(arguments, base, arguments.base, training)
    publish(arguments, base, family, fields, weights, publication, Source(base, fields, weights))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 1 after saying what is wrong."""
    return run_script(__doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
