"""Metrics against worked examples, and the edit distance against a slow definition."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glimpseprune.metrics import anls, edit_distance, exact_match, relaxed_accuracy

TEXTS = st.text("ab ", max_size=7)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("42", "42", 1),
        (" New  York\n", "new york", 1),
        ("42.", "42", 0),
        ("", "42", 0),
        ("b", ["a", "b"], 1),
    ],
)
def test_exact_match(answer, reference, score):
    assert exact_match(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("kitten", "kitten", 1),
        ("sitten", "kitten", 5 / 6),
        ("sitting", "kitten", 1 - 3 / 7),
        ("ab", "cb", 0),  # half of it is wrong
        ("", "a", 0),
        ("", "", 1),
        ("Sitten", ["kit", "KITTEN"], 5 / 6),
    ],
)
def test_anls(answer, reference, score):
    assert anls(answer, reference) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("-95", "-100", 1),
        ("1,000", "1000", 1),
        ("50%", "0.5", 1),
        ("0.01", "0", 0),
        ("0", "0", 1),
        ("Yes", "yes", 1),
        ("no", "7", 0),
        ("nan", "7", 0),
        ("inf", "7", 0),
        ("7", "inf", 0),
        ("7", "nan", 0),
        ("7", ["8", "7.2"], 1),
    ],
)
def test_relaxed_accuracy(answer, reference, score):
    assert relaxed_accuracy(answer, reference) == score


def test_no_reference_is_an_error():
    with pytest.raises(ValueError, match="no reference"):
        exact_match("a", [])


@given(TEXTS, TEXTS)
def test_edit_distance_equals_its_definition(one, other):
    @cache
    def slow(i, j):
        if not i or not j:
            return i + j
        changed = slow(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        return min(changed, slow(i - 1, j) + 1, slow(i, j - 1) + 1)

    assert edit_distance(one, other) == slow(len(one), len(other))
