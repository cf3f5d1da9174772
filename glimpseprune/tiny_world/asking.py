"""What can be asked about a page: questions of each kind with answers and evidence.

| kind | question | answer | evidence |
|---|---|---|---|
| value | What is the value of KQ? | its digits | the label |
| colour | What is the colour of KQ? | a colour's name | the label |
| compare | Which is larger, KQ or ZB? | a key | both labels |
| count | How many labels are red? | a number | the labels of the colour |
| none | What is the value of XJ? (a key that is not on the page) | none | nothing |
| neighbour | What is the label of KQ? | the key in the slot on its left | both labels |
| pair | What are the values of KQ, ZB? | both, in the order of the keys | both labels |
| list | Which labels are red? | their keys in reading order | the labels of the colour |
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .pages import KINDS, LETTERS, Label, Page, Question, in_next_slot

LONGEST_LIST = 4
ABSENT = "none"


def ask(page: Page, kind: str, number: int, generator: np.random.Generator) -> list[Question]:
    """Up to `number` different questions of a kind; fewer where the page has no more to ask."""
    order = [page.labels[i] for i in generator.permutation(len(page.labels))]
    if kind == "value":
        return [_value_question(label) for label in order[:number]]
    if kind == "colour":
        return [_colour_question(label) for label in order[:number]]
    if kind == "compare":
        pairs = [(a, b) for a, b in zip(order, order[1:], strict=False) if a.value != b.value]
        return [_compare_question(a, b) for a, b in pairs[:number]]
    if kind == "count":
        colours = list(dict.fromkeys(label.colour for label in order))
        return [_count_question(page.labels, colour) for colour in colours[:number]]
    if kind == "none":
        return [_none_question(key) for key in _absent_keys(page, number, generator)]
    if kind == "neighbour":
        pairs = [
            (left, label) for label in order for left in page.labels if in_next_slot(left, label)
        ]
        return [_neighbour_question(left, label) for left, label in pairs[:number]]
    if kind == "pair":
        return [_pair_question(a, b) for a, b in zip(order[:number], order[1:], strict=False)]
    if kind == "list":
        lists = {label.colour: _of_colour(page.labels, label.colour) for label in order}
        short = [each for each in lists.values() if len(each) <= LONGEST_LIST]
        return [_list_question(each) for each in short[:number]]
    raise ValueError(f"kind: {kind!r} is not one of {KINDS}")


def _value_question(label: Label) -> Question:
    return Question("value", f"What is the value of {label.key}?", label.value, (label.box,))


def _colour_question(label: Label) -> Question:
    return Question("colour", f"What is the colour of {label.key}?", label.colour, (label.box,))


def _compare_question(first: Label, second: Label) -> Question:
    larger = max(first, second, key=lambda label: int(label.value))
    text = f"Which is larger, {first.key} or {second.key}?"
    return Question("compare", text, larger.key, (first.box, second.box))


def _count_question(labels: Sequence[Label], colour: str) -> Question:
    boxes = tuple(label.box for label in _of_colour(labels, colour))
    return Question("count", f"How many labels are {colour}?", str(len(boxes)), boxes)


def _none_question(key: str) -> Question:
    return Question("none", f"What is the value of {key}?", ABSENT, ())


def _neighbour_question(left: Label, label: Label) -> Question:
    boxes = (left.box, label.box)
    return Question("neighbour", f"What is the label of {label.key}?", left.key, boxes)


def _pair_question(first: Label, second: Label) -> Question:
    text = f"What are the values of {first.key}, {second.key}?"
    return Question("pair", text, f"{first.value},{second.value}", (first.box, second.box))


def _list_question(labels: Sequence[Label]) -> Question:
    keys, boxes = ",".join(label.key for label in labels), tuple(label.box for label in labels)
    return Question("list", f"Which labels are {labels[0].colour}?", keys, boxes)


def _of_colour(labels: Sequence[Label], colour: str) -> list[Label]:
    return [label for label in labels if label.colour == colour]


def _absent_keys(page: Page, number: int, generator: np.random.Generator) -> list[str]:
    """Different keys that no label of the page has."""
    taken = {label.key for label in page.labels}
    keys: list[str] = []
    while len(keys) < number:
        first, second = generator.integers(len(LETTERS), size=2)
        key = LETTERS[first] + LETTERS[second]
        if key not in taken:
            taken.add(key)
            keys.append(key)
    return keys
