"""A family is a small file that states its difference."""

from itertools import combinations
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

CODE = Path(__file__).resolve().parents[1] / "modeling_glimpseprune"
FAMILY_FILES = sorted(CODE.glob("modeling_*.py"))
RUN = 6


def runs(file: Path) -> set[tuple[str, ...]]:
    """Every run of six lines that say something."""
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    return {tuple(lines[start : start + RUN]) for start in range(len(lines) - RUN + 1)}


def test_there_are_four_families():
    names = [file.stem.removeprefix("modeling_") for file in FAMILY_FILES]
    assert names == ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"]


@pytest.mark.parametrize("pair", list(combinations(FAMILY_FILES, 2)), ids=str)
def test_no_six_lines_stand_in_two_family_files(pair):
    first, second = map(runs, pair)
    assert first and second
    assert not first & second


@pytest.mark.parametrize("file", FAMILY_FILES, ids=lambda file: file.stem)
def test_a_family_file_names_every_sibling_it_needs(file):
    """transformers 4 copies no others out of a local folder."""
    needed = {Path(each).stem for each in get_relative_import_files(file)}
    assert set(get_relative_imports(file)) == needed - {file.stem}
