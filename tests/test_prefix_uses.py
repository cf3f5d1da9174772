"""What else a prefix is for: growing, conversations, storing, threads, training; and bad input."""

import copy
import threading
from functools import partial

import pytest
import torch
from conftest import LOOK_LAYER as GLIMPSE_LAYER
from conftest import pad_together
from double_precision import as_double, in_double_precision
from generation_checks import (
    assert_near,
    generate,
)
from generation_prompts import random_keep
from test_prefix import (
    ATOL,
    asked,
    assert_equals_fresh,
    assert_same_caches,
    assert_same_records,
    assert_unchanged,
    family,  # noqa: F401
    laid_out,
    tensors_of,
    without_pixels,
)
from test_turns import conversation, follow

from modeling_glimpseprune.stock import CACHE_NAMES, cache_of, given_cache

PAGE = [[3, (3, 4), 1, (2, 2), 1]]
EARLY = [GLIMPSE_LAYER, 1]


@pytest.mark.feature("prefixes: look once, ask often")
@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_beams_and_samples(make_model, build_batch, options):
    model, rows = make_model(1), asked(build_batch(PAGE), 2)
    batch, prefix = pad_together(rows), model.look(**rows[0])
    outputs = []
    for inputs in (batch, without_pixels(batch) | given_cache(prefix)):
        torch.manual_seed(0)
        output = model.generate(**inputs, max_new_tokens=4, max_keep_ratio=0.4, **options)
        outputs.append(output)
    assert torch.equal(outputs[0][:, -4:], outputs[1][:, -4:])


@torch.no_grad()
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_either_name_of_the_cache(make_model, build_batch, name):
    model, (row,) = make_model(), asked(build_batch(PAGE), 1)
    prefix = model.look(**row)
    expected = model.generate(**row, max_new_tokens=3)
    assert torch.equal(model.generate(**row, **{name: prefix}, max_new_tokens=3), expected)
    record = model.glimpse(**row, **{name: prefix})
    assert_same_records(record, model.glimpse(**row))


@pytest.mark.feature("prefixes: look once, ask often")
@torch.no_grad()
def test_drafts_over_a_prefix_change_nothing(make_model, build_batch):
    """Prompt look-up; the drafter of transformers 4 wants an end of text."""
    model, (row,) = make_model(1), asked(build_batch(PAGE), 1)
    prefix = model.look(**row)
    plain = model.generate(**row, max_new_tokens=8)
    inputs = without_pixels(row) | given_cache(prefix)
    drafted = model.generate(
        **inputs, max_new_tokens=8, prompt_lookup_num_tokens=3, eos_token_id=199
    )
    assert torch.equal(drafted, plain)


@torch.no_grad()
def test_beams_share_the_callers_mask(make_model, build_batch):
    model, rows = make_model(), asked(build_batch(PAGE), 2)
    batch, prefix = pad_together(rows), model.look(**rows[0])
    keep = (
        torch.rand(2 * prefix.visual_counts(1)[0], generator=torch.Generator().manual_seed(3)) < 0.4
    )
    options = {"num_beams": 2, "visual_keep_mask": keep, "max_new_tokens": 3}
    over = model.generate(**without_pixels(batch), **given_cache(prefix), **options)
    assert torch.equal(over[:, -3:], model.generate(**batch, **options)[:, -3:])


ONE_OF_TWO = [[2, (3, 4), 2, (2, 3), 3], [2, (3, 4), 1, (1, 3), 4]]


@pytest.mark.feature("growing prefixes")
@torch.no_grad()
@pytest.mark.parametrize("prune_layer", EARLY)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_question_may_bring_an_image_of_its_own(make_model, build_batch, prune_layer, rows):
    """Old and new visuals are judged together, in one row and in several."""
    model, batch = make_model(prune_layer), build_batch(ONE_OF_TWO[:rows])
    prefix = model.look(**batch.inputs, prefix_length=length_of(build_batch, [2, (3, 4)]))
    assert sum(prefix.visual_counts(rows)) < batch.num_visual
    inputs = batch.inputs | laid_out(prefix, batch.inputs)
    over = generate(model, inputs | given_cache(prefix), 3, max_keep_ratio=0.4)
    assert_equals_fresh(over, generate(model, batch.inputs, 3, max_keep_ratio=0.4))


def length_of(build_batch, parts: list) -> int:
    return build_batch([parts]).inputs["input_ids"].shape[1]


@pytest.mark.feature("growing prefixes")
@torch.no_grad()
@pytest.mark.parametrize("prune_layer", EARLY)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_prefix_grows(make_model, build_batch, prune_layer, rows):
    """By an image, then by text; those it grew from stay as they were."""
    model, batch = make_model(prune_layer), build_batch(ONE_OF_TWO[:rows])
    first = model.look(**batch.inputs, prefix_length=length_of(build_batch, [2, (3, 4)]))
    before = tensors_of(first)
    inputs = batch.inputs | laid_out(first, batch.inputs)
    second = model.look(**inputs, **given_cache(first))
    assert_unchanged(first, before)
    prefixes = [first, second]
    if rows == 1:
        most = inputs["input_ids"].shape[1] - 1
        prefixes.append(model.look(**inputs, **given_cache(second), prefix_length=most))
        assert prefixes[-1].get_seq_length() == most
    assert second.get_seq_length() > first.get_seq_length()
    fresh = generate(model, batch.inputs, 3, max_keep_ratio=0.4)
    for prefix in prefixes[1:]:
        inputs = without_pixels(batch.inputs) | laid_out(prefix, batch.inputs)
        over = generate(model, inputs | given_cache(prefix), 3, max_keep_ratio=0.4)
        assert_equals_fresh(over, fresh)


@pytest.mark.feature("growing prefixes")
@torch.no_grad()
@pytest.mark.parametrize("prune_layer", EARLY)
def test_a_prefix_may_begin_behind_a_turn_that_is_pruned(make_model, build_batch, prune_layer):
    model = make_model(prune_layer)
    first, second = build_batch([[3, (2, 3), 4]] * 2), build_batch([[1, (2, 2), 3]] * 2, 1)
    start = generate(model, first.inputs, 3, visual_keep_mask=random_keep(first))
    said = start.sequences[:, first.inputs["input_ids"].shape[1] :]
    inputs = follow(first, second, start, conversation(first, second, said))
    before = copy.deepcopy(cache_of(start))
    keep = random_keep(second, 1)
    prefix = model.look(**inputs)
    for options in ({"visual_keep_mask": keep}, {"max_keep_ratio": 0.5}):
        over = generate(model, inputs | given_cache(prefix), 3, **options)
        expected = generate(model, inputs | given_cache(copy.deepcopy(before)), 3, **options)
        assert_equals_fresh(over, expected)
    assert_same_caches(cache_of(start), before, atol=0)


@pytest.mark.feature("old images for a new question")
@torch.no_grad()
def test_looking_again_in_a_conversation(make_model, build_batch):
    """The prefix answers a later question as the whole conversation without its cache does."""
    model, batch = make_model(1), build_batch(PAGE)
    prefix = model.look(**batch.inputs)
    answer = generate(model, batch.inputs | given_cache(prefix), 3, max_keep_ratio=0.4)
    question = torch.randint(1, 150, (1, 4), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([answer.sequences, question], dim=1)
    again = {name: each for name, each in batch.inputs.items() if name != "mm_token_type_ids"}
    again |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    again = model._with_types(ids, again)
    over = generate(model, again | given_cache(prefix), 3, max_keep_ratio=0.4)
    assert_equals_fresh(over, generate(model, again, 3, max_keep_ratio=0.4))
    kept = generate(model, again | given_cache(cache_of(answer)), 3)
    assert kept.logits[0].sub(over.logits[0]).abs().max() > 1e-2  # what the kept cache cannot see


@torch.no_grad()
def test_double_precision_is_exact(shared_models, build_batch):
    """Up to roundings of float64 (1e-16) times the sums' lengths and layers."""
    for prune_layer in EARLY:
        fields = {"glimpse_layer": GLIMPSE_LAYER, "prune_layer": prune_layer}
        models = shared_models(4, glimpse=fields, num_layers=5)
        model = in_double_precision(copy.deepcopy(models.pruned))
        inputs = {name: as_double(each) for name, each in build_batch(PAGE).inputs.items()}
        prefix = model.look(**inputs)
        over = generate(model, inputs | given_cache(prefix), 3, max_keep_ratio=0.4)
        fresh = generate(model, inputs, 3, max_keep_ratio=0.4)
        caches = [cache_of(output) for output in (over, fresh)]
        assert caches[0].glimpse.importance.dtype == caches[0].layers[4].keys.dtype == torch.double
        assert_same_records(*(cache.glimpse for cache in caches), 1e-10)
        assert_same_caches(*caches, 1e-10)


@torch.no_grad()
def test_forward_takes_new_tokens_over_a_prefix(make_model, build_batch):
    """As for any cache: new ids, a mask of everything; outputs are of the new tokens."""
    model, (row,) = make_model(1), asked(build_batch(PAGE), 1)
    prefix = model.look(**row)
    past = prefix.get_seq_length()
    outputs = {"output_hidden_states": True, "max_keep_ratio": 0.4}
    fresh = model(**row, **outputs)
    new = {"input_ids": row["input_ids"][:, past:], "attention_mask": row["attention_mask"]}
    over = model(**new, **given_cache(prefix), **outputs)
    assert_near(over.logits, fresh.logits[:, past:], ATOL)
    for ours, whole in zip(over.hidden_states, fresh.hidden_states, strict=True):
        assert ours.shape[1] == new["input_ids"].shape[1]
        assert_near(ours, whole[:, past:], ATOL)
    assert_same_caches(cache_of(over), cache_of(fresh), ATOL)


@torch.no_grad()
def test_attentions_over_a_prefix(build_models, build_batch):
    fields = {"glimpse_layer": GLIMPSE_LAYER, "prune_layer": 1}
    model = build_models(4, "eager", glimpse=fields, num_layers=5).pruned
    (row,) = asked(build_batch(PAGE), 1)
    prefix = model.look(**row)
    past = prefix.get_seq_length()
    outputs = {"output_attentions": True, "max_keep_ratio": 0.4}
    fresh = model(**row, **outputs)
    new = {"input_ids": row["input_ids"][:, past:], "attention_mask": row["attention_mask"]}
    over = model(**new, **given_cache(prefix), **outputs)
    for ours, whole in zip(over.attentions, fresh.attentions, strict=True):
        assert_near(ours, whole[:, :, past:], ATOL)


@pytest.mark.feature("training over a prefix")
def test_labels_behind_the_question(make_model, build_batch):
    """A training forward over a prefix repeats the loss of whole prompts."""
    model, rows = make_model(1), asked(build_batch(PAGE), 1)
    prefix = model.look(**rows[0])
    past = prefix.get_seq_length()
    ids, mask = rows[0]["input_ids"], rows[0]["attention_mask"]
    labels = ids.clone()
    labels[:, : ids.shape[1] - 2] = -100
    fresh = model(**rows[0], labels=labels, max_keep_ratio=0.4).loss
    new = {"input_ids": ids[:, past:], "attention_mask": mask}
    over = model(**new, **given_cache(prefix), labels=labels[:, past:], max_keep_ratio=0.4).loss
    assert_near(over, fresh, 1e-5)


@pytest.mark.feature("training over a prefix")
@pytest.mark.parametrize("soft", [False, True])
def test_gradients_reach_through_a_look(build_models, build_batch, soft):
    """Two questions over one differentiable look have the gradients of two whole prompts."""
    model = build_models(4, glimpse={"glimpse_layer": 1, "prune_layer": 1}).pruned
    rows = asked(build_batch(PAGE), 2)
    past = model.look(**rows[0]).get_seq_length()
    count = model.look(**rows[0]).visual_counts(1)[0]
    mask = {"visual_keep_mask": torch.arange(count) % 3 == 0}
    if soft:
        mask = {"visual_log_keep": -torch.rand(count, generator=torch.Generator().manual_seed(2))}
    gradients = []
    for over_prefix in (False, True):
        model.zero_grad()
        total = torch.zeros(())
        if over_prefix:
            page = {name: each for name, each in rows[0].items()}
            for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                if name in page:
                    page[name] = page[name][:, :past]
            held = model.look(**page, differentiable=True)
        for row in rows:
            if over_prefix:
                new = {"input_ids": row["input_ids"][:, past:], **given_cache(held)}
                output = model(**new, attention_mask=row["attention_mask"], **mask)
                total = total + output.logits[:, -1].square().sum()
            else:
                total = total + model(**row, **mask).logits[:, -1].square().sum()
        total.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    largest = max(each.abs().max() for each in gradients[0].values())
    for name, expected in gradients[0].items():
        assert_near(gradients[1][name] / largest, expected / largest, 1e-5)


@pytest.mark.feature("training over a prefix")
@torch.no_grad()
def test_answers_in_place_over_a_prefix(make_model, build_batch, tmp_path):
    """Several questions in one batch, behind a page that ran all layers, stored in between."""
    model, rows = make_model(GLIMPSE_LAYER), asked(build_batch(PAGE), 3)
    batch = pad_together(rows)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    answer = torch.randint(1, 150, (3, 2), generator=torch.Generator().manual_seed(3))
    whole = {
        "input_ids": torch.cat([ids, answer], dim=1),
        "attention_mask": torch.cat([mask, torch.ones_like(answer)], dim=1),
    }
    if "mm_token_type_ids" in batch:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, 2))
    settings = {"in_place": True, "use_cache": True}
    fresh = model(**(batch | whole), **settings, prompt_length=ids.shape[1])
    model.look(**rows[0], in_place=True).save(tmp_path / "page.safetensors")
    prefix = model.load_prefix(tmp_path / "page.safetensors").to("cpu")
    before, past = tensors_of(prefix), prefix.get_seq_length()
    prompts = prefix.prompts(ids, mask)
    behind = prompts["input_ids"][:, past:]
    over = model(
        input_ids=torch.cat([behind, answer], dim=1),
        attention_mask=torch.cat([prompts["attention_mask"], torch.ones_like(answer)], dim=1),
        prompt_length=behind.shape[1],
        **settings,
        **given_cache(prefix),
    )
    assert_near(over.logits[:, -3:], fresh.logits[:, -3:], ATOL)
    assert_same_records(cache_of(over).glimpse, cache_of(fresh).glimpse)
    pruned = generate(model, prompts | given_cache(prefix), 3, max_keep_ratio=0.4)
    assert_equals_fresh(pruned, generate(model, batch, 3, max_keep_ratio=0.4))
    assert_unchanged(prefix, before)


@pytest.mark.feature("prefixes: look once, ask often")
@pytest.mark.parametrize("prune_layer", EARLY)
@torch.no_grad()
def test_all_but_the_last_token_of_each_prompt(make_model, build_batch, prune_layer):
    """What several masks of one prompt are asked over; rows of different length."""
    model, batch = make_model(prune_layer), pad_together(asked(build_batch(PAGE), 3))
    lengths = batch["attention_mask"].sum(1) - 1
    prefix = model.look(**batch, prefix_length=lengths.tolist())
    assert prefix.get_seq_length() == batch["input_ids"].shape[1] - 1
    inputs = without_pixels(batch) | given_cache(prefix)
    for settings in ({"max_keep_ratio": 0.4}, {"prune_threshold": 0.0}):
        over = generate(model, inputs, 3, **settings)
        assert_equals_fresh(over, generate(model, batch, 3, **settings))


@pytest.mark.feature("threads")
@torch.no_grad()
def test_threads_share_a_prefix(make_model, build_batch):
    model, rows = make_model(1), asked(build_batch(PAGE), 8)
    prefix = model.look(**rows[0])
    before = tensors_of(prefix)
    expected = [model.generate(**row, max_new_tokens=3, max_keep_ratio=0.4) for row in rows]
    found: list = [None] * len(rows)
    barrier = threading.Barrier(len(rows))

    @torch.no_grad()
    def ask(index: int) -> None:
        barrier.wait()
        inputs = without_pixels(rows[index]) | given_cache(prefix)
        found[index] = model.generate(**inputs, max_new_tokens=3, max_keep_ratio=0.4)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, found, expected))
    assert_unchanged(prefix, before)


@pytest.mark.feature("errors half way")
@torch.no_grad()
def test_an_error_half_way_leaves_the_prefix_as_it_was(make_model, build_batch, monkeypatch):
    model, (row,) = make_model(1), asked(build_batch(PAGE), 1)
    prefix = model.look(**row)
    before, expected = tensors_of(prefix), model.generate(**row, max_new_tokens=3)
    inputs = without_pixels(row) | given_cache(prefix)
    with monkeypatch.context() as patch:
        layer = model.model.language_model.layers[3]
        patch.setattr(layer, "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.generate(**inputs, max_new_tokens=3)
    assert_unchanged(prefix, before)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3), expected)


@pytest.mark.feature("prefixes: look once, ask often")
@torch.no_grad()
def test_rows_in_another_arrangement(make_model, build_batch):
    model = make_model(1)
    batch = build_batch([[2, (2, 3), 1, (3, 1), 3], [5, (2, 2), 2]])
    prefix = model.look(**batch.inputs)
    chosen = [1, 0, 1]
    rows = pad_together([batch.rows[row] for row in chosen])
    fresh = generate(model, rows, 3, max_keep_ratio=0.4)
    arranged = prefix.select_rows(chosen)
    itself = copy.deepcopy(prefix)
    itself.batch_select_indices(torch.tensor(chosen))
    assert prefix.batch_size == 2 and arranged.nbytes == prefix.nbytes
    for each in (arranged, itself):
        inputs = laid_out(each, rows) | given_cache(each)
        assert_equals_fresh(generate(model, inputs, 3, max_keep_ratio=0.4), fresh)


@torch.no_grad()
def test_copies_share_their_tensors(make_model, build_batch):
    model, (row,) = make_model(1), asked(build_batch(PAGE), 1)
    prefix = model.look(**row)
    copied = copy.deepcopy(prefix)
    ours, others = prefix.parts()[0], copied.parts()[0]
    assert ours["states"].data_ptr() == others["states"].data_ptr()
    assert ours["layers.0.keys"].data_ptr() == others["layers.0.keys"].data_ptr()
    inputs = without_pixels(row) | given_cache(copied)
    assert torch.equal(
        model.generate(**inputs, max_new_tokens=3), model.generate(**row, max_new_tokens=3)
    )


@pytest.mark.feature("stored prefixes")
@torch.no_grad()
def test_a_prefix_is_stored_and_read(make_model, build_batch, tmp_path):
    model, batch = make_model(1), build_batch([[2, (2, 3), 1, (3, 1), 3], [5, (2, 2), 2]])
    prefix, path = model.look(**batch.inputs), tmp_path / "page.safetensors"
    prefix.to("cpu").save(path)
    read = model.load_prefix(path)
    assert_unchanged(read, tensors_of(prefix))
    assert read.parts()[1] == prefix.parts()[1]
    inputs = laid_out(read, batch.inputs)
    over = generate(model, inputs | given_cache(read), 3, max_keep_ratio=0.4)
    assert_equals_fresh(over, generate(model, batch.inputs, 3, max_keep_ratio=0.4))


class TestBadInput:
    """Sentences, and a prefix that is usable afterwards."""

    @pytest.fixture
    def over(self, make_model, build_batch):
        model, (row,) = make_model(1), asked(build_batch(PAGE), 1)
        prefix = model.look(**row)
        before = tensors_of(prefix)
        yield model, row, prefix
        assert_unchanged(prefix, before)
        expected = model.generate(**row, max_new_tokens=2)
        inputs = without_pixels(row) | given_cache(prefix)
        assert torch.equal(model.generate(**inputs, max_new_tokens=2), expected)

    @pytest.mark.parametrize("method", ["generate", "glimpse", "look"])
    def test_other_ids(self, over, method):
        model, row, prefix = over
        ids = row["input_ids"].clone()
        ids[0, 1] += 1
        with pytest.raises(ValueError, match="prompt 0 does not begin with the prefix.*token 1 on"):
            getattr(model, method)(**row | {"input_ids": ids}, **given_cache(prefix))

    @pytest.mark.parametrize("method", ["generate", "glimpse", "look"])
    def test_other_pixels(self, over, method):
        model, row, prefix = over
        row = row | {"pixel_values": row["pixel_values"] + 0.1}
        options = {"prefix_length": row["input_ids"].shape[1]} if method == "look" else {}
        with pytest.raises(ValueError, match="another one than the prefix was made of"):
            getattr(model, method)(**row, **given_cache(prefix), **options)

    def test_pixels_are_told_in_any_precision(self, over):
        model, row, prefix = over
        rounded = row | {"pixel_values": row["pixel_values"].bfloat16()}
        model.glimpse(**rounded, **given_cache(prefix))

    def test_another_model(self, over, build_models):
        model, row, prefix = over
        fields = {"glimpse_layer": GLIMPSE_LAYER, "prune_layer": 1}
        other = build_models(4, glimpse=fields, num_layers=5).pruned
        other.glimpse(**row, **given_cache(prefix))  # the same weights
        other.model.language_model.layers[0].self_attn.q_proj.weight.data.mul_(1.01)
        with pytest.raises(ValueError, match="another model, or by this one with other weights"):
            other.generate(**row, **given_cache(prefix), max_new_tokens=2)

    def test_no_cache_wanted(self, over):
        model, row, prefix = over
        inputs = without_pixels(row) | given_cache(prefix)
        for call in (partial(model.generate, max_new_tokens=2), model):
            with pytest.raises(ValueError, match="use_cache=False cannot be combined"):
                call(**inputs, use_cache=False)

    def test_too_many_rows(self, over, build_batch):
        model, row, prefix = over
        three = pad_together(asked(build_batch(PAGE), 3))
        with pytest.raises(ValueError, match="a multiple of 2 rows, got 3"):
            model.generate(**three, **given_cache(prefix.select_rows([0, 0])))

    def test_no_question(self, over):
        model, row, prefix = over
        alone = {
            name: each[:, : prefix.get_seq_length()] for name, each in without_pixels(row).items()
        }
        with pytest.raises(ValueError, match="prompt 0 is all prefix"):
            model.generate(**alone, **given_cache(prefix))

    def test_no_ids(self, over):
        model, row, prefix = over
        with pytest.raises(ValueError, match="give whole prompts as ids"):
            model.generate(inputs_embeds=torch.zeros(1, 3, 8), **given_cache(prefix))

    def test_another_prune_layer(self, over):
        model, row, prefix = over
        with pytest.raises(ValueError, match="made for prune_layer 1, not 2"):
            model.generate(**row, **given_cache(prefix), prune_layer=2, max_new_tokens=2)

    def test_a_mask_that_does_not_fit(self, over):
        model, row, prefix = over
        with pytest.raises(ValueError, match="visual_keep_mask must have shape"):
            mask = torch.ones(3, dtype=torch.bool)
            inputs = row | given_cache(prefix)
            model.generate(**inputs, visual_keep_mask=mask, max_new_tokens=2)

    def test_writing(self, over):
        _, _, prefix = over
        for write in (
            lambda: prefix.crop(-1),
            lambda: prefix.update(torch.zeros(1), torch.zeros(1), 0),
            prefix.reset,
            lambda: prefix.reorder_cache(torch.zeros(1)),
        ):
            with pytest.raises(ValueError, match="cannot be cropped|never written to"):
                write()

    def test_cutting_an_answers_cache_into_its_visual_tokens(self, over):
        model, row, prefix = over
        given = without_pixels(row) | given_cache(prefix)
        output = generate(model, given, 3, max_keep_ratio=0.4)
        cache, length = cache_of(output), row["input_ids"].shape[1]
        with pytest.raises(ValueError, match="the cut would reach the prompt's visual tokens"):
            cache.layers[0].crop(prefix.get_seq_length() - 2)
        cache.layers[0].crop(length)
        assert cache.layers[0].get_seq_length() == length

    def test_chunks(self, over):
        model, row, prefix = over
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            model.generate(**row, **given_cache(prefix), prefill_chunk_size=2, max_new_tokens=2)

    def test_a_look_at_nothing(self, over, build_batch):
        model, row, prefix = over
        text = build_batch([[5]]).inputs
        with pytest.raises(ValueError, match="no image or video to look at"):
            model.look(**text)
        with pytest.raises(ValueError, match="no image or video to look at"):
            model.look(**text, prefix_length=3)
        with pytest.raises(ValueError, match="give prefix_length to take text"):
            model.look(**row, **given_cache(prefix))

    @pytest.mark.parametrize(
        "given", [{"prun_layer": 1}, {"prune_threshold": 0.3}, {"position_ids": torch.zeros(1)}]
    )
    def test_a_look_swallows_nothing(self, over, given):
        model, row, prefix = over
        with pytest.raises(ValueError, match=f"look does not take {next(iter(given))}"):
            model.look(**row, **given)

    def test_whole_prompts_in_forward(self, over):
        """With and without a mask that tells."""
        model, row, prefix = over
        with pytest.raises(ValueError, match="forward takes the ids behind it"):
            model(**row, **given_cache(prefix))
        with pytest.raises(ValueError, match="hold placeholders, but no image or video was given"):
            model(input_ids=row["input_ids"], **given_cache(prefix))

    @pytest.mark.parametrize("length", [0, -1, 999])
    def test_prefix_lengths(self, over, length):
        model, row, prefix = over
        with pytest.raises(ValueError, match="prefix_length must lie in 1"):
            model.look(**row, prefix_length=length)

    def test_prefix_lengths_of_rows(self, over):
        model, row, prefix = over
        with pytest.raises(ValueError, match="prefix_length has 2 numbers for 1 prompts"):
            model.look(**row, prefix_length=[3, 4])

    def test_in_place_needs_upper_layers(self, over):
        model, row, prefix = over
        behind = {"input_ids": row["input_ids"][:, prefix.get_seq_length() :]}
        late = model.look(**row, prune_layer=GLIMPSE_LAYER)
        behind |= {"attention_mask": row["attention_mask"], **given_cache(late)}
        with pytest.raises(ValueError, match="look with in_place=True, or give the whole prompt"):
            model(**behind, in_place=True)
        with pytest.raises(ValueError, match="look with in_place begins a prompt"):
            model.look(**row, in_place=True, **given_cache(prefix))

    def test_a_cut_through_an_image(self, over):
        model, row, prefix = over
        with pytest.raises(ValueError, match="prefix_length cuts through the image of prompt 0"):
            model.look(**row, prefix_length=8)

    def test_files(self, over, tmp_path):
        model, row, prefix = over
        path = tmp_path / "page.safetensors"
        prefix.save(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="damaged or no prefix"):
            model.load_prefix(path)
        for offset in (-1, whole.index(b"prune_layer") + 2):  # among numbers, and among notes
            damaged = bytearray(whole)
            damaged[offset] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="is damaged: what it holds does not fit"):
                model.load_prefix(path)
        path.write_bytes(b"")
        with pytest.raises(ValueError, match="damaged or no prefix"):
            model.load_prefix(path)
        with pytest.raises(FileNotFoundError, match="no such prefix"):
            model.load_prefix(tmp_path / "none")

    def test_another_kind_of_file(self, over, tmp_path):
        from safetensors.torch import save_file

        model = over[0]
        save_file({"a": torch.zeros(1)}, tmp_path / "other")
        with pytest.raises(ValueError, match="no prefix of this release"):
            model.load_prefix(tmp_path / "other")
