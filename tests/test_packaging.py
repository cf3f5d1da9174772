"""The package away from its repository: a wheel by itself, and a clone without symbolic links."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from fresh_process import run_fresh

from glimpseprune.loading import REPOSITORY
from glimpseprune.package_files import TINY_EARLY, TINY_MODEL, find_recipe, recipe_names

# Runs a command, and sees to it that all code of ours comes out of one folder.
COMMAND = """
import sys
from pathlib import Path

folder, repository, *arguments = sys.argv[1:]
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(repository)]
from glimpseprune.cli import main

result = main(arguments)
packages = ("conversion", "glimpseprune", "modeling_glimpseprune")
own = [m for name, m in sys.modules.items() if name.partition(".")[0] in packages]
files = [module.__file__ for module in own if getattr(module, "__file__", None)]
assert files and all(Path(file).is_relative_to(folder) for file in files), files
sys.exit(result)
"""


def run(command: list, folder: Path, place: Path) -> str:
    """What a command prints that finds our packages in `folder`, the others as this process does.

    It warns of nothing that is deprecated.

    Args:
        command: arguments of python.
        folder: in front of the search path.
        place: where it is started; the caches of Hugging Face's libraries lie beside it.
    """
    others = [str(Path(transformers.__file__).parents[1])]
    others += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    others = [path for path in others if Path(path).resolve() != REPOSITORY]
    variables = {
        "PYTHONPATH": os.pathsep.join([str(folder), *others]),
        "HF_HOME": str(place.with_name("cache")),
        "HF_HUB_OFFLINE": "1",
    }
    completed = run_fresh(*command, cwd=place, env=os.environ | variables)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert "FutureWarning" not in completed.stderr, completed.stderr
    assert "DeprecationWarning" not in completed.stderr, completed.stderr
    return completed.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that holds what `pip install` puts there out of a wheel, and nothing else."""
    scratch = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    here = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    wheel = [*pip, "wheel", "--no-deps", *here, "--wheel-dir", str(scratch), str(REPOSITORY)]
    subprocess.run(wheel, check=True)
    (file,) = scratch.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", scratch / "site", file], check=True)
    return scratch / "site"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """An empty folder."""
    folder = tmp_path_factory.mktemp("empty") / "place"
    folder.mkdir()
    return folder


@pytest.fixture
def glimpseprune(installed, place):
    """Runs a command of the installed package and returns what it prints."""

    def command(*arguments: object) -> str:
        return run(["-c", COMMAND, installed, REPOSITORY, *arguments], installed, place)

    return command


@pytest.fixture(scope="module")
def pages(installed, place) -> Path:
    """Questions about three pages, written by the installed package."""
    amount = ["--pages", 3, "--questions", 4, "--split", "train"]
    command = [installed / "bin" / "glimpseprune", "make-pages", "--output", "pages", *amount]
    run(command, installed, place)
    return place / "pages" / "train.jsonl"


def test_a_wheel_holds_the_files_that_the_commands_need(installed):
    package = installed / "glimpseprune"
    for folder in (TINY_MODEL, TINY_EARLY):
        originals = {path.name: path for path in folder.iterdir() if path.is_file()}
        copies = {path.name: path for path in (package / "hub_configs" / folder.name).glob("*.*")}
        assert copies.keys() == originals.keys()
        for name, copy in copies.items():
            assert not copy.is_symlink() and copy.read_bytes() == originals[name].read_bytes()
    recipes = {path.name for path in (package / "recipes").iterdir()}
    assert recipes == {path.name for path in (REPOSITORY / "recipes").iterdir()}
    for home in (REPOSITORY / "conversion", REPOSITORY / "glimpseprune" / "harness"):
        for path in home.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (installed / path.relative_to(REPOSITORY)).is_file(), path


def test_the_main_command_runs_from_a_wheel(glimpseprune, place):
    printed = glimpseprune("ask")
    assert "answer: " in printed and "kept" in printed
    assert (place / "glimpse.png").exists()
    assert not place.with_name("cache").joinpath("glimpseprune").exists()


def test_a_wheel_inspects_and_evaluates_its_tiny_model(glimpseprune, installed):
    printed = glimpseprune("inspect")
    assert str(installed / "glimpseprune" / "hub_configs" / "tiny") in printed
    assert "weights            sound" in printed
    printed = glimpseprune("evaluate", "--questions", 20)
    assert printed.count("questions 20") == 4


def test_a_wheel_trains_by_a_recipes_name_and_converts(glimpseprune, installed, pages):
    tiny = installed / "glimpseprune" / "hub_configs" / "tiny"
    settings = ["--set", "training.max_steps=1", "--set", "training.use_cpu=true"]
    stage1 = ["train-stage1", "--recipe", "stage1_tiny", "--base", tiny, "--data", pages]
    assert "repository: stage1" in glimpseprune(*stage1, "--output", "stage1", *settings)
    printed = glimpseprune("convert-stage1", "--run", "stage1", "--output", "published")
    assert "wrote published, verified" in printed
    assert "family             qwen2_5_vl" in glimpseprune("inspect", "published")


@pytest.mark.skipif(
    not shutil.which("git") or not (REPOSITORY / ".git").exists(), reason="this is no git clone"
)
def test_the_main_command_runs_in_a_clone_without_symbolic_links(tmp_path):
    clone, place = tmp_path / "clone", tmp_path / "place"
    git = ["git", "-c", "core.symlinks=false", "clone", "--quiet", "-c", "core.symlinks=false"]
    subprocess.run([*git, str(REPOSITORY), str(clone)], check=True)
    assert (clone / "hub_configs" / "tiny" / "glimpse.py").read_text().startswith("../")
    place.mkdir()
    printed = run(["-c", COMMAND, clone, REPOSITORY, "ask"], clone, place)
    assert "answer: " in printed and "kept" in printed
    (copy,) = (tmp_path / "cache" / "glimpseprune").iterdir()
    assert (copy / "glimpse.py").read_text().startswith('"""')


def test_recipes_are_found_by_name_and_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("stage1_tiny") == REPOSITORY / "recipes" / "stage1_tiny.yaml"
    (tmp_path / "stage1_tiny").write_text("base: here\n")
    assert find_recipe("stage1_tiny") == Path("stage1_tiny")
    assert recipe_names("stage1_") == [name for name in recipe_names() if "stage1" in name]
    with pytest.raises(FileNotFoundError, match="stage1_tinny is no recipe.* stage1_tiny, "):
        find_recipe("stage1_tinny")
