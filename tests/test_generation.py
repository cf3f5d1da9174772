"""What users do with `generate` beyond a greedy answer, each against the slow reference.

Every test names the feature it shows; `docs/generation.md` has a row for each (`test_docs.py`).
"""

import copy
import threading

import pytest
import torch
from accelerate.utils import send_to_device
from conftest import FIRST_SPECIAL_TOKEN, Batch, Models, build_config_fields, pad_together
from reference import (
    PIXEL_INPUTS,
    allowed_attention,
    attention_restricted_to,
    dropped_positions,
    positions,
    run_hidden,
)
from test_invariants import (
    PROMPTS,
    assert_equals_reference,
    assert_near,
    assert_same_output,
    completion_of,
    family,  # noqa: F401
    generate,
    gradients_of,
    step_logits,
    training_inputs,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Cache, DynamicCache
from transformers.cache_utils import QuantizedLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from glimpseprune.families import QWEN2_5_VL
from modeling_glimpseprune import pruned_forward
from modeling_glimpseprune.pruned_forward import TRANSFORMERS_5
from modeling_glimpseprune.visual_tokens import VisualTokens

QWEN_ONLY = pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
ONE, RAGGED = PROMPTS["one_image"], PROMPTS["ragged_batch"]


def random_keep(batch: Batch, seed: int = 0, share: float = 0.4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch.num_visual, generator=generator) < share


def reference_logits(models: Models, prompt: dict, completion, keep: torch.Tensor) -> torch.Tensor:
    """`(T + 1, vocabulary)` after the prompt and after each token of a completion `(T,)`."""
    completion = torch.as_tensor(completion, dtype=torch.long)
    layer = models.pruned.config.glimpse_layer
    logits = run_hidden(models.stock, prompt, completion, keep, layer).logits
    return logits[prompt["input_ids"].shape[1] - 1 :]


def allowed(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the tokens that the tests' generation settings allow."""
    logits = logits.log_softmax(-1)
    logits[..., FIRST_SPECIAL_TOKEN:] = float("-inf")
    return logits


def beam_search_slowly(
    models: Models, prompt: dict, keep: torch.Tensor, num_beams: int, num_tokens: int
) -> list[int]:
    """The most probable completion that a beam of this width finds; nothing ends early."""
    beams = [(0.0, [])]
    for _ in range(num_tokens):
        candidates = []
        for score, tokens in beams:
            steps = allowed(reference_logits(models, prompt, tokens, keep)[-1])
            best = steps.topk(num_beams)
            candidates += [
                (score + value, [*tokens, token])
                for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        beams = sorted(candidates, reverse=True)[:num_beams]
    return beams[0][1]


# How the next token is chosen.


@pytest.mark.feature("beam search")
@torch.no_grad()
def test_beam_search_equals_a_slow_beam_search(shared_models, build_batch):
    models, batch = shared_models(20), build_batch(RAGGED)
    keep = random_keep(batch)
    found = generate(models.pruned, batch.inputs, 4, num_beams=3, visual_keep_mask=keep)
    for row, (prompt, mask) in enumerate(zip(batch.rows, batch.split(keep), strict=True)):
        expected = beam_search_slowly(models, prompt, mask, num_beams=3, num_tokens=4)
        assert completion_of(found, batch, row).tolist() == expected


@pytest.mark.feature("sampling")
@torch.no_grad()
def test_sampled_tokens_come_from_the_reference_distribution(shared_models, build_batch):
    models, batch = shared_models(20), build_batch(RAGGED)
    keep = random_keep(batch)
    torch.manual_seed(0)
    settings = {"do_sample": True, "temperature": 1.3, "num_return_sequences": 2}
    output = generate(models.pruned, batch.inputs, visual_keep_mask=keep, **settings)
    assert len(output.sequences.unique(dim=0)) > len(batch.rows)
    for row in range(2 * len(batch.rows)):
        prompt, mask = batch.rows[row // 2], batch.split(keep)[row // 2]
        tokens = completion_of(output, batch, row)
        expected = reference_logits(models, prompt, tokens[:-1], mask)
        assert_near(step_logits(output, row), expected)


@pytest.mark.feature("beam sampling")
@torch.no_grad()
def test_beam_sampling_equals_the_uncached_one(shared_models, build_batch):
    """The same draws find the same beams where every step runs the whole prompt again."""
    model, batch = shared_models(20).pruned, build_batch(RAGGED)
    settings = {"do_sample": True, "num_beams": 3, "num_return_sequences": 2}
    settings["visual_keep_mask"] = random_keep(batch)
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        outputs.append(generate(model, batch.inputs, use_cache=use_cache, **settings))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert_near(outputs[0].sequences_scores, outputs[1].sequences_scores)


@pytest.mark.feature("assisted decoding with a draft model")
@pytest.mark.parametrize("drafter", ["pruned", "stock"])
@torch.no_grad()
def test_assisted_decoding_equals_hidden(shared_models, build_batch, drafter):
    """A draft model proposes, and the pruned cache is cropped where the model disagrees."""
    models = shared_models(21, glimpse={"max_keep_ratio": 0.4})
    batch = build_batch(ONE)
    assistant = copy.deepcopy(getattr(models, drafter))
    weight = assistant.lm_head.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.data[:FIRST_SPECIAL_TOKEN] += 0.1 * noise[:FIRST_SPECIAL_TOKEN]
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    drafting = {"assistant_model": assistant, "eos_token_id": 199}  # 4.57 needs the latter
    output = generate(models.pruned, batch.inputs, 12, **drafting)
    assert_equals_reference(models, batch, output, [output.past_key_values.glimpse.keep_mask])


@pytest.mark.feature("constraints")
@torch.no_grad()
def test_constrained_tokens_are_the_best_allowed_ones(shared_models, build_batch):
    models, batch = shared_models(20), build_batch(RAGGED)
    keep = random_keep(batch)
    even = list(range(2, FIRST_SPECIAL_TOKEN, 2))
    output = generate(
        models.pruned,
        batch.inputs,
        visual_keep_mask=keep,
        prefix_allowed_tokens_fn=lambda row, ids: even,
    )
    for row, (prompt, mask) in enumerate(zip(batch.rows, batch.split(keep), strict=True)):
        tokens = completion_of(output, batch, row)
        expected = reference_logits(models, prompt, tokens[:-1], mask)
        assert_near(step_logits(output, row), expected)
        assert tokens.tolist() == [even[i] for i in expected[:, even].argmax(-1).tolist()]


@pytest.mark.feature("stopping criteria")
@torch.no_grad()
def test_rows_end_on_their_own(shared_models, build_batch):
    """A row that said its last token is padded; the others go on as if alone."""
    models, batch = shared_models(20), build_batch(RAGGED)
    keep = random_keep(batch)
    free = generate(models.pruned, batch.inputs, 8, visual_keep_mask=keep)
    end = completion_of(free, batch, 0)[2].item()
    ended = generate(models.pruned, batch.inputs, 8, visual_keep_mask=keep, eos_token_id=end)
    for row in range(len(batch.rows)):
        expected = completion_of(free, batch, row).tolist()
        if end in expected:
            last = expected.index(end)
            expected[last + 1 :] = [0] * (len(expected) - last - 1)
        found = completion_of(ended, batch, row).tolist()
        assert found == expected[: len(found)] and not any(expected[len(found) :])

    def stops(ids, scores):
        return torch.full((len(ids),), ids.shape[1] == batch.inputs["input_ids"].shape[1] + 3)

    stopped = generate(
        models.pruned, batch.inputs, 8, visual_keep_mask=keep, stopping_criteria=[stops]
    )
    assert torch.equal(stopped.sequences, free.sequences[:, : stopped.sequences.shape[1]])
    assert stopped.sequences.shape[1] == free.sequences.shape[1] - 5


class Listener:
    """A streamer that remembers what it was given."""

    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten())

    def end(self):
        self.ended = True


@pytest.mark.feature("streamers")
@torch.no_grad()
def test_streamers_hear_prompt_and_answer(shared_models, build_batch):
    model, batch, listener = shared_models(20).pruned, build_batch(ONE), Listener()
    output = generate(model, batch.inputs, max_keep_ratio=0.4, streamer=listener)
    assert listener.ended and len(listener.parts) == 7
    assert torch.equal(torch.cat(listener.parts), output.sequences[0])


# What goes in.


@pytest.mark.feature("inputs_embeds")
@pytest.mark.parametrize("name", ["one_image", "ragged_batch"])
@torch.no_grad()
def test_embeddings_may_stand_for_ids(shared_models, build_batch, name):
    """As in the stock model; pruned as the same prompt given by ids at the same positions."""
    models, batch = shared_models(22), build_batch(PROMPTS[name])
    inputs = {key: value for key, value in batch.inputs.items() if key != "mm_token_type_ids"}
    embeddings = models.stock.get_input_embeddings()(inputs.pop("input_ids"))
    expected = generate(models.stock, inputs, inputs_embeds=embeddings)
    everything = generate(models.pruned, inputs, inputs_embeds=embeddings, prune_threshold=0.0)
    assert_same_output(everything, expected)
    keep = random_keep(batch)
    pruned = generate(models.pruned, inputs, inputs_embeds=embeddings, visual_keep_mask=keep)
    plain = inputs["attention_mask"].cumsum(-1) - 1
    if models.pruned.model.positions_from_ids:
        plain = plain.expand(3, -1, -1)
    ids = {"input_ids": batch.inputs["input_ids"], "position_ids": plain}
    logits = models.pruned(**inputs, **ids, visual_keep_mask=keep, logits_to_keep=1).logits[:, -1]
    assert_near(pruned.logits[0], logits)
    together = generate(
        models.pruned, inputs, inputs_embeds=embeddings, visual_keep_mask=keep, num_beams=2
    )
    for row, (prompt, mask) in enumerate(zip(batch.rows, batch.split(keep), strict=True)):
        alone = {key: value for key, value in prompt.items() if key != "mm_token_type_ids"}
        alone["inputs_embeds"] = models.stock.get_input_embeddings()(alone.pop("input_ids"))
        beams = generate(models.pruned, alone, visual_keep_mask=mask, num_beams=2)
        assert torch.equal(beams.sequences[0], together.sequences[row])


@pytest.mark.feature("right padding")
@torch.no_grad()
def test_right_padded_prompts_are_refused(shared_models, build_batch):
    model, batch = shared_models(20).pruned, build_batch(RAGGED)
    inputs = dict(batch.inputs)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in inputs:
            padding = [int((~mask.bool()).sum()) for mask in batch.inputs["attention_mask"]]
            rows = zip(inputs[name], padding, strict=True)
            inputs[name] = torch.stack([row.roll(-count) for row, count in rows])
    with pytest.raises(ValueError, match="pad on the left"):
        generate(model, inputs, 2, visual_keep_mask=random_keep(batch))


@pytest.mark.feature("logits_to_keep")
@pytest.mark.parametrize("kept", [1, torch.tensor([0, 3, -1])])
@torch.no_grad()
def test_some_logits_of_a_prompt(shared_models, build_batch, kept):
    model, batch = shared_models(20).pruned, build_batch(RAGGED)
    keep = random_keep(batch)
    every = model(**batch.inputs, visual_keep_mask=keep).logits
    some = model(**batch.inputs, visual_keep_mask=keep, logits_to_keep=kept).logits
    assert_near(some, every[:, -1:] if isinstance(kept, int) else every[:, kept])


# What comes out.


def hidden_run(models: Models, prompt: dict, completion: torch.Tensor, keep: torch.Tensor):
    """The stock model's output, layer by layer, while dropped tokens are hidden."""
    stock, layer = models.stock, models.pruned.config.glimpse_layer
    input_ids = torch.cat([prompt["input_ids"], completion.view(1, -1)], dim=1)
    prompt_length, length = prompt["input_ids"].shape[1], input_ids.shape[1]
    dropped = torch.zeros(length, dtype=torch.bool)
    dropped[:prompt_length] = dropped_positions(stock, prompt, keep)
    num_layers = stock.config.get_text_config().num_hidden_layers
    masks = [allowed_attention(dropped, prompt_length, each > layer) for each in range(num_layers)]
    pixels = {name: prompt[name] for name in PIXEL_INPUTS if name in prompt}
    with attention_restricted_to(stock, masks):
        output = stock(
            input_ids=input_ids,
            position_ids=positions(stock, prompt, length),
            output_hidden_states=True,
            output_attentions=True,
            **pixels,
        )
    return output, dropped


def assert_layers_equal(
    models: Models, batch: Batch, row: int, keep, completion, hidden_states, attentions
) -> None:
    """Hidden states `(length, hidden)` and attentions `(heads, length, length)` of one row."""
    expected, dropped = hidden_run(models, batch.rows[row], completion, keep)
    length, glimpse_layer = len(dropped), models.pruned.config.glimpse_layer
    assert len(hidden_states) == len(expected.hidden_states)
    for index, (found, wanted) in enumerate(
        zip(hidden_states, expected.hidden_states, strict=True)
    ):
        wanted = wanted[0].clone()
        if index > glimpse_layer:
            wanted[dropped] = 0
        assert_near(found[-length:], wanted)
    for index, (found, wanted) in enumerate(zip(attentions, expected.attentions, strict=True)):
        wanted = wanted[0].clone()
        if index > glimpse_layer:
            wanted[:, dropped] = 0
            wanted[:, :, dropped] = 0
        assert_near(found[:, -length:, -length:], wanted)
        assert not found[:, -length:, :-length].any()


@pytest.mark.feature("output_hidden_states, output_attentions")
@pytest.mark.parametrize("name", ["one_image", "ragged_batch"])
@torch.no_grad()
def test_layers_are_shown_as_the_caller_sees_the_prompt(shared_models, build_batch, name):
    models, batch = shared_models(23, "eager", {"glimpse_layer": 1}), build_batch(PROMPTS[name])
    keep = random_keep(batch)
    asked = {"output_hidden_states": True, "output_attentions": True, "visual_keep_mask": keep}
    output = generate(models.pruned, batch.inputs, 3, **asked)
    rows = batch.split(keep)
    for row, mask in enumerate(rows):
        completion = completion_of(output, batch, row)[:-1]
        num_layers = len(output.attentions[0])
        states = [
            torch.cat([step[layer][row] for step in output.hidden_states])
            for layer in range(num_layers + 1)
        ]
        attentions = [
            stack_attentions([step[layer][row] for step in output.attentions])
            for layer in range(num_layers)
        ]
        assert_layers_equal(models, batch, row, mask, completion, states, attentions)
    inputs = training_inputs(batch, output, [2] * len(rows))
    direct = models.pruned(**inputs, **asked)
    for row, mask in enumerate(rows):
        completion = completion_of(output, batch, row)[:-1]
        states = [each[row] for each in direct.hidden_states]
        attentions = [each[row] for each in direct.attentions]
        assert_layers_equal(models, batch, row, mask, completion, states, attentions)


def stack_attentions(steps: list[torch.Tensor]) -> torch.Tensor:
    """Rows of all steps, `(heads, rows, columns of the last)`."""
    columns = steps[-1].shape[-1]
    padded = [torch.nn.functional.pad(step, (0, columns - step.shape[-1])) for step in steps]
    return torch.cat(padded, dim=1)


@pytest.mark.feature("output_hidden_states, output_attentions")
@torch.no_grad()
def test_an_own_glimpse_leaves_no_trace_in_the_layers(shared_models, build_batch):
    """Glimpse tokens are taken out of what is shown."""
    model, batch = shared_models(23, "eager").pruned, build_batch(RAGGED)
    asked = {"output_hidden_states": True, "output_attentions": True, "max_keep_ratio": 0.4}
    own = model(**batch.inputs, **asked)
    keep = model.glimpse(**batch.inputs, max_keep_ratio=0.4).keep_mask
    given = model(**batch.inputs, **(asked | {"visual_keep_mask": keep}))
    real = batch.inputs["attention_mask"].bool()
    for found, wanted in zip(own.hidden_states, given.hidden_states, strict=True):
        assert_near(found[real], wanted[real])
    for found, wanted in zip(own.attentions, given.attentions, strict=True):
        assert_near(found.transpose(1, 2)[real], wanted.transpose(1, 2)[real])


# Caches and turns.


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
    inputs = {"past_key_values": start.past_key_values}
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
    second turn, and above the glimpse layer from the second turn itself.
    """
    stock, layer = models.stock, models.pruned.config.glimpse_layer
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
    seen = copy.deepcopy(start.past_key_values.glimpse)
    inputs = follow(first, second, start, second)
    output = generate(model, inputs, 3, max_keep_ratio=0.25)
    record = output.past_key_values.glimpse
    assert seen.total == 12 and record.total == 16 and record.kept <= 4
    assert [visual.grid for visual in record.visuals] == [(1, 4, 4)]
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1


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
    importance = [output.past_key_values.glimpse.importance for output in (first, asked)]
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
        inputs["past_key_values"] = copy.deepcopy(first.past_key_values)
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
    """A quantized layer that needs no package: it keeps multiples of a step."""

    def __init__(self, step: float):
        super().__init__(residual_length=2)
        self.step = step

    def _quantize(self, tensor, axis):
        return torch.round(tensor / self.step)

    def _dequantize(self, q_tensor):
        return q_tensor * self.step


def rounded_cache(model, step: float) -> Cache:
    return Cache(layers=[RoundedLayer(step) for _ in model.model.language_model.layers])


@pytest.mark.feature("quantized cache")
@torch.no_grad()
def test_a_quantized_cache_holds_kept_tokens(shared_models, build_batch):
    """Fine steps change nothing; coarse ones change what they change in the stock model."""
    models, batch = shared_models(24), build_batch(RAGGED)
    keep = random_keep(batch)
    for options in ({}, {"num_beams": 2}) if TRANSFORMERS_5 else ({},):
        cache = rounded_cache(models.pruned, 2.0**-20)
        options = options | {"visual_keep_mask": keep}
        output = generate(models.pruned, batch.inputs, past_key_values=cache, **options)
        assert cache.layers[0].dropped and cache.layers[-1].store.residual_length
        assert_same_output(output, generate(models.pruned, batch.inputs, **options))
    everything = {"visual_keep_mask": torch.ones_like(keep)}
    coarse, unrounded = (
        generate(models.pruned, batch.inputs, 6, past_key_values=past, **everything)
        for past in (rounded_cache(models.pruned, 0.5), None)
    )
    stock_cache = rounded_cache(models.stock, 0.5)
    assert_same_output(coarse, generate(models.stock, batch.inputs, 6, past_key_values=stock_cache))
    assert not torch.allclose(step_logits(coarse, 0), step_logits(unrounded, 0), atol=1e-3)


@pytest.mark.feature("quantized cache")
@torch.no_grad()
def test_what_a_quantized_cache_cannot_do(shared_models, build_batch):
    models, batch = shared_models(24), build_batch(ONE)
    cache = rounded_cache(models.pruned, 2.0**-20)
    output = generate(models.pruned, batch.inputs, 2, past_key_values=cache, max_keep_ratio=0.4)
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


# Attention implementations.


@QWEN_ONLY
@pytest.mark.feature("flex_attention")
def test_flex_attention_is_refused_as_in_the_stock_model(shared_models):
    for model in shared_models(24):
        model = copy.deepcopy(model)
        with pytest.raises(ValueError, match="flex|Flex"):
            model.set_attn_implementation("flex_attention")


@pytest.mark.slow
@pytest.mark.feature("flex_attention")
@pytest.mark.parametrize("family", ["llava", "llava_next"], indirect=True)
@torch.no_grad()
def test_flex_attention_equals_hidden(build_models, build_batch):
    models, batch = build_models(24), build_batch(RAGGED)
    keep = random_keep(batch)
    for model in models:
        model.set_attn_implementation({"text_config": "flex_attention"})
    try:
        generate(models.stock, batch.inputs, 3)
    except Exception as error:  # whatever the compiler raises
        pytest.skip(f"the stock model does not run it here: {type(error).__name__}")
    output = generate(models.pruned, batch.inputs, 3, visual_keep_mask=keep)
    for model in models:
        model.set_attn_implementation({"text_config": "sdpa"})
    assert_equals_reference(models, batch, output, batch.split(keep))


# Weights and devices.


@pytest.mark.feature("float16, bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_near(build_models, build_batch, dtype):
    """The scores and the answer's first logits, within the rounding of the stock model's own."""
    models, batch = build_models(26), build_batch(RAGGED)
    keep = random_keep(batch)
    importance = models.pruned.glimpse(**batch.inputs).importance
    expected = generate(models.pruned, batch.inputs, 1, visual_keep_mask=keep).logits[0]
    stock = models.stock(**batch.inputs).logits
    error = (models.stock.to(dtype)(**batch.inputs).logits.float() - stock).abs().max()
    model = models.pruned.to(dtype)
    rounded = generate(model, batch.inputs, 1, visual_keep_mask=keep).logits[0].float()
    assert (rounded - expected).abs().max() < 2 * error
    scores = model.glimpse(**batch.inputs).importance
    assert scores.isfinite().all()
    assert torch.corrcoef(torch.stack([scores.float(), importance]))[0, 1] > 0.98
    assert generate(model, batch.inputs).past_key_values.layers[0].keys.dtype == dtype


@pytest.mark.feature("device_map, disk offload")
@torch.no_grad()
def test_layers_on_disk_equal_hidden(build_models, build_batch, tmp_path):
    models, batch = build_models(27, glimpse={"glimpse_layer": 1}), build_batch(RAGGED)
    keep = random_keep(batch)
    models.pruned.save_pretrained(tmp_path / "model")
    placed = dict.fromkeys(
        ["model.glimpse", "model.language_model.embed_tokens", "lm_head",
         "model.language_model.norm", "model.language_model.rotary_emb",
         "model.language_model.layers.0"],
        "cpu",
    )  # fmt: skip
    others = {name for name, _ in models.pruned.model.named_children()}
    others |= {name for name, _ in models.pruned.model.named_parameters(recurse=False)}
    others -= {"language_model", "glimpse"}
    placed |= dict.fromkeys([f"model.{name}" for name in others], "cpu")
    placed |= {f"model.language_model.layers.{index}": "disk" for index in (1, 2)}
    model = type(models.pruned).from_pretrained(
        tmp_path / "model",
        dtype=torch.float32,
        device_map=placed,
        offload_folder=tmp_path / "offload",
    )
    assert next(model.model.language_model.layers[1].parameters()).device.type == "meta"
    output = generate(model, batch.inputs, visual_keep_mask=keep)
    assert_equals_reference(models, batch, output, batch.split(keep))
    importance = models.pruned.glimpse(**batch.inputs).importance
    assert_near(model.glimpse(**batch.inputs).importance, importance, 1e-5)


@pytest.mark.feature("PEFT adapters")
@torch.no_grad()
def test_an_adapter_on_the_language_model(build_models, build_batch):
    """With its adapter the model answers, and glimpses, as with the adapter merged."""
    peft = pytest.importorskip("peft")
    models, batch = build_models(28), build_batch(RAGGED)
    before = models.pruned.glimpse(**batch.inputs).importance
    config = peft.LoraConfig(
        r=2,
        target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|up_proj)",
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(models.pruned, config)
    settings = {"max_keep_ratio": 0.4}
    output = generate(adapted, batch.inputs, **settings)
    importance = output.past_key_values.glimpse.importance
    assert (importance - before).abs().max() > 1e-2
    merged = generate(adapted.merge_and_unload(), batch.inputs, **settings)
    assert_same_output(output, merged, 1e-4)
    assert_near(merged.past_key_values.glimpse.importance, importance)


@pytest.mark.feature("gradient checkpointing")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_equal_kept_ones(build_models, build_batch, use_reentrant):
    models, batch = build_models(29, glimpse={"glimpse_layer": 1}), build_batch(RAGGED)
    keep = random_keep(batch)
    with torch.no_grad():
        output = generate(models.pruned, batch.inputs, 4, visual_keep_mask=keep)
    model, inputs = models.pruned.train(), training_inputs(batch, output, [4, 2, 3])
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            arguments = {"use_reentrant": use_reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
        loss = model(**inputs, visual_keep_mask=keep).loss
        loss.backward()
        gradients = {name: grad for name, grad in gradients_of(model).items() if grad is not None}
        found.append((loss.detach(), {name: grad.clone() for name, grad in gradients.items()}))
        model.zero_grad()
    assert_near(found[1][0], found[0][0], 1e-6)
    assert found[1][1].keys() == found[0][1].keys()
    for name, expected in found[0][1].items():
        assert_near(found[1][1][name], expected, 1e-4 * float(expected.abs().max()) + 1e-7)


@pytest.mark.feature("gradient checkpointing")
def test_checkpointed_stage_1_gradients_equal_kept_ones(build_models, build_batch):
    """The forward of stage 1, whose glimpse weights alone learn."""
    models, batch = build_models(29), build_batch(RAGGED)
    with torch.no_grad():
        output = generate(models.stock, batch.inputs, 4)
    model, inputs = models.pruned.train(), training_inputs(batch, output, [4, 2, 3])
    model.requires_grad_(False)
    model.model.glimpse.requires_grad_(True)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            arguments = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
        outputs = model(**inputs, in_place=True, use_cache=True)
        scores = outputs.past_key_values.glimpse.importance
        (outputs.loss + scores.sigmoid().sum()).backward()
        glimpse = model.model.glimpse
        found.append([weight.grad.clone() for weight in glimpse.parameters()])
        model.zero_grad()
    for kept, checkpointed in zip(*found, strict=True):
        assert_near(checkpointed, kept, 1e-4 * float(kept.abs().max()) + 1e-7)


@pytest.mark.feature("save_pretrained and reload")
@torch.no_grad()
def test_a_reloaded_model_is_the_same(shared_models, build_batch, tmp_path):
    model, batch = shared_models(24).pruned, build_batch(RAGGED)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    settings = {"max_keep_ratio": 0.4}
    expected = generate(model, batch.inputs, **settings)
    assert_same_output(generate(reloaded, batch.inputs, **settings), expected)


# Nothing is left behind.


@pytest.mark.feature("threads")
@torch.no_grad()
def test_eight_threads_share_a_model(shared_models, build_batch):
    model = shared_models(24).pruned
    batches = [build_batch(RAGGED if seed % 2 else ONE, seed) for seed in range(8)]
    settings = [
        {"max_keep_ratio": 0.1 + 0.1 * seed, "num_beams": 1 + seed % 3} for seed in range(8)
    ]
    expected = [
        generate(model, batch.inputs, **options)
        for batch, options in zip(batches, settings, strict=True)
    ]
    outputs, start = [None] * 8, threading.Barrier(8)

    def run(index: int) -> None:
        start.wait(timeout=60)
        with torch.no_grad():
            outputs[index] = generate(model, batches[index].inputs, **settings[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output, alone in zip(outputs, expected, strict=True):
        assert output is not None
        assert_same_output(output, alone)


class Interruption(Exception):
    """Raised half way."""


@pytest.mark.feature("errors half way")
@pytest.mark.parametrize("place", ["vision encoder", "prefill", "decoding"])
@torch.no_grad()
def test_an_error_half_way_leaves_the_model_usable(shared_models, build_batch, place):
    model, batch = shared_models(24).pruned, build_batch(RAGGED)
    settings = {"max_keep_ratio": 0.4}
    expected = generate(model, batch.inputs, **settings)
    hooks_before = [len(module._forward_hooks) for module in model.model.tapped_modules()]

    def fail(*args):
        raise Interruption

    hooks, processors = [], []
    if place == "vision encoder":
        hooks.append(model.model.tapped_modules()[0].register_forward_hook(fail))
    elif place == "prefill":
        hooks.append(model.model.language_model.layers[-1].mlp.register_forward_hook(fail))
    else:

        def fail_later(ids, scores):
            if ids.shape[1] > batch.inputs["input_ids"].shape[1] + 2:
                raise Interruption
            return scores

        processors.append(fail_later)
    with pytest.raises(Interruption):
        generate(model, batch.inputs, logits_processor=processors, **settings)
    for hook in hooks:
        hook.remove()
    hooks_after = [len(module._forward_hooks) for module in model.model.tapped_modules()]
    assert hooks_after == hooks_before
    assert_same_output(generate(model, batch.inputs, **settings), expected)


# Without a GPU: attention interfaces, offloading and devices stood in for.


def flash_attention_in_words(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs
):
    """What `flash_attention_2` computes: causal from the last key backwards, keys masked in 2-D."""
    assert attention_mask is None or attention_mask.shape == (len(key), key.shape[2])
    assert kwargs.get("position_ids") is None or query.shape[2] == 1
    queries, keys = query.shape[2], key.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None]
    if attention_mask is not None:
        seen = seen & attention_mask[:, None].bool()
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen[:, None], -1e9)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


@pytest.mark.feature("flash_attention_2")
@torch.no_grad()
def test_nothing_but_a_flash_interface_is_asked_of_it(build_models, build_batch, monkeypatch):
    models, batch = build_models(31, glimpse={"glimpse_layer": 1}), build_batch(RAGGED)
    keep = random_keep(batch)
    expected = models.pruned.glimpse(**batch.inputs).importance
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return flash_attention_in_words(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", counted)
    models.pruned.model.language_model.config._attn_implementation = "flash_attention_2"
    output = generate(models.pruned, batch.inputs, 4, visual_keep_mask=keep)
    assert len(calls) == 4 * 3
    assert_equals_reference(models, batch, output, batch.split(keep))
    importance = models.pruned.glimpse(**batch.inputs).importance
    assert_near(importance, expected)


class NoStream:
    """Stands in for a device's stream where there is no device."""

    def wait_stream(self, other):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


@pytest.mark.feature("offloaded cache")
@torch.no_grad()
def test_an_offloaded_cache_is_pruned(shared_models, build_batch, monkeypatch):
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda *args: NoStream())
    models, batch = shared_models(24), build_batch(RAGGED)
    keep = random_keep(batch)
    options = {"cache_implementation": "offloaded", "visual_keep_mask": keep}
    output = generate(models.pruned, batch.inputs, **options)
    assert output.past_key_values.offloading
    assert_equals_reference(models, batch, output, batch.split(keep))


def place(module: torch.nn.Module, device: str) -> None:
    """Put a module on a device that does not exist, and move what it is called with there."""
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            part._parameters[name] = torch.nn.Parameter(weight.to(device))
        for name, buffer in list(part.named_buffers(recurse=False)):
            part._buffers[name] = buffer.to(device)

    def move(module, args, kwargs):
        return send_to_device(args, device), send_to_device(kwargs, device)

    module.register_forward_pre_hook(move, with_kwargs=True)


@pytest.mark.feature("device_map, several devices")
@pytest.mark.parametrize("glimpse_device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("glimpse_layer", [0, 1, 2])
@torch.no_grad()
def test_no_operation_mixes_devices(monkeypatch, glimpse_layer, glimpse_device):
    """Two devices of tensors without contents: an operation on both would raise."""
    monkeypatch.setattr(pruned_forward, "_kept_counts", lambda *args: ([9, 11], False, 15))
    fields = build_config_fields() | {"predictor_hidden_size": 16, "predictor_condition_size": 16}
    fields["attn_implementation"] = "eager"  # other masks look into the padding
    config = QWEN2_5_VL.config_class(
        **fields,
        predictor_num_heads=2,
        glimpse_layer=glimpse_layer,
        attention_layers=sorted({0, glimpse_layer}),
    )
    with FakeTensorMode():
        model = QWEN2_5_VL.model_class(config).eval().model
        decoder = model.language_model
        devices = ["cuda:0", "cuda:1", "cuda:1"]
        for layer, device in zip(decoder.layers, devices, strict=True):
            place(layer, device)
        place(decoder.norm, "cuda:1")
        place(decoder.rotary_emb, "cuda:0")
        place(model.glimpse, glimpse_device)
        zeros = torch.zeros(20, 6, dtype=torch.long, device="cuda:0")
        features = [torch.empty(20, 16, device="cuda:1") for _ in config.vision_layers]
        tokens = VisualTokens(
            zeros[:, 0], zeros[:, 1], features, zeros, ["image", "image"], [10, 10]
        )
        request = pruned_forward.PruneRequest(
            model.glimpse, tokens, glimpse_layer, None, ["top_left"], 0.5, 0.3, 1
        )
        cache = DynamicCache()
        for length, prune_request in ((16, request), (1, None)):
            past = cache.get_seq_length()
            output = decoder(
                inputs_embeds=torch.empty(2, length, 32, device="cuda:0"),
                attention_mask=torch.ones(2, past + length, dtype=torch.long, device="cuda:0"),
                position_ids=torch.zeros(3, 2, length, dtype=torch.long, device="cuda:0"),
                past_key_values=cache,
                use_cache=True,
                prune_request=prune_request,
            )
            assert output.last_hidden_state.shape == (2, length, 32)
    assert [str(layer.keys.device) for layer in cache.layers] == devices
    assert all(layer.keys.shape[2] == 12 for layer in cache.layers)
