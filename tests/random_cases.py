"""Random cases: some at once, many more with the marker `slow`."""

import pytest


def random_cases(number: int, at_once: int) -> list:
    """Seeds for `parametrize`, of which the first `at_once` run in the fast suite."""
    return [
        pytest.param(seed, marks=[] if seed < at_once else pytest.mark.slow)
        for seed in range(number)
    ]
