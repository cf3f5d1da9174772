"""Later turns, kept caches and kinds of caches, each against the slow reference.

Every test names the feature it shows; `docs/generation.md` has a row for each (`test_docs.py`).
"""

import copy

import pytest
import torch
from conftest import Batch, Models, pad_together
from generation_checks import (
    assert_equals_reference,
    assert_near,
    assert_same_output,
    generate,
    step_logits,
)
from generation_prompts import (
    ONE,
    QWEN_ONLY,
    RAGGED,
    family,  # noqa: F401 (a fixture)
    random_keep,
)
from reference import (
    PIXEL_INPUTS,
    allowed_attention,
    attention_restricted_to,
    dropped_positions,
    positions,
)
from transformers import Cache
from transformers.cache_utils import QuantizedLayer

from modeling_glimpseprune.pruned_cache import PrunedLayer
from modeling_glimpseprune.stock import cache_of, given_cache


def conversation(first: Batch, second: Batch, answers: torch.Tensor) -> Batch:
    """Both turns as one prompt: the first, what was said, and the second behind it."""
    rows, counts = [], []
    for row, (before, after) in enumerate(zip(first.rows, second.rows, strict=True)):
        said = {"input_ids": answers[row : row + 1], "attention_mask": None}
        joined = {}
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in before:
                middle = said["input_ids"]
                if name != "input_ids":
                    middle = torch.full_like(middle, name == "attention_mask")
                joined[name] = torch.cat([before[name], middle.to(before[name]), after[name]], 1)
        for name in PIXEL_INPUTS:
            parts = [turn[name] for turn in (before, after) if name in turn]
            if parts:
                joined[name] = torch.cat(parts)
        rows.append(joined)
        counts.append(first.visual_counts[row] + second.visual_counts[row])
    return Batch(pad_together(rows), rows, counts, first.visuals + second.visuals)


TURNS = {
    "image after image": ([[3, (3, 4), 4]], [[2, (2, 3), 3]]),
    "image after text": ([[5]], [[2, (2, 3), 3]]),
    "images in a batch": ([[3, (2, 3), 4], [2, (1, 2), 3, (2, 2), 1]], [[1, (2, 2), 3]] * 2),
    "image after a text-only row": ([[7], [1, (2, 2), 2]], [[(3, 2), 2], [(2, 3), 2]]),
    "text after images": ([[3, (2, 3), 4], [2, (1, 2), 5]], [[3], [3]]),
    "video after image": ([[3, (3, 4), 4]], [[2, (2, 2, 2), 3]]),
}


@pytest.mark.feature("later turns with new images")
@pytest.mark.parametrize("given", ["all visuals", "new visuals"])
@pytest.mark.parametrize("name", TURNS)
@torch.no_grad()
def test_a_new_image_on_a_later_turn_equals_hidden(shared_models, build_batch, name, given):
    """The new image is pruned, the old one stays pruned; what is dropped late was seen before."""
    models = shared_models(30, glimpse={"glimpse_layer": 1})
    first, second = (build_batch(turn, seed) for seed, turn in enumerate(TURNS[name]))
    keeps = [random_keep(first), random_keep(second, 1)]
    start = generate(models.pruned, first.inputs, 3, visual_keep_mask=keeps[0])
    answers = start.sequences[:, first.inputs["input_ids"].shape[1] :]
    both = conversation(first, second, answers)
    inputs = follow(first, second, start, both if given == "all visuals" else second)
    generate(models.pruned, build_batch([[(4, 4), 9]] * 3).inputs, 2)  # leaves its own positions
    later = {"visual_keep_mask": keeps[1]} if second.num_visual else {}
    output = generate(models.pruned, inputs, 4, **later)
    for row, prompt in enumerate(both.rows):
        of_row = [keep[row] for keep in (first.split(keeps[0]), second.split(keeps[1]))]
        assert_equals_two_turns(models, prompt, first.rows[row], of_row, output, row)


def follow(first: Batch, second: Batch, start, visuals: Batch) -> dict:
    """Inputs of a later turn over the cache of an answer."""
    inputs = given_cache(cache_of(start))
    inputs["input_ids"] = torch.cat([start.sequences, second.inputs["input_ids"]], dim=1)
    said = start.sequences.shape[1] - first.inputs["input_ids"].shape[1]
    for name in ("attention_mask", "mm_token_type_ids"):
        if name in first.inputs:
            before = torch.nn.functional.pad(
                first.inputs[name], (0, said), value=int(name == "attention_mask")
            )
            inputs[name] = torch.cat([before, second.inputs[name]], dim=1)
    return inputs | {name: visuals.inputs[name] for name in PIXEL_INPUTS if name in visuals.inputs}


def assert_equals_two_turns(models: Models, prompt, first_prompt, keeps, output, row: int) -> None:
    """Logits of a second answer against the stock model with each turn's dropped tokens hidden.

    The first turn's are hidden from everything behind it; the second's from what is behind the
    second turn, and above the prune layer, of which both turns have the same, from the second turn
    itself.
    """
    stock, layer = models.stock, cache_of(output).glimpse.prune_layer
    steps = step_logits(output, row)
    completion = output.sequences[row, -len(steps) :]
    input_ids = torch.cat([prompt["input_ids"], completion[None, :-1]], dim=1)
    length, prompt_length = input_ids.shape[1], prompt["input_ids"].shape[1]
    first_length = first_prompt["input_ids"].shape[1]
    dropped = torch.zeros(length, dtype=torch.bool)
    dropped[:prompt_length] = dropped_positions(stock, prompt, torch.cat(keeps))
    in_first = torch.arange(length) < first_length
    masks = []
    for index in range(stock.config.get_text_config().num_hidden_layers):
        of_first = allowed_attention(dropped & in_first, first_length, index > layer)
        of_second = allowed_attention(dropped & ~in_first, prompt_length, index > layer)
        masks.append(of_first & of_second)
    pixels = {name: prompt[name] for name in PIXEL_INPUTS if name in prompt}
    with attention_restricted_to(stock, masks):
        logits = stock(
            input_ids=input_ids, position_ids=positions(stock, prompt, length), **pixels
        ).logits[0]
    assert_near(steps, logits[prompt_length - 1 :])


@pytest.mark.feature("later turns with new images")
@torch.no_grad()
def test_an_image_may_be_pruned_after_one_that_was_not(shared_models, build_batch):
    models = shared_models(30, glimpse={"glimpse_layer": 1})
    first, second = (build_batch(turn, s) for s, turn in enumerate(TURNS["images in a batch"]))
    keeps = [torch.ones(first.num_visual, dtype=torch.bool), random_keep(second, 1)]
    start = generate(models.pruned, first.inputs, 3, prune=False)
    answers = start.sequences[:, first.inputs["input_ids"].shape[1] :]
    both = conversation(first, second, answers)
    generate(models.stock, build_batch([[(4, 4), 9]]).inputs, 2)
    generate(models.pruned, build_batch([[(4, 4), 9]]).inputs, 2, prune=False)
    inputs = follow(first, second, start, both)
    output = generate(models.pruned, inputs, 4, visual_keep_mask=keeps[1])
    for row, prompt in enumerate(both.rows):
        of_row = [keep[row] for keep in (first.split(keeps[0]), second.split(keeps[1]))]
        assert_equals_two_turns(models, prompt, first.rows[row], of_row, output, row)


@QWEN_ONLY
@pytest.mark.feature("later turns with new images")
@torch.no_grad()
def test_a_later_turn_takes_its_own_glimpse(shared_models, build_batch):
    model = shared_models(30, glimpse={"glimpse_layer": 1}).pruned
    first, second = build_batch(ONE), build_batch([[2, (4, 4), 3]], 1)
    start = generate(model, first.inputs, 3, max_keep_ratio=0.5)
    seen = copy.deepcopy(cache_of(start).glimpse)
    inputs = follow(first, second, start, second)
    output = generate(model, inputs, 3, max_keep_ratio=0.25)
    record = cache_of(output).glimpse
    assert seen.total == 12 and record.total == 16 and record.kept <= 4
    assert [visual.grid for visual in record.visuals] == [(1, 4, 4)]
    assert cache_of(output).get_seq_length() == output.sequences.shape[1] - 1


@pytest.mark.feature("later turns with new images")
def test_visuals_that_belong_nowhere(shared_models, build_batch):
    model = shared_models(30).pruned
    first, second = build_batch([[3, (3, 4), 4]]), build_batch([[2, (2, 3), 3]], 1)
    start = generate(model, first.inputs, 3, max_keep_ratio=0.5)
    inputs = follow(first, second, start, build_batch([[(1, 1), (1, 1), (1, 1), 1]]))
    with pytest.raises(ValueError, match="placeholders"):
        generate(model, inputs, 3)


@pytest.mark.feature("a new question without the cache")
@torch.no_grad()
def test_a_new_question_is_a_new_glimpse(shared_models, build_batch):
    model, batch = shared_models(24).pruned, build_batch(ONE)
    other = dict(batch.inputs)
    other["input_ids"] = batch.inputs["input_ids"].clone()
    other["input_ids"][:, -3:] = torch.tensor([5, 6, 7])
    first, again, asked = (
        generate(model, inputs, max_keep_ratio=0.5)
        for inputs in (batch.inputs, batch.inputs, other)
    )
    assert_same_output(again, first)
    importance = [cache_of(output).glimpse.importance for output in (first, asked)]
    assert (importance[0] - importance[1]).abs().max() > 1e-2


@pytest.mark.feature("deep copies")
@torch.no_grad()
def test_copies_go_their_own_way(shared_models, build_batch):
    """Two continuations of one answer, each over its copy of the cache; and a copied model."""
    models, batch = shared_models(24), build_batch(RAGGED)
    keep = random_keep(batch)
    model = copy.deepcopy(models.pruned)
    first = generate(model, batch.inputs, 2, visual_keep_mask=keep)
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(1, 150, (len(batch.rows), 2), generator=generator)
        ids = torch.cat([first.sequences, text], dim=1)
        mask = torch.nn.functional.pad(batch.inputs["attention_mask"], (0, 4), value=1)
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs |= given_cache(copy.deepcopy(cache_of(first)))
        second = generate(model, inputs, 3)
        assert_equals_reference(models, batch, second, batch.split(keep), first_step=4)


@pytest.mark.feature("chunked prefill")
@torch.no_grad()
def test_chunked_prefill_is_refused(shared_models, build_batch):
    """A chunk of the prompt cannot know what the question at its end needs."""
    models, batch = shared_models(24), build_batch(ONE)
    with pytest.raises(ValueError, match="prefill_chunk_size cannot be combined with pruning"):
        generate(models.pruned, batch.inputs, 2, prefill_chunk_size=8)


@pytest.mark.feature("static cache")
@torch.no_grad()
def test_a_static_cache_is_refused(shared_models, build_batch):
    models, batch = shared_models(24), build_batch(ONE)
    with pytest.raises(ValueError, match="use the default"):
        generate(models.pruned, batch.inputs, 2, cache_implementation="static")
    unpruned = generate(models.pruned, batch.inputs, 2, cache_implementation="static", prune=False)
    assert_same_output(unpruned, generate(models.stock, batch.inputs, 2))


class RoundedLayer(QuantizedLayer):
    """A quantized layer that needs no package: it keeps multiples of a step.

    Args:
        step: a power of two, so that the multiples are exact.
        residual_length: so many new tokens are rounded together.
    """

    def __init__(self, step: float, residual_length: int):
        super().__init__(residual_length=residual_length)
        self.step = step

    def _quantize(self, tensor, axis):
        return torch.round(tensor / self.step)

    def _dequantize(self, q_tensor):
        return q_tensor * self.step


class OpenlyRoundedLayer(PrunedLayer):
    """What a `RoundedLayer` must come to: kept tokens that are rounded where they lie."""

    def __init__(self, step: float):
        super().__init__()
        self.step = step

    def seal(self):
        self.keys, self.values = (
            torch.round(each / self.step) * self.step for each in (self.keys, self.values)
        )


def cache_of_layers(model, layer_class, *arguments) -> Cache:
    return Cache(layers=[layer_class(*arguments) for _ in model.model.language_model.layers])


@pytest.mark.feature("quantized cache")
@torch.no_grad()
def test_a_quantized_cache_holds_kept_tokens(shared_models, build_batch):
    """It holds the numbers that an open cache holds whose prompt is rounded likewise."""
    models, batch = shared_models(24), build_batch(RAGGED)
    keep, step, never = random_keep(batch), 2.0**-4, 99
    reorders = "reorder_cache" in vars(QuantizedLayer)  # earlier releases reorder an empty residual
    for options in ({}, {"num_beams": 2}) if reorders else ({},):
        options = options | {"visual_keep_mask": keep}
        held = cache_of_layers(models.pruned, RoundedLayer, step, never)
        openly = cache_of_layers(models.pruned, OpenlyRoundedLayer, step)
        output, expected, unrounded = (
            generate(models.pruned, batch.inputs, **given_cache(cache), **options)
            for cache in (held, openly, None)
        )
        assert held.layers[0].dropped and held.layers[-1].store.get_seq_length()
        assert_same_output(output, expected)
        assert not torch.allclose(step_logits(output, 0), step_logits(unrounded, 0), atol=1e-2)


@pytest.mark.feature("quantized cache")
@torch.no_grad()
def test_a_quantized_cache_of_every_token_is_the_stock_models(shared_models, build_batch):
    """No number of these models lies within float32's error of where rounding turns."""
    models, batch = shared_models(24), build_batch(RAGGED)
    everything = {"visual_keep_mask": torch.ones(batch.num_visual, dtype=torch.bool)}
    stock_cache, cache = (cache_of_layers(each, RoundedLayer, 0.5, 2) for each in models)
    output = generate(models.pruned, batch.inputs, 6, **given_cache(cache), **everything)
    assert_same_output(output, generate(models.stock, batch.inputs, 6, **given_cache(stock_cache)))
    unrounded = generate(models.pruned, batch.inputs, 6, **everything)
    assert not torch.allclose(step_logits(output, 0), step_logits(unrounded, 0), atol=1e-2)


@pytest.mark.feature("quantized cache")
@torch.no_grad()
def test_what_a_quantized_cache_cannot_do(shared_models, build_batch):
    models, batch = shared_models(24), build_batch(ONE)
    cache = cache_of_layers(models.pruned, RoundedLayer, 2.0**-20, 2)
    output = generate(models.pruned, batch.inputs, 2, **given_cache(cache), max_keep_ratio=0.4)
    assert not getattr(cache, "is_croppable", False)  # as newer releases ask before they crop
    for change in (
        lambda: cache.crop(-1),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0])),
    ):
        with pytest.raises(ValueError, match="a quantized cache cannot be"):
            change()
    second = build_batch([[2, (2, 2), 3]])
    with pytest.raises(ValueError, match="cannot be pruned"):
        generate(models.pruned, follow(batch, second, output, second), 2, max_keep_ratio=0.4)


@pytest.mark.feature("quantized cache")
@torch.no_grad()
def test_generate_makes_a_quantized_cache(shared_models, build_batch):
    pytest.importorskip("optimum.quanto")
    models, batch = shared_models(24), build_batch(RAGGED)
    options = {"cache_implementation": "quantized", "cache_config": {"q_group_size": 4}}
    everything = {"visual_keep_mask": torch.ones(batch.num_visual, dtype=torch.bool)}
    output = generate(models.pruned, batch.inputs, **everything, **copy.deepcopy(options))
    assert_same_output(output, generate(models.stock, batch.inputs, **options))


@pytest.mark.slow
@QWEN_ONLY
@pytest.mark.feature("torch.compile")
@torch.no_grad()
def test_compiled_decoding_equals_hidden(build_models, build_batch):
    """`torch.compile` of the forward: prefills break out of the graph, decode steps do not."""
    models, batch = build_models(25), build_batch(RAGGED)
    keep = random_keep(batch)
    model = models.pruned
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    output = generate(model, batch.inputs, visual_keep_mask=keep)
    torch.compiler.reset()
    assert_equals_reference(models, batch, output, batch.split(keep))


OTHERS = {
    "an image elsewhere": ([[3, (3, 4), 4]], [[5, (3, 4), 20]]),
    "an image where it holds text": ([[40]], [[3, (3, 4), 30]]),
    "text where it holds an image": ([[3, (3, 4), 4]], [[60]]),
    "an image, and a shorter prompt": ([[3, (3, 4), 12]], [[4, (2, 2), 2]]),
    "rows of a batch": ([[9, (2, 3), 4], [2, (2, 3), 4]], [[8, (2, 3), 30], [2, (2, 3), 30]]),
}


@pytest.mark.feature("a cache of another prompt")
@pytest.mark.parametrize("settings", [{"max_keep_ratio": 0.5}, {"prune": False}], ids=str)
@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_a_cache_of_another_prompt_is_refused(shared_models, build_batch, name, settings):
    """Its visuals would count as those of the ids; nothing else tells that they are not."""
    model = shared_models(30).pruned
    held, other = (build_batch(prompts, seed) for seed, prompts in enumerate(OTHERS[name]))
    start = generate(model, held.inputs, 3, **settings)
    whole = dict(held.inputs) | {"use_cache": True}
    for cache in (cache_of(start), cache_of(model.model(**whole, **settings))):
        with pytest.raises(ValueError, match="the cache holds another prompt"):
            generate(model, other.inputs | given_cache(cache), 3, **settings)


@pytest.mark.feature("later turns of text")
@pytest.mark.parametrize("settings", [{"max_keep_ratio": 0.5}, {"prune": False}], ids=str)
@torch.no_grad()
def test_rows_of_a_cache_may_be_moved_between_turns(shared_models, build_batch, settings):
    """Repeated, selected and reordered: what they hold is still their prompts."""
    model = shared_models(30).pruned
    if "prune" in settings and model.model.positions_from_ids:
        pytest.skip("the stock model counts on from the rows that it ran last")
    first, second = build_batch([[3, (2, 3), 4], [9, (1, 2), 5]]), build_batch([[4], [4]], 1)
    start = generate(model, first.inputs, 3, **settings)
    inputs = follow(first, second, start, second)
    name, cache = next((k, v) for k, v in inputs.items() if isinstance(v, Cache))
    expected = generate(model, inputs | {name: copy.deepcopy(cache)}, 4, **settings)
    for rows in ([1, 0], [1], [0, 0, 1, 1]):
        moved, index = copy.deepcopy(cache), torch.tensor(rows)
        moved.batch_select_indices(index)
        picked = {key: each[index] for key, each in inputs.items() if key != name}
        output = generate(model, picked | {name: moved}, 4, **settings)
        assert torch.equal(output.sequences, expected.sequences[index])
        ids = torch.nn.functional.pad(output.sequences, (0, 2), value=7)
        said = ids.shape[1] - inputs["attention_mask"].shape[1]
        mask = torch.nn.functional.pad(picked["attention_mask"], (0, said), value=1)
        again = {"input_ids": ids, "attention_mask": mask, name: cache_of(output)}
        assert generate(model, again, 2, **settings).sequences.shape[1] == ids.shape[1] + 2
