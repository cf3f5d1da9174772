"""What the tests of generation run, and what they compare with the references."""

import torch
from conftest import TRANSFORMERS_5, Batch, Models
from reference import run_hidden

from modeling_glimpseprune.stock import cache_of, given_cache


def generate(model, inputs: dict, num_tokens: int = 6, **options):
    """Greedy unless asked otherwise; ids, raw logits and the cache."""
    options = {"do_sample": False, "max_new_tokens": num_tokens} | options
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


def step_logits(output, row: int) -> torch.Tensor:
    """`(steps, vocabulary)` logits of one row of a `generate` output."""
    return torch.stack(output.logits)[:, row]


def completion_of(output, batch: Batch, row: int) -> torch.Tensor:
    return output.sequences[row, batch.inputs["input_ids"].shape[1] :]


def assert_near(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_same_output(actual, expected, atol: float = 1e-5) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    assert_near(torch.stack(actual.logits), torch.stack(expected.logits), atol)


def assert_equals_reference(
    models: Models, batch: Batch, output, masks: list[torch.Tensor], first_step: int = 0
) -> None:
    """Ids, logits and cache of a pruned generation against the reference of each row.

    Tokens were dropped at the prune layer that the output's record names.

    Args:
        masks: the keep mask of each row.
        first_step: tokens after the prompt that `output` was given and did not generate.
    """
    layer = cache_of(output).glimpse.prune_layer
    for row, (prompt, mask) in enumerate(zip(batch.rows, masks, strict=True)):
        completion = completion_of(output, batch, row)
        expected = run_hidden(models.stock, prompt, completion[:-1], mask, layer)
        logits = expected.logits[prompt["input_ids"].shape[1] - 1 + first_step :]
        assert_near(step_logits(output, row), logits)
        assert torch.equal(completion[first_step:], logits.argmax(-1))
        assert_cache_equals(cache_of(output), row, expected)


def assert_cache_equals(cache, row: int, expected) -> None:
    """Every layer holds the row's kept tokens, packed to the right, and nothing else of it."""
    length = int(expected.kept.sum())
    for layer, keys, values in zip(cache.layers, expected.keys, expected.values, strict=True):
        assert_near(layer.keys[row, :, -length:], keys[:, expected.kept])
        assert_near(layer.values[row, :, -length:], values[:, expected.kept])
        padding = 0 if layer.prompt_mask is None else int((~layer.prompt_mask[row]).sum())
        assert layer.keys.shape[-2] == length + padding


def threshold_that_keeps(importance: torch.Tensor, share: float) -> float:
    """A threshold that about this share exceeds, far from every score."""
    scores = torch.cat([torch.tensor([0.0, 1.0]), importance.sigmoid()]).sort().values
    gaps = scores.diff()
    middle = round((1 - share) * len(importance)) + 1
    nearby = range(max(0, middle - 2), min(len(gaps), middle + 2))
    widest = max(nearby, key=lambda i: gaps[i])
    return float(scores[widest] + gaps[widest] / 2)


def second_turn(batch: Batch, first, num_tokens: int) -> dict:
    """Inputs that continue an answer with `num_tokens` of text, over its cache."""
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(1, 150, (len(batch.rows), num_tokens), generator=generator)
    input_ids = torch.cat([first.sequences, text], dim=1)
    inputs = {"input_ids": input_ids, **given_cache(cache_of(first))}
    later = input_ids.shape[1] - batch.inputs["input_ids"].shape[1]
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in batch.inputs:
            inputs[name] = torch.nn.functional.pad(batch.inputs[name], (0, later), value=fill)
    return inputs


def decode(model, inputs: dict, num_tokens: int, explicit_positions: bool, **prefill):
    """Yield the logits of each greedy step, calling `forward` by hand."""
    outputs = model(**inputs, use_cache=True, **prefill)
    cache, mask = cache_of(outputs), inputs["attention_mask"]
    position = first_position(model, inputs)
    for _ in range(num_tokens):
        yield outputs.logits[:, -1]
        token = outputs.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        step = {} if TRANSFORMERS_5 else {"cache_position": torch.tensor([mask.shape[1] - 1])}
        if explicit_positions:
            step["position_ids"] = position
        position = position + 1
        outputs = model(
            input_ids=token, attention_mask=mask, **given_cache(cache), use_cache=True, **step
        )


def first_position(model, inputs: dict) -> torch.Tensor:
    """Rotary positions of the first answer token of each row: `(..., batch, 1)`."""
    if not model.model.positions_from_ids:
        return torch.full((len(inputs["input_ids"]), 1), inputs["input_ids"].shape[1])
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    arguments = {name: inputs[name] for name in names if name in inputs}
    _, delta = type(model.model).get_rope_index(model.model, **arguments)
    if TRANSFORMERS_5:  # counted from the tokens of the row
        return (inputs["attention_mask"].sum(1, keepdim=True) + delta).expand(3, -1, -1)
    length = inputs["input_ids"].shape[1]  # counted from the padded length
    return (length + delta).expand(3, -1, -1)


def training_inputs(batch: Batch, output, lengths: list[int]) -> dict:
    """The prompts and the first `lengths` tokens of their completions, with labels."""
    inputs = dict(batch.inputs)
    prompt_length = inputs["input_ids"].shape[1]
    longest = max(lengths)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    completion = output.sequences[:, prompt_length : prompt_length + longest]
    completion = completion.masked_fill(~real, 0)
    labels = completion.masked_fill(~real, -100)
    later = {
        "input_ids": completion, "attention_mask": real.long(),
        "mm_token_type_ids": torch.zeros_like(completion),
    }  # fmt: skip
    for name, more in later.items():
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], more.to(inputs[name].dtype)], dim=1)
    unlabelled = torch.full_like(batch.inputs["input_ids"], -100)
    return inputs | {"labels": torch.cat([unlabelled, labels], dim=1)}


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters()}


def hidden_loss(models: Models, batch: Batch, keep: torch.Tensor, output, lengths) -> torch.Tensor:
    """Mean cross-entropy of the completions by the reference, with gradients."""
    losses = []
    rows = zip(batch.rows, batch.split(keep), lengths, strict=True)
    for row, (prompt, mask, length) in enumerate(rows):
        tokens = completion_of(output, batch, row)[:length]
        layer = cache_of(output).glimpse.prune_layer
        logits = run_hidden(models.stock, prompt, tokens[:-1], mask, layer).logits[-length:]
        losses.append(torch.nn.functional.cross_entropy(logits, tokens, reduction="none"))
    return torch.cat(losses).mean()
