"""The releases of transformers that are admitted are those that are tested, with each other too."""

import os
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from fresh_process import run_fresh
from packaging.requirements import Requirement
from packaging.version import Version
from shares import BOTH_LLAVAS, NEWEST_ONLY, SHARED_OUT, is_left_to_sibling, is_shared_with

from modeling_glimpseprune.stock import NEWEST_TESTED

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")

TESTS = Path(__file__).parent
PROJECT = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]
SCRIPT = (TESTS.parent / "scripts" / "test.sh").read_text()
OVERLAYS = TESTS.parent / ".venv"  # where scripts/test.sh puts older releases
WRITER = TESTS / "release_writer.py"
READER = """
import json, sys, numpy, torch, transformers
from pathlib import Path
auto_class = ("AutoModelForImageTextToText" if transformers.__version__.startswith("5")
              else "AutoModelForVision2Seq")
picture = numpy.zeros((40, 30, 3), numpy.uint8)
for folder in sys.argv[1:]:
    expected = json.loads(Path(folder, "expected.json").read_text())
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model, report = getattr(transformers, auto_class).from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True)
    for loaded in (model, processor):
        assert type(loaded).__module__.startswith("transformers_modules"), type(loaded)
    assert "glimpseprune" not in sys.modules and "modeling_glimpseprune" not in sys.modules
    assert not report["missing_keys"] and not report["unexpected_keys"], (folder, report)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(10, 30)[None]).logits
    # sums of a few dozen float32 products of order one, in another order
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-4)
    for prompt, ids in expected["ids"].items():
        images = [picture] if expected["image_token"] in prompt else None
        inputs = processor(text=[prompt], images=images, return_tensors="pt")
        found = inputs["input_ids"][0].tolist()
        assert found == ids, (folder, transformers.__version__, prompt, found, ids)
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
print(transformers.__version__, len(sys.argv) - 1)
"""


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
    modules = {path.stem for path in TESTS.glob("test_*.py")}
    assert NEWEST_ONLY <= modules and SHARED_OUT <= modules - NEWEST_ONLY
    assert BOTH_LLAVAS <= modules


def test_older_releases_share_out_every_case():
    case = SimpleNamespace(path=Path("test_invariants.py"), get_closest_marker=lambda name: None)
    shares = []
    for n in range(40):
        case.name = f"test_a[{n}]"
        shares.append([is_shared_with(case, number, 2) for number in (1, 2)])
        assert is_shared_with(case, 1, 1)
    assert sorted(map(sum, shares)) == [1] * 40 and 5 < sum(share[0] for share in shares) < 35
    case.path = Path("test_turns.py")
    assert is_shared_with(case, 1, 2) and is_shared_with(case, 2, 2)


def left_out(module: str, *cases: str) -> list[bool]:
    ids = [f"tests/{module}.py::test_a[{case}]" for case in cases]
    return [
        is_left_to_sibling(SimpleNamespace(nodeid=each, path=Path(f"{module}.py")), set(ids))
        for each in ids
    ]


def test_one_llava_family_runs_each_case():
    pairs = [left_out("test_turns", f"llava-{n}", f"llava_next-{n}") for n in range(40)]
    assert all(sum(pair) == 1 for pair in pairs) and 5 < sum(pair[0] for pair in pairs) < 35
    alone = ("llava-1", "llava_next-2", "llava-llava_next", "qwen3_vl")
    assert not any(left_out("test_turns", *alone))
    assert not any(left_out("test_llava", "llava", "llava_next"))


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


def run_on(overlay: Path | None, folder: Path, *arguments: object) -> str:
    """What a process prints with an older release in front of the newest; None is the newest."""
    ours = [str(TESTS.parent), str(TESTS)] if WRITER in arguments else []
    paths = [str(overlay)] * (overlay is not None) + ours
    settings = {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HOME": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    completed = run_fresh(*arguments, cwd=folder, env=os.environ | settings)
    assert completed.returncode == 0, f"{overlay}: {completed.stderr[-3000:]}"
    return completed.stdout


def test_what_any_release_writes_loads_on_every_release(tmp_path):
    """Conversions and trained models of all families, on the releases that scripts/test.sh made."""
    overlays = {"newest": None}
    for path in sorted(OVERLAYS.glob("transformers-*")):
        if re.fullmatch(r"transformers-[\d.]+", path.name):
            overlays[path.name] = path
    places = {name: tmp_path / name for name in overlays}
    for place in places.values():
        (place / "written").mkdir(parents=True)
    for name, overlay in overlays.items():
        run_on(overlay, places[name], WRITER, places[name] / "written")
    written = sorted(path.parent for path in tmp_path.glob("*/written/*/expected.json"))
    assert len(written) == 6 * len(overlays)
    read = [
        run_on(overlay, places[name], "-c", READER, *written) for name, overlay in overlays.items()
    ]
    assert len({out.split()[0] for out in read}) == len(overlays), f"some are the same: {read}"
