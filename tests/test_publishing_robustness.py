"""Publishing under a memory limit, and when it is killed: slow checks, `pytest -m slow`."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import running
from publishing_material import write_stock_base
from test_publishing import TOKEN
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from conversion.convert_stage1 import main as convert_stage1
from conversion.push import main as push
from glimpseprune.hub.inspection import inspect_repository
from glimpseprune.loading import TINY_MODEL

pytestmark = pytest.mark.slow

KILLS = 20
MEGABYTE = 2**20
SHARD_BYTES = 700 * MEGABYTE
ALLOWED_MEGABYTES = 600
BIG_TEXT = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 18}
MEASURED = """
import sys

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

bare = peak()
from conversion.convert_official import main  # torch and transformers among its imports
loaded = peak()
assert main(sys.argv[1:]) == 0
print(peak() - loaded, loaded - bare)
"""


def write_sparse_base(folder: Path) -> int:
    """A stock base of zeros that takes next to no disk; returns its bytes of data."""
    folder.mkdir()
    config = json.loads((TINY_MODEL / "config.json").read_text())
    text = config["text_config"] | BIG_TEXT
    text |= {"num_attention_heads": 16, "vocab_size": 152_064, "layer_types": None}
    text["rope_scaling"] |= {"mrope_section": [16, 24, 24]}
    vision = config["vision_config"] | {"out_hidden_size": 2048}
    stock = {"text_config": text, "vision_config": vision, "tie_word_embeddings": False}
    stock |= {name: config[name] for name in config if name.endswith("token_id")}
    stock["model_type"] = "qwen2_5_vl"
    (folder / "config.json").write_text(json.dumps(stock))
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**stock))
    shards: list[dict] = [{}]
    end = 0
    for name, tensor in model.state_dict().items():
        size = tensor.numel() * 2
        if end + size > SHARD_BYTES and shards[-1]:
            shards.append({})
            end = 0
        entry = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        shards[-1][name] = entry
        end += size
    weight_map, total = {}, 0
    for index, tensors in enumerate(shards, start=1):
        file_name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        header = json.dumps(tensors).encode()
        header += b" " * (-len(header) % 8)
        size = max(entry["data_offsets"][1] for entry in tensors.values())
        with (folder / file_name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
        weight_map |= dict.fromkeys(tensors, file_name)
        total += size
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_big_official(folder: Path, base: Path) -> None:
    """An official checkpoint of zeros for that base."""
    from official_checkpoint import OFFICIAL_FIELDS

    folder.mkdir()
    fields = OFFICIAL_FIELDS | {
        "le_layers": list(range(18)),
        "attn_fuse_size": 256,
        "visual_cond_size": 512,
        "attn_fuse_num_heads": 4,
        "selected_visual_layers": [3, 1],
        "num_hidden_layers": 18,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    width, condition = 256, 512
    joint = width + condition
    modules = {
        "attn_in_proj.weight": (width, 16),
        "attn_in_proj.bias": (width,),
        "attn_out_projs.1.weight": (1, width),
        "attn_out_projs.1.bias": (1,),
    }
    for layer in (0, 1):
        modules |= {
            f"cond_in_projs.{layer}.weight": (condition, 128),
            f"cond_in_projs.{layer}.bias": (condition,),
            f"layers.{layer}.norm1.weight": (width,),
            f"layers.{layer}.norm2.weight": (width,),
            f"layers.{layer}.attn.q_proj.weight": (joint, joint),
            f"layers.{layer}.attn.k_proj.weight": (joint, joint),
            f"layers.{layer}.attn.v_proj.weight": (width, width),
            f"layers.{layer}.attn.o_proj.weight": (width, width),
            f"layers.{layer}.mlp.gate_proj.weight": (2 * width, width),
            f"layers.{layer}.mlp.gate_proj.bias": (2 * width,),
            f"layers.{layer}.mlp.up_proj.weight": (2 * width, width),
            f"layers.{layer}.mlp.up_proj.bias": (2 * width,),
            f"layers.{layer}.mlp.down_proj.weight": (width, 2 * width),
            f"layers.{layer}.mlp.down_proj.bias": (width,),
        }
    saved = {
        "attn_fuser": {name: torch.zeros(shape) for name, shape in modules.items()},
        "learnable_embeddings": torch.zeros(18, 1, 2048),
        "le_proj": {"weight": torch.zeros(2048, 2048), "bias": torch.zeros(2048)},
        "le_norm": {"weight": torch.zeros(2048)},
    }
    torch.save(saved, folder / "new_modules_gp.pt")


def test_three_gigabytes_convert_within_600_megabytes(tmp_path):
    size = write_sparse_base(tmp_path / "base")
    assert size >= 3 * 10**9
    write_big_official(tmp_path / "official", tmp_path / "base")
    arguments = ["--base", tmp_path / "base", "--glimpse", tmp_path / "official"]
    arguments += ["--output", tmp_path / "out", "--no-verify"]
    completed = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr
    above, libraries = (int(figure) / 1024 for figure in completed.stdout.splitlines()[-1].split())
    print(
        f"base {size / 1e9:.2f} GB: peak {above:.0f} MiB above the interpreter with its libraries, "
        f"which take {libraries:.0f} MiB"
    )
    assert above <= ALLOWED_MEGABYTES
    report = inspect_repository(tmp_path / "out")
    assert report.weight_bytes > size


def in_a_fork(work, *arguments) -> multiprocessing.Process:
    """Run a function in a forked process, which needs no second to import anything."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def kill_after(process: multiprocessing.Process, seconds: float) -> None:
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def quietly(command, *arguments) -> None:
    """Run a command without its output, and end the process by its code."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    os._exit(command(list(map(str, arguments))))


def test_killed_conversions_leave_nothing_or_all(tmp_path):
    base = write_stock_base(tmp_path / "base")
    arguments = ["--run", TINY_MODEL, "--base", base, "--no-verify", "--output"]
    for complete in (tmp_path / "warming-up", tmp_path / "complete"):
        started = time.monotonic()
        in_a_fork(quietly, convert_stage1, *arguments, complete).join()
        duration = time.monotonic() - started
    expected = {path.name: path.read_bytes() for path in complete.iterdir()}
    chance = random.Random(0)
    outcomes = {"nothing": 0, "unfinished": 0, "complete": 0}
    for attempt in range(KILLS):
        output = tmp_path / "results" / f"out{attempt}"
        process = in_a_fork(quietly, convert_stage1, *arguments, output)
        kill_after(process, chance.uniform(0, duration))
        left = list(output.parent.iterdir()) if output.parent.exists() else []
        partial = [path for path in left if path.name.startswith(f".{output.name}.partial-")]
        if output.exists():
            assert {path.name: path.read_bytes() for path in output.iterdir()} == expected
            inspect_repository(output)
        else:
            in_a_fork(quietly, convert_stage1, *arguments, output).join()
            inspect_repository(output)
        outcomes["unfinished" if partial else "complete" if output in left else "nothing"] += 1
        hidden = [path.name for path in output.parent.iterdir() if path.name.startswith(".")]
        assert not hidden, "an abandoned folder was not removed"
    print(f"conversion takes {duration:.2f} s; killed {KILLS} times: {outcomes}")


def push_to(endpoint: str, folder: Path) -> None:
    """Push in this process; the client's settings are read at its import."""
    huggingface_hub.constants.ENDPOINT = endpoint
    huggingface_hub.constants.HF_HUB_DISABLE_XET = True
    os.environ["HF_TOKEN"] = TOKEN
    quietly(push, "--folder", folder, "--push-to-hub", "org/killed")


def test_killed_uploads_show_nothing_or_all(tmp_path):
    base = write_stock_base(tmp_path / "base")
    folder = tmp_path / "out"
    assert not convert_stage1(
        ["--run", str(TINY_MODEL), "--base", str(base), "--no-verify", "--output", str(folder)]
    )
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    chance = random.Random(1)
    outcomes = {"nothing": 0, "complete": 0}
    total = count_requests(tmp_path / "whole", folder)
    for attempt in range(KILLS):
        store = tmp_path / f"store{attempt}"
        store.mkdir()
        with running(store, TOKEN) as server:
            process = in_a_fork(push_to, server.endpoint, folder)
            kill_at_request(server, process, chance.randrange(total + 1))
            process.join()
            shown = {}
            if "org/killed" in server.repositories:
                shown = dict(server.files("org/killed"))
                shown.pop(".gitattributes")
            outcomes["complete" if shown else "nothing"] += 1
            assert not shown or set(shown) == set(expected)
            server.on_request = lambda request: None
            again = in_a_fork(push_to, server.endpoint, folder)
            again.join()
            assert again.exitcode == 0
            files = server.files("org/killed")
            held = {name: server.content(files[name]) for name in expected}
            assert held == expected
    print(f"an upload makes {total} requests; killed {KILLS} times: {outcomes}")


def count_requests(store: Path, folder: Path) -> int:
    """Requests of an upload that nobody disturbs."""
    store.mkdir()
    with running(store, TOKEN) as server:
        process = in_a_fork(push_to, server.endpoint, folder)
        process.join()
        assert process.exitcode == 0
        return len(server.requests)


def kill_at_request(server, process: multiprocessing.Process, number: int) -> None:
    """Kill the client when the server has received that many of its requests."""
    lock = threading.Lock()

    def strike(request: str) -> None:
        with lock:
            if len(server.requests) > number and process.is_alive():
                os.kill(process.pid, signal.SIGKILL)

    server.on_request = strike
