"""Rules that score tokens without running the decoder, and the two places where they drop them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from modeling_glimpseprune.prune_request import PruneRequest

from .layer_masks import prefill_begun
from .method import Application, Method
from .model_sizes import ModelSizes
from .prompt_tokens import PromptTokens, prompts_of


class Scorer(ABC):
    """A rule that scores the visual tokens of one prompt.

    Attributes:
        reads_embeddings: whether it needs the tokens' embeddings, which a look does not hold.
    """

    reads_embeddings = False

    @abstractmethod
    def scores(self, prompt: PromptTokens) -> torch.Tensor:
        """`(n,)` float; the `prompt.budget` highest are kept, earlier ones first at ties."""

    def flops(self, sizes: ModelSizes, visual: int) -> int:
        """Operations of scoring n visual tokens, where they amount to anything."""
        return 0


def keep_highest(scores: torch.Tensor, budget: int) -> torch.Tensor:
    """`(n,)` bool, True at the `budget` highest of `(n,)` scores, earlier ones first at ties."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep[scores.argsort(descending=True, stable=True)[:budget]] = True
    return keep


def drop_before_decoder(request: PruneRequest, keep: torch.Tensor) -> None:
    """Have a prefill drop the visual tokens outside `keep` (`(N,)` bool) before its first layer."""
    request.visual_keep_mask, request.prune_layer = keep, -1


@dataclass(frozen=True)
class Scored(Method):
    """Keeps the tokens that a rule scores highest; subclasses say where the others go.

    Attributes:
        scorer: the rule.
    """

    scorer: Scorer | None = None

    @contextmanager
    def applied(self, model, processor, batch) -> Iterator[Application]:
        def begin(request, inputs_embeds) -> None:
            prompts = prompts_of(request, inputs_embeds, processor, batch.samples, self.ratio)
            masks = [keep_highest(self.scorer.scores(each), each.budget) for each in prompts]
            self.drop(request, torch.cat(masks))

        with prefill_begun(model, begin):
            yield self.application({"visual_keep_mask": batch.everything})

    def drop(self, request: PruneRequest, keep: torch.Tensor) -> None:
        """Have a prefill drop the visual tokens outside `keep` (`(N,)` bool)."""
        raise NotImplementedError

    def application(self, options: dict[str, object]) -> Application:
        """The method at work, with these options of `generate`."""
        return Application(options)

    def look_layer(self, config: PretrainedConfig) -> int | None:
        return None

    def scoring_flops(self, sizes: ModelSizes, visual: int, prompt: int) -> int:
        return self.scorer.flops(sizes, visual)


@dataclass(frozen=True)
class AtGlimpseLayer(Scored):
    """Drops tokens where GlimpsePrune does, by its own machinery: a rule against the predictor."""

    def drop(self, request: PruneRequest, keep: torch.Tensor) -> None:
        request.visual_keep_mask = keep

    def look_layer(self, config: PretrainedConfig) -> int | None:
        return None if self.scorer.reads_embeddings else Method.look_layer(self, config)

    @property
    def drops_inside_glimpse_layer(self) -> bool:
        return True


@dataclass(frozen=True)
class BeforeDecoder(Scored):
    """Drops tokens before the decoder's first layer."""

    def drop(self, request: PruneRequest, keep: torch.Tensor) -> None:
        drop_before_decoder(request, keep)

    def application(self, options: dict[str, object]) -> Application:
        return Application(options, last_full_layer=-1)
