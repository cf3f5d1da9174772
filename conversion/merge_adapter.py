"""Merge stage 2's LoRA adapter into its base, tensor by tensor.

    python conversion/merge_adapter.py --base BASE --adapter ADAPTER --output MERGED

Files of the base that hold no adapted weight are taken as they are; of the others, one tensor at a
time is in memory. peft does the arithmetic. The result is what the base was, a stock model folder
or a GlimpsePrune repository: `glimpseprune train-stage1 --base MERGED` goes on with it. A
repository's glimpse was trained on the base without the adapter, unless stage 2 trained it further
(`mask: sampled`): then it comes out of the adapter's folder.
"""

import argparse
import logging
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conversion.processor_files import copy_processor_files
from conversion.publishing import resolve_base, run_script
from conversion.repository import (
    LICENCE_FILES,
    is_glimpse,
    rename_base,
    resolve_folder,
    write_index,
)
from glimpseprune.families import Family, family_of
from glimpseprune.hub.folders import check_vacant, place_file, vacant_sibling
from glimpseprune.hub.shards import (
    GLIMPSE_WEIGHTS,
    ConversionError,
    Shard,
    find_shards,
    read_json,
    read_shard,
    rewrite_tensors,
)
from modeling_glimpseprune.base_weights import GLIMPSE_PREFIX

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, GLIMPSE_WEIGHTS)
ADAPTED = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
COPIED = ("config.json", "generation_config.json", *LICENCE_FILES)
# Settings whose effect is more than a sum of products per layer, with the value that is supported.
ONLY = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "modules_to_save": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}

logger = logging.getLogger(__name__)


def merge(base: Path, adapter: Path, output: Path) -> None:
    """Write a copy of a base with an adapter merged in, or nothing.

    Args:
        base: folder of the stock base, or of a GlimpsePrune repository that holds its base.
        adapter: folder that peft saved, of a LoRA adapter of our model or of the stock one.
        output: folder to create; it may exist if it is empty.

    Raises:
        ConversionError: when base or adapter are unsound or do not belong together.
        ValueError: when `output` is not empty.
    """
    config = read_json(base / "config.json")
    family = family_of(config, base)
    shards = find_shards(base)
    names = rename_base(shards, family)
    factors = read_adapter(adapter)
    modules = adapted_modules(factors, names, family)
    glimpse = read_glimpse(adapter, shards)
    with vacant_sibling(output) as folder:
        weight_map = {}
        for index, shard in enumerate(tqdm(shards, desc="shards", disable=None), start=1):
            file_name = f"merged-{index:05d}-of-{len(shards):05d}.safetensors"
            ours = {name: modules[name] for name in shard.tensors if name in modules}
            if ours or not glimpse.keys().isdisjoint(shard.tensors):
                merge_shard(shard, ours, factors, adapter, glimpse, folder / file_name)
            else:
                place_file(shard.path, folder / file_name)
            weight_map |= dict.fromkeys(shard.tensors, file_name)
        write_index(folder, weight_map, sum(shard.data_bytes for shard in shards))
        for file in (*base.glob("*.py"), *(base / name for name in COPIED)):
            if file.exists():
                shutil.copyfile(file, folder / file.name)
        copy_processor_files(folder, base)
    logger.info("merged %d weights into %s", len(modules), output)


def read_adapter(adapter: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors by the names peft gave them.

    Raises:
        ConversionError: when its files are missing or damaged, or it is more than a plain LoRA.
    """
    config = read_json(adapter / ADAPTER_CONFIG)
    for name, supported in ONLY.items():
        if config.get(name, supported) != supported:
            raise ConversionError(
                f"{name}={config[name]!r} of {adapter / ADAPTER_CONFIG} is not supported; "
                f"supported is only {supported!r}"
            )
    shard = read_shard(adapter / ADAPTER_WEIGHTS)
    unexpected = [name for name in shard.tensors if not ADAPTED.fullmatch(name)]
    if unexpected:
        raise ConversionError(f"{shard.path} holds {unexpected[0]}, which is no LoRA factor")
    return load_file(shard.path)


def read_glimpse(adapter: Path, shards: Sequence[Shard]) -> dict[str, torch.Tensor]:
    """Glimpse weights that stage 2 trained, by the names that the base has.

    Raises:
        ConversionError: when they are not those of the base's glimpse.
    """
    path = adapter / GLIMPSE_WEIGHTS
    headers = {name: each for shard in shards for name, each in shard.tensors.items()}
    held = {name: each["shape"] for name, each in headers.items() if is_glimpse(name)}
    if not path.exists():
        return {}
    if not held:
        logger.warning("%s is left out: the base has no glimpse", path)
        return {}
    found = {f"{GLIMPSE_PREFIX}{name}": each for name, each in read_shard(path).tensors.items()}
    shapes = {name: each["shape"] for name, each in found.items()}
    for name in sorted(held.keys() | shapes):
        if held.get(name) != shapes.get(name):
            raise ConversionError(f"{name} of {path} does not fit the base's glimpse")
    return {f"{GLIMPSE_PREFIX}{name}": weight for name, weight in load_file(path).items()}


def adapted_modules(
    factors: Mapping[str, torch.Tensor], names: Mapping[str, str], family: Family
) -> dict[str, str]:
    """The adapted module (as the adapter names it) of each weight of the base that changes.

    Raises:
        ConversionError: naming a module that the base does not have.
    """
    by_our_name = {ours: theirs for theirs, ours in names.items()}
    stock_names = set(names)
    modules = {}
    for module in dict.fromkeys(ADAPTED.fullmatch(name)[1] for name in factors):
        weight = f"{module}.weight"
        held = by_our_name.get(weight, weight if weight in stock_names else None)
        if held is None:
            raise ConversionError(
                f"the adapter changes {module}, which this {family.base_model_type} base lacks"
            )
        modules[held] = module
    return modules


def merge_shard(
    shard: Shard,
    modules: Mapping[str, str],
    factors: Mapping[str, torch.Tensor],
    adapter: Path,
    glimpse: Mapping[str, torch.Tensor],
    target: Path,
) -> None:
    """Write a shard's tensors, those of adapted modules merged and the glimpse replaced.

    Args:
        shard: file of the base.
        modules: adapted module of each of its weights that change.
        factors: the adapter's tensors.
        adapter: folder of its configuration.
        glimpse: weights to put in the place of the shard's.
        target: file to write.
    """

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name in glimpse:
            return glimpse[name].to(weight.dtype)
        module = modules[name]
        own = {key: value for key, value in factors.items() if ADAPTED.fullmatch(key)[1] == module}
        return merge_weight(weight, module, own, adapter)

    rewrite_tensors(shard, modules.keys() | (glimpse.keys() & shard.tensors.keys()), change, target)


def merge_weight(
    weight: torch.Tensor, module: str, factors: Mapping[str, torch.Tensor], adapter: Path
) -> torch.Tensor:
    """One linear layer's weight `(out, in)` with its adapter merged by peft.

    Raises:
        ConversionError: when the factors do not fit the weight or the adapter's configuration.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(adapter))
    config.inference_mode = True
    config.task_type = None  # a lone layer generates nothing
    config.base_model_name_or_path = None  # and has no name, of which peft would warn
    config.target_modules = [module.rpartition(".")[2]]  # chosen by the tensors that there are
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    try:
        adapted = get_peft_model(_nest(module, linear), config)
        set_peft_model_state_dict(adapted, dict(factors))
        merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ConversionError(f"merging the adapter into {module} failed: {error}") from error
    return merged.get_submodule(module).weight.data.contiguous()


def _nest(path: str, leaf: nn.Module) -> nn.Module:
    """Modules within modules, so that `leaf` is found at a dotted path."""
    for name in reversed(path.split(".")):
        parent = nn.Module()
        parent.add_module(name, leaf)
        leaf = parent
    return leaf


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.add_argument(
        "--base", required=True, help="stock base or GlimpsePrune repository: a folder or a Hub id"
    )
    parser.add_argument("--base-revision", help="revision of the base, where it is a Hub id")
    parser.add_argument("--adapter", required=True, help="what peft saved: a folder or a Hub id")
    parser.add_argument("--output", required=True, type=Path, help="folder to create")


def run(arguments: argparse.Namespace) -> int:
    """Merge what the arguments name."""
    check_vacant(arguments.output)
    base = resolve_base(arguments.base, arguments.base_revision)
    adapter = resolve_folder(arguments.adapter, ADAPTER_FILES)
    merge(base, adapter, arguments.output)
    print(f"wrote {arguments.output}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 1 after saying what is wrong."""
    return run_script(__doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
