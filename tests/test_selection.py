import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import select_slowly

from modeling_glimpseprune.selection import select_visual_tokens

# Few distinct values, so that ties and scores exactly at a threshold are common.
LOGITS = st.sampled_from([-30.0, -1.5, -0.25, 0.0, 0.25, 1.5, 30.0]) | st.floats(-5, 5, width=32)
THRESHOLDS = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)
RATIOS = st.none() | st.sampled_from([0.111, 0.25, 0.5, 0.7, 1.0]) | st.floats(0.001, 1)


def select(rows: list[list[float]], threshold=0.5, max_ratio=None, min_tokens=0) -> list:
    """The rule under test, applied to the scores of each row: a list of booleans a row."""
    sizes = [len(row) for row in rows]
    keep = select_visual_tokens(
        importance=torch.tensor([score for row in rows for score in row]),
        rows=torch.arange(len(rows)).repeat_interleave(torch.tensor(sizes)),
        num_rows=len(rows),
        prune_threshold=threshold,
        max_keep_ratio=max_ratio,
        min_keep_tokens=min_tokens,
    )
    assert keep.dtype == torch.bool
    return [piece.tolist() for piece in keep.split(sizes)]


@settings(deadline=None, max_examples=300)
@given(
    rows=st.lists(st.lists(LOGITS, max_size=12), min_size=1, max_size=4),
    threshold=THRESHOLDS,
    max_ratio=RATIOS,
    min_tokens=st.integers(0, 15),
)
def test_matches_the_slow_rule(rows, threshold, max_ratio, min_tokens):
    expected = [select_slowly(row, threshold, max_ratio, min_tokens) for row in rows]
    assert select(rows, threshold, max_ratio, min_tokens) == expected


def test_the_threshold_itself_is_dropped():
    assert select([[0.0, 1e-3, -1e-3]], threshold=0.5) == [[False, True, False]]


def test_earlier_of_equal_tokens_ranks_first():
    assert select([[2.0, 3.0, 2.0, 2.0]], max_ratio=0.5) == [[True, True, False, False]]
    assert select([[-2.0, -3.0, -2.0]], min_tokens=1) == [[True, False, False]]


def test_rows_are_bounded_by_themselves():
    rows = [[1.0, 2.0, 3.0, 4.0], [], [-1.0, -2.0]]
    expected = [[False, False, True, True], [], [True, False]]
    assert select(rows, max_ratio=0.5, min_tokens=1) == expected


def test_no_visual_tokens_at_all():
    assert select([[], []], min_tokens=3) == [[], []]


def test_minimum_wins_over_the_ratio():
    assert select([[1.0, 2.0, 3.0, 4.0]], max_ratio=0.25, min_tokens=3) == [
        [False, True, True, True]
    ]


def test_minimum_above_the_number_of_tokens_keeps_all():
    assert select([[-5.0, -6.0], [-7.0]], min_tokens=9) == [[True, True], [True]]


def test_no_minimum_may_drop_everything():
    assert select([[-5.0, -6.0]]) == [[False, False]]


@pytest.mark.parametrize("total", range(1, 40))
@pytest.mark.parametrize("max_ratio", [0.111, 0.29, 0.58, 0.7, 1.0])
def test_ratio_rounds_down_as_python_does(total, max_ratio):
    kept = sum(select([[float(score) for score in range(1, total + 1)]], max_ratio=max_ratio)[0])
    assert kept == int(max_ratio * total)


def test_low_precision_scores():
    scores = torch.tensor([0.5, -0.5, 1.0], dtype=torch.bfloat16)
    keep = select_visual_tokens(scores, torch.zeros(3, dtype=torch.long), 1, 0.5, 0.4, 0)
    assert keep.tolist() == [False, False, True]
