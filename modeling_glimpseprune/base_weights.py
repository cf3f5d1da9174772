"""Where the weights of a repository lie when they are not simply its own, under its own names.

`glimpse_base` in a repository's configuration describes the base:

    repository: Hub id or folder of the base; a path that starts with a dot is seen from the folder
        of the repository that names it.
    revision: its commit, branch or tag; None is the newest.
    key_mapping: regular expression -> replacement, which turns names of the base's tensors into
        names of the model's. A published repository holds the base's files untouched.
    included: False for a glimpse-only repository, which holds the glimpse weights alone and takes
        the base's from `repository`.

A model that was loaded has all weights under its own names, and is saved so.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from .stock import file_of, save_under_own_names

GLIMPSE_PREFIX = "model.glimpse."
GLIMPSE_SHARD = "model-glimpse.safetensors"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
PLACE_ARGUMENTS = ("revision", "subfolder")
COMPANIONS = ("config.json", "generation_config.json")


@contextmanager
def located_weights(
    repository: str | os.PathLike | None, arguments: dict
) -> Iterator[tuple[str | os.PathLike | None, dict]]:
    """Give what the stock `from_pretrained` needs to find all weights of a repository.

    Args:
        repository: what the caller wants to load: a folder or a Hub id.
        arguments: the caller's keyword arguments of `from_pretrained`.

    Yields:
        The folder or Hub id to load instead, and the arguments to load it with.

    Raises:
        OSError: when the base of a glimpse-only repository cannot be fetched.
        ValueError: when the base is not named, or its index points outside its folder.
    """
    base = _read_base(repository, arguments)
    if base.get("key_mapping"):
        mapping = (arguments.get("key_mapping") or {}) | base["key_mapping"]
        arguments = arguments | {"key_mapping": mapping}
    if base.get("included", True):
        yield repository, arguments
        return
    hub_arguments = {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}
    place = {name: arguments[name] for name in PLACE_ARGUMENTS if arguments.get(name)}
    own_arguments = hub_arguments | place
    with tempfile.TemporaryDirectory() as folder:
        for name in COMPANIONS:
            file = file_of(repository, name, **own_arguments)
            if file is not None:
                Path(folder, name).write_bytes(Path(file).read_bytes())
        glimpse = os.path.abspath(cached_file(repository, GLIMPSE_SHARD, **own_arguments))
        base = base | {"repository": _seen_from(repository, base.get("repository"))}
        weight_map = _without_glimpse(_base_weight_map(base, hub_arguments), folder)
        weight_map |= dict.fromkeys(_names(glimpse), glimpse)
        index = {"metadata": {}, "weight_map": weight_map}
        Path(folder, INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
        rest = {name: value for name, value in arguments.items() if name not in PLACE_ARGUMENTS}
        yield folder, rest


def own_weights(model: PreTrainedModel, repository: str | os.PathLike | None) -> None:
    """Let a loaded model be saved as one repository, under its own names."""
    base = model.config.glimpse_base
    if base is None:
        return
    origin = {name: base.get(name) for name in ("repository", "revision")}
    model.config.glimpse_base = origin if origin["repository"] else None
    model.config.name_or_path = model.name_or_path = str(repository)
    save_under_own_names(model)


def _read_base(repository: str | os.PathLike | None, arguments: dict) -> dict:
    """`glimpse_base` of what is to be loaded; empty where there is none."""
    config = arguments.get("config")
    if isinstance(config, PretrainedConfig):
        return config.glimpse_base or {}
    if repository is None or arguments.get("state_dict") is not None:
        return {}
    names = (*HUB_ARGUMENTS, *PLACE_ARGUMENTS)
    given = {name: arguments[name] for name in names if arguments.get(name)}
    content, _ = PretrainedConfig.get_config_dict(config or repository, **given)
    return content.get("glimpse_base") or {}


def _seen_from(repository: str | os.PathLike, base: str | None) -> str | None:
    if base and base.startswith("."):
        return os.path.join(repository, base)
    return base


def _base_weight_map(base: dict, hub_arguments: dict) -> dict[str, str]:
    """Absolute path of the file that holds each of the base's tensors."""
    repository, revision = base.get("repository"), base.get("revision")
    if not repository:
        raise ValueError("glimpse_base must name the repository of the base, which is not included")
    hub_arguments = hub_arguments | ({"revision": revision} if revision else {})
    single = file_of(repository, SINGLE_FILE, **hub_arguments)
    if single is not None:
        return dict.fromkeys(_names(single), os.path.abspath(single))
    index = file_of(repository, INDEX_FILE, **hub_arguments)
    if index is None:
        raise OSError(
            f"the base {repository} (revision {revision or 'main'}) holds neither {SINGLE_FILE} "
            f"nor {INDEX_FILE}, or they are not in the cache and cannot be fetched"
        )
    weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    for file_name in weight_map.values():
        path = PurePosixPath(file_name)
        if path.is_absolute() or ".." in path.parts or set("\\:") & set(file_name):
            raise ValueError(f"the index of the base {repository} names a file outside: {path}")
    files, _ = get_checkpoint_shard_files(repository, index, **hub_arguments)
    paths = dict(zip(sorted(set(weight_map.values())), files, strict=True))
    return {name: os.path.abspath(paths[file]) for name, file in weight_map.items()}


def _without_glimpse(weight_map: dict[str, str], folder: str) -> dict[str, str]:
    """The map without glimpse weights, which a base that was trained itself brings along.

    All that a file holds is loaded, whatever is taken from it: files with other weights beside
    theirs are copied into the folder without them.
    """
    kept = {name: file for name, file in weight_map.items() if not name.startswith(GLIMPSE_PREFIX)}
    places = {}
    for number, file in enumerate(sorted(set(kept.values()))):
        mixed = any(name.startswith(GLIMPSE_PREFIX) for name in _names(file))
        places[file] = os.path.join(folder, f"base-{number}.safetensors") if mixed else file
        if mixed:
            _copy_without_glimpse(file, places[file])
    return {name: places[file] for name, file in kept.items()}


def _copy_without_glimpse(file: str, copy: str) -> None:
    header, start = _read_header(file)
    entries, places, end = {"__metadata__": header.get("__metadata__", {})}, [], 0
    for name in _names(file):
        if not name.startswith(GLIMPSE_PREFIX):
            first, last = header[name]["data_offsets"]
            entries[name] = header[name] | {"data_offsets": [end, end + last - first]}
            places.append((start + first, last - first))
            end += last - first
    content = json.dumps(entries).encode()
    content += b" " * (-len(content) % 8)  # tensors begin aligned
    with open(file, "rb") as source, open(copy, "wb") as target:
        target.write(len(content).to_bytes(8, "little") + content)
        for first, size in places:
            source.seek(first)
            target.write(source.read(size))


def _names(shard: str) -> list[str]:
    """The tensors that a safetensors file holds."""
    return [name for name in _read_header(shard)[0] if name != "__metadata__"]


def _read_header(shard: str) -> tuple[dict, int]:
    """What a safetensors file says of its tensors, and where their data begin."""
    with open(shard, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size
