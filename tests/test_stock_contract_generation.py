"""Generation: whatever `generate` of a family's stock class does, ours does too.

With `prune=False` bit for bit, and with every visual token kept up to rounding; see
`stock_comparison.py`. Nothing here names a family, so that a new one is held to it.
"""

import copy

import pytest
import torch
from conftest import FAMILIES, FIRST_SPECIAL_TOKEN, TEXT_INPUTS, build_batch
from stock_comparison import KEPT, MODES, UNPRUNED, batch_of, compare, pair_of
from test_deployment import NoStream
from transformers import DynamicCache, GenerationConfig, StaticCache, WatermarkingConfig

from modeling_glimpseprune.stock import ENCODES_FIRST, cache_of, given_cache

NEW_TOKENS = 4


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture
def batch(family):
    """Of several images a row, some stock models repeat each by itself where they repeat rows."""
    return batch_of(family, several=ENCODES_FIRST)


@pytest.fixture
def pair(shared_models, mode, batch):
    return pair_of(shared_models(5), mode, batch)


@pytest.fixture
def pair_of_one(shared_models, family, mode):
    """A single prompt."""
    return pair_of(shared_models(5), mode, batch_of(family, rows=1))


def generate(model, inputs: dict, **options):
    """Answers of a fixed length, drawn alike where they are drawn."""
    torch.manual_seed(7)
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS} | options
    return model.generate(**inputs, **options)


def ask(pair, refusal=None, raises=(), **options) -> None:
    """Compare what `generate` returns; options may be functions that make them anew."""

    def question(model, settings):
        made = {name: value() if callable(value) else value for name, value in options.items()}
        return generate(model, pair.inputs, **made, **settings)

    compare(question, pair, refusal, raises)


# How tokens are chosen.

ENDS = list(range(1, 150))
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams that end": {"num_beams": 2, "early_stopping": True, "eos_token_id": ENDS},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "processors": {
        "repetition_penalty": 1.7,
        "no_repeat_ngram_size": 1,
        "bad_words_ids": [[3], [5, 7]],
        "sequence_bias": [[[11], 4.0]],
        "forced_eos_token_id": 9,
    },
    "a watermark": {"watermarking_config": WatermarkingConfig},
    "rows that end": {"eos_token_id": ENDS, "min_new_tokens": 2, "max_new_tokens": 6},
    "no cache": {"use_cache": False},
    "no cache, beams": {"use_cache": False, "num_beams": 2},
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_of_choosing_tokens(pair, name):
    ask(pair, **WAYS[name])


def test_guidance(pair):
    """A second run of text alone; a stock model that keeps positions on itself confuses the two."""
    if pair.pruned.model.positions_from_ids and not pair.is_exact:
        pytest.skip("our cache carries its own positions")
    ask(pair, raises=RuntimeError, guidance_scale=1.5)


@pytest.mark.parametrize(
    "options",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"dola_layers": "high"},
        {"num_beams": 2, "force_words_ids": [[3]]},
    ],
    ids=["contrastive search", "groups of beams", "layers compared", "constrained beams"],
)
def test_ways_that_want_code_of_others(pair, options):
    """transformers has them in repositories of their own, which nobody trusted here."""
    ask(pair, raises=ValueError, **options)


def test_a_wrong_way(pair):
    """Errors of `generate` itself."""
    for wrong in (
        {"no_such_argument": 1},
        {"num_return_sequences": 2},
        {"max_new_tokens": 0},
        {"cache_implementation": "no such cache"},
        {"temperature": -1.0, "do_sample": True},
    ):
        ask(pair, raises=(ValueError, TypeError), **wrong)


# What comes back.

ASKED = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
}


@pytest.mark.parametrize("name", ["greedy", "several samples", "beams", "no cache"])
def test_everything_that_is_returned(shared_models, batch, mode, name):
    """Scores, logits, hidden states and attentions: as many, of the same shapes and values."""
    ask(pair_of(shared_models(5, "eager"), mode, batch), **ASKED, **WAYS[name])


def test_transition_scores(pair):
    def question(model, settings):
        output = generate(
            model, pair.inputs, **settings, return_dict_in_generate=True, output_scores=True
        )
        return model.compute_transition_scores(output.sequences, output.scores)

    compare(question, pair)


# Drafts.


def drafter_of(model):
    """The model itself, wrong now and then."""
    assistant = copy.deepcopy(model)
    weight = assistant.lm_head.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.data[:FIRST_SPECIAL_TOKEN] += 0.1 * noise[:FIRST_SPECIAL_TOKEN]
    assistant.generation_config.num_assistant_tokens = 3
    return assistant


def test_drafts_of_another_model(pair_of_one):
    def question(model, settings):
        drafts = {"assistant_model": drafter_of(model), "eos_token_id": 199}
        return generate(model, pair_of_one.inputs, **drafts, max_new_tokens=6, **settings)

    compare(question, pair_of_one)


def test_drafts_from_the_prompt(pair_of_one):
    ask(pair_of_one, prompt_lookup_num_tokens=2, max_new_tokens=6, eos_token_id=199)


# Caches.

CACHES = {
    "dynamic": ({"cache_implementation": "dynamic"}, None),
    "offloaded": ({"cache_implementation": "offloaded"}, None),
    "static": ({"cache_implementation": "static"}, "static cache"),
    "offloaded static": ({"cache_implementation": "offloaded_static"}, "static cache"),
    "quantized": ({"cache_implementation": "quantized"}, None),
}


@pytest.mark.parametrize("name", CACHES)
def test_kinds_of_caches(pair, monkeypatch, name):
    """Streams are stood in for; a quantized cache wants a package that may not be there."""
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda *args: NoStream())
    options, refusal = CACHES[name]
    raises = (ImportError, RuntimeError) if name in ("quantized", "offloaded static") else ()
    ask(pair, refusal, raises, **options)


def test_a_cache_of_the_callers(pair):
    options = dict.fromkeys(given_cache(None), DynamicCache)
    ask(pair, **options)
    ask(pair, **options, num_beams=2)


def test_a_static_cache_of_the_callers(pair):
    config = pair.stock.config.get_text_config()
    options = dict.fromkeys(given_cache(None), lambda: StaticCache(config=config, max_cache_len=80))
    ask(pair, "4-D mask", **options)


def test_an_answer_goes_on(pair_of_one):
    """A second question of text over the cache of the first, whole and cropped."""
    text = {name: value for name, value in pair_of_one.inputs.items() if name in TEXT_INPUTS}

    def question(model, settings):
        first = generate(model, pair_of_one.inputs, return_dict_in_generate=True, **settings)
        rest = settings if "prune" in settings else {}
        answers = []
        for dropped in (0, 2):
            cache = copy.deepcopy(cache_of(first))
            if dropped:
                cache.crop(-dropped)
            kept = first.sequences[:, : first.sequences.shape[1] - dropped]
            ids = torch.cat([kept, torch.tensor([[3, 4, 5]])], dim=1)
            count = ids.shape[1] - text["input_ids"].shape[1]
            more = {
                name: torch.nn.functional.pad(value, (0, count), value=int("mask" in name))
                for name, value in text.items()
            }
            more["input_ids"] = ids
            answers.append(generate(model, more, **given_cache(cache), **rest))
        return answers

    compare(question, pair_of_one)


# What goes in.


def test_prompts_as_embeddings(pair):
    embeddings = pair.stock.get_input_embeddings()(pair.inputs["input_ids"])
    alone = {
        name: value
        for name, value in pair.inputs.items()
        if name not in ("input_ids", "mm_token_type_ids")
    }
    for inputs in (alone, pair.inputs):
        for options in ({}, {"num_beams": 2}):

            def question(model, settings, inputs=inputs, options=options):
                model.model.rope_deltas = None
                return generate(model, inputs, inputs_embeds=embeddings, **options, **settings)

            compare(question, pair, raises=(ValueError, RuntimeError))


def test_ids_by_position(pair):
    inputs = {name: value for name, value in pair.inputs.items() if name != "input_ids"}

    def question(model, settings):
        return model.generate(
            pair.inputs["input_ids"], do_sample=False, max_new_tokens=3, **inputs, **settings
        )

    compare(question, pair)


def test_a_configuration_of_the_callers(pair):
    ask(
        pair,
        generation_config=GenerationConfig(
            max_new_tokens=3, num_beams=2, pad_token_id=0, eos_token_id=5
        ),
        max_new_tokens=3,
    )
    ask(pair, max_length=pair.inputs["input_ids"].shape[1] + 2, max_new_tokens=None)


def test_prefill_in_chunks(pair):
    ask(pair, "chunks", raises=(ValueError, RuntimeError), prefill_chunk_size=4)


def test_text_alone(shared_models, family, mode):
    text = build_batch([[7], [4]], family=family)
    pair = pair_of(shared_models(5), UNPRUNED, text)
    if mode == KEPT:
        pair = pair._replace(settings={})
    ask(pair)
    ask(pair, num_beams=2)
    ask(pair, cache_implementation="static")


def test_no_prompt_at_all(pair):
    def question(model, settings):
        return model.generate(max_new_tokens=2, **settings)

    compare(question, pair._replace(inputs={}), raises=(ValueError, RuntimeError, TypeError))
