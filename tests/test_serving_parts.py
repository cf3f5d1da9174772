"""What `glimpseprune serve` is made of: images of requests, prefixes, what must be installed."""

import importlib.util
from importlib.machinery import ModuleSpec

import pytest
import torch
from conftest import FAMILIES
from PIL import Image

from glimpseprune.cli import main
from glimpseprune.commands.serve import check_installed
from glimpseprune.serving import image_reader
from glimpseprune.serving.answering import PromptCounts, answer, settings_of
from glimpseprune.serving.image_reader import ImageReader
from glimpseprune.serving.prefix_store import PrefixStore

PICTURE = {"type": "image_url", "image_url": {"url": "page.png"}}
TEXT = {"type": "text", "text": "What?"}
UNBOUNDED = 2**40


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    """A folder that holds a picture, beside another picture and a link to it."""
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    for path in (allowed / "page.png", tmp_path / "secret.png"):
        Image.new("RGB", (8, 6), "red").save(path)
    (allowed / "link.png").symlink_to(tmp_path / "secret.png")
    return allowed


# Images of requests.


def test_images_take_the_place_of_addresses(folder):
    message = {"role": "user", "content": [TEXT, PICTURE]}
    earlier = {"role": "system", "content": "Be brief."}
    read = ImageReader(folder).with_images([earlier, message])
    image = read[1]["content"][1]["image_url"]
    assert image.size == (8, 6) and image.mode == "RGB"
    assert read[0] == earlier and read[1]["content"][0] == TEXT
    assert message["content"][1] is PICTURE  # the request itself is left alone


@pytest.mark.parametrize("address", ["page.png", "{folder}/page.png", "file://{folder}/page.png"])
def test_files_of_the_folder_that_is_allowed(folder, address):
    address = address.format(folder=folder)
    assert ImageReader(folder).read(address).size == (8, 6)
    with pytest.raises(ValueError, match="local files are refused here: .*--allow-local-files"):
        ImageReader().read(address)


@pytest.mark.parametrize("address", ["../secret.png", "link.png", "{folder}/../secret.png"])
def test_files_outside_of_it(folder, address):
    address = address.format(folder=folder)
    with pytest.raises(ValueError, match="outside of the folder"):
        ImageReader(folder).read(address)


@pytest.mark.parametrize("address", ["none.png", "\0", "x" * 5000, "", "."])
def test_files_that_are_not_there(folder, address):
    with pytest.raises(ValueError, match="image 3 "):
        ImageReader(folder).read(address, 3)


def test_a_file_behind_an_address_may_be_too_large(monkeypatch):
    class Response:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def raise_for_status(self):
            pass

        def iter_content(self, size):
            while True:
                yield bytes(size)

    monkeypatch.setattr(image_reader.requests, "get", lambda address, **options: Response())
    with pytest.raises(ValueError, match="larger than 64 MiB"):
        ImageReader().read("http://somewhere/endless.png")


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        (None, "at least one message"),
        ([], "at least one message"),
        (["What?"], "an object with a role, got 'What\\?'|an object with a role, got What"),
        ([{"content": "What?"}], "an object with a role"),
        ([{"role": "user", "content": 3}], "text or a list of parts, got 3"),
        ([{"role": "user", "content": ["What?"]}], "a part must be"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "a part must be"),
        ([{"role": "user", "content": [{"type": "video_url"}]}], "a part must be"),
    ],
)
def test_messages_that_are_not_formed_as_the_protocol_says(messages, sentence):
    with pytest.raises(ValueError, match=sentence):
        ImageReader().with_images(messages)


# Prefixes kept.


def prompt_of(build_batch, *parts, seed: int = 0) -> dict:
    """Inputs of one prompt."""
    return build_batch([[*parts]], seed=seed).rows[0]


def with_question(inputs: dict, shift: int) -> dict:
    """The same prompt with another last word."""
    ids = inputs["input_ids"].clone()
    ids[:, -1] = 1 + (ids[:, -1] + shift) % 20
    return inputs | {"input_ids": ids}


def test_a_known_image_is_not_looked_at_again(shared_models, build_batch, monkeypatch):
    model, store = shared_models(3).pruned, PrefixStore(UNBOUNDED)
    inputs = prompt_of(build_batch, 2, (4, 4), 5)
    first = store.find(model, inputs, None)
    assert first.reused == 0 and len(store) == 1
    monkeypatch.setattr(type(model), "look", None)
    second = store.find(model, with_question(inputs, 1), None)
    assert second.prefix is first.prefix
    assert second.reused == first.prefix.get_seq_length() < inputs["input_ids"].shape[1]
    assert "pixel_values" in inputs and "pixel_values" not in second.inputs


def test_what_makes_a_prefix_another_one(shared_models, build_batch):
    model, store = shared_models(3).pruned, PrefixStore(UNBOUNDED)
    inputs = prompt_of(build_batch, 2, (4, 4), 5)
    other_text = inputs | {"input_ids": inputs["input_ids"].clone()}
    other_text["input_ids"][0, 0] += 1
    other_pixels = inputs | {"pixel_values": inputs["pixel_values"] + 1}
    for prompt in (inputs, other_text, other_pixels):
        assert store.find(model, prompt, None).reused == 0
    assert store.find(model, inputs, 0).reused == 0
    assert len(store) == 4
    for prompt in (inputs, other_text, other_pixels):
        assert store.find(model, prompt, None).reused


def test_a_prefix_grows_by_what_is_new(shared_models, build_batch):
    model, store = shared_models(3).pruned, PrefixStore(UNBOUNDED)
    both = prompt_of(build_batch, 2, (4, 4), 3, (4, 4), 5)
    visuals = model.model.place_visuals(both["input_ids"], both)
    end = visuals[0].last + 3
    begun = model.model.keep_visuals(both, visuals, [True, False])
    begun |= {
        name: both[name][:, :end]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        if name in both
    }
    first = store.find(model, begun, None)
    grown = store.find(model, both, None)
    assert grown.reused == first.prefix.get_seq_length()
    assert grown.prefix.get_seq_length() > grown.reused
    assert store.find(model, both, None).reused == grown.prefix.get_seq_length()


def test_prefixes_are_bounded_in_bytes(shared_models, build_batch):
    model = shared_models(3).pruned
    prompts = [prompt_of(build_batch, 2, (4, 4), 5, seed=seed) for seed in range(3)]
    size = PrefixStore(UNBOUNDED).find(model, prompts[0], None).prefix.nbytes
    store = PrefixStore(2 * size)
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        store.find(model, prompt, None)
        assert store.nbytes <= store.limit
    assert [store.find(model, prompt, None).reused > 0 for prompt in prompts[::2]] == [True] * 2
    assert store.find(model, prompts[1], None).reused == 0  # asked for longest ago
    too_small = PrefixStore(size - 1)
    assert too_small.find(model, prompts[0], None).prefix.nbytes == size and not len(too_small)
    store.clear()
    assert store.nbytes == 0


@pytest.mark.parametrize(
    "settings", [{}, {"max_keep_ratio": 0.5}, {"prune_layer": 0}, {"prune": False}]
)
def test_answers_over_kept_prefixes_are_the_models_own(shared_models, build_batch, settings):
    model, store = shared_models(3).pruned, PrefixStore(UNBOUNDED)
    options = {"max_new_tokens": 4, "do_sample": False}
    inputs = prompt_of(build_batch, 2, (4, 4), 5)
    for shift in range(3):
        asked = with_question(inputs, shift)
        ids, counts = answer(model, store, asked, settings, **options)
        assert torch.equal(ids, model.generate(**asked, **options, **settings))
        kept = model.glimpse(**asked, **settings).kept if "prune" not in settings else counts.visual
        assert counts == PromptCounts(counts.visual, kept, counts.reused)
        assert (counts.reused > 0) == (shift > 0 and "prune" not in settings)
    ids, counts = answer(model, PrefixStore(0), inputs, settings, **options)
    assert torch.equal(ids, model.generate(**inputs, **options, **settings))
    assert counts.reused == 0


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_a_kept_prefix_that_lacks_patches_answers_no_stock_model(
    shared_models, build_batch, monkeypatch
):
    models, store = shared_models(3), PrefixStore(UNBOUNDED)
    inputs = prompt_of(build_batch, 2, (4, 4), 5)
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    monkeypatch.setattr(models.pruned.config, "redundant_patches", 0)
    options = {"max_new_tokens": 4, "do_sample": False}
    for _ in range(2):
        answer(models.pruned, store, inputs, {}, **options)
        assert store.find(models.pruned, inputs, None).prefix.layers[0].lacks_patches.all()
        ids, counts = answer(models.pruned, store, inputs, {"prune": False}, **options)
        assert torch.equal(ids, models.stock.generate(**inputs, **options))
        assert counts == PromptCounts(16, 16, 0)


def test_a_prompt_of_text(shared_models, build_batch):
    model = shared_models(3).pruned
    inputs = prompt_of(build_batch, 6)
    ids, counts = answer(model, PrefixStore(UNBOUNDED), inputs, {}, max_new_tokens=2)
    assert ids.shape[1] > 6 and counts == PromptCounts(0, 0, 0)


# Settings and installation.


def test_settings_of_a_request(shared_models):
    config = shared_models(3).pruned.config
    request = {"model": "tiny", "prune": True, "max_keep_ratio": None, "min_keep_tokens": 3}
    assert settings_of(request, config) == {"prune": True, "min_keep_tokens": 3}
    for name, value in (("prune", 1), ("prune_threshold", "high"), ("prune_layer", 99)):
        with pytest.raises(ValueError, match=f"{name} must .*got {value!r}"):
            settings_of({name: value}, config)


def without(*names: str):
    """`find_spec` where some packages are missing and all others are there."""
    return lambda name: None if name in names else ModuleSpec(name, None)


def test_the_release_without_a_server(monkeypatch, capsys):
    monkeypatch.setattr("glimpseprune.commands.serve.find_spec", without("transformers.cli"))
    assert main(["serve"]) == 2
    assert "serve starts the server of transformers 5, and installed" in capsys.readouterr().err


def test_missing_packages(monkeypatch):
    monkeypatch.setattr("glimpseprune.commands.serve.find_spec", without("fastapi", "openai"))
    with pytest.raises(ValueError, match="serve needs fastapi, openai: pip install"):
        check_installed()


@pytest.mark.skipif(importlib.util.find_spec("transformers.cli") is not None, reason="has a server")
def test_this_release_has_no_server():
    with pytest.raises(ValueError, match="transformers 4"):
        check_installed()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--allow-local-files", "nowhere"], "must name a folder, and nowhere is none"),
        (["--prefix-memory", "-1"], "must not be negative, got -1"),
    ],
)
def test_arguments_that_cannot_be(monkeypatch, capsys, arguments, sentence):
    monkeypatch.setattr("glimpseprune.commands.serve.find_spec", without())
    assert main(["serve", *arguments]) == 2
    assert sentence in capsys.readouterr().err
