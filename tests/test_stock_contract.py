"""Calls: whatever the stock class of a family answers to one, ours answers too.

With `prune=False` bit for bit, and with every visual token kept up to rounding; see
`stock_comparison.py`. Nothing here names a family, so that a new one is held to it.
"""

import inspect

import pytest
import torch
from conftest import FAMILIES, build_batch
from stock_comparison import KEPT, MODES, UNPRUNED, batch_of, build_pair, compare, pair_of

from modeling_glimpseprune.stock import CACHE_NAME, TRANSFORMERS_5, cache_of, given_cache

PARTS = ("model", "backbone")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def batch(family):
    return batch_of(family)


@pytest.fixture(params=MODES)
def pair(request, shared_models, batch):
    return pair_of(shared_models(5), request.param, batch)


def labels_of(inputs: dict) -> torch.Tensor:
    """Labels on the two last tokens."""
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    return labels


CALLS = {
    "nothing more": {},
    "no cache": {"use_cache": False},
    "a cache": {"use_cache": True},
    "tuples": {"return_dict": False},
    "tuples of all": {"return_dict": False, "output_hidden_states": True, "output_attentions": True},
    "hidden states": {"output_hidden_states": True},
    "hidden states of the ends": {"output_hidden_states": [0, -1]},
    "hidden states of a layer": {"output_hidden_states": 2},
    "no hidden states": {"output_hidden_states": 0},
    "hidden states of none": {"output_hidden_states": []},
    "attentions": {"output_attentions": True},
    "no attentions": {"output_attentions": False},
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_a_call_returns_what_the_stock_models_does(pair, part, name):
    def question(model, settings):
        return model(**pair.inputs, **CALLS[name], **settings)

    compare(question, pair.parts[part])


OF_THE_HEAD = {
    "labels": {"labels": labels_of},
    "labels and a count": {"labels": labels_of, "num_items_in_batch": lambda inputs: torch.tensor(7)},
    "the last logits": {"logits_to_keep": lambda inputs: 1},
    "three logits": {"logits_to_keep": lambda inputs: 3},
    "logits by index": {"logits_to_keep": lambda inputs: torch.tensor([0, 4, -1])},
}


@pytest.mark.parametrize("name", OF_THE_HEAD)
@torch.no_grad()
def test_losses_and_logits(pair, name):
    more = {key: make(pair.inputs) for key, make in OF_THE_HEAD[name].items()}
    compare(lambda model, settings: model(**pair.inputs, **more, **settings), pair)


@torch.no_grad()
def test_labels_on_every_token(pair):
    compare(
        lambda model, settings: model(**pair.inputs, labels=pair.inputs["input_ids"], **settings),
        pair,
        refusal="labels on every token",
    )
