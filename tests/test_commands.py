"""The command line: what it prints and writes, and sentences instead of tracebacks."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationMixin

from glimpseprune import loading
from glimpseprune.answering import answerer
from glimpseprune.cli import COMMANDS, main
from glimpseprune.package_files import SAMPLE_PAGE, TINY_MODEL
from glimpseprune.visualisation import draw_glimpse


def test_every_command_has_help(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        assert COMMANDS[command].split()[0] in capsys.readouterr().out


def test_ask_answers_prunes_and_draws(tmp_path, capsys):
    picture = tmp_path / "folder" / "picture.png"
    assert main(["ask", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    kept, total = (int(n) for n in re.search(r"kept (\d+) of (\d+)", printed).groups())
    assert "answer: " in printed and 0 < kept < total
    page = Image.open(SAMPLE_PAGE)
    assert Image.open(picture).size == (2 * page.width, page.height)


def test_ask_without_pruning_keeps_all(tmp_path, capsys):
    picture = tmp_path / "picture.png"
    assert main(["ask", "--no-prune", "--output", str(picture)]) == 0
    assert "all" in capsys.readouterr().out and not picture.exists()


def test_ask_draws_what_was_not_encoded_in_another_colour(tmp_path, capsys):
    picture = tmp_path / "picture.png"
    assert main(["ask", "--redundant-patches", "48", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    total, encoded = (int(re.search(r, printed)[1]) for r in (r"of (\d+)", r"encoded: (\d+)"))
    assert 0 < encoded < total
    drawn = np.asarray(Image.open(picture), dtype=int)
    left = drawn[:, : drawn.shape[1] // 2]
    # A dimmed pixel reaches a quarter of 255; the tint alone has more blue, and the page has no
    # blue so strong over a red so weak.
    tinted = (left[..., 2] > 100) & (left[..., 0] < 100)
    assert tinted.mean() == pytest.approx(1 - encoded / total, abs=0.02)
    assert main(["ask", "--redundant-patches", "0", "--no-prune"]) == 2
    assert "leave them out with prune=False" in capsys.readouterr().err


def test_pictures_tell_kept_dropped_and_unencoded_apart():
    page = Image.new("RGB", (6, 2), (200, 200, 200))
    keep, encoded = torch.tensor([True, False, False]), torch.tensor([True, True, False])
    importance = torch.tensor([2.0, -2.0, float("-inf")])
    drawn = np.asarray(draw_glimpse(page, keep, importance, (1, 3), encoded))[0].tolist()
    kept, dropped, unseen = drawn[0:6:2]
    assert kept == [200, 200, 200] and dropped == [50, 50, 50]
    assert unseen[2] > unseen[0] + 50 and unseen != dropped
    *scored, unscored = drawn[6::2]
    assert all(len(set(colour)) == 3 for colour in scored) and unscored == [200, 200, 200]
    without = draw_glimpse(page, keep, importance.clamp(min=-9), (1, 3))
    assert np.asarray(without)[0].tolist()[4] == dropped


def test_chat_looks_once_and_answers_until_an_empty_line(capsys, monkeypatch):
    questions = ["What is the value of CS?", "What is the value of CS?"]
    typed = iter([*questions, "", "never asked"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert main(["chat"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("looked at 1 image(s), 144 visual tokens") == 1
    answers = printed.splitlines()[2::2]
    assert answers == ["577", "577"]
    assert len(re.findall(r"kept \d+ of 144 \(\d+\.\d%\), \d+\.\d\d s", printed)) == 2


def test_chat_goes_on_with_a_conversation(capsys, monkeypatch):
    """What was said stands in the next prompt, behind the images."""
    prompts = []
    generate = GenerationMixin.generate
    monkeypatch.setattr(
        GenerationMixin,
        "generate",
        lambda self, *args, **kwargs: prompts.append(kwargs) or generate(self, *args, **kwargs),
    )
    typed = iter(["What is the value of CS?", "And of AB?"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed, ""))
    page = ["--image", str(SAMPLE_PAGE)]
    assert main(["chat", "--model", str(TINY_MODEL), *page, *page, "--max-new-tokens", "6"]) == 0
    assert "looked at 2 image(s), 288 visual tokens" in capsys.readouterr().out
    first, second = (prompt["input_ids"][0].tolist() for prompt in prompts)
    question = len(first) - 4  # both end in what opens the answer
    assert second[:question] == first[:question] and len(second) > len(first) + 6


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "there is no image"), (b"no image", "cannot read"), (b"", "cannot read")],
)
def test_ask_says_what_is_wrong_with_an_image(tmp_path, capsys, content, sentence):
    image, picture = tmp_path / "image.png", tmp_path / "picture.png"
    if content is not None:
        image.write_bytes(content)
    assert main(["ask", "--image", str(image), "--output", str(picture)]) == 2
    assert sentence in capsys.readouterr().err and not picture.exists()


@pytest.mark.parametrize(("wanted", "dtype"), [(["--dtype", "bfloat16"], "bfloat16"), ([], "auto")])
@pytest.mark.parametrize("command", ["answer", "ask", "calibrate", "chat", "evaluate"])
def test_weights_are_held_as_asked(command, wanted, dtype, tmp_path, capsys, monkeypatch):
    def load_model(path=None, device=None, dtype="auto"):
        raise ValueError(f"held in {dtype}")

    for module in (loading, answerer):
        monkeypatch.setattr(module, "load_model", load_model)
    (tmp_path / "in.jsonl").write_text('{"question": "?"}\n')
    files = [str(tmp_path / name) for name in ("in.jsonl", "out.jsonl")]
    assert main([command, *(files if command == "answer" else []), *wanted]) == 2
    assert f"held in {dtype}" in capsys.readouterr().err


def test_ask_refuses_settings_out_of_range(tmp_path, capsys):
    output = ["--output", str(tmp_path / "picture.png")]
    assert main(["ask", "--max-keep-ratio", "2", *output]) == 2
    assert "max_keep_ratio" in capsys.readouterr().err


def test_evaluate_writes_results_of_all_settings(tmp_path, capsys):
    output = tmp_path / "results.json"
    assert main(["evaluate", "--questions", "12", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    results = report["results"]
    assert report["settings"]["questions"] == 12
    assert results["all tokens"]["all"]["retention"] == 1.0
    capped = results["pruned, max_keep_ratio 0.111"]["all"]
    assert capped["questions"] == 12 and 0 < capped["retention"] <= 0.112
    assert 0 < results["pruned"]["all"]["retention"] < 1
