"""How right an answer is, from 0 to 1: pure functions of two texts.

Each takes the reference as one text or as several acceptable ones, of which the best counts.
"""

import math
from collections.abc import Callable, Sequence

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05


def exact_match(answer: str, reference: str | Sequence[str]) -> float:
    """1 when both texts are the same, letter case and runs of white space apart; else 0."""
    return _best(lambda each: float(_plain(answer) == _plain(each)), reference)


def anls(answer: str, reference: str | Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """Normalised edit similarity, as DocVQA scores answers (arXiv 1907.00490, equation 1).

    One minus the edit distance over the longer text's length, letter case and white space as in
    `exact_match`; 0 when the distance is `threshold` of that length or more.
    """

    def similarity(each: str) -> float:
        one, other = _plain(answer), _plain(each)
        distance = edit_distance(one, other) / max(len(one), len(other), 1)
        return 1 - distance if distance < threshold else 0.0

    return _best(similarity, reference)


def relaxed_accuracy(
    answer: str, reference: str | Sequence[str], tolerance: float = RELAXED_TOLERANCE
) -> float:
    """ChartQA's rule (arXiv 2203.10244, section 5): numbers may be off by a share of the reference.

    Where both texts are numbers ("12", "1,200", "35 %") and the reference is not zero, 1 when they
    differ by at most `tolerance` of it; everything else must match exactly.
    """

    def relaxed(each: str) -> float:
        given, wanted = _number(answer), _number(each)
        if given is None or not wanted:
            return exact_match(answer, each)
        return float(abs(given - wanted) <= tolerance * abs(wanted))

    return _best(relaxed, reference)


def edit_distance(one: str, other: str) -> int:
    """Fewest characters to insert, delete or replace to turn one text into the other."""
    previous = list(range(len(other) + 1))
    for row, left in enumerate(one, start=1):
        current = [row]
        for column, right in enumerate(other, start=1):
            replaced = previous[column - 1] + (left != right)
            current.append(min(replaced, previous[column] + 1, current[-1] + 1))
        previous = current
    return previous[-1]


def _best(score: Callable[[str], float], reference: str | Sequence[str]) -> float:
    references = [reference] if isinstance(reference, str) else reference
    if not references:
        raise ValueError("there is no reference answer to compare with")
    return max(score(each) for each in references)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _number(text: str) -> float | None:
    """The number a text states, a percentage as its hundredth; None when it states none."""
    text = text.strip().replace(",", "")
    share = text.endswith("%")
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return value / 100 if share else value
