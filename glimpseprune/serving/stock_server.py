"""transformers' server with our classes in it: everything that is assumed of `transformers serve`.

It looks a model's class up in the `transformers` module and knows modalities by the names of stock
classes, so its model manager is given ours; and its handler of chat completions reads images and
calls `generate` as it knows them, so that is given what a request says of images and pruning. The
rest is the stock server as it is. `tests/test_serving_assumptions.py` holds each assumption
against the installed release.
"""

import asyncio
import copy
import importlib.util
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import torch
from fastapi import HTTPException
from fastapi.responses import JSONResponse, Response
from openai.types.completion_usage import CompletionUsage, PromptTokensDetails
from transformers import PreTrainedModel, ProcessorMixin
from transformers.cli.serve import Serve
from transformers.cli.serving import chat_completion, model_manager, utils

from ..loading import load_model, load_processor
from .answering import PromptCounts, answer, settings_of
from .image_reader import ImageReader
from .prefix_store import PrefixStore

PACKAGE = "transformers.cli.serving"
OTHER_HANDLERS = (  # module and class, where the release has them
    ("completion", "CompletionHandler"),
    ("response", "ResponseHandler"),
    ("systemone", "SystemOneHandler"),
    ("transcription", "TranscriptionHandler"),
)


class ModelManager(model_manager.ModelManager):
    """The stock manager, of one GlimpsePrune repository and no other model.

    Args:
        repository: folder or Hub repository; requests know it as `force_model`.
        prefixes: emptied when the model is unloaded.
    """

    def __init__(self, *args, repository: str, prefixes: PrefixStore, **kwargs):
        self.repository, self.prefixes = repository, prefixes
        super().__init__(*args, **kwargs)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *args, **kwargs):
        """The one model.

        Raises:
            ValueError: for another, whose code would run here.
        """
        if model_id_and_revision != self.force_model:
            raise ValueError(f"this server has {self.force_model} and loads no other model")
        return super().load_model_and_processor(model_id_and_revision, *args, **kwargs)

    def _load_processor(self, *args, **kwargs) -> ProcessorMixin:
        return load_processor(self.repository)

    def _load_model(self, *args, **kwargs) -> PreTrainedModel:
        device = None if self.device == "auto" else self.device
        return load_model(self.repository, device, self.dtype)[0]

    def shutdown(self) -> None:
        super().shutdown()
        self.prefixes.clear()

    @staticmethod
    def get_model_modality(model, processor=None) -> utils.Modality:
        return utils.Modality.VLM

    def list_models(self, *args, **kwargs) -> list[dict]:
        """What `GET /v1/models` shows."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": ""}]

    get_gen_models = list_models  # its name up to transformers 5.8


class ChatParameters(chat_completion.ChatCompletionHandler._valid_params_class, total=False):
    """Fields that a request may have."""

    prune: bool
    prune_threshold: float
    max_keep_ratio: float
    min_keep_tokens: int
    prune_layer: int


class ChatHandler(chat_completion.ChatCompletionHandler):
    """The stock handler of chat completions; a copy of it serves one request.

    Args:
        images: reads the images of messages.
        prefixes: of images that were asked about lately.
    """

    _valid_params_class = ChatParameters

    def __init__(self, *args, images: ImageReader, prefixes: PrefixStore, **kwargs):
        super().__init__(*args, **kwargs)
        self.images, self.prefixes = images, prefixes
        self.answering: Answering | None = None

    async def handle_request(self, body: dict, request_id: str) -> Response:
        """The stock method, over images that are read already; or why it cannot answer."""
        try:
            self._validate_request(body)
            messages = await asyncio.to_thread(self.images.with_images, body.get("messages"))
            handler = super(ChatHandler, copy.copy(self))
            return await handler.handle_request(body | {"messages": messages}, request_id)
        except ValueError as error:
            return refusal(400, str(error))
        except HTTPException as error:
            return refusal(error.status_code, str(error.detail))

    def _resolve_model(self, body: dict) -> tuple[str, "Answering", ProcessorMixin]:
        model_id, model, processor = super()._resolve_model(body)
        settings = settings_of(body, model.config)
        self.answering = Answering(model, self.prefixes, settings)
        return model_id, self.answering, processor

    def _build_completion(self, *args, usage: CompletionUsage | None = None, **kwargs) -> dict:
        return super()._build_completion(*args, usage=self._counted(usage), **kwargs)

    def _build_chunk_sse(self, *args, usage: CompletionUsage | None = None, **kwargs) -> str:
        return super()._build_chunk_sse(*args, usage=self._counted(usage), **kwargs)

    def _counted(self, usage: CompletionUsage | None) -> CompletionUsage | None:
        """Usage with what became of the prompt, where there is any."""
        counts = self.answering.counts
        if usage is not None and counts is not None:
            details = {
                "cached_tokens": counts.reused,
                "visual_tokens": counts.visual,
                "kept_visual_tokens": counts.kept,
            }
            usage.prompt_tokens_details = PromptTokensDetails.model_validate(details)
        return usage


class Answering:
    """Stands for the model in one request, and is it but for `generate`.

    Attributes:
        counts: what became of the prompt, once there is an answer.
    """

    def __init__(self, model: PreTrainedModel, prefixes: PrefixStore, settings: dict):
        self.model, self.prefixes, self.settings = model, prefixes, settings
        self.counts: PromptCounts | None = None

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def generate(
        self, *, generation_config, tokenizer, streamer=None, **inputs
    ) -> torch.LongTensor:
        """`(1, prompt + answer)` ids. A stream ends when its counts are there."""
        options = {"generation_config": generation_config, "tokenizer": tokenizer}
        if streamer is None:
            return self._answer(inputs, options)
        try:
            ids = self._answer(inputs, options | {"streamer": HeldStreamer(streamer)})
        except utils._GenerationCancelled:
            raise
        except Exception as error:  # the server puts its text between quotes of JSON as it is
            raise RuntimeError(json.dumps(str(error))[1:-1]) from error
        streamer.end()
        return ids

    def _answer(self, inputs: dict, options: dict) -> torch.LongTensor:
        ids, self.counts = answer(self.model, self.prefixes, inputs, self.settings, **options)
        return ids


class HeldStreamer:
    """Hands tokens on, and leaves the end to others."""

    def __init__(self, streamer: utils.DirectStreamer):
        self.streamer = streamer

    def put(self, value: torch.Tensor) -> None:
        self.streamer.put(value)

    def end(self) -> None:
        pass


class OtherHandler:
    """In the place of handlers that would run a GlimpsePrune model unasked, or read local files."""

    def __init__(self, *args, **kwargs):
        pass

    async def handle_request(self, *args) -> JSONResponse:
        return refusal(404, "this server answers at /v1/chat/completions alone")


def refusal(status: int, message: str) -> JSONResponse:
    """An answer that says why there is none, as OpenAI's clients read it."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status)


def serve(
    repository: str,
    name: str,
    images: ImageReader,
    prefixes: PrefixStore,
    **options,
) -> Serve:
    """Run transformers' server until it is ended.

    Args:
        repository: folder or Hub repository of a GlimpsePrune model.
        name: of the model in requests.
        options: what `transformers serve` takes, such as `host` and `port`.
    """
    manager = partial(ModelManager, repository=repository, prefixes=prefixes)
    handler = partial(ChatHandler, images=images, prefixes=prefixes)
    with our_classes(manager, handler):
        return Serve(force_model=name, trust_remote_code=True, **options)


@contextmanager
def our_classes(manager: object, handler: object) -> Iterator[None]:
    """While `Serve` builds its parts, they are ours."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(model_manager, "ModelManager", manager))
        stack.enter_context(patch.object(chat_completion, "ChatCompletionHandler", handler))
        for module, name in OTHER_HANDLERS:
            if importlib.util.find_spec(f"{PACKAGE}.{module}") is not None:
                other = importlib.import_module(f"{PACKAGE}.{module}")
                stack.enter_context(patch.object(other, name, OtherHandler))
        yield
