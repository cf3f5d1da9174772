"""The writer of Hub repositories: a base's shards, the glimpse weights, code and configurations.

A repository loads on transformers 4.57 and 5 alike. The base's files are taken as they are, linked
where the file system allows; `glimpse_base` in the configuration says how to read their names (see
`modeling_glimpseprune/base_weights.py`). A glimpse-only repository leaves them out and names where
they are.
"""

import copy
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError
from safetensors.torch import save
from tqdm import tqdm
from transformers import PretrainedConfig

from conversion.model_card import ModelCard, base_licence, render_card
from conversion.processor_files import write_processor
from conversion.prompt_ids import check_prompt_ids
from glimpseprune.families import Family
from glimpseprune.hub.folders import place_file, vacant_sibling
from glimpseprune.hub.redaction import reasons
from glimpseprune.hub.remote_code import copy_code
from glimpseprune.hub.shards import (
    INDEX_FILE,
    ConversionError,
    Shard,
    copy_tensors,
    find_shards,
    read_json,
)
from glimpseprune.portable import portable_config, write_json
from modeling_glimpseprune.base_weights import GLIMPSE_PREFIX, GLIMPSE_SHARD
from modeling_glimpseprune.glimpse_fields import GLIMPSE_FIELDS

TRAINED_KEY = f"{GLIMPSE_PREFIX}trained"
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
CARD_FILE = "README.md"
SUMMARY_FILE = "training_summary.json"
BASE_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    INDEX_FILE,
    CARD_FILE,
    *LICENCE_FILES,
)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_NAMED = 8
COMMIT = re.compile(r"[0-9a-f]{40}")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Publication:
    """What a repository is to be and to say, beside its weights.

    Attributes:
        base_repository: Hub id (or folder) from which users can fetch the base.
        base_revision: its commit, branch or tag.
        glimpse_only: leave the base's weights out; `base_repository` must be given.
        card: what the model card says.
        verify: called with the finished folder before it takes its place; raises a ConversionError
            to refuse it.
    """

    base_repository: str | None = None
    base_revision: str | None = None
    glimpse_only: bool = False
    card: ModelCard = field(default_factory=ModelCard)
    verify: Callable[[Path], None] | None = None


def resolve_folder(source: str, files: tuple[str, ...], revision: str | None = None) -> Path:
    """A local folder, or the files of a Hub repository fetched into the Hub's cache.

    Args:
        source: path of a folder, or a Hub id.
        files: names and patterns to fetch.
        revision: branch, tag or commit of a Hub id.

    Raises:
        ConversionError: when it is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(files)))
    except (OSError, ValueError, HFValidationError) as error:
        raise ConversionError(
            f"{source} is no folder here, and fetching it from the Hub failed: {reasons(error)}"
        ) from None


def fetched_commit(folder: Path) -> str | None:
    """The commit a folder of the Hub's cache is named after; None for any other folder."""
    return folder.name if COMMIT.fullmatch(folder.name) else None


def write_repository(
    output: Path,
    base: Path,
    family: Family,
    glimpse_fields: Mapping[str, object],
    glimpse_weights: Mapping[str, torch.Tensor],
    publication: Publication = Publication(),  # noqa: B008 (it is frozen)
) -> None:
    """Write a complete model repository, or nothing.

    The base's tensors are never loaded, so memory does not grow with the model. Floating-point
    glimpse weights take the dtype of the base's embeddings.

    Args:
        output: folder to create; it may exist if it is empty.
        base: folder of the stock base or of a repository of ours whose glimpse weights are left
            out; safetensors in one file or in shards.
        family: the base's family.
        glimpse_fields: the configuration fields that GlimpsePrune adds.
        glimpse_weights: every tensor under `model.glimpse.`, by its full name.
        publication: what else the repository is to be.

    Raises:
        ConversionError: when an input is missing or damaged, tensors are missing, unexpected or of
            a wrong shape, a field cannot be, the processor's ids are not the base's, or
            `publication` refuses the result.
        ValueError: when `output` is not empty.
    """
    config = build_config(read_json(base / "config.json"), family, glimpse_fields, publication)
    shards = find_shards(base)
    names = rename_base(shards, family)
    model_config = validate_config(config, family)
    check_tensors(shards, names, glimpse_weights, family, model_config)
    with vacant_sibling(output) as folder:
        _write_weights(folder, shards, glimpse_weights, publication.glimpse_only)
        write_json(folder / "config.json", config)
        _write_generation_config(folder, base, model_config)
        copy_code(folder)
        write_processor(folder, base, family)
        check_prompt_ids(folder, base, family, model_config)
        _copy_licence(folder, base)
        card = render_card(publication.card, config, base_licence(base / CARD_FILE))
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        if publication.card.training_summary is not None:
            summary = without_places(publication.card.training_summary)
            write_json(folder / SUMMARY_FILE, summary)
        if publication.verify is not None:
            publication.verify(folder)
    logger.info("wrote %s", output)


def build_config(
    base: dict,
    family: Family,
    glimpse_fields: Mapping[str, object],
    publication: Publication = Publication(),  # noqa: B008
) -> dict:
    """The base's configuration with our fields, as written to config.json.

    Raises:
        ConversionError: when the base is of another family, or is left out and not named.
    """
    if base.get("model_type") not in family.model_types:
        raise ConversionError(
            f"the base must be a {family.base_model_type} model, got {base.get('model_type')!r}"
        )
    if publication.glimpse_only and not publication.base_repository:
        raise ConversionError("a glimpse-only repository must name the base that it leaves out")
    head = {
        "architectures": [family.model_class.__name__],
        "auto_map": family.auto_map,
        "model_type": family.config_class.model_type,
        "glimpse_base": {
            "repository": publication.base_repository,
            "revision": publication.base_revision,
            "included": not publication.glimpse_only,
            "key_mapping": dict(family.base_key_map),
        },
    }
    ours = {*head, *GLIMPSE_FIELDS}
    rest = {name: value for name, value in portable_config(base).items() if name not in ours}
    return head | rest | dict(glimpse_fields)


def validate_config(config: dict, family: Family) -> PretrainedConfig:
    """The configuration as the model will see it.

    Raises:
        ConversionError: naming the field and the value that cannot be.
    """
    try:
        return family.config_class(**copy.deepcopy(config))  # it changes nested fields in place
    except ValueError as error:
        raise ConversionError(f"the configuration does not fit the base: {error}") from error


def is_glimpse(name: str) -> bool:
    """Whether a tensor is one that GlimpsePrune adds."""
    return name.startswith(GLIMPSE_PREFIX)


def rename_base(shards: list[Shard], family: Family) -> dict[str, str]:
    """Our name of each of the base's tensors; glimpse weights are left out.

    Raises:
        ConversionError: when two tensors would bear the same name.
    """
    held = [name for shard in shards for name in shard.tensors if not is_glimpse(name)]
    names: dict[str, str] = {}
    for name in held:
        names[name] = family.stored_name(name)
    if len(set(names.values())) < len(names):
        raise ConversionError("the base holds the same tensors under old and new names")
    return names


def check_tensors(
    shards: list[Shard],
    names: Mapping[str, str],
    glimpse_weights: Mapping[str, torch.Tensor],
    family: Family,
    config: PretrainedConfig,
) -> None:
    """Compare all tensors, by name and shape, with a model built without storage.

    Raises:
        ConversionError: naming those that are missing, unexpected or of a wrong shape.
    """
    expected = {
        family.stored_name(name): tuple(tensor.shape)
        for name, tensor in family.without_storage(config).state_dict().items()
    }
    found = {name: tuple(tensor.shape) for name, tensor in glimpse_weights.items()}
    for shard in shards:
        for name, entry in shard.tensors.items():
            if name in names:
                found[names[name]] = tuple(entry["shape"])
    if config.tie_word_embeddings:
        found.setdefault("lm_head.weight", expected["lm_head.weight"])
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    wrong = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of a wrong shape": wrong}
    sentences = [f"{kind}: {_enumerate(named)}" for kind, named in faults.items() if named]
    if sentences:
        raise ConversionError("tensors do not fit the configuration; " + "; ".join(sentences))


def without_places(content: object) -> object:
    """A training summary in which absolute paths are cut to their last part."""
    if isinstance(content, Mapping):
        return {name: without_places(value) for name, value in content.items()}
    if isinstance(content, list):
        return [without_places(value) for value in content]
    if isinstance(content, str) and os.path.isabs(content):
        return Path(content).name
    return content


def _enumerate(items: list[str]) -> str:
    rest = f" and {len(items) - MAX_NAMED} more" if len(items) > MAX_NAMED else ""
    return ", ".join(items[:MAX_NAMED]) + rest


def _write_weights(
    folder: Path,
    shards: list[Shard],
    glimpse_weights: Mapping[str, torch.Tensor],
    glimpse_only: bool,
) -> None:
    weights = _cast(glimpse_weights, _base_dtype(shards))
    (folder / GLIMPSE_SHARD).write_bytes(save(weights, metadata={"format": "pt"}))
    if glimpse_only:
        return
    weight_map = dict.fromkeys(weights, GLIMPSE_SHARD)
    weight_map |= place_shards(folder, shards, "base")
    sizes = [
        stop - start
        for shard in shards
        for name, entry in shard.tensors.items()
        if not is_glimpse(name)
        for start, stop in [entry["data_offsets"]]
    ]
    total = sum(sizes) + sum(tensor.nbytes for tensor in weights.values())
    write_index(folder, weight_map, total)


def place_shards(folder: Path, shards: list[Shard], stem: str) -> dict[str, str]:
    """Link or copy the base's files; those that hold glimpse weights too are written without them.

    The files do not bear the names under which transformers saves, so that no later save into the
    folder overwrites a file that is linked to the base's.

    Returns:
        File name by tensor name.
    """
    weight_map: dict[str, str] = {}
    kept = [shard for shard in shards if not all(map(is_glimpse, shard.tensors))]
    for index, shard in enumerate(tqdm(kept, desc="shards", disable=None), start=1):
        file_name = f"{stem}-{index:05d}-of-{len(kept):05d}.safetensors"
        names = [name for name in shard.tensors if not is_glimpse(name)]
        if len(names) == len(shard.tensors):
            place_file(shard.path, folder / file_name)
        else:
            copy_tensors(shard, names, folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    return weight_map


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write the index of a sharded model."""
    ordered = dict(sorted(weight_map.items()))
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": ordered})


def _base_dtype(shards: list[Shard]) -> torch.dtype:
    entries = {name: entry for shard in shards for name, entry in shard.tensors.items()}
    embeddings = next(name for name in entries if name.endswith("embed_tokens.weight"))
    dtype = entries[embeddings]["dtype"]
    if dtype not in DTYPES:
        raise ConversionError(f"the base's {embeddings} is {dtype}, which is no float")
    return DTYPES[dtype]


def _cast(weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in weights.items()
    }


def _write_generation_config(folder: Path, base: Path, config: PretrainedConfig) -> None:
    """Copy the base's, or write the special tokens that its configuration knows."""
    source = base / "generation_config.json"
    if source.exists():
        shutil.copyfile(source, folder / source.name)
        return
    text_config = config.get_text_config()
    tokens = {
        "bos_token_id": text_config.bos_token_id,
        "eos_token_id": text_config.eos_token_id,
        "pad_token_id": text_config.pad_token_id,
    }
    known = {name: token for name, token in tokens.items() if token is not None}
    write_json(folder / source.name, known)


def _copy_licence(folder: Path, base: Path) -> None:
    for name in LICENCE_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, folder / name)
