"""`glimpseprune inspect`: what it says of a sound repository, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.convert_stage1 import main as convert_stage1
from glimpseprune.cli import main
from glimpseprune.hub.inspection import inspect_repository
from glimpseprune.hub.shards import ConversionError
from glimpseprune.package_files import TINY_EARLY, TINY_MODEL

GLIMPSE, BASE = "model-glimpse.safetensors", "base-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"
PREDICTOR = "model.glimpse.predictor.output_projection.bias"
NORM = "model.language_model.norm.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inspected") / "published"
    arguments = ["--run", str(TINY_MODEL), "--output", str(folder), "--no-verify"]
    assert convert_stage1([*arguments, "--base-name", "org/base", "--base-revision", "v1"]) == 0
    return folder


@pytest.fixture
def repository(published, tmp_path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "repository"))


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_tensors(path: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_header(path: Path, old: bytes, new: bytes) -> None:
    """Same length, so that nothing else moves."""
    assert len(old) == len(new)
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def move_to_base(folder: Path) -> None:
    """The index says that a tensor lies where it does not."""
    change_json(folder / INDEX, lambda index: index["weight_map"].update({PREDICTOR: BASE}))


def hold_twice(folder: Path) -> None:
    tensor = load_file(folder / GLIMPSE)[PREDICTOR]
    change_tensors(folder / BASE, lambda held: held.update({PREDICTOR: tensor}))


REFUSALS = {
    "path above the folder": (
        lambda folder: change_json(
            folder / INDEX, lambda index: index["weight_map"].update({NORM: "../secret"})
        ),
        f"puts {NORM} into '../secret', which is no file inside its folder",
    ),
    "absolute path": (
        lambda folder: change_json(
            folder / INDEX, lambda index: index["weight_map"].update({NORM: "/etc/passwd"})
        ),
        "into '/etc/passwd', which is no file inside its folder",
    ),
    "path of another system": (
        lambda folder: change_json(
            folder / INDEX, lambda index: index["weight_map"].update({NORM: "..\\secret"})
        ),
        "which is no file inside its folder",
    ),
    "code from above the folder": (
        lambda folder: change_json(
            folder / "config.json",
            lambda config: config["auto_map"].update(AutoConfig="../evil.Config"),
        ),
        "auto_map takes AutoConfig from '../evil.py', which is no file inside its folder",
    ),
    "missing code": (
        lambda folder: (folder / "configuration_glimpseprune.py").unlink(),
        "configuration_glimpseprune.py, which is missing",
    ),
    "missing shard": (lambda folder: (folder / GLIMPSE).unlink(), f"{GLIMPSE} is missing"),
    "truncated shard": (
        lambda folder: truncate(folder / BASE),
        f"{BASE} is truncated or damaged: .* bytes where its header announces",
    ),
    "tensor in two shards": (hold_twice, f"{PREDICTOR} lies both in .* and in"),
    "tensor twice in a shard": (
        lambda folder: change_header(
            folder / GLIMPSE,
            b'"model.glimpse.predictor.layers.0.mlp.up_proj.bias"',
            b'"model.glimpse.predictor.layers.1.mlp.up_proj.bias"',
        ),
        "holds model.glimpse.predictor.layers.1.mlp.up_proj.bias twice",
    ),
    "tensor in another shard": (move_to_base, f"puts {PREDICTOR} into {BASE}, but it lies in"),
    "tensor missing from its shard": (
        lambda folder: change_tensors(folder / GLIMPSE, lambda held: held.pop(PREDICTOR)),
        f"names {PREDICTOR}, which {GLIMPSE} does not hold",
    ),
    "tensor missing everywhere": (
        lambda folder: (
            change_tensors(folder / GLIMPSE, lambda held: held.pop(PREDICTOR)),
            change_json(folder / INDEX, lambda index: index["weight_map"].pop(PREDICTOR)),
        ),
        f"weights are missing: {PREDICTOR}",
    ),
    "tensor the index forgets": (
        lambda folder: change_json(folder / INDEX, lambda index: index["weight_map"].pop(NORM)),
        f"holds {NORM}, which .* does not name",
    ),
    "tensor that is none of the model's": (
        lambda folder: (
            change_tensors(folder / BASE, lambda held: held.update(extra=torch.ones(2))),
            change_json(folder / INDEX, lambda index: index["weight_map"].update(extra=BASE)),
        ),
        "weights are not the model's: extra",
    ),
    "wrong shape": (
        lambda folder: change_tensors(
            folder / BASE, lambda held: held.update({NORM: torch.ones(5, dtype=torch.bfloat16)})
        ),
        f"weights have a wrong shape: {NORM}",
    ),
    "integers instead of floats": (
        lambda folder: change_tensors(
            folder / BASE, lambda held: held.update({NORM: torch.ones(192, dtype=torch.int8)})
        ),
        f"weights have a wrong dtype: {NORM} I8",
    ),
    "glimpse weights of two dtypes": (
        lambda folder: change_tensors(
            folder / GLIMPSE, lambda held: held.update({PREDICTOR: held[PREDICTOR].float()})
        ),
        "the glimpse weights mix dtypes: BF16, F32",
    ),
    "unknown dtype": (
        lambda folder: change_header(folder / GLIMPSE, b'"BF16"', b'"XX16"'),
        "in the unknown dtype XX16",
    ),
    "stock model": (
        lambda folder: change_json(
            folder / "config.json", lambda config: config.update(model_type="qwen2_5_vl")
        ),
        "is a 'qwen2_5_vl' model, not a GlimpsePrune repository",
    ),
    "K outside the decoder": (
        lambda folder: change_json(
            folder / "config.json", lambda config: config.update(glimpse_layer=9)
        ),
        "glimpse_layer must be one of the decoder's layers 0..5, got 9",
    ),
    "no code": (
        lambda folder: change_json(folder / "config.json", lambda config: config.pop("auto_map")),
        "has no auto_map",
    ),
}


@pytest.mark.parametrize("damage, sentence", REFUSALS.values(), ids=REFUSALS)
def test_unsound_repositories_are_refused(repository, damage, sentence):
    damage(repository)
    with pytest.raises(ConversionError, match=sentence.replace("\\", "\\\\")):
        inspect_repository(repository)


def test_report(published):
    report = inspect_repository(published)
    assert (report.family, report.glimpse_layer, report.num_layers) == ("qwen2_5_vl", 1, 6)
    assert (report.predictor_parameters, report.glimpse_parameters) == (223_233, 260_673)
    assert (report.base, report.base_revision, report.base_included) == ("org/base", "v1", True)
    policy = report.prune_threshold, report.max_keep_ratio, report.min_keep_tokens
    tiny = json.loads((TINY_MODEL / "config.json").read_text())
    assert policy == (tiny["prune_threshold"], None, 1)
    assert report.base_dtypes == {"BF16": 129} and report.glimpse_dtype == "BF16"
    assert report.trained
    assert report.commit is None and report.pickles == ()


def test_an_untrained_glimpse_is_named(repository, capsys):
    change_tensors(
        repository / GLIMPSE, lambda tensors: tensors["model.glimpse.trained"].fill_(False)
    )
    assert main(["inspect", str(repository)]) == 0
    assert "NOT TRAINED: pruning will be refused" in capsys.readouterr().out


def test_glimpse_only_repository(published, tmp_path):
    arguments = ["--run", str(TINY_MODEL), "--output", str(tmp_path / "out"), "--no-verify"]
    given = ["--glimpse-only", "--base", str(published), "--base-name", "org/base"]
    assert convert_stage1([*arguments, *given]) == 0
    report = inspect_repository(tmp_path / "out")
    assert not report.base_included and report.files == 1 and report.base_dtypes == {}
    assert report.weight_bytes < 600_000
    (tmp_path / "out" / "new_modules.bin").write_bytes(b"")
    assert inspect_repository(tmp_path / "out").pickles == ("new_modules.bin",)


def test_a_glimpse_that_is_read_ahead(capsys):
    report = inspect_repository(TINY_EARLY)
    assert (report.prune_layer, report.base, report.base_included) == (0, "../tiny", False)
    assert main(["inspect", str(TINY_EARLY)]) == 0
    assert "prune layer P      0" in capsys.readouterr().out


def test_command(published, tmp_path, capsys):
    assert main(["inspect", str(published)]) == 0
    printed = capsys.readouterr().out
    assert "glimpse layer K    1 of 0..5" in printed and "prune layer P      K" in printed
    assert "base               org/base at v1" in printed
    assert "sound: 8.3 MB in 2 file(s)" in printed
    assert main(["inspect", str(tmp_path)]) == 2
    assert "config.json cannot be read: No such file" in capsys.readouterr().err
