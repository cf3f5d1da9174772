"""Pictures as people see them: turned as their EXIF orientation says, wherever they are opened."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from glimpseprune.cli import main
from glimpseprune.commands.evaluate import read_samples
from glimpseprune.data.visual_cot import VisualCoTError, read_visual_cot
from glimpseprune.data.visual_cot_collator import VisualCoTCollator
from glimpseprune.images import open_image, picture_size
from glimpseprune.package_files import SAMPLE_PAGE
from glimpseprune.training.base import load_for_training
from modeling_glimpseprune.processing_glimpseprune import GlimpsePruneQwen2_5_VLProcessor

HARNESS = Path(read_samples.__code__.co_filename).parents[1] / "harness"
# Orientation -> how its file holds an upright picture (rows, columns, ...), by the EXIF standard:
# where the stored first row and first column lie on the picture.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda upright: upright[::-1].swapaxes(0, 1),  # left, bottom
}
ON_ITS_SIDE = 6
LOSSLESS = {".webp": {"lossless": True}}


def store(upright: np.ndarray, path: Path, orientation: int = ON_ITS_SIDE) -> Path:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = np.ascontiguousarray(STORED[orientation](upright))
    Image.fromarray(stored).save(path, exif=exif, **LOSSLESS.get(path.suffix, {}))
    return path


@pytest.fixture
def upright() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (84, 112, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_is_turned(tmp_path, upright, kind, orientation):
    path = store(upright, tmp_path / f"photo.{kind}", orientation)
    assert np.array_equal(np.array(open_image(path)), upright)
    assert picture_size(path)[:2] == (112, 84)


def test_damaged_exif_leaves_a_picture_as_it_is(tmp_path, upright):
    path = tmp_path / "photo.png"
    Image.fromarray(upright).save(path, exif=b"no exif at all")
    assert np.array_equal(np.array(open_image(path)), upright)
    assert picture_size(path) == (112, 84, False)


@pytest.mark.parametrize("read", [open_image, picture_size])
def test_what_is_no_image_is_named(tmp_path, read):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot read the image .*broken.png"):
        read(tmp_path / "broken.png")
    with pytest.raises(ValueError, match="there is no image .*absent.png"):
        read(tmp_path / "absent.png")


def test_ask_sees_a_photo_upright(tmp_path, capsys):
    page = np.array(Image.open(SAMPLE_PAGE).convert("RGB"))
    Image.fromarray(page).save(tmp_path / "upright.png")
    photo = store(page, tmp_path / "photo.png")
    answers = []
    for path in (tmp_path / "upright.png", photo):
        picture = tmp_path / "picture.png"
        assert main(["ask", "--image", str(path), "--output", str(picture)]) == 0
        answers.append((capsys.readouterr().out, Image.open(picture).tobytes()))
    assert answers[0] == answers[1]


@pytest.fixture
def rows(tmp_path, upright) -> Path:
    """A question about a page, and the same about a photo of it that is stored on its side."""
    Image.fromarray(upright).save(tmp_path / "page.png")
    store(upright, tmp_path / "photo.png")
    row = {
        "question": "What?", "answer": "7", "bboxs": [[84, 0, 112, 28]], "dataset": "test",
        "width": 112, "height": 84,
    }  # fmt: skip
    lines = [json.dumps(row | {"image": name}) for name in ("page.png", "photo.png")]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_evaluation_sees_photos_upright(rows, upright):
    page, photo = read_samples(rows, None, 10, 0)
    assert np.array_equal(np.array(page.image), upright)
    assert np.array_equal(np.array(photo.image), upright)


def test_training_sees_photos_upright(rows, base):
    collator = VisualCoTCollator(load_for_training(str(base))[1])
    assert isinstance(collator.processor, GlimpsePruneQwen2_5_VLProcessor)
    page, photo = (collator([[row]]) for row in read_visual_cot(rows))
    assert torch.equal(photo["visuals"]["pixel_values"], page["visuals"]["pixel_values"])
    assert torch.equal(photo["image_grid_thw"], page["image_grid_thw"])
    assert photo["evidence_mask"].any()
    assert torch.equal(photo["evidence_mask"], page["evidence_mask"])


@pytest.mark.parametrize("scale", [1, 3])
def test_a_row_with_the_size_of_the_unturned_picture_is_refused(rows, scale):
    """Boxes may refer to another size of the picture, but not to another picture."""
    page, photo = (json.loads(line) for line in rows.read_text().splitlines())
    photo |= {"width": 84 * scale, "height": 112 * scale, "bboxs": [[0, 84, 28, 112]]}
    rows.write_text("\n".join(map(json.dumps, (page, photo))))
    sentence = (
        rf"line 2: width and height are {84 * scale} and {112 * scale}, those of .*photo.png as it "
        "is stored, but its EXIF orientation turns it to 112 x 84"
    )
    with pytest.raises(VisualCoTError, match=sentence):
        read_visual_cot(rows)
    photo |= {"width": 112 * scale, "height": 84 * scale, "bboxs": [[0, 56, 28, 84]]}
    rows.write_text("\n".join(map(json.dumps, (page, photo))))
    assert len(read_visual_cot(rows)) == 2


def test_boxes_of_conversations_lie_on_the_turned_picture(tmp_path, upright):
    store(upright, tmp_path / "photo.png")
    turns = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "Me"}]
    entry = {"image": ["photo.png", "photo.png###[84, 0, 112, 28]"], "conversations": turns}
    (tmp_path / "data.json").write_text(json.dumps([entry]))
    (row,) = read_visual_cot(tmp_path / "data.json")
    assert (row.width, row.height, row.boxes) == (112, 84, ((84, 0, 112, 28),))


@pytest.mark.parametrize(
    "task",
    [
        "lm_eval_tasks/tiny_world/pages.py",
        "lmms_eval_tasks/tiny_world/questions.py",
        "lmms_eval_tasks/visual_cot/conversations.py",
    ],
)
def test_harness_tasks_see_photos_upright(tmp_path, upright, task):
    store(upright, tmp_path / "photo.png")
    spec = importlib.util.spec_from_file_location("task", HARNESS / task)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    doc, place = {"image": "photo.png"}, {"image_folder": str(tmp_path)}
    if task.startswith("lm_eval"):
        module.IMAGE_FOLDER = tmp_path
        (image,) = module.doc_to_image(doc)
    else:
        turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me"}]
        (image,) = module.doc_to_visual(doc | {"conversations": turns}, place)
    assert np.array_equal(np.array(image), upright)
