"""Second questions about a page: under the first one's mask, and over a prefix.

    python -m benchmarks.second_questions --output benchmarks/results/second_questions.json

A pruned cache that is kept for the next turn holds what the first question needed. Pairs of
questions about one page of the tiny world say what that leaves of a second question's evidence, how
many second questions are answered right with it, and that over a prefix everything equals prompts
asked afresh: second questions alone (the tiny model was trained on single turns, so accuracies are
of those), and as second turns of a conversation.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from benchmarks.efficiency.__main__ import describe_machine
from glimpseprune.commands.evaluate import read_samples
from glimpseprune.data.visual_cot import visible_evidence
from glimpseprune.loading import chat, load_model
from glimpseprune.metrics import exact_match
from glimpseprune.portable import write_json
from glimpseprune.sample import Sample
from modeling_glimpseprune.glimpse_record import GlimpseRecord
from modeling_glimpseprune.stock import cache_of, given_cache


@dataclass
class Answered:
    """One answer.

    Attributes:
        text: the answer.
        record: the glimpse that chose the visual tokens.
    """

    text: str
    record: GlimpseRecord


class Asker:
    """A model and its processor, asked one prompt at a time."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, max_new_tokens: int = 16):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens

    def prompt(self, sample: Sample, earlier: Sequence[tuple[str, str]] = ()) -> dict:
        """Inputs of a question, behind turns of questions and answers about its image."""
        turns = []
        for question, answer in earlier:
            answered = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            turns += [*chat(question, with_image=not turns), answered]
        turns += chat(sample.question, with_image=not turns)
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        inputs = self.processor(images=[sample.image], text=[text], return_tensors="pt")
        return inputs.to(self.model.device)

    def ask(self, inputs: dict, prefix=None, **settings) -> Answered:
        """Answer greedily, by the whole prompt or over a prefix."""
        if prefix is not None:
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            inputs |= given_cache(prefix)
        generated = self.model.generate(
            **inputs,
            **settings,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        completion = generated.sequences[0, inputs["input_ids"].shape[1] :]
        text = self.processor.decode(completion, skip_special_tokens=True)
        return Answered(text.strip(), cache_of(generated).glimpse)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", help="folder or Hub repository (default: the tiny model)")
    parser.add_argument("--pairs", type=int, default=240, help="at most, about four a page")
    parser.add_argument("--seed", type=int, default=0, help="of the pages")
    arguments = parser.parse_args()
    model, processor = load_model(arguments.model)
    samples = read_samples(None, None, arguments.pairs, arguments.seed)
    results = compare(model, processor, samples)
    settings = {
        "model": arguments.model or "hub_configs/tiny",
        "dtype": str(model.dtype),
        "glimpse_layer": model.config.glimpse_layer,
        "prune_threshold": model.config.prune_threshold,
        "seed": arguments.seed,
    }
    content = {"machine": describe_machine(str(model.device)), "settings": settings}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output, content | {"results": results})
    print(json.dumps(results, indent=2))


@torch.inference_mode()
def compare(
    model: PreTrainedModel, processor: ProcessorMixin, samples: Sequence[Sample]
) -> dict[str, float | int]:
    """Every question of a page as the first of a pair, the next one of the page as its second.

    Args:
        samples: questions about pages; a page with a single one is left out.
    """
    asker = Asker(model, processor)
    pages: dict[Path, list[Sample]] = defaultdict(list)
    for sample in samples:
        pages[sample.path].append(sample)
    sums: dict[str, float] = defaultdict(float)
    difference = 0.0
    for page in tqdm([page for page in pages.values() if len(page) > 1], unit="page", leave=False):
        prompts = [asker.prompt(sample) for sample in page]
        fresh = [asker.ask(inputs) for inputs in prompts]
        prefix = model.look(**prompts[0])
        over = [asker.ask(inputs, prefix) for inputs in prompts]
        for first, second in zip(range(len(page)), [*range(1, len(page)), 0], strict=True):
            sample, own = page[second], fresh[second]
            under = asker.ask(prompts[second], visual_keep_mask=fresh[first].record.keep_mask)
            turns = asker.prompt(sample, [(page[first].question, fresh[first].text)])
            turn, turn_over = asker.ask(turns), asker.ask(turns, prefix)
            evidence = _evidence(processor, sample, own.record)
            found = {
                "evidence in the first one's mask": _share(evidence, fresh[first].record),
                "evidence in its own mask": _share(evidence, own.record),
                "evidence in its own mask, second turn": _share(evidence, turn_over.record),
                "kept by the first one's mask": fresh[first].record.retention,
                "kept by its own mask": own.record.retention,
                "right under the first one's mask": exact_match(under.text, sample.answer),
                "right over the prefix": exact_match(over[second].text, sample.answer),
                "right afresh": exact_match(own.text, sample.answer),
                "answers equal to fresh prompts": over[second].text == own.text,
                "masks equal to fresh prompts": _same_mask(over[second], own),
                "answers equal to fresh conversations": turn_over.text == turn.text,
                "masks equal to fresh conversations": _same_mask(turn_over, turn),
            }
            for name, value in found.items():
                sums[name] += value
            sums["pairs"] += 1
            for ours, expected in ((over[second], own), (turn_over, turn)):
                apart = (ours.record.importance - expected.record.importance).abs().max()
                difference = max(difference, float(apart))
    pairs = int(sums.pop("pairs"))
    results = {
        name: int(total) if "equal" in name else total / pairs for name, total in sums.items()
    }
    return {"pairs": pairs} | results | {"largest difference of importance": difference}


def _evidence(processor, sample: Sample, record: GlimpseRecord) -> torch.Tensor:
    grids = [visual.grid[1:] for visual in record.visuals]
    return visible_evidence(processor, sample.boxes, *sample.size, grids)


def _share(evidence: torch.Tensor, record: GlimpseRecord) -> float:
    """Part of the evidence that is kept."""
    return record.keep_mask.cpu()[evidence].float().mean().item()


def _same_mask(ours: Answered, expected: Answered) -> bool:
    return torch.equal(ours.record.keep_mask, expected.record.keep_mask)


if __name__ == "__main__":
    main()
