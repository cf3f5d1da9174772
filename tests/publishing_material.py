"""What the publishing tests start from: the tiny model as a stage 1 run, its base, a plus one."""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from conversion.convert_stage1 import main as convert_stage1
from conversion.convert_stage2 import main as convert_stage2
from conversion.merge_adapter import merge
from conversion.processor_files import PROCESSOR_FILES
from conversion.repository import is_glimpse
from conversion.trained_glimpse import read_trained_glimpse
from glimpseprune.families import QWEN2_5_VL
from glimpseprune.hub.shards import find_shards, load_tensors
from glimpseprune.loading import TINY_MODEL
from modeling_glimpseprune.glimpse_fields import GLIMPSE_FIELDS

BASE_NAME, MERGED_NAME = "org/tiny-base", "org/tiny-merged"


def write_stock_base(folder: Path) -> Path:
    """The stock model under the tiny one, in two shards with the names of published bases."""
    folder.mkdir()
    (shard,) = find_shards(TINY_MODEL)
    names = [name for name in shard.tensors if not is_glimpse(name)]
    weight_map = {}
    for index, part in enumerate((names[::2], names[1::2]), start=1):
        tensors = {_published(name): t for name, t in load_tensors(shard, part).items()}
        file_name = f"model-{index:05d}-of-00002.safetensors"
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((TINY_MODEL / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in GLIMPSE_FIELDS}
    config |= {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    }
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("generation_config.json", *PROCESSOR_FILES):
        if (TINY_MODEL / name).exists():
            shutil.copyfile(TINY_MODEL / name, folder / name)
    card = "---\nlicense: other\nlicense_name: tiny-licence\n---\n\n# Base\n"
    (folder / "README.md").write_text(card)
    return folder


def _published(name: str) -> str:
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def load_model(folder: Path):
    """A model of ours with our own classes."""
    return QWEN2_5_VL.model_class.from_pretrained(folder, dtype="auto").eval()


def write_adapter(folder: Path, model) -> None:
    """A LoRA adapter as stage 2's trainer saves it, with weights that change the model."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    torch.manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)


def write_stage1_run(folder: Path, merged: Path) -> Path:
    """What stage 1 on a merged base leaves: one folder with all weights under our names."""
    glimpse = read_trained_glimpse(TINY_MODEL)
    model = QWEN2_5_VL.model_class.from_pretrained(
        merged,
        config=QWEN2_5_VL.config_class.from_pretrained(TINY_MODEL),
        key_mapping=QWEN2_5_VL.base_key_map,
        dtype="auto",
    )
    model.load_state_dict(glimpse.weights, strict=False)
    model._weight_conversions = None
    model.save_pretrained(folder)
    for name in PROCESSOR_FILES:
        if (TINY_MODEL / name).exists():
            shutil.copyfile(TINY_MODEL / name, folder / name)
    return folder


def write_all(folder: Path) -> dict[str, Path]:
    """Every kind of repository, by the Hub id that it is to have; stock bases included."""
    base = write_stock_base(folder / "base")
    write_adapter(folder / "adapter", load_model(TINY_MODEL))
    merge(base, folder / "adapter", folder / "merged")
    run = write_stage1_run(folder / "stage1-on-merged", folder / "merged")
    stage1 = ["--run", str(TINY_MODEL), "--base", str(base), "--base-name", BASE_NAME]
    stage2 = ["--stage1", str(run), "--merged", str(folder / "merged")]
    stage2 += ["--base-name", MERGED_NAME]
    written = {BASE_NAME: base, MERGED_NAME: folder / "merged"}
    for name, command, arguments in (
        ("org/tiny", convert_stage1, ["--run", str(TINY_MODEL)]),
        ("org/stage1", convert_stage1, stage1),
        ("org/stage1-glimpse", convert_stage1, [*stage1, "--glimpse-only"]),
        ("org/plus", convert_stage2, stage2),
        ("org/plus-glimpse", convert_stage2, [*stage2, "--glimpse-only"]),
    ):
        output = folder / name.partition("/")[2]
        assert command([*arguments, "--no-verify", "--output", str(output)]) == 0
        written[name] = output
    return written
