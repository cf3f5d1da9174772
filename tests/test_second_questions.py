"""Second questions of the tiny world: what a kept mask leaves of them, and a prefix."""

from benchmarks.second_questions import Asker, compare
from glimpseprune.commands.evaluate import read_samples
from glimpseprune.loading import TINY_MODEL, load_model


def test_a_prefix_answers_what_a_kept_mask_cannot():
    """Twelve pairs of three pages; the figures of many are in docs/look_once.md."""
    model, processor = load_model(TINY_MODEL)
    samples = read_samples(None, None, 12, seed=1)
    result = compare(model, processor, samples)
    assert result["pairs"] == 12
    for name, value in result.items():
        if "equal" in name:
            assert value == 12, name
    assert result["evidence in the first one's mask"] < 0.3
    assert result["evidence in its own mask"] > 0.6
    assert result["right under the first one's mask"] <= 0.5 < result["right over the prefix"]
    assert result["right over the prefix"] == result["right afresh"]


def test_prompts_of_a_conversation_begin_alike():
    """So one prefix serves the first question and those behind it."""
    model, processor = load_model(TINY_MODEL)
    sample = read_samples(None, None, 1, seed=1)[0]
    asker = Asker(model, processor)
    alone, behind = asker.prompt(sample), asker.prompt(sample, [("What is that?", "A page.")])
    prefix = model.look(**alone)
    length = prefix.get_seq_length()
    assert alone["input_ids"][0, :length].tolist() == behind["input_ids"][0, :length].tolist()
    assert "A page." in processor.decode(behind["input_ids"][0])
