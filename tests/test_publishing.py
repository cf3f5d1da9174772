"""Publishing: what is written, and the way through the Hub and back, over HTTP on loopback."""

import json
import os
import re
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import safetensors.torch
import torch
import transformers
import yaml
from fresh_process import run_fresh
from hub_server import SIGNATURE, HubServer, running
from peft import PeftModel
from publishing_material import BASE_NAME, MERGED_NAME, load_model, write_all
from safetensors.torch import load_file, save_file

from conversion.convert_stage1 import main as convert_stage1
from conversion.merge_adapter import merge
from conversion.model_card import ModelCard, render_card
from conversion.repository import is_glimpse, without_places
from glimpseprune.families import QWEN2_5_VL
from glimpseprune.hub import folders, shards
from glimpseprune.hub.folders import place_file
from glimpseprune.hub.redaction import redact
from glimpseprune.hub.shards import ConversionError, find_shards
from glimpseprune.loading import REPOSITORY, TINY_MODEL

TOKEN = "hf_TheTokenOfTheTests"
IDS = ("org/tiny", "org/stage1", "org/stage1-glimpse", "org/plus", "org/plus-glimpse")
PUSH = """
import json, sys
from huggingface_hub import HfApi
from conversion.push import main

for name, folder, revision in json.loads(sys.argv[1]):
    if (name.endswith("-base") or name.endswith("-merged")):
        HfApi().create_repo(name, private=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    else:
        given = ["--folder", folder, "--push-to-hub", name]
        assert main(given + (["--revision", revision] if revision else [])) == 0
"""
LOAD = """
import json, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import numpy, torch, transformers
from safetensors.torch import save_file

auto = getattr(transformers, sys.argv[1])
found, tensors = {}, {}
for name, options in json.loads(sys.argv[2]):
    model = auto.from_pretrained(name, trust_remote_code=True, dtype="auto", **options)
    processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=True, **options)
    for tensor in (*model.parameters(), *model.buffers()):  # out of mapped files, aligned
        tensor.data = tensor.data.clone()
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    image = numpy.arange(112 * 140 * 3, dtype=numpy.uint8).reshape(112, 140, 3)
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    key = name + "@" + options.get("revision", "main")
    tensors[key] = model.glimpse(**inputs).importance
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    found[key] = {"module": type(model).__module__, "base": model.config.glimpse_base,
                  "threshold": model.config.prune_threshold, "name": model.name_or_path,
                  "generation": model.generation_config.eos_token_id,
                  "tokens": answer[0].tolist(), "dtype": str(model.dtype)}
found["own package"] = "modeling_glimpseprune" in sys.modules
save_file(tensors, sys.argv[3])
print(json.dumps(found))
"""


def auto_model_name() -> str:
    transformers_5 = int(transformers.__version__.split(".")[0]) >= 5
    return "AutoModelForImageTextToText" if transformers_5 else "AutoModelForVision2Seq"


def run_python(
    hub: HubServer, home: Path, *arguments: object, own_code: bool = True, **environment: str
) -> CompletedProcess:
    """A fresh process whose Hub is the test's; `own_code` puts this repository on its path."""
    home.mkdir(exist_ok=True)
    paths = [str(Path(transformers.__file__).parents[1])]
    paths += [str(REPOSITORY)] if own_code else []
    own = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return run_fresh(*arguments, cwd=home, env=kept | own | environment)


def load_in_fresh_process(hub: HubServer, home: Path, models: list, **environment: str) -> tuple:
    """What the Hub's users see of models `(id, options)`: descriptions and importances."""
    scores = home.with_name(f"{home.name}-{len(environment)}.safetensors")
    completed = run_python(
        hub,
        home,
        "-c",
        LOAD,
        auto_model_name(),
        json.dumps(models),
        scores,
        own_code=False,
        **environment,
    )
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout.splitlines()[-1]), load_file(scores)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with running(tmp_path_factory.mktemp("store"), TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def pushed(written, hub, tmp_path_factory) -> HubServer:
    """A Hub that holds all kinds, and a second revision of one, uploaded by the real client."""
    other = tmp_path_factory.mktemp("other") / "stage1"
    shutil.copytree(written["org/stage1"], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"prune_threshold": 0.25}))
    jobs = [(name, str(folder), None) for name, folder in written.items()]
    jobs.append(("org/stage1", str(other), "cautious"))
    completed = run_python(hub, other.parent / "home", "-c", PUSH, json.dumps(jobs))
    assert completed.returncode == 0, completed.stderr
    return hub


def test_round_trip_over_http(pushed, written, tmp_path):
    models = [(name, {}) for name in IDS] + [("org/stage1", {"revision": "cautious"})]
    found, scores = load_in_fresh_process(pushed, tmp_path / "home", models)
    assert not found.pop("own package")
    for key, one in found.items():
        assert one["module"].startswith("transformers_modules")
        assert one["name"] == key.partition("@")[0] and one["generation"] is not None
        assert one["dtype"] == "torch.bfloat16"
    assert found["org/stage1@cautious"]["threshold"] == 0.25
    tiny = json.loads((TINY_MODEL / "config.json").read_text())
    assert found["org/stage1@main"]["threshold"] == tiny["prune_threshold"] != 0.25
    origin = {"repository": BASE_NAME, "revision": None}
    assert found["org/stage1-glimpse@main"]["base"] == found["org/stage1@main"]["base"] == origin
    assert found["org/plus@main"]["base"]["repository"] == MERGED_NAME
    for kind in ("stage1", "plus"):
        full, small = f"org/{kind}@main", f"org/{kind}-glimpse@main"
        assert torch.equal(scores[full], scores[small])
        assert found[full]["tokens"] == found[small]["tokens"]
    assert torch.equal(scores["org/tiny@main"], scores["org/stage1@main"])
    assert not torch.equal(scores["org/plus@main"], scores["org/stage1@main"])

    offline = [("org/stage1-glimpse", {}), ("org/stage1", {"revision": "cautious"})]
    again, cached = load_in_fresh_process(pushed, tmp_path / "home", offline, HF_HUB_OFFLINE="1")
    assert torch.equal(cached["org/stage1-glimpse@main"], scores["org/stage1@main"])
    seen = len(pushed.requests)
    local = [("org/plus-glimpse", {"local_files_only": True})]
    again, cached = load_in_fresh_process(pushed, tmp_path / "home", local)
    assert torch.equal(cached["org/plus-glimpse@main"], scores["org/plus@main"])
    assert not [line for line in pushed.requests[seen:] if "safetensors" in line]


def test_upload_is_private_and_one_commit(pushed, written):
    for name in IDS:
        held = pushed.repositories[name]
        assert held.private
        main = pushed.files(name)
        assert set(main) - {".gitattributes"} == {path.name for path in written[name].iterdir()}
        for path in written[name].iterdir():
            assert pushed.content(main[path.name]) == path.read_bytes()
    commits = [line for line in pushed.requests if "/commit/main" in line]
    assert len(commits) == len(written)
    assert any("/lfs/" in line and line.endswith("/2") for line in pushed.requests), "no parts"
    stage1 = pushed.repositories["org/stage1"]
    assert set(stage1.branches) == {"main", "cautious"} and len(stage1.commits) == 3


@pytest.mark.slow
def test_pushing_again_sends_nothing(pushed, written, tmp_path):
    seen, commits = len(pushed.requests), len(pushed.repositories["org/plus"].commits)
    jobs = json.dumps([("org/plus", str(written["org/plus"]), None)])
    completed = run_python(pushed, tmp_path / "home", "-c", PUSH, jobs)
    assert completed.returncode == 0, completed.stderr
    assert not [line for line in pushed.requests[seen:] if line.startswith("PUT")]
    assert len(pushed.repositories["org/plus"].commits) == commits


@pytest.mark.newest
def test_inspect_reads_headers_from_the_hub(pushed, written, tmp_path):
    script = "import sys; from glimpseprune.cli import main; main(sys.argv[1:])"
    seen = len(pushed.requests)
    completed = run_python(pushed, tmp_path / "home", "-c", script, "inspect", "org/plus")
    assert completed.returncode == 0, completed.stderr
    assert f"base               {MERGED_NAME}" in completed.stdout
    assert pushed.repositories["org/plus"].branches["main"] in completed.stdout
    assert "weights            sound: 8.3 MB in 3 file(s)" in completed.stdout
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    fetched = [line for line in pushed.requests[seen:] if "/cdn/" in line]
    assert fetched, "no header was read"


@pytest.mark.newest
def test_tokens_and_signed_addresses_are_never_said(pushed, written, tmp_path):
    """The server's error repeats the caller's authorization and a signed address."""
    pushed.failing = re.compile("/preupload/|/tiny-base")
    push = [REPOSITORY / "conversion" / "push.py", "--folder", written["org/tiny"]]
    push += ["--push-to-hub", "org/refused"]
    fetch = [REPOSITORY / "conversion" / "convert_stage1.py", "--run", TINY_MODEL]
    fetch += ["--base", BASE_NAME, "--output", tmp_path / "out"]
    try:
        for command in (push, fetch):
            failed = run_python(pushed, tmp_path / "home", *command)
            said = failed.stdout + failed.stderr
            assert failed.returncode == 1 and "failed" in said and "rejected" in said
            assert TOKEN not in said and SIGNATURE not in said
    finally:
        pushed.failing = None
    assert set(pushed.files("org/refused")) == {".gitattributes"}


def test_token_of_any_name_is_redacted(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "no-usual-form")
    said = "Bearer abc-def no-usual-form; hf_abcdefgh1; https://store.example/x?X-Sig=s&y=1 end"
    assert redact(said) == "Bearer *** ***; ***; https://store.example/x?*** end"


def test_base_files_are_linked_not_copied(written):
    """A reflink has its own inode and no blocks of its own; a hard link the same inode."""
    base = find_shards(written[BASE_NAME])
    published = [shard for shard in find_shards(written["org/stage1"]) if "base" in shard.path.name]
    assert [shard.path.read_bytes() for shard in published] == [
        shard.path.read_bytes() for shard in base
    ]
    merged = find_shards(written[MERGED_NAME])
    plus = [shard for shard in find_shards(written["org/plus"]) if "base" in shard.path.name]
    assert [shard.path.read_bytes() for shard in plus] == [s.path.read_bytes() for s in merged]


def test_place_file_takes_no_more_disk(tmp_path):
    (tmp_path / "base").write_bytes(os.urandom(50_000_000))
    os.sync()
    before = shutil.disk_usage(tmp_path).used
    (tmp_path / "link").symlink_to(tmp_path / "base")  # as in the Hub's cache
    place_file(tmp_path / "link", tmp_path / "placed")
    os.sync()
    assert not (tmp_path / "placed").is_symlink()
    assert (tmp_path / "placed").stat().st_ino == (tmp_path / "base").stat().st_ino or (
        shutil.disk_usage(tmp_path).used - before < 10_000_000
    )


def test_place_file_copies_where_links_are_impossible(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError("another device")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(folders, "_clone", lambda source, target: False)
    (tmp_path / "base").write_bytes(b"weights")
    place_file(tmp_path / "base", tmp_path / "placed")
    assert (tmp_path / "placed").read_bytes() == b"weights"


def test_merged_weights_are_those_of_peft(written, tmp_path):
    """Shard by shard as all at once, to the bit; what the adapter does not touch stays."""
    adapter = written[MERGED_NAME].with_name("adapter")
    whole = PeftModel.from_pretrained(load_model(written["org/stage1"]), adapter)
    expected = whole.merge_and_unload(safe_merge=True).state_dict()
    model = load_model(written["org/plus"]).state_dict()
    base = load_model(written["org/stage1"]).state_dict()
    assert all(torch.equal(model[name], expected[name]) for name in expected)
    changed = {name for name in model if not torch.equal(model[name], base[name])}
    assert changed == {
        f"model.language_model.layers.{layer}.{module}.weight"
        for layer in range(6)
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }


def test_merging_holds_one_tensor_of_the_base_at_a_time(written, tmp_path, monkeypatch, recwarn):
    read = []

    def load(content: bytes) -> dict:
        tensors = safetensors.torch.load(content)
        read.append(len(tensors))
        return tensors

    monkeypatch.setattr(shards, "load", load)
    adapter = written[MERGED_NAME].with_name("adapter")
    merge(written[BASE_NAME], adapter, tmp_path / "merged")
    assert read == [1] * 18  # three modules in each of six layers
    assert not [each for each in recwarn if "base_model_name_or_path" in str(each.message)]


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"use_dora": True}, "use_dora=True of .* is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3' of .* is not supported"),
    ],
)
def test_adapters_that_are_more_than_lora_are_refused(written, tmp_path, change, sentence):
    adapter = tmp_path / "adapter"
    shutil.copytree(written[MERGED_NAME].with_name("adapter"), adapter)
    change_json(adapter / "adapter_config.json", **change)
    with pytest.raises(ConversionError, match=sentence):
        merge(written[BASE_NAME], adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_adapter_of_another_base_is_refused(written, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(written[MERGED_NAME].with_name("adapter"), adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("layers.5.", "layers.9."): t for name, t in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    with pytest.raises(ConversionError, match="changes model.language_model.layers.9"):
        merge(written[BASE_NAME], adapter, tmp_path / "merged")


def test_saving_a_loaded_repository_makes_it_whole(written, tmp_path, monkeypatch):
    """A glimpse-only model is saved as a full one, under its own names."""
    folder = tmp_path / "glimpse"
    shutil.copytree(written["org/plus-glimpse"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["glimpse_base"]["repository"] = str(written[MERGED_NAME])
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(folder)
    assert model.name_or_path == str(folder)
    backbone = QWEN2_5_VL.model_class.backbone_class.from_pretrained(folder, dtype="auto")
    state, wanted = backbone.state_dict(), model.model.state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    model.save_pretrained(tmp_path / "saved")
    again, expected = load_model(tmp_path / "saved"), load_model(written["org/plus"])
    assert again.config.glimpse_base["repository"] == str(written[MERGED_NAME])
    state, wanted = again.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert set(read_shard_names(tmp_path / "saved")) == set(wanted)


@pytest.mark.parametrize("relative", [True, False])
def test_a_base_may_be_trained_and_lie_beside(relative, tmp_path):
    """Its own glimpse lies in the same file, of other values and of another size."""
    base, output = tmp_path / "whole", tmp_path / "glimpse"
    shutil.copytree(TINY_MODEL, base)
    tensors = load_file(base / "model.safetensors")
    wanted = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in filter(is_glimpse, tensors):
        tensors[name] = torch.zeros(*tensors[name].shape, 3)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    given = ["--base", str(base), "--base-name", "../whole" if relative else str(base)]
    arguments = ["--run", str(TINY_MODEL), "--output", str(output), "--glimpse-only", "--no-verify"]
    assert convert_stage1([*arguments, *given]) == 0
    state = load_model(output).state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def read_shard_names(folder: Path) -> list[str]:
    return [name for shard in find_shards(folder) for name in shard.tensors]


def test_base_that_cannot_be_fetched_is_named(written, tmp_path, monkeypatch):
    folder = tmp_path / "glimpse"
    shutil.copytree(written["org/plus-glimpse"], folder)
    change_json(
        folder / "config.json",
        glimpse_base={"repository": "org/nowhere", "revision": None, "included": False},
    )
    with pytest.raises(OSError, match="org/nowhere"):
        load_model_locally(folder)


def load_model_locally(folder: Path):
    return QWEN2_5_VL.model_class.from_pretrained(folder, local_files_only=True)


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_glimpse_only_needs_a_base_to_name(written, tmp_path, capsys):
    arguments = ["--run", str(TINY_MODEL), "--output", str(tmp_path / "out"), "--glimpse-only"]
    assert convert_stage1(arguments) == 1
    assert "give its Hub id as --base-name" in capsys.readouterr().err
    here = [*arguments, "--base", str(written[BASE_NAME]), "--no-verify"]
    for more in ([], ["--base-name", "../tiny"]):
        assert convert_stage1([*here, *more, "--push-to-hub", "org/x"]) == 1
        assert "give its Hub id as --base-name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_untrained_glimpse_is_not_published(tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(TINY_MODEL, run)
    tensors = load_file(run / "model.safetensors")
    tensors["model.glimpse.trained"].fill_(False)
    save_file(tensors, run / "model.safetensors", metadata={"format": "pt"})
    assert convert_stage1(["--run", str(run), "--output", str(tmp_path / "out")]) == 1
    assert "the glimpse weights of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_verification_refuses_another_base(written, tmp_path, capsys):
    """The run's scores are not those of its glimpse on a base it was not trained on."""
    arguments = ["--run", str(TINY_MODEL), "--base", str(written[MERGED_NAME])]
    assert convert_stage1([*arguments, "--output", str(tmp_path / "out")]) == 1
    assert "the repository's importance differs from its source's" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_model_card(written):
    card = (written["org/stage1-glimpse"] / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == BASE_NAME and metadata["license"] == "other"
    assert metadata["license_name"] == "tiny-licence"
    assert metadata["library_name"] == "transformers" and "glimpseprune" in metadata["tags"]
    assert "holds the glimpse weights alone" in card and "$" not in card
    assert "| glimpse layer K (0-based) | 1 |" in card and "2508.01548" in card
    summary = json.loads((written["org/stage1"] / "training_summary.json").read_text())
    assert summary["steps"] > 0 and "/" not in summary["training"]["output_dir"][:1]


def test_card_takes_measurements():
    results = REPOSITORY / "benchmarks" / "results" / "tiny_accuracy.json"
    config = json.loads((TINY_MODEL / "config.json").read_text())
    config["glimpse_base"] = {"repository": None, "revision": None, "included": True}
    card = render_card(ModelCard(measurements=results), config, {"license": "apache-2.0"})
    row = json.loads(results.read_text())["results"]["pruned"]["all"]
    figures = f"{row['accuracy']:.4f} | {row['retention']:.4f} | {row['questions']}"
    assert f"| pruned | {figures} |" in card and "prune layer P" not in card
    early = render_card(ModelCard(), config | {"prune_layer": 0}, {})
    assert "| prune layer P (tokens are dropped there, the glimpse is read ahead) | 0 |" in early
    with pytest.raises(ConversionError, match="is not what `glimpseprune evaluate --output`"):
        render_card(ModelCard(measurements=TINY_MODEL / "config.json"), config, {})


def test_places_on_the_machine_are_cut_from_the_summary():
    summary = {"recipe": {"base": "/home/me/base", "data": "runs/x"}, "list": ["/a/b", 1]}
    cut = {"recipe": {"base": "base", "data": "runs/x"}, "list": ["b", 1]}
    assert without_places(summary) == cut
