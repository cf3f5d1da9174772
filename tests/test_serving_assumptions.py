"""What `glimpseprune/serving/stock_server.py` assumes of transformers' server, one by one."""

import asyncio
import inspect
import json
import threading

import pytest
import torch
from serving_process import needs_serving
from test_serving_parts import PICTURE, TEXT, folder  # noqa: F401

from glimpseprune.loading import load_model
from glimpseprune.package_files import TINY_MODEL
from glimpseprune.serving.answering import SETTINGS
from glimpseprune.serving.image_reader import ImageReader
from glimpseprune.serving.prefix_store import PrefixStore

needs_serving()

import uvicorn  # noqa: E402
from openai.types.completion_usage import CompletionUsage, PromptTokensDetails  # noqa: E402
from transformers.cli.serving import chat_completion, model_manager, utils  # noqa: E402

from glimpseprune.serving.stock_server import (  # noqa: E402
    Answering,
    ChatHandler,
    ModelManager,
    OtherHandler,
    serve,
)

STOCK_HANDLER, STOCK_MANAGER = chat_completion.ChatCompletionHandler, model_manager.ModelManager


@pytest.fixture(scope="module")
def loaded():
    return load_model(TINY_MODEL)


@pytest.fixture
def apps(monkeypatch):
    """The applications that servers would run, which do not run."""
    found = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: found.append(self.config.app))
    return found


@pytest.fixture
def server(apps, folder):  # noqa: F811
    store = PrefixStore(2**30)
    server = serve(str(TINY_MODEL), "tiny", ImageReader(folder), store, log_level="error")
    yield server
    server._model_manager.shutdown()


class Standing:
    """In the model's place: says what it was called with."""

    generation_config = None

    def __init__(self, error: Exception | None = None):
        self.error, self.calls, self.threads = error, [], set()

    def generate(self, **arguments):
        self.calls.append(arguments)
        self.threads.add(threading.get_ident())
        if self.error is not None:
            raise self.error
        streamer = arguments.get("streamer")
        if streamer is not None:
            for ids in ([[1, 2]], [3], [4]):
                streamer.put(torch.tensor(ids))
            streamer.end()
        return torch.tensor([[1, 2, 3, 4]])


def test_our_classes_are_built_in_the_stock_ones_places(server, apps):
    why = "`Serve` no longer takes its parts from the modules of transformers.cli.serving"
    assert isinstance(server._model_manager, ModelManager), why
    assert isinstance(server._chat_handler, ChatHandler), why
    for name in ("completion", "response", "systemone", "transcription"):
        handler = getattr(server, f"_{name}_handler", None)
        assert handler is None or isinstance(handler, OtherHandler), (
            f"{why}: the handler of {name} is the stock one, which reads local files"
        )
    assert chat_completion.ChatCompletionHandler is STOCK_HANDLER
    assert model_manager.ModelManager is STOCK_MANAGER


def test_every_handler_is_known(apps, server):
    """Else a new interface could read local files or run what nobody tested."""
    known = {"_model_manager", "_generation_state", "_chat_handler", "server"}
    known |= {f"_{name}_handler" for name in ("completion", "response", "systemone")}
    unknown = vars(server).keys() - known - {"_transcription_handler"}
    assert not unknown, f"`Serve` has parts that stock_server.py does not know: {unknown}"


def test_routes(apps, server):
    paths = {route.path for route in apps[0].routes}
    needed = {"/v1/chat/completions", "/v1/models", "/health"}
    assert needed <= paths, f"the stock server has no {needed - paths}"


def test_what_is_overridden_is_there():
    ours = {
        STOCK_MANAGER: (
            "process_model_name",
            "load_model_and_processor",
            "_load_processor",
            "_load_model",
            "shutdown",
            "get_model_modality",
        ),
        STOCK_HANDLER: (
            "_validate_request",
            "handle_request",
            "_resolve_model",
            "_build_completion",
            "_build_chunk_sse",
        ),
    }
    for stock, names in ours.items():
        for name in names:
            assert hasattr(stock, name), f"{stock.__name__} has no {name} that could be overridden"
    lists = [name for name in ("list_models", "get_gen_models") if hasattr(STOCK_MANAGER, name)]
    assert lists, "GET /v1/models asks the manager by another name than list_models"


def test_the_stock_manager_still_needs_ours(loaded):
    """Both places that the module's docstring names."""
    model, processor = loaded
    with pytest.raises(ValueError, match="Unknown modality"):
        STOCK_MANAGER.get_model_modality(model, processor)
        pytest.fail("the stock server knows the modality of remote classes: leave the override out")
    source = inspect.getsource(STOCK_MANAGER._load_model)
    assert "getattr(transformers, config.architectures[0])" in source, (
        "the stock manager finds classes elsewhere than in `transformers`, perhaps ours too"
    )


def test_a_request_may_say_settings_of_the_pruning():
    stock = STOCK_HANDLER._valid_params_class.__mutable_keys__
    ours = ChatHandler._valid_params_class.__mutable_keys__
    assert ours - stock == set(SETTINGS), (
        "fields of a request are no longer known by __mutable_keys__ of _valid_params_class"
    )


def test_a_read_image_passes_in_the_place_of_its_address(loaded, folder):  # noqa: F811
    messages = ImageReader(folder).with_images([{"role": "user", "content": [PICTURE, TEXT]}])
    parts = STOCK_HANDLER.get_processor_inputs_from_messages(messages, utils.Modality.VLM)
    image = messages[0]["content"][0]["image_url"]
    assert parts[0]["content"][0] == {"type": "image", "url": image}, (
        "the stock handler does more with an image's address than handing it on"
    )
    inputs = loaded[1].apply_chat_template(
        parts, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert "pixel_values" in inputs, "apply_chat_template takes no pictures as `url`"


def run_plain(model, processor, inputs):
    manager = utils.GenerateManager()

    async def run():
        asked = (
            manager.generate_non_streaming(model, processor, inputs, None, str(i)) for i in "ab"
        )
        return await asyncio.gather(*asked)

    return asyncio.run(run())


def run_streamed(model, processor, inputs) -> list[str]:
    """Events of a streamed answer, as the stock handler sends them."""

    async def run():
        handler = STOCK_HANDLER(None, None)
        options = {"gen_manager": utils.GenerateManager()}
        response = handler._streaming(
            "id", model, processor, "tiny", inputs, Configuration(), **options
        )
        return [event async for event in response.body_iterator]

    return asyncio.run(run())


class Configuration:
    max_new_tokens = 2


def test_how_generate_is_called(loaded):
    model, processor = Standing(), loaded[1]
    model.config = loaded[0].config
    inputs = {"input_ids": torch.tensor([[1, 2]])}
    for text, length, ids in run_plain(model, processor, inputs):
        assert (length, ids.tolist()) == (2, [3, 4]), "the answer is not what follows the prompt"
        assert text == processor.decode([3, 4], skip_special_tokens=True)
    run_streamed(model, processor, inputs)
    plain, _, streamed = model.calls
    expected = {"input_ids", "generation_config", "tokenizer"}
    assert plain.keys() == expected, f"`generate` is called with {plain.keys()}"
    assert streamed.keys() == expected | {"streamer"}, f"`generate` streams with {streamed.keys()}"


def test_one_answer_after_the_other(loaded):
    model = Standing()
    run_plain(model, loaded[1], {"input_ids": torch.tensor([[1, 2]])})
    assert len(model.threads) == 1, (
        "requests are answered in several threads, so docs/serve.md is wrong"
    )


def test_a_streams_end_waits_for_the_counts(loaded):
    """The last event holds the counts, and is made when the streamer ends."""
    heard = []

    class Streamer:
        def put(self, value):
            heard.append(value.tolist())

        def end(self):
            heard.append(answering.counts)

    answering = Answering(Standing(), None, {})
    answering._answer = lambda inputs, options: set_counts(answering, inputs, options)
    answering.generate(
        generation_config=None, tokenizer=None, streamer=Streamer(), input_ids=torch.tensor([[1]])
    )
    assert heard == [[[1, 2]], [3], [4], "counts"]


def set_counts(answering, inputs, options):
    ids = answering.model.generate(**inputs, **options)
    answering.counts = "counts"
    return ids


def test_an_error_in_a_stream_is_readable(loaded):
    error = ValueError('it said "no"\n\\ and more')
    model = Standing(error)
    model.config = loaded[0].config
    answering = Answering(model, None, {})
    answering._answer = lambda inputs, options: model.generate(**inputs, **options)
    last = run_streamed(answering, loaded[1], {"input_ids": torch.tensor([[1, 2]])})[-1]
    try:
        shown = json.loads(last.removeprefix("data: "))
    except json.JSONDecodeError:
        pytest.fail(f"the stock server writes errors of a stream otherwise than before: {last}")
    assert shown == {"error": str(error)}, "the stock server escapes errors of a stream by itself"


def test_a_stream_that_nobody_hears_is_ended(loaded):
    """`put` raises, which `Answering` hands on as it is."""

    async def run():
        tokenizer = loaded[1].tokenizer._tokenizer
        streamer = utils.DirectStreamer(tokenizer, asyncio.get_running_loop(), asyncio.Queue())
        streamer.cancel()
        answering = Answering(Standing(), None, {})
        answering._answer = lambda inputs, options: answering.model.generate(**inputs, **options)
        answering.generate(generation_config=None, tokenizer=None, streamer=streamer)

    with pytest.raises(utils._GenerationCancelled):
        asyncio.run(run())


def test_usage_has_room_for_counts():
    details = PromptTokensDetails.model_validate({"cached_tokens": 1, "kept_visual_tokens": 2})
    usage = CompletionUsage(prompt_tokens=3, completion_tokens=1, total_tokens=4)
    usage.prompt_tokens_details = details
    shown = usage.model_dump(exclude_none=True)["prompt_tokens_details"]
    assert shown == {"cached_tokens": 1, "kept_visual_tokens": 2}, (
        "prompt_tokens_details drops fields that it does not know"
    )


# The parts together, in this process.


def ask(server, messages: object, **fields) -> tuple[int, dict]:
    """Status and content of an answer."""
    body = {"model": "tiny", "messages": messages, "max_tokens": 2} | fields
    response = asyncio.run(server._chat_handler.handle_request(body, "id"))
    return response.status_code, json.loads(response.body)


def test_requests_do_not_share_what_they_ask(server, folder):  # noqa: F811
    messages = [{"role": "user", "content": [PICTURE, TEXT]}]
    status, content = ask(server, messages, min_keep_tokens=1)
    assert status == 200, content
    assert content["model"] == "tiny"
    assert server._chat_handler.answering is None
    assert ask(server, messages, min_keep_tokens=-1)[0] == 400


def test_local_files_where_they_are_allowed(server, folder):  # noqa: F811
    def of(path):
        return [{"role": "user", "content": [{"type": "image_url", "image_url": str(path)}, TEXT]}]

    assert ask(server, of(folder / "page.png"))[0] == 200
    status, content = ask(server, of(folder.parent / "secret.png"))
    assert status == 400 and "outside of the folder" in content["error"]["message"]


def test_no_other_model_is_loaded(server):
    with pytest.raises(ValueError, match="this server has tiny and loads no other model"):
        server._model_manager.load_model_and_processor("somebody/code")
    assert [each["id"] for each in server._model_manager.list_models()] == ["tiny"]


def test_prefixes_go_with_the_model(server):
    assert ask(server, [{"role": "user", "content": [PICTURE, TEXT]}])[0] == 200
    store = server._chat_handler.prefixes
    assert len(store) == 1
    server._model_manager.shutdown()
    assert len(store) == 0
    assert ask(server, [{"role": "user", "content": [PICTURE, TEXT]}])[0] == 200  # loads again
