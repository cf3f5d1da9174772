"""`glimpseprune demo` without its page: sessions, what they show, and what the command refuses."""

import gc
import re
import weakref
from functools import partial, partialmethod
from importlib.util import find_spec
from io import BytesIO

import pytest
import torch
from PIL import Image
from transformers import GenerationMixin

from glimpseprune.cli import main
from glimpseprune.commands.ask import SAMPLE_QUESTION
from glimpseprune.demo.session import NO_ANSWER, NO_IMAGE, NO_QUESTION, Session, Settings, Visitor
from glimpseprune.demo.words import Shown, redrawn, shown, trouble_of
from glimpseprune.loading import load_model, prepare
from glimpseprune.package_files import SAMPLE_PAGE, TINY_MODEL
from modeling_glimpseprune.stock import cache_of

PAGE = SAMPLE_PAGE.read_bytes()
TOTAL = 144  # visual tokens of the sample page


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY_MODEL)


@pytest.fixture
def session(tiny):
    """A session that shows the sample page."""
    session = Session(*tiny, max_new_tokens=8)
    session.show(PAGE)
    return session


@pytest.fixture
def settings(tiny):
    return Settings.of_model(tiny[0].config)


@pytest.fixture
def runs(tiny, monkeypatch):
    """What the model is asked to do, one word a time."""
    model, done = type(tiny[0]), []

    def noted(self, method, *args, **kwargs):
        done.append(method.__name__)
        return method(self, *args, **kwargs)

    for name in ("look", "generate"):
        monkeypatch.setattr(model, name, partialmethod(noted, getattr(model, name)))
    return done


def image_file(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def mask_of_model(tiny, settings: Settings) -> torch.Tensor:
    """Which tokens the model keeps for the sample question, asked in one piece."""
    model, processor = tiny
    inputs = prepare(processor, [Image.open(SAMPLE_PAGE)], [SAMPLE_QUESTION])
    generated = model.generate(
        **inputs,
        max_new_tokens=1,
        return_dict_in_generate=True,
        prune_threshold=settings.prune_threshold,
        max_keep_ratio=settings.max_keep_ratio,
        prune_layer=settings.prune_layer,
    )
    return cache_of(generated).glimpse.keep_mask


# Sessions.


def test_settings_come_from_the_configuration(tiny):
    config = tiny[0].config
    assert Settings.of_model(config) == Settings(config.prune_threshold, 1.0, config.glimpse_layer)
    early, _ = load_model(TINY_MODEL.with_name("tiny_early"))
    assert Settings.of_model(early.config).prune_layer == early.config.prune_layer == 0


def test_questions_are_answered_over_one_look(session, settings, runs):
    answer = session.ask(f" {SAMPLE_QUESTION}\n", settings)
    assert answer.question == SAMPLE_QUESTION and answer.text == "577"
    assert 0 < answer.record.kept < answer.record.total == TOTAL
    assert answer.seconds > 0 and answer.seconds_of_look > 0
    second = session.ask("What is the value of MC?", settings)
    assert second.text == "871" and runs == ["look", "generate", "generate"]
    assert session.answers == [answer, second]
    assert second.seconds_of_look == answer.seconds_of_look


@pytest.mark.parametrize(
    ("threshold", "cap"), [(0.002, 1.0), (0.0, 1.0), (0.3, 1.0), (1.0, 1.0), (0.002, 0.03)]
)
def test_a_redraw_keeps_what_the_model_keeps(tiny, session, settings, runs, threshold, cap):
    answer = session.ask(SAMPLE_QUESTION, settings)
    moved = Settings(threshold, cap, settings.prune_layer)
    before = list(runs)
    chosen = session.chosen(answer, moved)
    assert runs == before
    assert torch.equal(chosen.keep_mask, mask_of_model(tiny, moved))
    assert session.ask(SAMPLE_QUESTION, moved).record.kept == chosen.kept


def test_a_redraw_keeps_anchored_corners(tiny, session, settings, monkeypatch):
    monkeypatch.setattr(tiny[0].config, "anchor_corners", ["top_left", "bottom_right"])
    answer = session.ask(SAMPLE_QUESTION, settings)
    moved = Settings(0.9, 1.0, settings.prune_layer)
    chosen = session.chosen(answer, moved)
    assert chosen.keep_mask[[0, -1]].all() and chosen.kept < TOTAL
    assert torch.equal(chosen.keep_mask, mask_of_model(tiny, moved))


def test_another_prune_layer_takes_another_look(tiny, session, settings, runs):
    session.ask(SAMPLE_QUESTION, settings)
    early = Settings(settings.prune_threshold, 1.0, 0)
    answer = session.ask(SAMPLE_QUESTION, early)
    assert runs == ["look", "generate"] * 2
    assert torch.equal(answer.record.keep_mask, mask_of_model(tiny, early))
    assert answer.record.prune_layer == 0


def test_the_stock_model_answers_the_latest_question(session, settings, monkeypatch):
    session.ask(SAMPLE_QUESTION, settings)
    asked = []
    generate = GenerationMixin.generate
    monkeypatch.setattr(
        GenerationMixin,
        "generate",
        lambda self, *args, **kwargs: asked.append(kwargs) or generate(self, *args, **kwargs),
    )
    whole = session.ask_whole()
    assert whole.text == "577" and whole.seconds > 0 and session.whole is whole
    assert asked[0]["prune"] is False and "pixel_values" in asked[0]
    session.ask("What is the value of MC?", settings)
    assert session.whole is None  # it was another question's


def test_the_stock_model_sees_what_the_look_left_out(tiny, session, settings, monkeypatch):
    model, encoded = tiny[0], []
    handle = model.model.visual.patch_embed.register_forward_hook(
        lambda _, args, __: encoded.append(len(args[0]))
    )
    monkeypatch.setattr(model.config, "redundant_patches", 48)
    answer = session.ask(SAMPLE_QUESTION, settings)
    assert not answer.record.encoded.all()
    assert session.ask_whole().text == "577"
    assert encoded[0] < encoded[1] == TOTAL * 4
    handle.remove()


def test_another_image_frees_what_was_seen(session, settings):
    session.ask(SAMPLE_QUESTION, settings)
    states = weakref.ref(session.prefix.held.states)
    session.show(image_file(Image.new("RGB", (112, 56), "red")))
    gc.collect()
    assert states() is None and session.prefix is None
    assert session.answers == []
    assert session.ask("What is this?", settings).record.total == 8
    session.show(None)
    assert session.image is None and session.prefix is None


def test_images_are_turned_as_cameras_say(tiny):
    exif = Image.Exif()
    exif[0x0112] = 6
    session = Session(*tiny)
    session.show(image_file(Image.new("RGB", (80, 40)), "JPEG", exif=exif))
    assert session.image.size == (40, 80)
    answer = session.ask("What is this?", Settings.of_model(tiny[0].config))
    assert answer.seen.size == (40, 80)


def test_sessions_do_not_disturb_each_other(tiny, session, settings):
    other = Session(*tiny)
    other.show(image_file(Image.open(SAMPLE_PAGE).transpose(Image.Transpose.ROTATE_180)))
    assert session.ask(SAMPLE_QUESTION, settings).text == "577"
    other.ask(SAMPLE_QUESTION, settings)
    assert session.ask(SAMPLE_QUESTION, settings).text == "577"


# What is wrong.


def test_sentences_for_what_is_missing(tiny, session, settings):
    empty = Session(*tiny)
    for ask, sentence in [
        (lambda: empty.ask(SAMPLE_QUESTION, settings), NO_IMAGE),
        (lambda: session.ask("  \n", settings), NO_QUESTION),
        (session.ask_whole, NO_ANSWER),
    ]:
        with pytest.raises(ValueError) as told:
            ask()
        assert trouble_of(told.value) == sentence


def test_requests_that_overtake_one_another_are_about_their_image(tiny, settings, runs, tmp_path):
    files = {turned: str(tmp_path / f"{turned}.png") for turned in (False, True)}
    for turned, path in files.items():
        page = Image.open(SAMPLE_PAGE)
        (page.transpose(Image.Transpose.ROTATE_180) if turned else page).save(path)
    opened = []
    visitor = Visitor()
    at = partial(visitor.session_at, open_session=lambda: opened.append(1) or Session(*tiny, 8))
    assert at(files[False]).ask(SAMPLE_QUESTION, settings).text == "577"
    before = at(files[False]).prefix
    # the next image's own request comes after the question about it
    other = at(files[True])
    assert other.ask(SAMPLE_QUESTION, settings).text != "577" and other.prefix is not before
    assert len(at(files[True]).answers) == 1
    assert runs == ["look", "generate"] * 2
    assert at(None).image is None and at(None).answers == []
    with pytest.raises(FileNotFoundError):
        at(str(tmp_path / "gone.png"))
    assert at(str(tmp_path / "gone.png")).image is None  # it is said once
    assert opened == [1]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"no image", "Cannot read the image you chose: it is no image file"),
        (b"", "Cannot read the image you chose: it is no image file"),
        (PAGE[:4000], "Cannot read the image you chose: "),
        (image_file(Image.new("1", (401, 401))), "too large: 401 x 401 pixels, more than 160000"),
    ],
)
def test_sentences_for_images(tiny, session, settings, content, sentence):
    session = Session(*tiny, max_pixels=400 * 400)
    session.show(PAGE)
    with pytest.raises(ValueError) as told:
        session.show(content)
    assert sentence in trouble_of(told.value)
    assert session.image is None  # the last one is gone from the page, too


def test_sentences_for_what_else_goes_wrong(session, settings):
    assert "too large for the memory" in trouble_of(torch.OutOfMemoryError("CUDA out of memory"))
    assert "too large" in trouble_of(Image.DecompressionBombError("attack"))
    assert trouble_of(KeyError("x")) == "KeyError: 'x'"
    with pytest.raises(ValueError) as told:
        session.ask("<|image_pad|> and <|image_pad|>?", settings)
    assert "placeholder" in trouble_of(told.value) and session.answers == []
    assert session.ask(SAMPLE_QUESTION, settings).text == "577"


# What is shown.


def test_an_empty_page(tiny, settings):
    assert shown(Session(*tiny), settings) == Shown("", "", "", "", "", "")
    assert redrawn(Session(*tiny), settings) == ("", "")


def test_a_page_with_answers(session, settings):
    session.ask("What is the value of MC?", settings)
    answer = session.ask(SAMPLE_QUESTION, settings)
    session.ask_whole()
    page = shown(session, settings, "Something <b>bad</b>.")
    assert page.trouble == '<p role="alert">Something &lt;b&gt;bad&lt;/b&gt;.</p>'
    assert '"answer">577<' in page.answer and SAMPLE_QUESTION in page.answer
    counts = f"{answer.record.kept} of {TOTAL} visual tokens ({answer.record.retention:.1%})"
    assert counts in page.answer and f"<strong>{counts}</strong> are kept" in page.kept
    assert "the same answer" in page.whole and "577" in page.whole
    assert "871" in page.earlier and "577" not in page.earlier
    assert len(re.findall(r'<img src="data:image/jpeg;base64,[^"]+" alt="\w', page.pictures)) == 2


def test_a_redraw_says_what_it_is(session, settings):
    answer = session.ask(SAMPLE_QUESTION, settings)
    kept, pictures = redrawn(session, settings)
    assert "not run again" not in kept
    moved, moved_pictures = redrawn(session, Settings(0.9, 1.0, settings.prune_layer))
    assert f"not run again: the answer saw {answer.record.kept}." in moved
    assert moved_pictures != pictures
    other_layer, same_pictures = redrawn(session, Settings(settings.prune_threshold, 1.0, 0))
    assert "Of prune layer 0 the scores at hand say nothing" in other_layer
    assert same_pictures == pictures


def test_a_redraw_while_another_image_is_chosen(session, settings, monkeypatch):
    session.ask(SAMPLE_QUESTION, settings)
    before, choose = redrawn(session, settings), session.chosen

    def chosen(*arguments):
        session.show(None)
        return choose(*arguments)

    monkeypatch.setattr(session, "chosen", chosen)
    assert redrawn(session, settings) == before
    assert redrawn(session, settings) == ("", "")


def test_what_people_write_is_escaped(session, settings):
    session.ask("<script>1</script>", settings)
    session.ask("<img src=x>", settings)
    page = shown(session, settings)
    assert "<script" not in page.earlier and "<img" not in page.answer


# The command.


def without_gradio(name: str):
    return None if name == "gradio" else find_spec(name)


def test_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("glimpseprune.commands.demo.find_spec", without_gradio)
    assert main(["demo"]) == 2
    assert "pip install 'glimpseprune[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["max-new-tokens", "max-pixels"])
def test_the_command_refuses_what_cannot_be(monkeypatch, capsys, name):
    monkeypatch.setattr("glimpseprune.commands.demo.find_spec", lambda name: True)
    assert main(["demo", f"--{name}", "0"]) == 2
    assert f"{name.replace('-', '_')} must be 1 or more, got 0" in capsys.readouterr().err
