"""Troubles that people reported of such models: training batches, packed rows, turns, compiling.

What comes back from a call, and how it may be made, is in `test_stock_contract.py`.
"""

import pytest
import torch
from conftest import Batch, counts_from_ids, pad_together
from generation_checks import (
    assert_near,
    generate,
)
from generation_prompts import (
    FAMILY_NAMES,
)

from modeling_glimpseprune.row_boundaries import AlignedRows, first_labelled
from modeling_glimpseprune.stock import cache_of, given_cache

PROMPTS = [[2, (2, 3), 3], [4, (3, 3), 6], [1, (2, 2), 2]]
ANSWERS = [3, 1, 4]
SETTINGS = {"max_keep_ratio": 0.5}
TOKEN_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids")


@pytest.fixture(params=FAMILY_NAMES)
def family(request):
    return request.param


def with_answers(row: dict, count: int, seed: int) -> dict:
    """A prompt and its answer, labelled."""
    answer = torch.randint(1, 189, (1, count), generator=torch.Generator().manual_seed(seed))
    prompt = row["input_ids"]
    added = {
        "input_ids": torch.cat([prompt, answer], dim=1),
        "labels": torch.cat([torch.full_like(prompt, -100), answer], dim=1),
    }
    for name in ("attention_mask", "mm_token_type_ids"):
        if name in row:
            fill = torch.full_like(answer, int(name == "attention_mask"))
            added[name] = torch.cat([row[name], fill], dim=1)
    return row | added


def pad_right(rows: list[dict]) -> dict:
    """A batch as tutorials' collators make it: everything padded on the right."""
    length = max(row["input_ids"].shape[1] for row in rows)
    padding = {"labels": -100}
    inputs = {}
    for name in (*TOKEN_INPUTS, "labels"):
        if name in rows[0]:
            inputs[name] = torch.cat(
                [
                    torch.nn.functional.pad(
                        row[name], (0, length - row[name].shape[1]), value=padding.get(name, 0)
                    )
                    for row in rows
                ]
            )
    pixels = [{k: v for k, v in row.items() if k not in inputs} for row in rows]
    return inputs | {
        name: torch.cat([each[name] for each in pixels if name in each])
        for name in dict.fromkeys(key for each in pixels for key in each)
    }


@pytest.fixture
def rows(build_batch) -> list[dict]:
    batch = build_batch(PROMPTS)
    answered = zip(batch.rows, ANSWERS, strict=True)
    return [with_answers(row, count, i) for i, (row, count) in enumerate(answered)]


@pytest.mark.parametrize("prune_layer", [None, 0])
@pytest.mark.parametrize("padding", ["right", "left"])
@torch.no_grad()
def test_each_row_is_cut_at_its_own_boundary(shared_models, rows, padding, prune_layer):
    """Prompts that end at different columns: scores, logits and loss are those of each row."""
    model = shared_models(5, glimpse={"prune_layer": prune_layer}).pruned
    inputs = pad_right(rows)
    if padding == "left":
        labels = [row.pop("labels") for row in rows]
        inputs = pad_together(rows)
        length = inputs["input_ids"].shape[1]
        shift = [length - each.shape[1] for each in labels]
        inputs["labels"] = torch.cat(
            [
                torch.nn.functional.pad(each, (n, 0), value=-100)
                for each, n in zip(labels, shift, strict=True)
            ]
        )
        rows = [row | {"labels": each} for row, each in zip(rows, labels, strict=True)]
    output = model(**inputs, **SETTINGS, output_hidden_states=True)
    assert cache_of(output) is None  # it would hold the rows as they were moved
    losses, tokens = [], []
    for i, row in enumerate(rows):
        alone = model(**row, **SETTINGS, output_hidden_states=True)
        real = inputs["attention_mask"][i].bool()
        assert_near(output.logits[i, real], alone.logits[0])
        for states, expected in zip(output.hidden_states, alone.hidden_states, strict=True):
            assert_near(states[i, real], expected[0])
        losses.append(alone.loss)
        tokens.append(int((row["labels"] != -100).sum()))
    mean = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    assert_near(output.loss, mean)


@torch.no_grad()
def test_boundaries_may_be_given(shared_models, rows):
    model, inputs = shared_models(5).pruned, pad_right(rows)
    labels = inputs.pop("labels")
    boundaries = (labels != -100).to(torch.uint8).argmax(1)
    assert boundaries.unique().numel() > 1
    expected = model(**inputs, labels=labels, **SETTINGS).logits
    assert torch.equal(model(**inputs, prompt_length=boundaries, **SETTINGS).logits, expected)
    whole = model.model(**inputs, prompt_length=boundaries, **SETTINGS).last_hidden_state
    assert torch.equal(model.lm_head(whole), expected)


def test_gradients_of_a_ragged_batch_are_its_rows(build_models, rows):
    model = build_models(5).pruned.train()
    weight = model.lm_head.weight
    model(**pad_right(rows), **SETTINGS).loss.backward()
    together, weight.grad = weight.grad.clone(), None
    total = sum(ANSWERS)
    for row, count in zip(rows, ANSWERS, strict=True):
        (model(**row, **SETTINGS).loss * count / total).backward()
    assert_near(together, weight.grad)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": "all"}, r"labels begin at the first token of row\(s\) \[0, 1, 2\]"),
        ({"prompt_length": torch.tensor([0, 3, 3])}, "prompt_length must lie in 1..22, got"),
        ({"output_attentions": True}, "cannot be combined with a cache that holds"),
    ],
)
def test_boundaries_that_cannot_be_are_refused(shared_models, rows, change, message, family):
    if family != "qwen2_5_vl":
        pytest.skip("the sentences name lengths of Qwen's prompts")
    inputs = pad_right(rows) | change
    if isinstance(change.get("labels"), str):
        inputs["labels"] = inputs["input_ids"]
    if "prompt_length" in change:
        inputs.pop("labels")
    with pytest.raises(ValueError, match=message):
        shared_models(5).pruned(**inputs)


@pytest.mark.parametrize("unlabelled", [[0], [1], [2], [0, 2], [0, 1, 2]], ids=str)
@torch.no_grad()
def test_rows_without_labels_are_prompts(shared_models, rows, unlabelled):
    """As where a collator cuts a long row before its answer."""
    model, inputs = shared_models(5).pruned, pad_right(rows)
    inputs["labels"][unlabelled] = -100
    logits = model(**inputs, **SETTINGS).logits
    for i, row in enumerate(rows):
        if i in unlabelled:
            row = {name: value for name, value in row.items() if name != "labels"}
        real = inputs["attention_mask"][i].bool()
        assert_near(logits[i, real], model(**row, **SETTINGS).logits[0])


@pytest.mark.parametrize("training", [False, True])
def test_text_alone_may_be_labelled_from_its_first_token(build_models, training):
    models, ids = build_models(5), torch.randint(1, 150, (2, 8))
    stock, pruned = (model.train(training)(input_ids=ids, labels=ids).loss for model in models)
    assert torch.equal(pruned, stock)


def test_labels_tell_where_completions_begin():
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, -100, -100], [-100, -100, -100, -100]])
    assert first_labelled(labels).tolist() == [2, 1, 4]
    assert first_labelled(labels[:1]) == 2 and first_labelled(labels[2:]).tolist() == [4]


def test_rows_are_moved_and_moved_back():
    rows = AlignedRows(torch.tensor([1, 3]), 4, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]))
    tokens = torch.arange(8).view(2, 4)
    moved = rows.move(tokens)
    assert rows.prompt_length == 3
    assert rows.attention_mask.tolist() == [[0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert moved[0, 2:6].tolist() == [0, 1, 2, 3] and moved[1, :4].tolist() == [4, 5, 6, 7]
    assert torch.equal(rows.move_back(moved), tokens)


def test_padding_behind_a_row_is_no_part_of_its_prompt():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    rows = AlignedRows(torch.tensor([4, 3]), 4, mask)
    assert rows.prompt_length == 3 and rows.shift.tolist() == [1, 0]


@pytest.mark.parametrize("backbone", [False, True])
def test_training_wants_to_know_where_the_answer_begins(build_models, rows, backbone):
    """Label smoothing takes the labels away; trainers of others call the backbone."""
    model, inputs = build_models(5).pruned.train(), pad_right(rows)
    labels = inputs.pop("labels")
    called = model.model if backbone else model
    with pytest.raises(ValueError, match="give prompt_length"):
        called(**inputs, **SETTINGS)
    called(**inputs, prune=False)
    called(**inputs, prompt_length=first_labelled(labels), **SETTINGS)
    with torch.no_grad():
        called(**rows[0] if not backbone else {k: v for k, v in rows[0].items() if k != "labels"})


@torch.no_grad()
def test_packed_rows_are_refused_while_pruning(shared_models, build_batch, family):
    models, batch = shared_models(5), build_batch([[2, (2, 2), 3, (2, 2), 2]])
    inputs = {k: v for k, v in batch.inputs.items() if k != "attention_mask"}
    length = inputs["input_ids"].shape[1]
    packed = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)])[None]
    if counts_from_ids(family):
        packed = packed[None].expand(4, -1, -1)
    with pytest.raises(ValueError, match="position_ids start again within a row"):
        models.pruned(**inputs, position_ids=packed)
    with pytest.raises(ValueError, match="position_ids start again within a row"):
        keep = torch.ones(batch.num_visual, dtype=torch.bool)
        models.pruned(**inputs, position_ids=packed, visual_keep_mask=keep)
    unpruned = models.pruned(**inputs, position_ids=packed, prune=False).logits
    assert torch.equal(unpruned, models.stock(**inputs, position_ids=packed).logits)


@pytest.mark.parametrize("first", [[6], [2, (3, 2), 2]], ids=["text", "image"])
@torch.no_grad()
def test_unpruned_turns_with_images_go_on_as_the_whole_conversation(
    build_models, build_batch, first
):
    """A cached turn, then one with an image: every token of the answer, not the first alone."""
    models = build_models(3)
    one, two = build_batch([first], 1), build_batch([[2, (2, 4), 3]], 2)
    whole = joined(one, two)
    expected = generate(models.stock, whole)
    cache = cache_of(models.pruned(**one.inputs, use_cache=True, prune=False))
    new = {name: value for name, value in two.inputs.items() if name not in TOKEN_INPUTS}
    tokens = {name: whole[name] for name in TOKEN_INPUTS if name in whole}
    output = generate(models.pruned, tokens | new | given_cache(cache), prune=False)
    assert torch.equal(output.sequences, expected.sequences)
    assert_near(torch.stack(output.logits), torch.stack(expected.logits))


def joined(first: Batch, second: Batch) -> dict:
    """Inputs of both turns at once."""
    inputs = {}
    for name in dict.fromkeys([*first.inputs, *second.inputs]):
        parts = [each.inputs[name] for each in (first, second) if name in each.inputs]
        inputs[name] = torch.cat(parts, dim=1 if name in TOKEN_INPUTS else 0)
    return inputs


@torch.no_grad()
def test_unpruned_prefills_in_chunks_are_the_stock_models(shared_models, build_batch):
    models, batch = shared_models(5), build_batch([[2, (2, 3), 5]])
    chunked = {"prefill_chunk_size": 4, "max_new_tokens": 4, "do_sample": False}
    try:
        expected = models.stock.generate(**batch.inputs, **chunked)
    except (ValueError, RuntimeError) as error:
        pytest.skip(f"the stock model cannot: {error}")
    assert torch.equal(models.pruned.generate(**batch.inputs, **chunked, prune=False), expected)


@torch.no_grad()
def test_calls_compile_where_the_stock_models_do(build_models):
    """With text alone: over images the stock models compile whole on no release tested."""
    models = build_models(5, glimpse={"glimpse_layer": 1, "attention_layers": [1]}, num_layers=2)
    inputs = {"input_ids": torch.arange(1, 9)[None], "use_cache": False}

    def compiled(model, **more):
        torch._dynamo.reset()
        return torch.compile(model, fullgraph=True, backend="eager")(**inputs, **more)

    expected = compiled(models.stock).logits
    assert torch.equal(compiled(models.pruned, prune=False).logits, expected)


@torch.no_grad()
def test_hidden_states_are_those_asked_for(shared_models, build_batch):
    models, inputs = shared_models(5), build_batch(PROMPTS).inputs
    asked = {"output_hidden_states": [0, -1]}
    unpruned = models.pruned(**inputs, prune=False, **asked).hidden_states
    pruned = models.pruned(**inputs, **asked).hidden_states
    everything = models.pruned(**inputs, output_hidden_states=True).hidden_states
    assert [each is None for each in pruned] == [each is None for each in unpruned]
    for each, expected in zip(pruned, everything, strict=True):
        assert each is None or torch.equal(each, expected)


@pytest.mark.parametrize("own_choice", [False, True])
def test_returned_hidden_states_have_gradients(build_models, build_batch, own_choice):
    model, batch = build_models(5).pruned, build_batch(PROMPTS)
    settings = {"prune_threshold": 0.5}
    if own_choice:
        settings = {"visual_keep_mask": torch.ones(batch.num_visual, dtype=torch.bool)}
    output = model(**batch.inputs, **settings, output_hidden_states=True)
    for states in output.hidden_states:
        states.retain_grad()
    output.logits[:, -1].sum().backward()
    assert all(states.grad is not None and states.grad.any() for states in output.hidden_states)
