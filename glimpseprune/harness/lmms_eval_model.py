"""`lmms-eval --model glimpseprune`: a chat model that prunes, and says for each sample how much."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from ..loading import load_model
from .measured_generation import Cost, LookedPrompts, generate_measured

AGGREGATED = (
    "retention",
    "visual_tokens",
    "kept_visual_tokens",
    "seconds_to_first_token",
    "seconds_of_look",
)


@dataclass
class PruningCounts(TokenCounts):
    """A sample's token counts with what pruning did; lmms-eval writes `to_dict` with the sample."""

    cost: Cost | None = None

    def to_dict(self) -> dict[str, float]:
        counts = super().to_dict()
        return counts if self.cost is None else counts | self.cost.to_dict()


class GlimpsePrune(lmms):
    """Any GlimpsePrune repository.

    Args (of `--model_args`):
        pretrained: folder or Hub repository.
        prune: False evaluates the stock model.
        prune_threshold, max_keep_ratio, min_keep_tokens: default: the repository's.
        batch_size: prompts at a time.
        device: default: a GPU if there is one, or accelerate's choice where it runs several
            processes.
        dtype: as `from_pretrained` takes it.
        max_new_tokens: where a task does not say.
        system_prompt: put in front of every conversation.
        by_image: ask requests about one image together, over one look at it. It reads every image
            once more, to tell which are the same.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        prune: bool = True,
        prune_threshold: float | None = None,
        max_keep_ratio: float | None = None,
        min_keep_tokens: int | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        max_new_tokens: int = 128,
        system_prompt: str | None = None,
        max_batch_size: int | None = None,
        by_image: bool = True,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        self.model, self.processor = load_model(pretrained, device, dtype)
        settings = {
            "prune_threshold": prune_threshold,
            "max_keep_ratio": max_keep_ratio,
            "min_keep_tokens": min_keep_tokens,
        }
        self.settings = {name: value for name, value in settings.items() if value is not None}
        if not prune:
            self.settings = {"prune": False}
        self.batch_size = int(batch_size)
        self.max_new_tokens = max_new_tokens
        self.system_prompt = system_prompt
        self.by_image = by_image and prune

    @property
    def device(self) -> torch.device:
        return self.accelerator.device if self._world_size > 1 else self.model.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer requests in batches of equal generation settings; answers are in the order given.

        Requests about one image follow one another.
        """
        results: list[GenerationResult | None] = [None] * len(requests)
        costs, seconds = {}, 0.0
        progress = tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding")
        for indices in self._batches(requests):
            answers, of_batch = self._answer([requests[index] for index in indices])
            for index, answer, cost in zip(indices, answers, of_batch, strict=True):
                counts = PruningCounts(cost.prompt_tokens, cost.output_tokens, cost=cost)
                results[index] = GenerationResult(answer, counts)
                request = requests[index]
                if not request.metadata.get("__padding_only__"):
                    costs[request.task_name, request.doc_id, index] = cost
                self.cache_hook.add_partial("generate_until", request.args[:1], answer)
            seconds += max(map(_seconds, of_batch))
            progress.update(len(indices))
        progress.close()
        self._log(list(costs.values()), seconds)
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("glimpseprune answers by generation; it ranks no given answers")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("glimpseprune takes tasks of one round")

    def _batches(self, requests: list[Instance]) -> Iterator[list[int]]:
        """Indices of requests that share their generation settings."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            settings = sorted(request.args[2].items(), key=lambda item: item[0])
            groups.setdefault(repr(settings), []).append(index)
        for indices in groups.values():
            if self.by_image:
                first_seen: dict[str, int] = {}
                pages = [_images_hash(self._media(requests[index])) for index in indices]
                places = [first_seen.setdefault(page, len(first_seen)) for page in pages]
                indices = [index for _, index in sorted(zip(places, indices, strict=True))]
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size]

    def _answer(self, requests: list[Instance]) -> tuple[list[str], list[Cost]]:
        conversations = [self._conversation(request) for request in requests]
        images = [_images_of(conversation) for conversation in conversations]
        texts = [
            self.processor.apply_chat_template(
                conversation.to_hf_messages(), tokenize=False, add_generation_prompt=True
            )
            for conversation in conversations
        ]
        different, begins_with = list(range(len(texts))), None
        if self.by_image and all(images):
            token = self.processor.image_token
            begins = [
                (text.rpartition(token)[0], _images_hash(of_prompt))
                for text, of_prompt in zip(texts, images, strict=True)
            ]
            begins_with = [list(dict.fromkeys(begins)).index(each) for each in begins]
            different = [begins.index(each) for each in dict.fromkeys(begins)]
        flat = [image for row in different for image in images[row]]
        shown = [texts[row] for row in different]
        inputs = self.processor(images=flat or None, text=shown, padding=True, return_tensors="pt")
        looked = None
        if len(different) < len(texts):
            looked = LookedPrompts(texts, begins_with)
        asked = requests[0].args[2]
        answers, costs = generate_measured(
            self.model,
            self.processor,
            inputs.to(self.model.device),
            looked,
            **self.settings,
            **self._options(asked),
        )
        stops = asked.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        return [_cut(answer, stops) for answer in answers], costs

    def _media(self, request: Instance) -> list:
        return _images_of(self._conversation(request))

    def _conversation(self, request: Instance) -> ChatMessages:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        if self.system_prompt:
            messages = self._apply_system_prompt(messages, self.system_prompt)
        return ChatMessages(messages=messages)

    def _options(self, asked: dict) -> dict[str, object]:
        """Options of `generate` from a task's `generation_kwargs`; greedy by default."""
        options = {"max_new_tokens": asked.get("max_new_tokens", self.max_new_tokens)}
        options["num_beams"] = asked.get("num_beams", 1)
        temperature = asked.get("temperature") or 0.0
        options["do_sample"] = asked.get("do_sample", temperature > 0) and temperature > 0
        if options["do_sample"]:
            options |= {"temperature": temperature, "top_p": asked.get("top_p") or 1.0}
        return options

    def _log(self, costs: list[Cost], seconds: float) -> None:
        """Averages over all processes into the results' `throughput`."""
        sums = [sum(getattr(cost, name) for cost in costs) for name in AGGREGATED]
        tokens = sum(cost.output_tokens for cost in costs)
        decoded = sum(cost.output_tokens - 1 for cost in costs)
        decoding = sum(
            (cost.output_tokens - 1) / cost.tokens_per_second for cost in costs
            if cost.tokens_per_second
        )  # fmt: skip
        local = [*sums, len(costs), tokens, seconds, decoded, decoding]
        together = torch.tensor(local, dtype=torch.float64, device=self.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(together)
        *sums, count, tokens, seconds, decoded, decoding = together.tolist()
        if self.rank != 0 or not count:
            return
        averages = {name: total / count for name, total in zip(AGGREGATED, sums, strict=True)}
        averages["decoded_tokens_per_second"] = decoded / decoding if decoding else 0.0
        averages["samples"] = int(count)
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=int(tokens),
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics=averages,
        )


def _images_of(conversation: ChatMessages) -> list:
    images, videos, audios = conversation.extract_media()
    if videos or audios:
        raise NotImplementedError("the glimpseprune model of lmms-eval takes images only")
    return images


def _images_hash(images: list) -> str:
    """Tells the images of a prompt; what is named by its path is told by that."""
    digest = hashlib.sha256()
    for image in images:
        named = isinstance(image, str)
        digest.update(repr(image if named else (image.mode, image.size)).encode())
        digest.update(b"" if named else image.tobytes())
    return digest.hexdigest()


def _seconds(cost: Cost) -> float:
    """From the call to an answer's end."""
    decoding = (cost.output_tokens - 1) / cost.tokens_per_second if cost.tokens_per_second else 0.0
    return cost.seconds_to_first_token + decoding


def _cut(answer: str, stops: list[str]) -> str:
    """The answer up to the first stop string that it holds."""
    ends = [answer.find(stop) for stop in stops if stop and stop in answer]
    return answer[: min(ends)] if ends else answer
