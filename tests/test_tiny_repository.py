"""The tiny repositories: complete, small, and loadable as users load them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from glimpseprune.hub.remote_code import code_files, with_code
from glimpseprune.package_files import SAMPLE_PAGE, TINY_EARLY, TINY_MODEL

TINY_DEEP = TINY_MODEL.with_name("tiny_deep")
FOLDERS = pytest.mark.parametrize(
    "folder", [TINY_MODEL, TINY_EARLY, TINY_DEEP], ids=lambda folder: folder.name
)
TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
FRESH_PROCESS = """
import json, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import transformers
from PIL import Image

folder, page, name = sys.argv[1:]
model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
message = {"role": "user", "content": [
    {"type": "image", "image": Image.open(page).convert("RGB")},
    {"type": "text", "text": "What is the value of CS?"}]}
inputs = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True,
                                       return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True)
record = output["cache" if "cache" in output else "past_key_values"].glimpse
pipe = transformers.pipeline("image-text-to-text", model=folder, trust_remote_code=True)
spoken = pipe(text=[message], max_new_tokens=8, return_full_text=False)
answer = processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1]:],
                                skip_special_tokens=True)[0]
print(json.dumps({
    "model": type(model).__module__, "processor": type(processor).__module__,
    "own_package": "modeling_glimpseprune" in sys.modules or "glimpseprune" in sys.modules,
    "kept": record.kept, "total": record.total, "answer": answer,
    "prune_layer": record.prune_layer,
    "pipeline": spoken[0]["generated_text"]}))
"""


@FOLDERS
def test_code_files_are_links_and_complete(folder):
    config = json.loads((folder / "config.json").read_text())
    code = {path.name: path for path in code_files(config)}
    links = {path.name: path for path in folder.glob("*.py")}
    assert links.keys() == code.keys()
    for name, link in links.items():
        assert link.is_symlink() and link.resolve() == code[name].resolve()
    assert with_code(folder) == folder


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "processor_config.json"])
@pytest.mark.parametrize("folder", [TINY_EARLY, TINY_DEEP], ids=lambda folder: folder.name)
def test_all_read_prompts_alike(name, folder):
    assert (folder / name).read_bytes() == (TINY_MODEL / name).read_bytes()


def test_a_folder_without_its_code_is_completed_once(tmp_path, monkeypatch):
    """Where git makes plain files of links, a code file holds the place of the code."""
    monkeypatch.setattr("glimpseprune.hub.remote_code.HF_HOME", str(tmp_path / "cache"))
    plain = tmp_path / "tiny"
    shutil.copytree(TINY_MODEL, plain, symlinks=True)
    (plain / "__pycache__").mkdir()
    for link in list(plain.glob("*.py")):
        place = str(link.readlink())
        link.unlink()
        link.write_text(place)
    complete = with_code(plain)
    assert complete.parent == tmp_path / "cache" / "glimpseprune"
    for path in TINY_MODEL.iterdir():
        assert (complete / path.name).read_bytes() == path.read_bytes()
    assert len(list(complete.iterdir())) == len(list(TINY_MODEL.iterdir()))
    written = complete.stat().st_mtime_ns
    assert with_code(plain) == complete and complete.stat().st_mtime_ns == written
    (plain / "training_summary.json").write_text("{}")
    assert with_code(plain) not in (complete, plain)


def test_a_copy_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("glimpseprune.hub.remote_code.HF_HOME", str(tmp_path / "file"))
    shutil.copytree(TINY_MODEL, tmp_path / "tiny")
    (tmp_path / "tiny" / "glimpse.py").unlink()
    with pytest.raises(OSError, match="file"):
        with_code(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("folder", "limit"),
    [(TINY_MODEL, 12_000_000), (TINY_EARLY, 1_000_000), (TINY_DEEP, 16_000_000)],
)
def test_repositories_are_small(folder, limit):
    assert sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".py") <= limit


def auto_model_names() -> list[str]:
    other = "AutoModelForMultimodalLM" if TRANSFORMERS_5 else "AutoModelForVision2Seq"
    return ["AutoModelForImageTextToText", other]


@pytest.mark.parametrize(
    ("folder", "auto_model", "prune_layer"),
    [
        *((TINY_MODEL, name, 1) for name in auto_model_names()),
        (TINY_EARLY, "AutoModelForImageTextToText", 0),
        (TINY_DEEP, "AutoModelForImageTextToText", 5),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else str(value),
)
def test_loads_and_answers_in_a_fresh_process(folder, auto_model, prune_layer, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    site = str(Path(transformers.__file__).parents[1])
    environment |= {"PYTHONPATH": site, "HF_HOME": str(tmp_path / "cache")}
    completed = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, folder, SAMPLE_PAGE, auto_model],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert completed.returncode == 0, completed.stderr
    found = json.loads(completed.stdout.splitlines()[-1])
    assert found["model"].startswith("transformers_modules")
    assert found["processor"].startswith("transformers_modules")
    assert not found["own_package"]
    assert 0 < found["kept"] < found["total"] and found["prune_layer"] == prune_layer
    assert found["answer"] == found["pipeline"] != ""
