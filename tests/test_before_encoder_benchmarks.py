"""What measures encoding in part: rows that stay, document-like pages, the page about them."""

import pytest
import torch

from benchmarks.before_encoder import Report
from benchmarks.efficiency.before_encoder import document, measure, ways
from benchmarks.efficiency.before_encoder_page import counted, section
from benchmarks.efficiency.workload import Pair, build_prompt


def test_rows_that_are_there_are_not_measured_again(tmp_path):
    path, calls = tmp_path / "folder" / "report.json", []

    def measure(value: int) -> dict:
        calls.append(value)
        return {"value": value}

    first = Report(path, {"questions": 3})
    assert first.row(("pages", "full", "all"), measure, 1) == {"value": 1}
    again = Report(path, {"questions": 3})
    assert again.row(("pages", "full", "all"), measure, 2) == {"value": 1}
    assert again.row(("pages", "full", "0"), measure, 3) == {"value": 3}
    assert calls == [1, 3]
    with pytest.raises(ValueError, match="name another file"):
        Report(path, {"questions": 4})


@pytest.fixture(scope="module")
def rows_of(tmp_path_factory):
    from conftest import build_models

    models = build_models(glimpse={"glimpse_layer": 2})
    prompt = build_prompt(models.pruned, 1, 144, 5, torch.float32)
    prompt = document(prompt, models.pruned.model.visual.spatial_merge_size)
    return measure(Pair(*models), prompt, ways(2, 1, prompt.visual), "processor", 1)


def test_a_document_is_encoded_where_its_ink_is(rows_of):
    """Two lines of four tokens on 12 x 12, and one token for all the paper."""
    left_out = {name: row for name, row in rows_of.items() if name.startswith("redundant")}
    assert len(left_out) == 3 and all(row["encoded"] == 2 * 4 + 1 for row in left_out.values())
    assert rows_of["stock"]["encoded"] == 144
    assert rows_of["stock"]["first token / stock"] == 1
    assert all(0 < row["encoder"] < row["first token"] for row in rows_of.values())


def test_the_page_shows_what_was_counted_and_measured(rows_of):
    shown = section({"settings": {"clock": "processor"}, "rows": rows_of})
    assert section(None) in shown and "clock: processor" in shown
    for name, shares in counted().items():
        assert f"| {name} |" in shown
        assert all(f"{share:.3f}" in shown for share in shares)
    for name, row in rows_of.items():
        assert f"| {name} | {row['encoded']} |" in shown


def test_counted_shares_are_the_trials():
    """It had 50 other tokens and its own rounding: two thousandths."""
    encoder, alone, late, _ = counted()["a denser page of text"]
    assert encoder == pytest.approx(0.221, abs=2e-3)
    assert alone == pytest.approx(0.241, abs=2e-3)
    assert late == pytest.approx(0.191, abs=2e-3)
