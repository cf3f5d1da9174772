"""Trains the tiny base from nothing, stage by stage.

No loss ever sees where the evidence of a question lies: the answers are learnt from answers
alone, and the losses that teach seeing are about the page, whatever is asked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .accuracy import generation_accuracy
from .asking import ask
from .cards import CardCodes, PageHeads, card_targets, character_targets, entry_tokens
from .forward import answer_figures, kept_states
from .links import AheadHead, LinkHead, link_targets
from .model import CODE_SCALE, fresh_base, save_base
from .optimisers import optimisers_of
from .packing import PackedBatch, Packer, misspell
from .pages import (
    KINDS,
    Page,
    PageSettings,
    Question,
    draw_page,
    make_page,
    page_generator,
)
from .pixels import page_patches
from .recipe import Recipe, Stage

if TYPE_CHECKING:
    from transformers import ProcessorMixin

LOG_FILE = "log.jsonl"
STATE_FILE = "training_state.pt"
SUMMARY_FILE = "training_summary.json"


@dataclass(frozen=True)
class Batch:
    """Pages of one grid with questions and what is to be seen on them.

    `packed` is None where nothing is asked. `patches` `(patches, 1176)` is None where pages are
    given as codes. `characters` `(tokens, cells)`, `cards` `(tokens, slots)` and `links`
    `(tokens, letters)` are the classes of all pages' tokens. `kinds` are those of the questions,
    page by page.
    """

    grid: tuple[int, int]
    pages: list[Page]
    packed: PackedBatch | None
    patches: torch.Tensor | None
    characters: torch.Tensor
    cards: torch.Tensor
    links: torch.Tensor
    kinds: list[str]


class BaseTrainer:
    """Runs a recipe's stages, logs them and keeps a resumable state beside the model."""

    def __init__(self, recipe: Recipe, processor: ProcessorMixin, output: Path, seed: int) -> None:
        self.recipe, self.processor, self.output, self.seed = recipe, processor, output, seed
        self.model = fresh_base(processor, seed, recipe.decoder)
        self.model.set_attn_implementation("eager")  # on a CPU its backward pass is the fastest
        width = self.model.config.text_config.hidden_size
        embeddings = self.model.get_input_embeddings().weight
        entries = entry_tokens(processor.tokenizer)
        self.codes = CardCodes(embeddings, entries, seed)
        self.heads = PageHeads(width, self.codes, seed)
        self.letters = torch.tensor(entries[0])
        self.links = LinkHead(embeddings[entries[0]], seed)
        self.ahead = AheadHead(embeddings[entries[0]], self.letters, seed)
        self.packer = Packer(processor)
        self.optimisers = optimisers_of(
            self.model, [*self.heads.parameters(), *self.links.parameters()], recipe
        )
        self.step, self.pages_seen, self.seconds = 0, 0, 0.0

    def start_from(self, folder: Path) -> None:
        """Take the base's weights from a model folder instead of random ones.

        A GlimpsePrune repository's added weights are left out. Give the seed the model was trained
        with: the codes that teach seeing are drawn from it.

        Raises:
            ValueError: where the folder's weights are not those of a tiny base.
        """
        try:
            self.model.load_state_dict(_base_weights(folder))
        except RuntimeError as error:
            raise ValueError(f"{folder} holds no tiny base: {error}") from None

    def start_vision_from(self, folder: Path) -> None:
        """Take the vision encoder's weights from a model folder; all others stay random.

        Raises:
            ValueError: where the folder holds no vision encoder of the tiny base's sizes.
        """
        prefix = "model.visual."
        weights = {
            name.removeprefix(prefix): each
            for name, each in _base_weights(folder).items()
            if name.startswith(prefix)
        }
        try:
            self.model.model.visual.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{folder} holds no vision encoder to start from: {error}") from None

    def train(
        self, save_minutes: float = 3.0, progress: bool = True, last_step: int | None = None
    ) -> None:
        """Run what is left of the recipe, or up to `last_step`.

        The model is saved every `save_minutes`, at each stage's end and at the last step.
        """
        from tqdm import tqdm

        self.output.mkdir(parents=True, exist_ok=True)
        end = self.recipe.total_steps if last_step is None else last_step
        bar = tqdm(total=end, initial=self.step, disable=not progress)
        saved = time.monotonic()
        for stage, stage_step in self._remaining():
            if stage_step == 0 and stage.fit_batches:
                self._fit_last_layer(stage)
            figures = self._train_step(stage, stage_step)
            bar.update()
            bar.set_description(f"{stage.name} {figures['loss']:.3f}")
            last = stage_step + 1 == stage.steps or self.step == end
            if last or time.monotonic() - saved > 60 * save_minutes:
                self.save()
                saved = time.monotonic()
            if self.step == end:
                break
        bar.close()

    def save(self) -> None:
        """Write the model as a loadable folder, and what resuming needs."""
        save_base(self.model, self.processor, self.output)
        state = {
            "heads": self.heads.state_dict(),
            "links": self.links.state_dict(),
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "counters": (self.step, self.pages_seen, self.seconds),
        }
        partial = self.output / (STATE_FILE + ".partial")
        torch.save(state, partial)
        partial.replace(self.output / STATE_FILE)

    def resume(self) -> bool:
        """Take up the state in the output folder; False if there is none."""
        path = self.output / STATE_FILE
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        self.heads.load_state_dict(state["heads"])
        self.links.load_state_dict(state["links"])
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.pages_seen, self.seconds = state["counters"]
        self._cut_log()
        return True

    def _remaining(self) -> Iterator[tuple[Stage, int]]:
        first = 0
        for stage in self.recipe.stages:
            for stage_step in range(max(0, self.step - first), stage.steps):
                yield stage, stage_step
            first += stage.steps

    def _train_step(self, stage: Stage, stage_step: int) -> dict[str, float]:
        begin = time.monotonic()
        batch = self._batch(stage)
        factor = _rate_factor(stage, stage_step)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["base_rate"] * factor
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            figures = self._figures(stage, batch)
        figures["loss"].backward()
        parameters = [
            *self.model.parameters(),
            *self.heads.parameters(),
            *self.links.parameters(),
        ]
        figures["norm"] = nn.utils.clip_grad_norm_(parameters, self.recipe.clip)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += time.monotonic() - begin
        numbers = {name: round(float(value.detach()), 4) for name, value in figures.items()}
        self._log(stage, batch, numbers)
        return numbers

    def _batch(self, stage: Stage) -> Batch:
        """The next pages; all of one grid, drawn from the stage's."""
        choice = page_generator(self.seed, "train", -1 - self.step)
        grid = stage.grids[choice.integers(len(stage.grids))]
        settings = PageSettings(grids=stage.grids, most_labels=stage.most_labels)
        pages, questions = [], []
        number = max(1, round(stage.tokens / (grid[0] * grid[1])))
        asked = (
            max(1, stage.questions_a_step // number) if stage.questions_a_step else stage.questions
        )
        for _ in range(number):
            generator = page_generator(self.seed, "train", self.pages_seen)
            self.pages_seen += 1
            page = make_page(generator, "train", settings, grid)
            pages.append(page)
            questions.append(_mixed_questions(page, stage, asked, generator))
        images = stage.source != "cards"
        return Batch(
            grid,
            pages,
            self._pack(grid, questions, stage),
            torch.cat([page_patches(draw_page(page)) for page in pages]) if images else None,
            torch.from_numpy(np.concatenate([character_targets(page) for page in pages])),
            torch.from_numpy(np.concatenate([card_targets(page) for page in pages])),
            torch.from_numpy(np.concatenate([link_targets(page) for page in pages])),
            [question.kind for of_page in questions for question in of_page],
        )

    def _pack(
        self, grid: tuple[int, int], questions: list[list[Question]], stage: Stage
    ) -> PackedBatch | None:
        if stage.source == "images":
            return None
        packed = self.packer.pack(grid, questions, stage.form, stage.blind)
        if stage.misspelled:
            misspell(packed, self.letters, stage.misspelled, self._noise())
        return packed

    def _noise(self) -> torch.Generator:
        """What noise of this step is drawn from."""
        return torch.Generator().manual_seed(1_000_003 * self.seed + self.step)

    def _figures(self, stage: Stage, batch: Batch) -> dict[str, torch.Tensor]:
        """Losses and accuracies of a batch; `loss` is their weighted sum."""
        figures: dict[str, torch.Tensor] = {}
        if batch.patches is None:
            tokens = self.codes(batch.cards)
            noise = torch.randn(tokens.shape, generator=self._noise())
            tokens = tokens + stage.code_noise * noise
            loss = tokens.new_zeros(())
        else:
            with torch.set_grad_enabled(not stage.freeze_vision):
                tokens = self._see(batch)
            figures |= self.heads.losses(tokens, batch.characters, batch.cards)
            loss = stage.read_weight * figures["read_loss"]
            loss = loss + stage.card_weight * figures["card_loss"]
            figures["code_loss"] = (tokens - self.codes(batch.cards)).square().mean()
            loss = loss + stage.code_weight * figures["code_loss"] / CODE_SCALE**2
        if batch.packed is not None:
            layer = self.model.model.language_model.layers[stage.link_layer]
            upper = self.model.model.language_model.layers[stage.ahead_layer]
            with kept_states(layer) as states, kept_states(upper) as upper_states:
                answers = answer_figures(
                    self.model,
                    batch.packed,
                    tokens,
                    stage.page_from_layer,
                    batch.kinds if len(stage.kinds) > 1 else (),
                    stage.by_question,
                )
            figures |= answers
            loss = loss + answers["answer_loss"]
            if stage.ahead_weight:
                figures |= self.ahead.figures(upper_states[0], batch.packed.labels)
                loss = loss + stage.ahead_weight * figures["ahead_loss"]
            if stage.link_weight:
                image = batch.packed.input_ids == self.model.config.image_token_id
                figures |= self.links.figures(states[0][image], batch.links)
                loss = loss + stage.link_weight * figures["link_loss"]
        return figures | {"loss": loss}

    def _see(self, batch: Batch) -> torch.Tensor:
        rows, columns = batch.grid
        grid = torch.tensor([[1, 2 * rows, 2 * columns]]).repeat(len(batch.pages), 1)
        seen = self.model.model.visual(batch.patches, grid_thw=grid)
        return seen if isinstance(seen, torch.Tensor) else seen.pooler_output

    @torch.no_grad()
    def _fit_last_layer(self, stage: Stage) -> None:
        """Set the vision encoder's last layer to what best gives the card codes (least squares).

        So the language model, which learnt on codes, meets from the first image tokens it knows.
        """
        layers = self.model.model.visual.merger.mlp
        last, layers[2] = layers[2], nn.Identity()
        size = last.in_features + 1
        products, targets = torch.zeros(size, size), torch.zeros(size, last.out_features)
        for _ in range(stage.fit_batches):
            batch = self._batch(stage)
            features = functional.pad(self._see(batch), (0, 1), value=1.0)
            products += features.T @ features
            targets += features.T @ self.codes(batch.cards)
        products += 1e-4 * products.diagonal().mean() * torch.eye(size)
        solution = torch.linalg.solve(products, targets)
        last.weight.copy_(solution[:-1].T)
        last.bias.copy_(solution[-1])
        layers[2] = last
        for optimiser in self.optimisers:
            for parameter in last.parameters():
                optimiser.state.pop(parameter, None)

    def _cut_log(self) -> None:
        """Drop the log's lines of steps that the saved state does not know."""
        path = self.output / LOG_FILE
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        path.write_text("".join(kept), encoding="utf-8")

    def _log(self, stage: Stage, batch: Batch, numbers: dict[str, float]) -> None:
        entry = {"step": self.step, "stage": stage.name, "grid": batch.grid}
        entry |= {"minutes": round(self.seconds / 60, 3), "pages": self.pages_seen} | numbers
        with open(self.output / LOG_FILE, "a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")


def write_summary(trainer: BaseTrainer) -> dict[str, object]:
    """Measure the saved model on held-out test pages and write `training_summary.json`.

    The accuracy is exact match by greedy generation through the processor, a page size at a time.
    """
    import transformers

    recipe, folder = trainer.recipe, trainer.output
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    kinds = [kind for kind in KINDS if kind in recipe.stages[-1].kinds]
    accuracy = {
        f"{rows}x{columns}": {
            kind: generation_accuracy(
                model, trainer.processor, (rows, columns), recipe.evaluation_questions, kind=kind
            )
            for kind in kinds
        }
        for rows, columns in recipe.evaluation_grids
    }
    summary = {
        "accuracy": accuracy,
        "seed": trainer.seed,
        "steps": trainer.step,
        "pages": trainer.pages_seen,
        "training_minutes": round(trainer.seconds / 60, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _base_weights(folder: Path) -> dict[str, torch.Tensor]:
    """A folder's weights without a glimpse's, by the names of the stock model's modules.

    Files written by `train-base` have the names of published checkpoints.
    """
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    published = not any(name.startswith("model.language_model.") for name in weights)
    places = {"visual.": "model.visual.", "model.": "model.language_model."} if published else {}
    named = {}
    for name, each in weights.items():
        if ".glimpse." in name:
            continue
        for old, new in places.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        named[name] = each
    return named


def _mixed_questions(
    page: Page, stage: Stage, number: int, generator: np.random.Generator
) -> list[Question]:
    """Up to `number` questions, each kind in about the stage's share."""
    kinds, shares = list(stage.kinds), np.array(list(stage.kinds.values()))
    counts = generator.multinomial(number, shares / shares.sum())
    questions = [
        question
        for kind, count in zip(kinds, counts, strict=True)
        if count
        for question in ask(page, kind, int(count), generator)
    ]
    return questions or ask(page, "value", 1, generator)


def _rate_factor(stage: Stage, step: int) -> float:
    first, last = stage.rate
    warm = min(1.0, (step + 1) / stage.warm_up) if stage.warm_up else 1.0
    return warm * (first + (last - first) * step / stage.steps)
