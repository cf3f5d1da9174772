"""`glimpseprune answer --engine ray`: actors that answer, die and are replaced, and two nodes.

The tests need Ray (`pip install '.[ray]'`) and skip without it.
"""

import json
import random
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import answering_stand_ins
import pytest
from answering_stand_ins import (
    STAND_IN,
    PixelTeller,
    can_run_stand_ins,
    run_stand_in,
    run_until_done,
)
from PIL import Image

from glimpseprune.answering.ray_engine import RayPool
from glimpseprune.cli import main
from glimpseprune.tiny_world.dataset import write_pages

ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
pytest.importorskip("ray.data", reason="needs Ray Data: pip install '.[ray]'")

OBJECT_STORE = 100_000_000
POOL = RayPool(cpus=0.5)
QUESTIONS = 12


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, with more processors than it may have."""
    ray.cloudpickle.register_pickle_by_value(answering_stand_ins)
    ray.init(
        "local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=OBJECT_STORE,
    )
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(answering_stand_ins)


@pytest.fixture
def questions(tmp_path):
    """Forty rows about four images, one of which is none."""
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 50, 99)).save(tmp_path / f"{number}.png")
    rows = [{"question": f"{n}?", "image": f"{n % 4}.png"} for n in range(40)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: row[name] for name in row if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Questions about pages, and their answers in one process."""
    folder = tmp_path_factory.mktemp("local")
    path = write_pages(folder, "test", range(3), 3)
    lines = path.read_text().splitlines()[:QUESTIONS]
    random.Random(0).shuffle(lines)
    path.write_text("\n".join([*lines, '{"question": "What?", "image": "nowhere.png"}']) + "\n")
    assert main(command_of(path, folder / "answers.jsonl")) == 0
    return path, read(folder / "answers.jsonl")


def command_of(questions: Path, output: Path) -> list[str]:
    options = ["--max-new-tokens", "8", "--batch-size", "4", "--window", "8", "--masks"]
    return ["answer", str(questions), str(output), *options]


@pytest.mark.parametrize("actors", [1, 2])
def test_actors_answer_as_one_process(cluster, local, tmp_path, actors):
    questions, expected = local
    output = tmp_path / "answers.jsonl"
    options = ["--engine", "ray", "--actors", str(actors), "--cpus-per-actor", "0.5"]
    assert main([*command_of(questions, output), *options]) == 0
    assert read(output) == expected


def test_a_run_goes_on_with_another_engine(cluster, questions, tmp_path):
    expected, output = tmp_path / "expected.jsonl", tmp_path / "answers.jsonl"
    run_stand_in(questions, expected)

    class Stops(PixelTeller):
        def answer(self, unit, pictures):
            if (unit.window, unit.index) == (1, 2):
                raise KeyboardInterrupt
            return super().answer(unit, pictures)

    with pytest.raises(KeyboardInterrupt):
        run_stand_in(questions, output, Stops)
    assert run_stand_in(questions, output, engine=POOL) == (40, 10)
    assert output.read_bytes() == expected.read_bytes()


def test_actors_that_die_are_started_again(cluster, questions, tmp_path):
    """Nothing is lost or written twice; a row over which they always die is an error."""
    expected, output = tmp_path / "expected.jsonl", tmp_path / "answers.jsonl"
    run_stand_in(questions, expected)
    notes = tmp_path / "notes"
    notes.mkdir()
    once = partial(PixelTeller, ends_over=("5?", "22?"), notes=notes)
    assert run_stand_in(questions, output, once, engine=POOL) == (40, 10)
    assert output.read_bytes() == expected.read_bytes()
    assert sorted(note.name for note in notes.iterdir()) == ["22", "5"]

    always = partial(PixelTeller, ends_over=("0?",))
    poisoned = tmp_path / "poisoned.jsonl"
    assert run_stand_in(questions, poisoned, always, engine=POOL) == (40, 11)
    first, *others = read(poisoned)
    assert first["error"] == "3 actors in turn ended over this row" and first["answer"] is None
    assert others == read(expected)[1:]


def test_a_run_ends_where_no_actor_lives(cluster, questions, tmp_path):
    class Never(PixelTeller):
        def __init__(self):
            raise ValueError("there is no model")

    with pytest.raises(ValueError, match="there is no model"):
        run_stand_in(questions, tmp_path / "answers.jsonl", Never, engine=POOL)
    assert not (tmp_path / "answers.jsonl").exists()


def test_without_ray_a_sentence_says_how(questions, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="pip install"):
        run_stand_in(questions, tmp_path / "answers.jsonl", engine=POOL)


class NodeTeller(PixelTeller):
    """Answers with the node that it is on."""

    def answer(self, unit, pictures):
        answers = super().answer(unit, pictures)
        node = ray.get_runtime_context().get_node_id()
        return [answer | {"answer": node} for answer in answers]


@contextmanager
def two_nodes():
    """Two `ray start` processes on this machine, which end with the context; their address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1"]
    common += ["--disable-usage-stats", "--object-store-memory", str(OBJECT_STORE)]
    address = f"127.0.0.1:{port}"
    head = ["--head", "--node-ip-address", "127.0.0.1", "--port", str(port)]
    head += ["--include-dashboard", "false"]
    nodes = []
    try:
        for options in (head, ["--address", address, "--node-ip-address", "127.0.0.1"]):
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            nodes.append(subprocess.Popen([*common, *options], **quiet))
        yield address
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait(60)


@pytest.mark.slow
def test_two_nodes_share_a_job(local, questions, tmp_path):
    """`pytest tests/test_answer_ray.py -m slow`: an actor on each, with a stand-in and a model."""
    ray.shutdown()
    command, expected = local
    with two_nodes() as address:
        for _ in range(60):
            time.sleep(2)
            try:
                ray.init(address, log_to_driver=False)
            except ConnectionError:
                continue
            if len([node for node in ray.nodes() if node["Alive"]]) == 2:
                break
            ray.shutdown()
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        ray.cloudpickle.register_pickle_by_value(answering_stand_ins)
        pool = RayPool(actors=2)
        slow = partial(NodeTeller, seconds=0.5)
        assert run_stand_in(questions, tmp_path / "nodes.jsonl", slow, engine=pool) == (40, 10)
        found = [row["answer"] for row in read(tmp_path / "nodes.jsonl")]
        assert len({node for node in found if node is not None}) == 2
        ray.shutdown()
        output = tmp_path / "answers.jsonl"
        options = ["--engine", "ray", "--actors", "2", "--ray-address", address]
        assert main([*command_of(command, output), *options]) == 0
        assert read(output) == expected


@pytest.mark.slow
def test_a_killed_run_over_ray_ends_in_the_same_file(questions, tmp_path, monkeypatch):
    """`pytest tests/test_answer_ray.py -m slow`: what started the job is killed."""
    can_run_stand_ins(monkeypatch)
    expected, output = tmp_path / "expected.jsonl", tmp_path / "answers.jsonl"
    run_stand_in(questions, expected)
    command = [sys.executable, STAND_IN, str(questions), str(output), "--reads", "--ray"]
    assert run_until_done([*command, "--seconds", "1"], output, kills=3, within=1.0, seed=0) == 3
    assert output.read_bytes() == expected.read_bytes()
