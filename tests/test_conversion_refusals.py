"""Conversion of official checkpoints: what is refused, and what the command says."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from official_checkpoint import (
    BASE_CONFIG,
    HIDDEN,
    change_json,
    official_modules,
    write_base,
    write_json,
    write_official,
)
from safetensors.torch import load_file, save_file

from conversion import repository
from conversion.convert_official import convert, main
from glimpseprune.hub.shards import ConversionError


@pytest.fixture
def official(tmp_path) -> Path:
    return write_official(tmp_path / "official")


@pytest.fixture
def base(tmp_path) -> Path:
    return write_base(tmp_path / "base")


def change_modules(official: Path, change: Callable[[dict], object]) -> None:
    modules = official_modules()
    change(modules)
    torch.save(modules, official / "new_modules_gp.pt")


def truncate(path: Path, kept: float = 0.9) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])


def change_base_tensor(base: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


PICKLE = "new_modules_gp.pt"
REFUSALS = {
    "deep supervision": (
        lambda base, official: change_json(official / "config.json", deep_supervision=True),
        "deep_supervision=True is not supported",
    ),
    "supervised attention": (
        lambda base, official: change_json(official / "config.json", ori_attn_supervision=True),
        "ori_attn_supervision=True is not supported",
    ),
    "other kernel in the predictor": (
        lambda base, official: change_json(official / "config.json", attn_fuse_use_flash_attn=True),
        "attn_fuse_use_flash_attn=True is not supported; supported is only False",
    ),
    "dummy predictor": (
        lambda base, official: change_json(official / "config.json", attn_fuse_type="AttnFuserX"),
        "attn_fuse_type='AttnFuserX' is not supported",
    ),
    "unknown corner": (
        lambda base, official: change_json(official / "config.json", anchor_positions=["mid"]),
        "anchor_positions='mid' is not supported",
    ),
    "K below the decoder": (
        lambda base, official: change_json(official / "config.json", reduce_layer=-1),
        "glimpse_layer must be one of the decoder's layers 0..2, got -1",
    ),
    "attention above the decoder": (
        lambda base, official: change_json(
            official / "config.json", selected_layers=[7], reduce_layer=7
        ),
        r"selected_layers must be layers of the decoder \(0..2\), got \[7\]",
    ),
    "attention above K": (
        lambda base, official: change_json(official / "config.json", selected_layers=[2]),
        "attention_layers must lie in 0..glimpse_layer",
    ),
    "vision layer": (
        lambda base, official: change_json(official / "config.json", selected_visual_layers=[9, 0]),
        "vision_layers must be vision blocks",
    ),
    "other base": (
        lambda base, official: change_json(official / "config.json", hidden_size=48),
        "hidden_size is 32 in the base's configuration and 48 in the glimpse's",
    ),
    "other family": (
        lambda base, official: change_json(base / "config.json", model_type="qwen2_vl"),
        "base is a 'qwen2_vl' model; known are qwen2_5_vl, qwen3_vl, llava, llava_next",
    ),
    "no official config": (
        lambda base, official: (official / "config.json").unlink(),
        "official.*config.json cannot be read",
    ),
    "official config of something else": (
        lambda base, official: write_json(official / "config.json", BASE_CONFIG),
        "official configuration lacks the field 'selected_layers'",
    ),
    "broken base config": (
        lambda base, official: (base / "config.json").write_text("{"),
        "base.*config.json is not a JSON file",
    ),
    "no pickle": (
        lambda base, official: (official / PICKLE).unlink(),
        f"{PICKLE} is missing",
    ),
    "empty pickle": (
        lambda base, official: truncate(official / PICKLE, 0),
        f"{PICKLE} is truncated or not a pickle of tensors",
    ),
    "truncated pickle": (
        lambda base, official: truncate(official / PICKLE),
        f"{PICKLE} is truncated or not a pickle of tensors",
    ),
    "text instead of a pickle": (
        lambda base, official: (official / PICKLE).write_text("version https://git-lfs\n"),
        f"{PICKLE} is truncated or not a pickle of tensors",
    ),
    "pickle with code": (
        lambda base, official: torch.save({"le_norm": os.getcwd}, official / PICKLE),
        f"{PICKLE} is truncated or not a pickle of tensors",
    ),
    "pickle of a list": (
        lambda base, official: torch.save([1, 2], official / PICKLE),
        "must hold named tensors",
    ),
    "pickle of numbers": (
        lambda base, official: torch.save({"le_proj": {"weight": 1}}, official / PICKLE),
        "must hold named tensors, got le_proj.weight",
    ),
    "missing official tensor": (
        lambda base, official: change_modules(official, lambda held: held.pop("le_norm")),
        "missing: model.glimpse.token.norm.weight$",
    ),
    "unexpected official tensor": (
        lambda base, official: change_modules(
            official, lambda held: held.update(le_gate=torch.ones(1))
        ),
        "unexpected tensor: le_gate",
    ),
    "output projection of an inner layer": (
        lambda base, official: change_modules(
            official,
            lambda held: held["attn_fuser"].update({"attn_out_projs.0.bias": torch.ones(1)}),
        ),
        "more than once, again as attn_fuser.attn_out_projs.0.bias",
    ),
    "official tensor of a wrong shape": (
        lambda base, official: change_modules(
            official, lambda held: held.update(learnable_embeddings=torch.ones(3, 2, HIDDEN))
        ),
        r"of a wrong shape: model.glimpse.token.embeddings \(3, 2, 32\) instead of \(3, 1, 32\)",
    ),
    "missing shard": (
        lambda base, official: (base / "model.safetensors").rename(base / "elsewhere.safetensors"),
        "holds neither model.safetensors nor model.safetensors.index.json",
    ),
    "index names a missing shard": (
        lambda base, official: write_json(
            base / "model.safetensors.index.json", {"weight_map": {"a": "model-00001.safetensors"}}
        ),
        "model-00001.safetensors is missing",
    ),
    "index without a map": (
        lambda base, official: write_json(base / "model.safetensors.index.json", {}),
        "has no weight_map",
    ),
    "truncated shard": (
        lambda base, official: truncate(base / "model.safetensors"),
        "model.safetensors is truncated or damaged: .* bytes where its header announces",
    ),
    "shard cut in its header": (
        lambda base, official: truncate(base / "model.safetensors", 0.001),
        "model.safetensors is truncated or not a safetensors file",
    ),
    "shard that is no safetensors file": (
        lambda base, official: (base / "model.safetensors").write_bytes(
            b"\x02" + b"\0" * 7 + b"[]"
        ),
        "model.safetensors is not a safetensors file",
    ),
    "missing base tensor": (
        lambda base, official: change_base_tensor(base, "model.norm.weight", None),
        "missing: model.language_model.norm.weight$",
    ),
    "unexpected base tensor": (
        lambda base, official: change_base_tensor(base, "model.extra", torch.ones(1)),
        "unexpected: model.language_model.extra$",
    ),
    "base tensor of a wrong shape": (
        lambda base, official: change_base_tensor(base, "model.norm.weight", torch.ones(5)),
        r"of a wrong shape: model.language_model.norm.weight \(5,\) instead of \(32,\)",
    ),
    "base tensor under two names": (
        lambda base, official: change_base_tensor(
            base, "model.language_model.norm.weight", torch.ones(HIDDEN)
        ),
        "the same tensors under old and new names",
    ),
}


@pytest.mark.parametrize("damage, sentence", REFUSALS.values(), ids=REFUSALS)
def test_bad_inputs_are_named_and_nothing_is_written(tmp_path, base, official, damage, sentence):
    damage(base, official)
    with pytest.raises(ConversionError, match=sentence):
        convert(base, official, tmp_path / "results" / "out")
    assert not any((tmp_path / "results").rglob("*"))


def test_a_failure_while_writing_leaves_nothing(tmp_path, base, official, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(repository, "place_file", fail)
    with pytest.raises(OSError, match="no space left"):
        convert(base, official, tmp_path / "results" / "out")
    assert not any((tmp_path / "results").rglob("*"))


def test_output_must_be_absent_or_empty(tmp_path, base, official):
    (tmp_path / "empty").mkdir()
    convert(base, official, tmp_path / "empty")
    with pytest.raises(ValueError, match="empty exists and is not an empty folder"):
        convert(base, official, tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file exists and is not an empty folder"):
        convert(base, official, tmp_path / "file")


def test_command_says_what_is_wrong(tmp_path, base, official, capsys):
    change_json(base / "config.json", model_type="qwen2_vl")
    arguments = ["--base", str(base), "--glimpse", str(official)]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    known = "known are qwen2_5_vl, qwen3_vl, llava, llava_next"
    assert printed.err == f"error: {base} is a 'qwen2_vl' model; {known}\n"
    assert not printed.out and not (tmp_path / "out").exists()


def test_command_fetches_hub_ids(tmp_path, base, official, monkeypatch):
    asked = []

    def fetch(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision))
        assert "config.json" in allow_patterns
        return str(base if repo_id == "some/base" else official)

    monkeypatch.setattr(repository, "snapshot_download", fetch)
    sources = ["--base", "some/base", "--base-revision", "v1", "--glimpse", "some/glimpse"]
    assert main([*sources, "--output", str(tmp_path / "out"), "--no-verify"]) == 0
    assert asked == [("some/base", "v1"), ("some/glimpse", None)]
    assert (tmp_path / "out" / "config.json").exists()


def test_command_names_a_base_that_is_nowhere(tmp_path, official, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ["--glimpse", str(official), "--output", str(tmp_path / "out")]
    assert main(["--base", str(tmp_path / "absent"), *arguments]) == 1
    assert "absent is no folder here" in capsys.readouterr().err
