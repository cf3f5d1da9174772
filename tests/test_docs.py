"""The table of `docs/generation.md` says what the tests show."""

import ast
import re
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "generation.md"
MODELS = {"shared_models", "build_models", "make_model"}  # fixtures that come in every family
ROW = re.compile(r"\| (?P<feature>[^|]+) \| (?P<answer>[^|]+) \| (?P<families>[^|]+) \| (`.+`) \|")


OF_QWEN = ("video", "parts of images encoded")
FAMILIES = ("Qwen2.5-VL", "Qwen", "all")  # from few to many


def marked_tests() -> dict[str, dict[str, str]]:
    """Feature -> its tests, with the families each runs on."""
    features = defaultdict(dict)
    for path in sorted(TESTS.glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            arguments = {argument.arg for argument in node.args.args}
            decorators = [ast.unparse(each) for each in node.decorator_list]
            for mark in decorators:
                if found := re.fullmatch(r"pytest\.mark\.feature\('(.+)'\)", mark):
                    families = "all" if arguments & MODELS else "Qwen2.5-VL"
                    if "QWEN_ONLY" in decorators or found[1] in OF_QWEN:
                        families = "Qwen"
                    features[found[1]][node.name] = families
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
        assert row["families"] == max(tests.values(), key=FAMILIES.index), row
