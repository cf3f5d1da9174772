"""The rehearsal: what it starts from, how it measures, and that its steps follow from each other.

The whole of it takes two minutes of processor time at its tiny geometry:
`pytest tests/test_rehearsal.py -m slow`.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from benchmarks.rehearsal import __main__ as rehearsal
from benchmarks.rehearsal import material
from benchmarks.rehearsal.measured import disk_bytes, run_measured
from benchmarks.rehearsal.steps import Step, steps
from conversion.convert_official import convert
from glimpseprune.data.visual_cot import read_visual_cot
from glimpseprune.hub.inspection import inspect_repository
from glimpseprune.hub.shards import find_shards
from glimpseprune.loading import REPOSITORY

MEGABYTE = 2**20
PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""
CHILD = "import time; held = bytearray(b'x') * (200 * 2**20); time.sleep(1)"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    arguments = ["--geometry", "tiny", "--grid", "4", "3", "--question-grid", "3", "2"]
    assert material.main([*arguments, "--output", str(folder)]) == 0
    return folder


def test_base_is_one_that_transformers_loads(written):
    shards = find_shards(written / "base")
    assert len(shards) > 1
    assert {each["dtype"] for shard in shards for each in shard.tensors.values()} == {"BF16"}
    names = {name for shard in shards for name in shard.tensors}
    assert {name.partition(".")[0] for name in names} == {"visual", "model"}
    model, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        written / "base", dtype="auto", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert len(model.model.language_model.layers) == 36 and len(model.model.visual.blocks) == 32
    processor = AutoProcessor.from_pretrained(written / "base")
    assert len(processor.tokenizer) == material.PLAIN_TOKENS + len(material.SPECIAL_TOKENS)
    text = "<|vision_start|><|image_pad|><|vision_end|>What is behind her?"
    photo = str(written / "photos" / "photo.jpg")
    ids = processor(images=[photo], text=[text], return_tensors="pt")["input_ids"][0]
    assert int((ids == model.config.image_token_id).sum()) == 12
    assert processor.decode(ids).endswith("<|vision_end|>What is behind her?")


def test_official_checkpoint_is_one_that_converts(written, tmp_path):
    convert(written / "base", written / "official", tmp_path / "late")
    report = inspect_repository(tmp_path / "late")
    assert report.trained and report.glimpse_layer == 23


def test_questions_are_about_small_photos(written):
    rows = read_visual_cot(written / "photos" / "questions.jsonl")
    assert len(rows) == 6 and {(row.width, row.height) for row in rows} == {(56, 84)}


def test_weights_keep_the_size_of_what_passes():
    weight = material.random_weight("q_proj.weight", torch.Size([64, 256]), torch.Generator())
    assert weight.dtype == torch.bfloat16
    # 16,384 draws: their spread is that of the distribution to a few thousandths
    assert weight.float().std().item() == pytest.approx(1 / 16, rel=0.05)


def test_memory_of_all_processes_is_seen(tmp_path):
    command = [sys.executable, "-c", PARENT, CHILD]
    taken = run_measured(command, os.environ, tmp_path, tmp_path / "log")
    assert taken.returncode == 0 and taken.seconds > 1
    for peak in (taken.peak_bytes, taken.peak_own_bytes):
        assert 200 * MEGABYTE < peak < 400 * MEGABYTE  # two bare interpreters hold some 20


def test_files_of_several_names_count_once(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 100)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "same").hardlink_to(tmp_path / "file")
    assert disk_bytes([tmp_path]) == 100


@pytest.mark.parametrize("geometry", material.GEOMETRIES)
def test_steps_use_what_is_there(geometry, tmp_path):
    arguments = rehearsal.parse(["--work", str(tmp_path), "--geometry", geometry])
    there: set[str] = set()
    for step in steps(arguments):
        made = {folder.name for folder in step.writes}
        used = {
            Path(word.rpartition("=")[2]).relative_to(tmp_path).parts[0]
            for word in step.arguments
            if f"{tmp_path}/" in word
        }
        assert {name for name in used if "." not in name} <= there | made, step.name
        there = (there | made) - {folder.name for folder in step.drops}


def test_a_failed_step_is_told_and_gone_on_with(tmp_path, monkeypatch, capsys):
    def of(*codes):
        return lambda arguments: [
            Step(name, ["-c", code], python=True)
            for name, code in zip(("first", "second"), codes, strict=True)
        ]

    command = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "figures.json")]
    done = f"print('wrote {tmp_path}/work and {tmp_path}/work/late')"
    monkeypatch.setattr(rehearsal, "steps", of(done, "raise SystemExit('broken')"))
    assert rehearsal.main(command) == 1
    assert "broken" in capsys.readouterr().err and not (tmp_path / "figures.json").exists()
    monkeypatch.setattr(rehearsal, "steps", of("raise SystemExit('again')", "print('whole')"))
    assert rehearsal.main(command) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert str(tmp_path) not in str(figures)
    said = [step["said"] for step in figures["steps"].values()]
    assert said == [["wrote FOLDER and late"], ["whole"]]
    with pytest.raises(ValueError, match="is of other settings"):
        rehearsal.main([*command, "--steps", "3"])


def test_the_docs_show_the_figures():
    report = json.loads((REPOSITORY / "benchmarks" / "results" / "rehearsal.json").read_text())
    page = (REPOSITORY / "docs" / "train.md").read_text().splitlines()
    assert len(report["steps"]) > 5
    for row in rehearsal.table(report):
        assert row in page


@pytest.mark.slow
def test_the_whole_way_at_the_tiny_geometry(tmp_path):
    output = tmp_path / "figures.json"
    assert rehearsal.main(["--work", str(tmp_path / "work"), "--output", str(output)]) == 0
    figures = json.loads(output.read_text())["steps"]
    kept, total = re.search(r"kept (\d+) of (\d+)", figures["ask"]["said"][-2]).groups()
    assert 0 < int(kept) <= 67 and total == "270"  # a quarter at most
    assert "NOT TRAINED" not in str(figures["inspect, of the Hub"]["said"])
