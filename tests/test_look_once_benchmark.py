"""The benchmark of looks on tiny models: ways answer alike, and the page shows the figures."""

import pytest

from benchmarks.efficiency.workload import Pair
from benchmarks.look_once.measurement import Workload, measure
from benchmarks.look_once.page import counted, write_page
from glimpseprune.portable import write_json

LAYERS, TEXT, NEW = 3, 4, 4


@pytest.fixture
def family():
    return "qwen2_5_vl"


def measured(models) -> dict:
    for model in models:
        model.requires_grad_(False)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return measure(Pair(*models), Workload(24, TEXT, 4, 0.25, NEW, (1, 0), 2))


def test_what_is_measured(build_models):
    point = measured(build_models(hidden_size=64, num_layers=LAYERS))
    ways = point["ways"]
    assert set(point["equal answers"].values()) == {4}
    assert len(ways) == 6 and point["kept"] == point["visual"] // 4
    prefix = point["visual"] + point["text"] - TEXT
    assert ways["stock fresh"]["bytes held"] == ways["fresh, P = 1"]["bytes held"] == 0
    cache = ways["stock, prefix cache"]["bytes held"]
    assert ways["look, P = 0"]["bytes held"] < ways["look, P = 1"]["bytes held"]
    per_token = cache // prefix
    kept = point["text"] + point["kept"] + NEW - 1
    for layer in (0, 1):
        for name in ("look", "fresh"):
            way = ways[f"{name}, P = {layer}"]
            assert way["bytes of a question's keys and values"] == kept * per_token
    for way in ways.values():
        for name in ("seconds to the first token", "seconds of the answer"):
            assert [len(of_repetition) for of_repetition in way[name]] == [4, 4]


def test_page(build_models, tmp_path):
    results, page = tmp_path / "look_once.json", tmp_path / "page.md"
    write_page(results, page)
    assert counted() in page.read_text() and "## Measured" not in page.read_text()
    point = measured(build_models(hidden_size=64, num_layers=LAYERS))
    write_json(results, {"machine": {"device": "a machine"}, "settings": {}, "points": [point]})
    write_page(results, page)
    text = page.read_text()
    assert "device: a machine." in text and "| seconds of 4 questions |" in text
    assert "| seconds of 8 questions |" not in text and "look, P = 0 4 of 4" in text


def test_counted_figures():
    text = counted()
    assert "19 questions at P = 18 and 17 questions at P = 5" in " ".join(text.split())
    assert "| 16 | 1796.6 | 122.2 | 1390.4 | 117.5 | 0.065 | 0.962 | 0.085 |" in text
    assert "| MiB held by a look, bfloat16 | 243.5 |" in text
