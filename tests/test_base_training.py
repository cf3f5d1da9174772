"""Training of the tiny base: packing, stages, saving, resuming, the written folder."""

import json
from itertools import islice

import pytest
import torch

from glimpseprune.cli import main
from glimpseprune.loading import REPOSITORY
from glimpseprune.package_files import TINY_MODEL
from glimpseprune.tiny_world.accuracy import (
    chat_prompt,
    generated_answers,
    generation_accuracy,
    held_out_questions,
)
from glimpseprune.tiny_world.asking import ask
from glimpseprune.tiny_world.cards import entry_tokens
from glimpseprune.tiny_world.forward import answer_figures, packed_hidden_states
from glimpseprune.tiny_world.model import fresh_base
from glimpseprune.tiny_world.packing import Packer, misspell
from glimpseprune.tiny_world.pages import (
    KINDS,
    PageSettings,
    draw_page,
    make_page,
    page_generator,
)
from glimpseprune.tiny_world.recipe import Recipe, Stage, load_recipe
from glimpseprune.tiny_world.training import SUMMARY_FILE, BaseTrainer
from glimpseprune.tiny_world.vocabulary import build_processor

RECIPE = """
evaluation_grids: [[4, 4]]
evaluation_questions: 4
stages:
  - {name: see, source: images, steps: 2, tokens: 32, grids: [[4, 4]], rate: [1.0, 0.5]}
  - {name: look-up, source: cards, steps: 2, tokens: 32, grids: [[4, 4]], form: key}
  - {name: speak, source: images, steps: 1, tokens: 32, grids: [[4, 4]], fit_batches: 2}
  - {name: all, source: both, steps: 1, tokens: 32, grids: [[4, 8]], kinds: {value: 1, count: 1}}
"""


NARROW = {"hidden_size": 128, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@torch.inference_mode()
def test_packed_questions_have_the_logits_of_questions_asked_alone(processor):
    model = fresh_base(processor, 0).eval()
    grid = (6, 9)
    generator = page_generator(0, "train", 0)
    pages = [make_page(generator, "train", PageSettings(), grid) for _ in range(2)]
    kinds = ("value", "compare")
    questions = [ask(page, kind, 3, generator) for page, kind in zip(pages, kinds, strict=True)]
    packed = Packer(processor).pack(grid, questions)
    visual = []
    for number, page in enumerate(pages):
        for block, question in enumerate(questions[number], 1):
            text = chat_prompt(processor, question.text) + question.answer + "<|im_end|>"
            alone = processor(text=[text], images=[draw_page(page)], return_tensors="pt")
            logits = model(**alone).logits[0]
            if block == 1:
                pixels, thw = alone["pixel_values"], alone["image_grid_thw"]
                visual.append(model.model.get_image_features(pixels, thw))
            rows = (packed.block[number] == block) | (packed.block[number] == 0)
            assert packed.input_ids[number][rows].tolist() == alone["input_ids"][0].tolist()
            visual_tokens = _features(visual[number])
            hidden = packed_hidden_states(model, _row(packed, number), visual_tokens)[0]
            torch.testing.assert_close(model.lm_head(hidden[rows]), logits, atol=1e-4, rtol=1e-4)


def test_blind_questions_do_not_see_the_image_but_the_rest_does(processor):
    generator = page_generator(0, "train", 0)
    page = make_page(generator, "train", PageSettings(), (4, 8))
    questions = [ask(page, "value", 2, generator)]
    open_eyes, blind = (Packer(processor).pack((4, 8), questions, blind=b) for b in (False, True))
    image = blind.input_ids[0] == processor.image_token_id
    sees_image = blind.visible[0, 0][:, image].all(dim=1)
    for block in (1, 2):
        places = (blind.block[0] == block).nonzero().flatten()
        first_label = int((blind.labels[0, places] != -100).nonzero()[0])
        assert sees_image[places[first_label:]].all()
        assert sees_image[places[:first_label]].any() == (block == 1)
    assert blind.visible[0, 0][:, ~image].equal(open_eyes.visible[0, 0][:, ~image])


def test_letters_said_so_far_are_misspelled_and_nothing_else_is(processor):
    generator = page_generator(0, "train", 0)
    page = make_page(generator, "train", PageSettings(), (12, 12))
    questions = [[*ask(page, "neighbour", 4, generator), *ask(page, "value", 4, generator)]]
    letters = torch.tensor(entry_tokens(processor.tokenizer)[0])
    right, wrong = (Packer(processor).pack((12, 12), questions) for _ in range(2))
    said = sum(len(question.answer) for question in questions[0] if question.kind == "neighbour")
    misspell(wrong, letters, 1.0, torch.Generator().manual_seed(0))
    changed = right.input_ids != wrong.input_ids
    assert said // 2 < changed.sum() <= said  # a letter may be drawn anew
    assert torch.isin(wrong.input_ids[changed], letters).all()
    assert (right.labels.roll(1, 1)[changed] == right.input_ids[changed]).all()
    assert (right.block[changed] <= 4).all() and right.labels.equal(wrong.labels)
    half = Packer(processor).pack((12, 12), questions)
    misspell(half, letters, 0.5, torch.Generator().manual_seed(0))
    assert 0 < (right.input_ids != half.input_ids).sum() < changed.sum()


def test_letters_ahead_are_part_of_the_loss(tmp_path, processor):
    shared = {"kinds": {"neighbour": 1.0}, "misspelled": 0.5, "ahead_layer": 1}
    losses = []
    for weight in (0.0, 0.5):
        stage = Stage("x", "cards", 1, 64, ((8, 8),), ahead_weight=weight, **shared)
        recipe = Recipe((stage,), decoder={"num_hidden_layers": 2})
        trainer = BaseTrainer(recipe, processor, tmp_path, 0)
        figures = trainer._train_step(stage, 0)
        losses.append(figures["loss"])
        assert ("ahead_loss" in figures) == (weight > 0)
    # The figures are rounded to four digits.
    assert losses[1] - losses[0] == pytest.approx(0.5 * figures["ahead_loss"], abs=2e-4)


@pytest.mark.parametrize(("fields", "asked"), [({}, (8, 8)), ({"questions_a_step": 6}, (3, 6))])
def test_questions_of_a_page_or_of_a_step(tmp_path, processor, fields, asked):
    """Large pages fill a step alone: of a step's questions they get more than small ones."""
    kinds = {"none": 1.0}  # as many as wanted, however few labels there are
    for grid, pages, number in (((4, 4), 2, 0), ((4, 8), 1, 1)):
        stage = Stage("x", "cards", 1, 32, (grid,), kinds=kinds, **fields)
        recipe = Recipe((stage,), decoder={"num_hidden_layers": 1})
        batch = BaseTrainer(recipe, processor, tmp_path, 0)._batch(stage)
        assert len(batch.pages) == pages
        assert batch.packed.block.amax(dim=1).tolist() == [asked[number]] * pages


def _features(seen):
    """The merged tokens `(tokens, width)` of one image in either generation of transformers."""
    features = seen if isinstance(seen, tuple | list) else seen.pooler_output
    return features[0]


def _row(packed, number):
    one = slice(number, number + 1)
    return type(packed)(
        packed.input_ids[one],
        packed.position_ids[:, one],
        packed.visible[one],
        packed.labels[one],
        packed.block[one],
    )


@torch.inference_mode()
@pytest.mark.parametrize("first", [1, 2])
def test_text_below_the_first_layer_that_sees_the_page_does_not(processor, first):
    model = fresh_base(processor, 0, {"num_hidden_layers": 3}).eval()
    generator = page_generator(0, "train", 0)
    page = make_page(generator, "train", PageSettings(), (4, 4))
    packed = Packer(processor).pack((4, 4), [ask(page, "value", 2, generator)])
    image = packed.input_ids[0] == processor.image_token_id
    states = []

    def hidden_states(visual_tokens):
        """States after each layer `(layers, text tokens, width)`."""
        seen = []
        hooks = [
            layer.register_forward_hook(lambda *call: seen.append(_states(call[-1])[0, ~image]))
            for layer in model.model.language_model.layers
        ]
        packed_hidden_states(model, packed, visual_tokens, first)
        for hook in hooks:
            hook.remove()
        return torch.stack(seen)

    for seed in range(2):
        visual = torch.randn(16, 192, generator=torch.Generator().manual_seed(seed))
        states.append(hidden_states(visual))
    same = [bool(torch.equal(*layers)) for layers in zip(*states, strict=True)]
    assert same == [layer < first for layer in range(3)]
    masks = packed_hidden_states(model, packed, visual)
    assert not torch.equal(masks, packed_hidden_states(model, packed, visual, first))


def _states(output):
    return output[0] if isinstance(output, tuple) else output


def test_a_start_takes_the_vision_encoder_and_no_more(tmp_path, processor):
    recipe = Recipe((Stage("x", "both", 1, 32, ((4, 4),)),), decoder={"num_hidden_layers": 2})
    trainer = BaseTrainer(recipe, processor, tmp_path, 0)
    before = {name: each.clone() for name, each in trainer.model.state_dict().items()}
    trainer.start_vision_from(TINY_MODEL)
    changed = {
        name for name, each in trainer.model.state_dict().items() if not each.equal(before[name])
    }
    assert changed and all("visual." in name for name in changed)
    other = BaseTrainer(Recipe(recipe.stages, decoder=NARROW), processor, tmp_path, 0)
    with pytest.raises(ValueError, match="holds no vision encoder"):
        other.start_vision_from(TINY_MODEL)


def test_a_training_starts_from_a_folder_that_training_wrote(tmp_path, processor):
    recipe = Recipe((Stage("x", "both", 1, 32, ((4, 4),)),), decoder={"num_hidden_layers": 1})
    first = BaseTrainer(recipe, processor, tmp_path / "first", 0)
    first.train(progress=False)
    second = BaseTrainer(recipe, processor, tmp_path / "second", 1)
    second.start_from(tmp_path / "first")
    for name, each in second.model.state_dict().items():
        assert each.equal(first.model.state_dict()[name].bfloat16().float())


def test_a_frozen_vision_encoder_stays_as_it_was(tmp_path, processor):
    stage = Stage("x", "both", 2, 32, ((4, 4),), freeze_vision=True)
    trainer = BaseTrainer(
        Recipe((stage,), decoder={"num_hidden_layers": 2}), processor, tmp_path, 0
    )
    before = {name: each.clone() for name, each in trainer.model.state_dict().items()}
    trainer.train(progress=False)
    for name, each in trainer.model.state_dict().items():
        if "visual." in name:
            assert each.equal(before[name])
        elif "q_proj.weight" in name:
            assert not each.equal(before[name])


@torch.inference_mode()
def test_a_long_answer_counts_as_much_as_a_short_one_on_request(processor):
    model = fresh_base(processor, 0, {"num_hidden_layers": 1}).eval()
    generator = page_generator(0, "train", 0)
    page = make_page(generator, "train", PageSettings(), (8, 8))
    questions = [ask(page, kind, 1, generator)[0] for kind in ("pair", "compare", "count")]
    visual = torch.randn(64, 192, generator=torch.Generator().manual_seed(0))

    def loss(asked, **options):
        packed = Packer(processor).pack((8, 8), [asked])
        return answer_figures(model, packed, visual, **options)["answer_loss"]

    alone = torch.stack([loss([question]) for question in questions])
    lengths = torch.tensor([len(question.answer) + 1.0 for question in questions])
    torch.testing.assert_close(loss(questions, by_question=True), alone.mean())
    torch.testing.assert_close(loss(questions), (alone * lengths).sum() / lengths.sum())


def test_labels_are_the_answer_and_its_end(processor):
    page = make_page(page_generator(0, "train", 0), "train", PageSettings(), (4, 8))
    question = ask(page, "value", 1, page_generator(0, "train", 1))[0]
    packed = Packer(processor).pack((4, 8), [[question]])
    wanted = packed.labels[0][packed.labels[0] != -100]
    assert processor.tokenizer.decode(wanted) == question.answer + "<|im_end|>"


def test_train_base_writes_a_loadable_folder_and_a_summary(tmp_path, recipe_file, processor):
    output = tmp_path / "base"
    options = ["--recipe", str(recipe_file), "--output", str(output), "--seed", "5"]
    assert main(["train-base", *options, "--threads", "1"]) == 0
    summary = json.loads((output / SUMMARY_FILE).read_text())
    assert summary["seed"] == 5 and summary["steps"] == 6
    assert summary["accuracy"]["4x4"]["value"]["questions"] == 4
    assert 3.5e6 < summary["parameters"] < 4e6
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert 0 <= log[-1]["accuracy_of_value"] <= 1 and "accuracy_of_count" in log[-1]
    assert [entry["stage"] for entry in log] == ["see"] * 2 + ["look-up"] * 2 + ["speak", "all"]
    assert sum(path.stat().st_size for path in output.glob("*.safetensors")) < 9e6

    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(output, dtype=torch.float32)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert model.generation_config.eos_token_id[0] == processor.tokenizer.eos_token_id
    loaded = AutoProcessor.from_pretrained(output)
    page = make_page(page_generator(0, "test", 0), "test", PageSettings(), (4, 4))
    questions = ["What is the value of KQ?", "How many labels are red?"]
    images = [draw_page(page)] * 2
    together = generated_answers(model, loaded, images, questions)
    alone = [generated_answers(model, loaded, [images[0]], [text])[0] for text in questions]
    assert together == alone


@pytest.mark.parametrize(
    "name", ["tiny_base", "tiny_base_longer", "tiny_base_stopped", "tiny_deep"]
)
def test_recipes_can_be_read(name):
    assert load_recipe(REPOSITORY / "recipes" / f"{name}.yaml").total_steps > 0


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path, recipe_file, processor):
    recipe = load_recipe(recipe_file)
    whole = BaseTrainer(recipe, processor, tmp_path / "whole", 1)
    whole.train(progress=False)

    stopped = BaseTrainer(recipe, processor, tmp_path / "parts", 1)
    stopped.train(progress=False, last_step=3)
    resumed = BaseTrainer(recipe, processor, tmp_path / "parts", 1)
    assert resumed.resume() and resumed.step == 3
    resumed.train(progress=False)
    logs = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (whole.output, resumed.output)
    ]
    assert len(logs[0]) == len(logs[1]) == recipe.total_steps
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
        assert (one["step"], one["grid"], one["pages"]) == (
            other["step"],
            other["grid"],
            other["pages"],
        )


def test_fitting_the_last_layer_brings_image_tokens_nearer_to_the_codes(tmp_path, processor):
    stage = Stage("speak", "images", 1, 320, ((4, 8),), fit_batches=20, code_weight=1.0)
    trainer = BaseTrainer(Recipe((stage,)), processor, tmp_path, 0)
    with torch.no_grad():
        before = trainer._figures(stage, trainer._batch(stage))["code_loss"]
        trainer._fit_last_layer(stage)
        after = trainer._figures(stage, trainer._batch(stage))["code_loss"]
    assert after < 0.5 * before


def test_accuracy_counts_every_question(processor):
    model = fresh_base(processor, 0).eval()
    figures = generation_accuracy(model, processor, (4, 4), 5, batch_size=2, max_new_tokens=2)
    assert figures == {"accuracy": 0.0, "questions": 5, "correct": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_hears_the_longest_answers_out(processor, kind):
    """A model that says what it is to say is right, however long that is."""
    asked = islice(held_out_questions("test", 0, PageSettings(), (8, 12), kind), 400)
    page, question = max(asked, key=lambda each: len(each[1].answer))
    said = processor.tokenizer(question.answer + "<|im_end|>", return_tensors="pt").input_ids

    class Says:
        device = "cpu"

        def generate(self, input_ids, max_new_tokens, **inputs):
            return torch.cat([input_ids, said[:, :max_new_tokens]], dim=1)

    answers = generated_answers(Says(), processor, [draw_page(page)], [question.text])
    assert answers == [question.answer]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"source": "sounds"}, "sounds"),
        ({"steps": 0}, "steps must be at least 1 in stage 'x'"),
        ({"questions": 0}, "questions must be at least 1"),
        ({"most_labels": 0}, "most_labels must be at least 1"),
        ({"questions_a_step": -1}, "questions_a_step must be at least 0"),
        ({"link_weight": -0.5}, "link_weight must be at least 0"),
        ({"misspelled": 1.5}, "misspelled must be at most 1"),
    ],
)
def test_a_stage_that_makes_no_sense_is_refused(fields, sentence):
    stage = {"name": "x", "source": "both", "steps": 1, "tokens": 1, "grids": ((4, 4),)}
    Stage(**stage)
    with pytest.raises(ValueError, match=sentence):
        Stage(**stage | fields)


def test_questions_that_no_page_has_are_not_looked_for_without_end():
    questions = held_out_questions("test", 0, PageSettings(), (4, 4), "neighbour")
    with pytest.raises(ValueError, match="pages of 4x4 tokens have no question of kind 'neighbour"):
        next(questions)
