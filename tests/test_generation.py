"""What users do with `generate` beyond a greedy answer, each against the slow reference.

Every test names the feature it shows; `docs/generation.md` has a row for each (`test_docs.py`).
"""

import copy

import pytest
import torch
from conftest import FIRST_SPECIAL_TOKEN, Batch, Models
from generation_checks import (
    assert_equals_reference,
    assert_near,
    assert_same_output,
    completion_of,
    generate,
    step_logits,
    training_inputs,
)
from generation_prompts import (
    ONE,
    PROMPTS,
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
    run_hidden,
)

from modeling_glimpseprune.stock import cache_of


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
    assert_equals_reference(models, batch, output, [cache_of(output).glimpse.keep_mask])


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
