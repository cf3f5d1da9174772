"""Training in two processes with DeepSpeed's ZeRO-2: what plain DDP gives, also when resumed."""

import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from stage1_data import recipe_of

from glimpseprune.loading import REPOSITORY

CONFIG = REPOSITORY / "recipes" / "deepspeed_zero2.json"

if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("on 4.57 rounding differs from DDP's", allow_module_level=True)
pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed", reason="it is in the extra `deepspeed`")


@pytest.fixture(params=["train-stage1", "train-stage2"])
def train(request, tmp_path):
    """Runs a recipe in two processes on CPUs, and returns what it wrote."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

    def make_recipe(output: str):
        settings = {"training.max_steps": 4, "training.save_steps": 2}
        if request.param == "train-stage1":
            base, data = (request.getfixturevalue(name) for name in ("base", "data"))
            return recipe_of(base, data, tmp_path / output, **settings)
        make = request.getfixturevalue("make_stage2_recipe")
        return make(output, mask="sampled", rewards={"retention": 1.0}, **settings)

    def run(output: str, *flags: str) -> dict[str, torch.Tensor]:
        recipe, path = make_recipe(output), tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(asdict(recipe)))
        command = [*launcher, "-m", "glimpseprune.cli", request.param, "--recipe", str(path)]
        subprocess.run([*command, *flags], cwd=REPOSITORY, env=environment, check=True, timeout=300)
        files = Path(recipe.output).glob("*.safetensors")
        return {name: each for file in files for name, each in load_file(file).items()}

    return run


def test_zero_2_trains_as_ddp_does_and_resumes(train, tmp_path):
    expected = train("ddp")
    sharded = ("--set", f"training.deepspeed={CONFIG}")
    whole = train("whole", *sharded)
    checkpoint = tmp_path / "whole.checkpoints" / "checkpoint-2"
    assert list(checkpoint.glob("global_step2/*optim_states.pt"))
    shutil.copytree(checkpoint, tmp_path / "resumed.checkpoints" / checkpoint.name)
    resumed = train("resumed", *sharded, "--resume")
    assert expected.keys() == whole.keys() == resumed.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(whole[name], weight, atol=1e-6, rtol=1e-5)
        assert torch.equal(resumed[name], whole[name]), name
