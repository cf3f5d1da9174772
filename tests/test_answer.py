"""`glimpseprune answer` in one process: what it answers, what it survives, what it refuses."""

import base64
import json
import pickle
import random
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from answering_stand_ins import (
    STAND_IN,
    PixelTeller,
    can_run_stand_ins,
    run_stand_in,
    run_until_done,
)
from PIL import Image

from glimpseprune.answering.answerer import Answerer, AnswerSettings, DeviceLost
from glimpseprune.answering.journal import Journal, beside
from glimpseprune.answering.questions import open_questions
from glimpseprune.answering.units import units_of_window
from glimpseprune.baselines.method import Method, OwnPruning
from glimpseprune.cli import main
from glimpseprune.commands.evaluate import read_samples
from glimpseprune.evaluation import evaluate
from glimpseprune.loading import load_model
from glimpseprune.package_files import TINY_MODEL
from glimpseprune.tiny_world.dataset import write_pages

PAGES, QUESTIONS = 4, 12
POISON = [
    {"question": "What is this?", "image": "damaged.png"},
    {"question": "What is this?", "image": "large.png"},
    {"question": "What is this?", "image": "nowhere.png"},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Questions about pages, shuffled, so that those of a page are apart."""
    path = write_pages(tmp_path_factory.mktemp("world"), "test", range(PAGES), 3)
    lines = path.read_text().splitlines()[:QUESTIONS]
    random.Random(0).shuffle(lines)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY_MODEL)


@pytest.fixture
def mixed(tmp_path):
    """Thirty rows about five images, three of them poisoned, one no row at all."""
    for number in range(5):
        Image.new("RGB", (8 + number, 8), (number, 50, 99)).save(tmp_path / f"{number}.png")
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG no more")
    Image.new("RGB", (200, 200)).save(tmp_path / "large.png")
    rows = [
        {"id": f"q{number}", "question": f"How about {number}?", "image": f"{number % 5}.png"}
        for number in range(30)
    ]
    for place, poison in zip((3, 12, 29), POISON, strict=True):
        rows[place] = poison
    return write_lines(tmp_path / "questions.jsonl", [*rows, "no object"])


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
        return parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{name: row[name] for name in row if name != "seconds"} for row in rows]


@pytest.mark.parametrize(("options", "method"), [([], OwnPruning()), (["--no-prune"], Method())])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_answers_are_those_of_evaluate(world, tiny, tmp_path, options, method, suffix):
    output = tmp_path / f"answers.{suffix}"
    command = ["answer", str(world), str(output), "--max-new-tokens", "16", "--batch-size", "5"]
    assert main([*command, *options, "--masks"]) == 0
    rows = read(output)
    samples = read_samples(world, None, QUESTIONS, seed=0)
    expected = {each.sample.number: each for each in evaluate(*tiny, samples, [method]).answers[0]}
    assert [row["row"] for row in rows] == list(range(QUESTIONS))
    for row in rows:
        answer = expected[row["row"]]
        assert row["question"] == answer.sample.question and row["answer"] == answer.text
        assert row["total"] == answer.visual and row["kept"] == answer.by_layer[-1]
        assert row["retention"] == round(answer.kept, 6)
        assert row["seconds"] > 0 and row["error"] is None and row["id"] is None
        assert row["kept"] == sum(row["mask"])
        assert row["total"] == len(row["mask"]) == sum(int(np.prod(grid)) for grid in row["grids"])


def test_rows_of_an_image_share_a_look(world, tiny, monkeypatch):
    """However far apart they stand in a window, and however many they are."""
    looked = []
    model = tiny[0]
    look = model.look
    monkeypatch.setattr(
        model, "look", lambda **inputs: looked.append(len(inputs["input_ids"])) or look(**inputs)
    )
    answerer = Answerer(*tiny, AnswerSettings(batch_size=3, max_new_tokens=2))
    questions = open_questions(world)
    units = list(units_of_window(questions, 0, QUESTIONS, batch_size=3))
    for unit in units:
        assert len(answerer.answer(unit, answerer.pictures(unit))) == len(unit.rows)
    images = {json.loads(line)["image"] for line in world.read_text().splitlines()}
    assert sum(looked) == len(images) < QUESTIONS
    asked = [row.number for unit in units for row in unit.rows]
    assert sorted(asked) == list(range(QUESTIONS)) and asked != sorted(asked)


def test_without_pruning_nothing_is_left_out(world, tiny, monkeypatch):
    """Whatever the configuration says: the stock model sees every patch."""
    encoded = []
    model = tiny[0]
    handle = model.model.visual.patch_embed.register_forward_hook(
        lambda _, args, __: encoded.append(len(args[0]))
    )

    def answers(prune: bool) -> tuple[list[dict], int]:
        encoded.clear()
        answerer = Answerer(*tiny, AnswerSettings(prune=prune, max_new_tokens=8))
        units = units_of_window(open_questions(world), 0, QUESTIONS, batch_size=16)
        rows = [each for unit in units for each in answerer.answer(unit, answerer.pictures(unit))]
        return without_seconds(rows), sum(encoded)

    expected = answers(False)
    monkeypatch.setattr(model.config, "redundant_patches", 48)
    assert answers(False) == expected and all(row["error"] is None for row in expected[0])
    assert 0 < answers(True)[1] < expected[1]
    handle.remove()


@pytest.mark.parametrize("form", ["parquet", "structs", "shards", "datasets", "data URLs"])
def test_images_come_as_paths_bytes_and_urls(mixed, tmp_path, form):
    """The same answers, whatever holds the questions."""
    rows = [json.loads(line) for line in mixed.read_text().splitlines()]
    rows = [row for row in rows[:-1] if row["image"] != "nowhere.png"]
    as_paths = write_lines(tmp_path / "as_paths.jsonl", rows)
    contents = [(mixed.parent / row["image"]).read_bytes() for row in rows]
    path = tmp_path / ("questions.parquet" if form in ("parquet", "structs") else "questions")
    if form == "data URLs":
        for row, content in zip(rows, contents, strict=True):
            row["image"] = "data:image/png;base64," + base64.b64encode(content).decode()
        path = write_lines(tmp_path / "urls.jsonl", rows)
    elif form == "datasets":
        datasets = pytest.importorskip("datasets", reason="a folder of datasets needs datasets")
        columns = {"image": [{"bytes": each, "path": None} for each in contents]}
        columns |= {name: [row.get(name) for row in rows] for name in ("question", "id")}
        features = {"image": datasets.Image(), "question": datasets.Value("string")}
        features = datasets.Features(features | {"id": datasets.Value("string")})
        datasets.Dataset.from_dict(columns, features).save_to_disk(path)
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
        from pyarrow.parquet import write_table

        for row, content in zip(rows, contents, strict=True):
            row["image"] = {"bytes": content, "path": None} if form == "structs" else content
        if form == "shards":
            path.mkdir()
            for number, first in enumerate((0, 10)):
                part = rows[first : first + 10] if first == 0 else rows[first:]
                write_table(pyarrow.Table.from_pylist(part), path / f"{number}.parquet")
        else:
            write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    run_stand_in(as_paths, tmp_path / "expected.jsonl")
    run_stand_in(path, tmp_path / "answers.jsonl")
    expected, found = read(tmp_path / "expected.jsonl"), read(tmp_path / "answers.jsonl")
    assert [row["error"] is None for row in found] == [row["error"] is None for row in expected]
    for row in [*expected, *found]:
        row["error"] = None  # which names the file, or says that there were bytes
    assert found == expected


def test_images_are_fetched(mixed, tmp_path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = partial(Quiet, directory=mixed.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        names = ["0.png", "missing.png", "questions.jsonl"]
        rows = [{"question": "What?", "image": f"{base}/{name}"} for name in names]
        run_stand_in(write_lines(tmp_path / "urls.jsonl", rows), tmp_path / "answers.jsonl")
        server.shutdown()
    fetched, missing, other = read(tmp_path / "answers.jsonl")
    assert fetched["error"] is None and fetched["answer"]
    assert "missing.png: status 404" in missing["error"]
    assert "cannot read the image" in other["error"]


def test_poisoned_rows_end_as_errors(world, tmp_path):
    """All other rows are answered as without them."""
    folder = world.parent
    (folder / "damaged.png").write_bytes(b"\x89PNG no more")
    Image.new("RGB", (900, 900)).save(folder / "large.png")
    rows = [json.loads(line) for line in world.read_text().splitlines()]
    placeholder = {"question": "What is <|image_pad|>?", "image": rows[0]["image"]}
    poison = [*POISON, placeholder, {"image": "large.png"}, {"question": "Where?"}]
    clean, poisoned = folder / "clean.jsonl", folder / "poisoned.jsonl"
    write_lines(clean, rows)
    write_lines(poisoned, [*poison[:3], *rows, *poison[3:]])
    with open(poisoned, "ab") as lines:
        lines.write(b'{"question": "Is this li')
    options = ["--max-new-tokens", "8", "--max-pixels", "800000"]
    for questions in (clean, poisoned):
        output = tmp_path / questions.name
        assert main(["answer", str(questions), str(output), *options]) == 0
    found = read(tmp_path / poisoned.name)
    errors = [row["error"] for row in found if row["error"] is not None]
    sentences = [
        *("cannot read the image", "is too large: 900 x 900 pixels, more than 800000"),
        *("there is no image", "more placeholders", "question must be a text", "image must be"),
        "not JSON",
    ]
    for sentence, error in zip(sentences, errors, strict=True):
        assert sentence in error
    answered = [row | {"row": row["row"] - 3} for row in found if row["error"] is None]
    assert without_seconds(answered) == without_seconds(read(tmp_path / clean.name))


def test_what_does_not_fit_is_asked_alone(world, tiny, monkeypatch):
    """Where memory ends; a device that is lost ends the run instead."""
    model = tiny[0]
    answerer = Answerer(*tiny, AnswerSettings(batch_size=6, max_new_tokens=4))
    unit = next(units_of_window(open_questions(world), 0, QUESTIONS, batch_size=6))
    pictures = answerer.pictures(unit)
    expected = without_seconds(answerer.answer(unit, pictures))
    generate, look = model.generate, model.look

    def limited(method, most):
        def call(**inputs):
            if len(inputs["input_ids"]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            return method(**inputs)

        return call

    monkeypatch.setattr(model, "generate", limited(generate, 1))
    assert without_seconds(answerer.answer(unit, pictures)) == expected
    monkeypatch.setattr(model, "look", limited(look, 1))
    assert without_seconds(answerer.answer(unit, pictures)) == expected
    monkeypatch.setattr(model, "look", limited(look, 0))
    failed = answerer.answer(unit, pictures)
    assert all("too large for the memory: OutOfMemoryError: CUDA" in row["error"] for row in failed)

    def lost(**inputs):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(model, "look", lost)
    with pytest.raises(DeviceLost, match="accelerator is lost"):
        answerer.answer(unit, pictures)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_journal_cut_anywhere_ends_in_the_same_file(mixed, tmp_path, suffix):
    expected = tmp_path / f"expected.{suffix}"
    rows, errors = run_stand_in(mixed, expected)
    assert (rows, errors) == (31, 4)
    whole = tmp_path / "whole.jsonl"

    class Stops(PixelTeller):
        def answer(self, unit, pictures):
            if (unit.window, unit.index) == (1, 2):
                raise KeyboardInterrupt
            return super().answer(unit, pictures)

    with pytest.raises(KeyboardInterrupt):
        run_stand_in(mixed, whole, Stops)
    journal = beside(whole, "journal").read_bytes()
    settings = beside(whole, "run.json").read_text()
    answered = sum(len(json.loads(line)["answers"]) for line in journal.splitlines())
    for cut in [*range(0, len(journal), 97), len(journal)]:
        output = tmp_path / f"cut_{cut}.{suffix}"
        beside(output, "run.json").write_text(settings)
        beside(output, "journal").write_bytes(journal[:cut])
        with pytest.raises(KeyboardInterrupt):
            run_stand_in(mixed, output, Stops)  # and cut again, behind what was cut before
        with Journal(output, 31, 16).opened() as found:
            assert found.answered == answered
        assert run_stand_in(mixed, output) == (31, 4)
        assert output.read_bytes() == expected.read_bytes()
        assert not beside(output, "journal").exists()


def test_damage_in_a_journal_is_asked_again(mixed, tmp_path):
    """What stands behind the damage is asked again too, and written once."""
    expected, output = tmp_path / "expected.jsonl", tmp_path / "answers.jsonl"
    run_stand_in(mixed, expected)

    class Stops(PixelTeller):
        def answer(self, unit, pictures):
            if unit.window == 1:
                raise KeyboardInterrupt
            return super().answer(unit, pictures)

    with pytest.raises(KeyboardInterrupt):
        run_stand_in(mixed, output, Stops)
    journal = beside(output, "journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[1] = b"\0" * (len(lines[1]) - 1) + b"\n"
    journal.write_bytes(b"".join(lines))
    run_stand_in(mixed, output)
    assert output.read_bytes() == expected.read_bytes()


def test_a_killed_run_ends_in_the_same_file(mixed, tmp_path, monkeypatch):
    can_run_stand_ins(monkeypatch)
    expected, output = tmp_path / "expected.parquet", tmp_path / "answers.parquet"
    run_stand_in(mixed, expected)
    command = [sys.executable, STAND_IN, str(mixed), str(output), "--reads", "--seconds", "0.1"]
    assert run_until_done(command, output, kills=3, within=0.1, seed=0) == 3
    assert output.read_bytes() == expected.read_bytes()


@pytest.mark.slow
def test_twenty_kills_of_two_thousand_rows(tmp_path):
    """`pytest tests/test_answer.py -m slow -k twenty` (fifteen minutes on two busy cores)."""
    path = write_pages(tmp_path, "test", range(500), 0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for place, poison in zip((100, 900, 1999), POISON, strict=True):
        rows[place] = poison
    assert len(rows) == 2000
    Image.new("RGB", (900, 900)).save(tmp_path / "large.png")
    (tmp_path / "damaged.png").write_bytes(b"no image")
    questions = write_lines(tmp_path / "questions.jsonl", rows)
    outputs = [tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"]
    options = ["--max-new-tokens", "4", "--max-pixels", "800000"]
    whole, killed = (
        [sys.executable, "-m", "glimpseprune.cli", "answer", str(questions), str(output), *options]
        for output in outputs
    )
    subprocess.run(whole, check=True, capture_output=True)
    cut = run_until_done(killed, outputs[1], kills=20, within=2.0, seed=1)
    assert cut == 20
    expected, found = (without_seconds(read(output)) for output in outputs)
    assert found == expected and [row["row"] for row in found] == list(range(2000))
    assert [row["row"] for row in found if row["error"]] == [100, 900, 1999]


def test_two_processes_do_not_write_one_output(mixed, tmp_path):
    output = tmp_path / "answers.jsonl"
    with Journal(output, 31, 16).opened():
        with pytest.raises(ValueError, match="another process writes"):
            run_stand_in(mixed, output)


def test_a_unit_is_written_once(tmp_path):
    """Also one that comes again when its window is complete, or in another process."""
    output = tmp_path / "answers.jsonl"
    row = {"row": 0, "error": None}
    for _ in range(2):
        with Journal(output, num_rows=3, window_rows=2).opened() as journal:
            for window, index, number in [(0, 0, 0), (0, 0, 0), (0, 1, 1), (0, 1, 1), (1, 0, 2)]:
                journal.add(window, index, [row | {"row": number}])
            assert journal.answered == 3 and not list(journal.open_windows())
            assert [answer["row"] for answer in journal.answers()] == [0, 1, 2]


def test_an_output_is_of_one_run(mixed, tmp_path):
    output = tmp_path / "answers.jsonl"
    assert run_stand_in(mixed, output) == (31, 4)
    content = output.read_bytes()
    assert run_stand_in(mixed, output) == (31, None)  # as when killed behind its last write
    with pytest.raises(ValueError, match="batch_size was 4, now 5"):
        run_stand_in(mixed, output, batch_size=5)
    beside(output, "run.json").unlink()
    with pytest.raises(ValueError, match="there is an output .* already"):
        run_stand_in(mixed, output)
    assert output.read_bytes() == content


def test_a_run_knows_its_questions(mixed, tmp_path, capsys):
    output = str(tmp_path / "answers.jsonl")
    beside(Path(output), "run.json").write_text(json.dumps({"questions": []}))
    assert main(["answer", str(mixed), output]) == 2
    assert "questions was []" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("absent.jsonl", None, "there are no questions"),
        ("empty.jsonl", b"\n", "there are no questions to answer"),
        ("questions.csv", b"a,b\n", "questions are JSON lines"),
        ("questions.parquet", b"none", "cannot read"),
    ],
)
def test_questions_that_are_none(tmp_path, capsys, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["answer", str(tmp_path / name), str(tmp_path / "answers.jsonl")]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("answers.*"))


def test_columns_and_splits_are_named(tmp_path):
    datasets = pytest.importorskip("datasets", reason="a folder of datasets needs datasets")
    questions = datasets.Dataset.from_dict({"question": ["What?"], "picture": ["a.png"]})
    questions.to_parquet(tmp_path / "questions.parquet")
    questions.save_to_disk(tmp_path / "folder")
    for path in ("questions.parquet", "folder"):
        with pytest.raises(ValueError, match="no column image: its columns are question, picture"):
            open_questions(tmp_path / path)
    datasets.DatasetDict(train=questions, test=questions).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="holds the splits train, test"):
        open_questions(tmp_path / "splits")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--max-keep-ratio", "2"], "max_keep_ratio"),
        (["--batch-size", "0"], "batch_size must be 1 or more"),
        (["--model", "./nowhere"], "nowhere"),
    ],
)
def test_settings_are_refused_before_rows_fail(
    mixed, tmp_path, capsys, monkeypatch, options, sentence
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["answer", str(mixed), str(tmp_path / "answers.jsonl"), *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "answers.jsonl").exists()


def test_another_format_is_refused(mixed, tmp_path):
    with pytest.raises(ValueError, match="answers are written to .jsonl or .parquet"):
        run_stand_in(mixed, tmp_path / "answers.csv")


def test_ranges_of_parquet(tmp_path):
    """In any order, several at once, and sent to other processes in between."""
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow.parquet import write_table

    rows = [{"question": str(number), "image": "a"} for number in range(200)]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=90)
    questions = open_questions(tmp_path / "a.parquet")
    left_open = questions.rows(0, 100)
    assert next(left_open).question == "0"
    for start, stop in [(0, 70), (70, 140), (140, 999), (200, 300), (10, 20), (20, 30), (5, 6)]:
        found = [int(row.question) for row in questions.rows(start, stop)]
        assert found == [*range(start, min(stop, 200))]
        if start == 10:
            questions = pickle.loads(pickle.dumps(questions))
    assert [row.number for row in left_open] == [*range(1, 100)]


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 700])
def test_ranges_of_json_lines(tmp_path, rows):
    path = tmp_path / "questions.jsonl"
    path.write_text(
        "\n\n".join(json.dumps({"question": str(n), "image": "a"}) for n in range(rows))
    )
    questions = open_questions(path)
    assert len(questions) == rows
    for start, stop in [
        (0, rows),
        (0, 10),
        (250, 260),
        (255, 257),
        (256, 600),
        (rows - 1, rows + 5),
    ]:
        found = list(questions.rows(max(start, 0), stop))
        assert [row.number for row in found] == list(range(max(start, 0), min(stop, rows)))
        assert [row.question for row in found] == [str(row.number) for row in found]


def peak_of_memory(folder: Path, rows: int, monkeypatch) -> int:
    """KiB of a run over rows with images of 20 KiB each, all different, in one row group."""
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow.parquet import write_table

    generator = np.random.default_rng(0)
    questions = folder / f"{rows}.parquet"
    images = [generator.bytes(20 << 10) for _ in range(rows)]
    columns = {"question": [f"What is {number}?" for number in range(rows)], "image": images}
    write_table(pyarrow.table(columns), questions, row_group_size=rows)
    can_run_stand_ins(monkeypatch)
    output = folder / f"{rows}_answers.parquet"
    command = [sys.executable, STAND_IN, str(questions), str(output), "--window", "256"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(printed.rpartition(":")[2])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch, capsys):
    """`pytest tests/test_answer.py -m slow -k memory`: 20,000 rows are 400 MiB of images."""
    peaks = {rows: peak_of_memory(tmp_path, rows, monkeypatch) for rows in (2_000, 5_000, 20_000)}
    with capsys.disabled():
        print("\npeak of memory, MiB:", {rows: peak >> 10 for rows, peak in peaks.items()})
    # KiB; allocators differ by some MiB from run to run, the images alone are 360 MiB more
    assert peaks[20_000] - peaks[2_000] < 90 << 10


def test_images_of_bytes_are_held_once(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow.parquet import write_table

    buffer = BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    rows = [{"question": f"{n}?", "image": buffer.getvalue()} for n in range(9)]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "questions.parquet")
    (unit,) = units_of_window(open_questions(tmp_path / "questions.parquet"), 0, 16, 4)
    (group,) = unit.groups
    assert group.image == buffer.getvalue() and len(group.rows) == 9
    assert all(row.image is None for row in group.rows)
