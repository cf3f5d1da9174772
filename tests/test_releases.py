"""The releases of transformers that are admitted are those that are tested."""

import re
import warnings
from pathlib import Path

import pytest
from conftest import NEWEST_ONLY
from packaging.requirements import Requirement
from packaging.version import Version

from modeling_glimpseprune.stock import NEWEST_TESTED

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")

TESTS = Path(__file__).parent
PROJECT = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]
SCRIPT = (TESTS.parent / "scripts" / "test.sh").read_text()


def test_the_range_begins_with_the_oldest_tested_releases():
    (admitted,) = (
        requirement.specifier
        for requirement in map(Requirement, PROJECT["dependencies"])
        if requirement.name == "transformers"
    )
    oldest_5, oldest_4 = re.search(r"older_releases=\((\S+) (\S+)\)", SCRIPT).groups()
    assert oldest_4.startswith("4.57.") and oldest_5.startswith("5.")
    fives = [Version(f"5.{minor}.0") for minor in range(Version(NEWEST_TESTED).minor + 1)]
    assert min(filter(admitted.contains, fives)) == Version(oldest_5)
    assert all(version in admitted for version in fives if version >= Version(oldest_5))
    assert oldest_4 in admitted and "4.56.2" not in admitted and "6.0.0" not in admitted


def test_what_runs_on_the_newest_release_alone_exists():
    assert NEWEST_ONLY <= {path.stem for path in TESTS.glob("test_*.py")}


@pytest.mark.parametrize("module", ["glimpseprune.loading", "transformers_modules.tiny.glimpse"])
@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_deprecations_that_are_told_to_our_code_are_errors(module, category):
    with pytest.raises(category):
        warnings.warn_explicit("it goes", category, "a_file.py", 1, module)


def test_a_deprecated_argument_is_an_error_wherever_it_is_told():
    message = "`past_key_values` is deprecated and will be removed in version 5.40.0 for `forward`."
    with pytest.raises(FutureWarning, match="past_key_values"):
        warnings.warn_explicit(message, FutureWarning, "module.py", 1, "torch.nn.modules.module")
    with warnings.catch_warnings(record=True) as told:
        warnings.warn_explicit("it goes", FutureWarning, "a_file.py", 1, "some.library")
    assert len(told) == 1
