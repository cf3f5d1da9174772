"""The writer of Hub repositories: a base's shards, the glimpse weights, code and configurations.

A repository loads on transformers 4.57 and 5 alike. Its tensors bear the names of our model's
parameters, since transformers 5 renames nothing for remote code.
"""

import copy
import inspect
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError
from safetensors.torch import save
from tqdm import tqdm
from transformers import PretrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files

try:
    from transformers.initialization import no_init_weights
except ImportError:  # transformers 4
    from transformers.modeling_utils import no_init_weights

from conversion.families import Family
from conversion.shards import (
    INDEX_FILE,
    ConversionError,
    Shard,
    copy_shard,
    find_shards,
    read_json,
)
from glimpseprune.portable import make_processor_portable, portable_config, write_json

GLIMPSE_SHARD = "model-glimpse.safetensors"
MODEL_AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForVision2Seq")
PROCESSOR_CONFIGS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
PROCESSOR_FILES = (
    *PROCESSOR_CONFIGS,
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
)
BASE_FILES = ("config.json", "generation_config.json", "*.safetensors", INDEX_FILE)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_NAMED = 8

logger = logging.getLogger(__name__)


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
            f"{source} is no folder here, and fetching it from the Hub failed: {error}"
        ) from error


def write_repository(
    output: Path,
    base: Path,
    family: Family,
    glimpse_fields: Mapping[str, object],
    glimpse_weights: Mapping[str, torch.Tensor],
) -> None:
    """Write a complete model repository, or nothing.

    The base's tensors are streamed, so memory does not grow with the model. Floating-point glimpse
    weights take the dtype of the base's embeddings.

    Args:
        output: folder to create; it may exist if it is empty.
        base: folder of the stock base, safetensors in one file or in shards.
        family: the base's family.
        glimpse_fields: the configuration fields that GlimpsePrune adds.
        glimpse_weights: every tensor under `model.glimpse.`, by its full name.

    Raises:
        ConversionError: when an input is missing or damaged, tensors are missing, unexpected or of
            a wrong shape, a field cannot be, or `output` is not empty.
    """
    check_vacant(output)
    config = build_config(read_json(base / "config.json"), family, glimpse_fields)
    shards = find_shards(base)
    names = rename_base(shards, family.base_key_map)
    model_config = validate_config(config, family)
    check_tensors(shards, names, glimpse_weights, family, model_config)
    with vacant_sibling(output) as folder:
        _write_weights(folder, shards, names, glimpse_weights)
        write_json(folder / "config.json", config)
        _write_generation_config(folder, base, model_config)
        _copy_code(folder, family)
        _copy_processor(folder, base, family)
    logger.info("wrote %s", output)


def check_vacant(output: Path) -> None:
    """Raise a ConversionError unless the folder is absent or empty."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"output {output} exists and is not an empty folder")


@contextmanager
def vacant_sibling(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place on success and vanishes on failure."""
    folder = output.absolute().with_name(f".{output.absolute().name}.partial-{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.replace(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def build_config(base: dict, family: Family, glimpse_fields: Mapping[str, object]) -> dict:
    """The base's configuration with our fields, as written to config.json.

    Raises:
        ConversionError: when the base is of another family.
    """
    if base.get("model_type") != family.base_model_type:
        raise ConversionError(
            f"the base must be a {family.base_model_type} model, got {base.get('model_type')!r}"
        )
    auto_map = {"AutoConfig": _reference(family.config_class)}
    auto_map |= {name: _reference(family.model_class) for name in MODEL_AUTO_CLASSES}
    auto_map["AutoProcessor"] = _reference(family.processor_class)
    head = {
        "architectures": [family.model_class.__name__],
        "auto_map": auto_map,
        "model_type": family.config_class.model_type,
    }
    rest = {name: value for name, value in portable_config(base).items() if name not in head}
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


def rename_base(shards: list[Shard], key_map: Mapping[str, str]) -> dict[str, str]:
    """Our name of each of the base's tensors.

    Raises:
        ConversionError: when two tensors would bear the same name.
    """
    names: dict[str, str] = {}
    for name in (name for shard in shards for name in shard.tensors):
        if name in names:
            raise ConversionError(f"the base holds {name} in two shards")
        names[name] = rename(name, key_map)
    if len(set(names.values())) < len(names):
        raise ConversionError("the base holds the same tensors under old and new names")
    return names


def rename(name: str, key_map: Mapping[str, str]) -> str:
    """A tensor's name in a repository, which every generation of transformers reads.

    It changes names of stock bases, and those of our parameters that differ between generations.
    """
    pattern = next((pattern for pattern in key_map if re.search(pattern, name)), None)
    return name if pattern is None else re.sub(pattern, key_map[pattern], name)


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
    with torch.device("meta"), no_init_weights():
        model = family.model_class(config)
    expected = {
        rename(name, family.base_key_map): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    found = {name: tuple(tensor.shape) for name, tensor in glimpse_weights.items()}
    for shard in shards:
        for name, entry in shard.tensors.items():
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


def _enumerate(items: list[str]) -> str:
    rest = f" and {len(items) - MAX_NAMED} more" if len(items) > MAX_NAMED else ""
    return ", ".join(items[:MAX_NAMED]) + rest


def _reference(code: type) -> str:
    """`module.Class`, as an auto_map names it."""
    return f"{code.__module__.rpartition('.')[2]}.{code.__name__}"


def _write_weights(
    folder: Path,
    shards: list[Shard],
    names: Mapping[str, str],
    glimpse_weights: Mapping[str, torch.Tensor],
) -> None:
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(tqdm(shards, desc="shards", disable=None), start=1):
        file_name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        copy_shard(shard, names, folder / file_name)
        weight_map |= {names[name]: file_name for name in shard.tensors}
    weights = _cast(glimpse_weights, _base_dtype(shards))
    (folder / GLIMPSE_SHARD).write_bytes(save(weights, metadata={"format": "pt"}))
    weight_map |= dict.fromkeys(weights, GLIMPSE_SHARD)
    total = sum(shard.data_bytes for shard in shards)
    total += sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_FILE, index)


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


def _copy_code(folder: Path, family: Family) -> None:
    entries = family.config_class, family.model_class, family.processor_class
    entry_files = [inspect.getfile(entry) for entry in entries]
    siblings = [file for entry in entry_files for file in get_relative_import_files(entry)]
    for file in sorted({*entry_files, *siblings}):
        shutil.copyfile(file, folder / Path(file).name)


def _copy_processor(folder: Path, base: Path, family: Family) -> None:
    files = [base / name for name in PROCESSOR_FILES if (base / name).exists()]
    if not files:
        logger.info("%s holds no tokenizer or processor files: none are written", base)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    make_processor_portable(folder)
    for name in PROCESSOR_CONFIGS:
        if (folder / name).exists():
            content = read_json(folder / name)
            content["processor_class"] = family.processor_class.__name__
            auto_map = content.get("auto_map", {})
            content["auto_map"] = auto_map | {"AutoProcessor": _reference(family.processor_class)}
            write_json(folder / name, content)
