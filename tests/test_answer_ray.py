"""`glimpseprune answer --engine ray`: actors that answer, die and are replaced, and two nodes.

The tests need Ray (`pip install '.[ray]'`) and skip without it.
"""

import json
import random
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

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

from glimpseprune.answering.journal import beside
from glimpseprune.answering.ray_engine import RayPool
from glimpseprune.cli import main
from glimpseprune.tiny_world.dataset import write_pages

ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
pytest.importorskip("ray.data", reason="needs Ray Data: pip install '.[ray]'")

OBJECT_STORE = 100_000_000
POOL = RayPool(actors=2, cpus=1)  # which leaves no processor to others
QUESTIONS = 12


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, as if it had two processors."""
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
    options = ["--engine", "ray", "--actors", str(actors)]
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


def test_answers_come_unit_by_unit(cluster, questions, tmp_path):
    """What goes through an actor is a unit, not all that was read together."""
    output = tmp_path / "answers.jsonl"

    def lines() -> list[str]:
        return beside(output, "journal").read_text().splitlines()

    class Waits(PixelTeller):
        answered = 0

        def answer(self, unit, pictures):
            begun = time.monotonic()
            while len(lines()) < self.answered and time.monotonic() - begun < 20:
                time.sleep(0.1)
            self.answered += 1
            written = str(len(lines()))
            return [row | {"answer": written} for row in super().answer(unit, pictures)]

    assert run_stand_in(questions, output, Waits, window_rows=40, engine=RayPool(1)) == (40, 10)
    told = {row["answer"] for row in read(output) if row["error"] is None}
    assert told < {"0", "1", "2", "3"} and len(told) == 3  # one of four images is none


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


@contextmanager
def two_nodes(monkeypatch) -> Iterator[str]:
    """Two `ray start` processes on this machine, which end with the context; their address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1"]
    common += ["--disable-usage-stats", "--object-store-memory", str(OBJECT_STORE)]
    common += ["--node-ip-address", "127.0.0.1"]
    head = ["--head", "--port", address.rpartition(":")[2], "--include-dashboard", "false"]
    with TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # paths of sockets are short
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex())
        nodes = []
        try:
            for options in (head, ["--address", address]):
                log = Path(folder, f"node_{len(nodes)}.log")
                with open(log, "w") as file:
                    nodes.append(subprocess.Popen([*common, *options], stdout=file, stderr=file))
                wait_for("--block", log)
            yield address
        finally:
            for node in reversed(nodes):
                node.terminate()
                node.wait(60)


def wait_for(words: str, log: Path) -> None:
    for _ in range(240):
        if words in log.read_text():
            return
        time.sleep(0.5)
    raise TimeoutError(log.read_text())


@pytest.mark.slow
def test_two_nodes_share_a_job(local, questions, tmp_path, monkeypatch):
    """`pytest tests/test_answer_ray.py -m slow`: an actor on each, with a stand-in and a model."""
    can_run_stand_ins(monkeypatch)
    pages, expected = local
    nodes, answers = tmp_path / "nodes.jsonl", tmp_path / "answers.jsonl"
    with two_nodes(monkeypatch) as address:
        command = [sys.executable, STAND_IN, str(questions), str(nodes), "--ray", address]
        command += ["--actors", "2", "--seconds", "1", "--reads", "--tell-nodes"]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        command = [sys.executable, "-m", "glimpseprune.cli", *command_of(pages, answers)]
        command += ["--engine", "ray", "--actors", "2", "--ray-address", address]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    told = [row["answer"] for row in read(nodes) if row["error"] is None]
    assert len(told) == 30 and len(set(told)) == 2
    assert read(answers) == expected


@pytest.mark.slow
def test_a_killed_run_over_ray_ends_in_the_same_file(questions, tmp_path, monkeypatch):
    """`pytest tests/test_answer_ray.py -m slow`: what started the job is killed."""
    can_run_stand_ins(monkeypatch)
    expected, output = tmp_path / "expected.jsonl", tmp_path / "answers.jsonl"
    run_stand_in(questions, expected)
    command = [sys.executable, STAND_IN, str(questions), str(output), "--reads", "--ray", "local"]
    assert run_until_done([*command, "--seconds", "1"], output, kills=3, within=1.0, seed=0) == 3
    assert output.read_bytes() == expected.read_bytes()
