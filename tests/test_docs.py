"""The table of `docs/generation.md` says what the tests show."""

import ast
import re
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "generation.md"
MODELS = {"shared_models", "build_models", "make_model"}  # fixtures that come in every family
ROW = re.compile(r"\| (?P<feature>[^|]+) \| (?P<answer>[^|]+) \| (?P<families>[^|]+) \| (`.+`) \|")


def marked_tests() -> dict[str, dict[str, bool]]:
    """Feature -> its tests, with whether each runs on every family."""
    features = defaultdict(dict)
    for path in sorted(TESTS.glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            arguments = {argument.arg for argument in node.args.args}
            decorators = [ast.unparse(each) for each in node.decorator_list]
            for mark in decorators:
                if found := re.fullmatch(r"pytest\.mark\.feature\('(.+)'\)", mark):
                    of_all = "QWEN_ONLY" not in decorators and bool(arguments & MODELS)
                    features[found[1]][node.name] = of_all and found[1] != "video"
    return features


def test_generation_page_lists_what_the_tests_show():
    rows = [match for line in PAGE.read_text().splitlines() if (match := ROW.fullmatch(line))]
    listed = {row["feature"]: re.findall(r"`(test_\w+)`", row[4]) for row in rows}
    marked = marked_tests()
    assert {name: sorted(tests) for name, tests in listed.items()} == {
        name: sorted(tests) for name, tests in marked.items()
    }
    for row in rows:
        tests = marked[row["feature"]]
        assert (row["answer"] == "refused") == all("refused" in name for name in tests), row
        assert row["families"] == ("all" if any(tests.values()) else "Qwen2.5-VL"), row
