"""What a repository is, and whether its weights are sound, without loading the model.

A folder's shards are read up to their headers; of a repository on the Hub, only its small files and
those headers are fetched. One value is read beside them: whether the glimpse was trained.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import HfFileSystem, snapshot_download
from huggingface_hub.utils import HFValidationError
from transformers import PretrainedConfig

from modeling_glimpseprune.base_weights import GLIMPSE_PREFIX, GLIMPSE_SHARD

from ..families import FAMILIES, Family
from .redaction import reasons
from .shards import (
    INDEX_FILE,
    SINGLE_FILE,
    ConversionError,
    Shard,
    check_index,
    check_inside,
    find_shards,
    parse_shard,
    read_json,
    read_shard,
    read_weight_map,
)

PREDICTOR_PREFIX = f"{GLIMPSE_PREFIX}predictor."
TRAINED_KEY = f"{GLIMPSE_PREFIX}trained"
SMALL_FILES = ("*.json", "*.py")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
FLOATS = ("F64", "F32", "F16", "BF16")
NAMED = 4


@dataclass(frozen=True)
class Report:
    """A sound repository.

    Attributes:
        family: `model_type` of its stock base.
        glimpse_layer, num_layers: K and the decoder's layers.
        prune_layer: P; None is K.
        predictor_parameters, predictor_bytes: size of the visual importance predictor.
        glimpse_parameters: of everything GlimpsePrune adds, the predictor included.
        prune_threshold, max_keep_ratio, min_keep_tokens: the policy.
        base, base_revision: where the base comes from; None where that was not recorded.
        base_included: False for a glimpse-only repository.
        commit: of the repository, where it was fetched.
        base_dtypes: tensors of the base by dtype.
        glimpse_dtype: of the glimpse weights.
        trained: whether the glimpse weights were trained; others refuse to prune.
        files, weight_bytes: weight files and their data.
        pickles: files that could run code when read; nothing here reads them.
    """

    family: str
    glimpse_layer: int
    prune_layer: int | None
    num_layers: int
    predictor_parameters: int
    predictor_bytes: int
    glimpse_parameters: int
    prune_threshold: float
    max_keep_ratio: float | None
    min_keep_tokens: int
    base: str | None
    base_revision: str | None
    base_included: bool
    commit: str | None
    base_dtypes: dict[str, int]
    glimpse_dtype: str
    trained: bool
    files: int
    weight_bytes: int
    pickles: tuple[str, ...]


def inspect_repository(source: str | Path, revision: str | None = None) -> Report:
    """Describe a repository and check its weights.

    Args:
        source: a folder, or a Hub id.
        revision: branch, tag or commit of a Hub id.

    Raises:
        ConversionError: when it is no GlimpsePrune repository, or saying what is wrong with it: a
            missing or truncated file, a path outside its folder, tensors that are missing,
            duplicate, unexpected, or of a wrong shape or dtype.
    """
    if Path(source).is_dir():
        folder, commit = Path(source), None
        content = read_json(folder / "config.json")
        family, config = _read_config(content, source)
        _check_code(content, folder)
        shards, open_shard = _read_shards(folder, config), _open_here
    else:
        folder = _fetch_small_files(str(source), revision)
        commit = folder.name
        content = read_json(folder / "config.json")
        family, config = _read_config(content, source)
        _check_code(content, folder)
        shards = _read_remote_shards(folder, str(source), commit, config)
        open_shard = partial(_open_remote, f"{source}@{commit}")
    _check_tensors(shards, family, config)
    trained = _is_trained(shards, open_shard)
    return _report(family, config, shards, commit, _pickles(folder), trained)


def _read_config(content: dict, source: object) -> tuple[Family, PretrainedConfig]:
    model_type = content.get("model_type")
    for family in FAMILIES:
        if family.config_class.model_type == model_type:
            try:
                return family, family.config_class(**content)
            except (ValueError, TypeError) as error:
                raise ConversionError(
                    f"the configuration of {source} cannot be: {error}"
                ) from error
    raise ConversionError(f"{source} is a {model_type!r} model, not a GlimpsePrune repository")


def _check_code(content: dict, folder: Path) -> None:
    auto_map = content.get("auto_map")
    if not auto_map:
        raise ConversionError(f"{folder / 'config.json'} has no auto_map: its code would not load")
    for name, reference in auto_map.items():
        file_name = f"{str(reference).rpartition('.')[0]}.py"
        check_inside(file_name, f"auto_map takes {name} from")
        if not (folder / file_name).exists():
            raise ConversionError(f"auto_map takes {name} from {file_name}, which is missing")


def _base_included(config: PretrainedConfig) -> bool:
    return (config.glimpse_base or {}).get("included", True)


def _read_shards(folder: Path, config: PretrainedConfig) -> list[Shard]:
    if _base_included(config):
        return find_shards(folder)
    return [read_shard(folder / GLIMPSE_SHARD)]


def _fetch_small_files(source: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(SMALL_FILES)))
    except (OSError, ValueError, HFValidationError) as error:
        raise ConversionError(
            f"{source} is no folder here, and fetching it from the Hub failed: {reasons(error)}"
        ) from None


def _read_remote_shards(
    folder: Path, source: str, commit: str, config: PretrainedConfig
) -> list[Shard]:
    """Headers of a Hub repository's shards, by ranged requests."""
    if not _base_included(config):
        return [_read_remote_shard(source, commit, GLIMPSE_SHARD)]
    if not (folder / INDEX_FILE).exists():
        return [_read_remote_shard(source, commit, SINGLE_FILE)]
    weight_map = read_weight_map(folder / INDEX_FILE)
    shards = [
        _read_remote_shard(source, commit, name) for name in dict.fromkeys(weight_map.values())
    ]
    check_index(weight_map, shards)
    return shards


def _read_remote_shard(source: str, commit: str, name: str) -> Shard:
    place = f"{source}@{commit}"
    try:
        size = HfFileSystem().info(f"{place}/{name}")["size"]
        with _open_remote(place, Path(name)) as file:
            return parse_shard(Path(name), file, size)
    except FileNotFoundError as error:
        raise ConversionError(f"shard {name} is missing from {source}") from error


def _open_remote(place: str, path: Path) -> BinaryIO:
    return HfFileSystem().open(f"{place}/{path.as_posix()}", "rb", block_size=2**20)


def _open_here(path: Path) -> BinaryIO:
    return path.open("rb")


def _is_trained(shards: list[Shard], open_shard: Callable[[Path], BinaryIO]) -> bool:
    """The one value that is read: the mark that training leaves."""
    shard = next(shard for shard in shards if TRAINED_KEY in shard.tensors)
    with open_shard(shard.path) as file:
        file.seek(shard.data_start + shard.tensors[TRAINED_KEY]["data_offsets"][0])
        return file.read(1) == b"\x01"


def _check_tensors(shards: list[Shard], family: Family, config: PretrainedConfig) -> None:
    """Compare names, shapes and dtypes with a model built without storage."""
    expected = {
        family.stored_name(name): tuple(tensor.shape)
        for name, tensor in family.without_storage(config).state_dict().items()
        if _base_included(config) or name.startswith(GLIMPSE_PREFIX)
    }
    found = _own_names(shards, family)
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
        found.pop("lm_head.weight", None)
    _refuse("weights are missing", [name for name in expected if name not in found])
    _refuse("weights are not the model's", [name for name in found if name not in expected])
    shapes = [name for name, shape in expected.items() if tuple(found[name]["shape"]) != shape]
    _refuse("weights have a wrong shape", shapes)
    kinds = {name: ("BOOL",) if name == TRAINED_KEY else FLOATS for name in expected}
    wrong = [name for name, kind in kinds.items() if found[name]["dtype"] not in kind]
    _refuse("weights have a wrong dtype", [f"{name} {found[name]['dtype']}" for name in wrong])
    glimpse = {
        entry["dtype"]
        for name, entry in found.items()
        if name.startswith(GLIMPSE_PREFIX) and name != TRAINED_KEY
    }
    if len(glimpse) > 1:
        raise ConversionError(f"the glimpse weights mix dtypes: {', '.join(sorted(glimpse))}")


def _own_names(shards: list[Shard], family: Family) -> dict[str, dict]:
    """Header entries by the names of our repositories."""
    found: dict[str, dict] = {}
    for shard in shards:
        for name, entry in shard.tensors.items():
            own = family.stored_name(name)
            if own in found:
                raise ConversionError(f"{own} is held twice, the second time as {name}")
            found[own] = entry
    return found


def _refuse(fault: str, names: list[str]) -> None:
    if names:
        rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise ConversionError(f"{fault}: {', '.join(names[:NAMED])}{rest}")


def _pickles(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES))


def _report(
    family: Family,
    config: PretrainedConfig,
    shards: list[Shard],
    commit: str | None,
    pickles: tuple[str, ...],
    trained: bool,
) -> Report:
    found = _own_names(shards, family)
    glimpse = {name: entry for name, entry in found.items() if name.startswith(GLIMPSE_PREFIX)}
    predictor = [entry for name, entry in glimpse.items() if name.startswith(PREDICTOR_PREFIX)]
    weights = [entry for name, entry in glimpse.items() if name != TRAINED_KEY]
    base = config.glimpse_base or {}
    return Report(
        family=family.base_model_type,
        glimpse_layer=config.glimpse_layer,
        prune_layer=config.prune_layer,
        num_layers=config.get_text_config().num_hidden_layers,
        predictor_parameters=sum(math.prod(entry["shape"]) for entry in predictor),
        predictor_bytes=sum(_bytes(entry) for entry in predictor),
        glimpse_parameters=sum(math.prod(entry["shape"]) for entry in weights),
        prune_threshold=config.prune_threshold,
        max_keep_ratio=config.max_keep_ratio,
        min_keep_tokens=config.min_keep_tokens,
        base=base.get("repository"),
        base_revision=base.get("revision"),
        base_included=_base_included(config),
        commit=commit,
        base_dtypes=dict(
            Counter(entry["dtype"] for name, entry in found.items() if name not in glimpse)
        ),
        glimpse_dtype=weights[0]["dtype"],
        trained=trained,
        files=len(shards),
        weight_bytes=sum(_bytes(entry) for entry in found.values()),
        pickles=pickles,
    )


def _bytes(entry: dict) -> int:
    start, stop = entry["data_offsets"]
    return stop - start
