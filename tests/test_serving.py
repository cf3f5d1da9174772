"""`glimpseprune serve` as a process of its own, asked by the `openai` client."""

import base64
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image
from serving_process import free_port, needs_serving, running

from glimpseprune.images import open_image
from glimpseprune.loading import load_model
from glimpseprune.package_files import SAMPLE_PAGE, TINY_MODEL
from glimpseprune.tiny_world.dataset import write_pages
from modeling_glimpseprune.stock import cache_of

needs_serving()

import openai  # noqa: E402

QUESTION = "What is the value of CS?"
LONG = 100  # tokens of an answer that nobody waits for


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Three pages of the tiny world, the first of which the sample question is about."""
    folder = tmp_path_factory.mktemp("pages")
    write_pages(folder, "test", range(2), 0)
    others = sorted(folder.rglob("*.png"))[:2]
    return [open_image(path) for path in (SAMPLE_PAGE, *others)]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    port = free_port()
    command = ["-m", "glimpseprune.cli", "serve", str(TINY_MODEL), "--name", "tiny"]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    with running([*command, "--port", str(port)], port, log) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY_MODEL)


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def messages(question: str, *addresses: str) -> list[dict]:
    images = [{"type": "image_url", "image_url": {"url": each}} for each in addresses]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


def ask(client, question: str, *addresses: str, **options):
    return client.chat.completions.create(
        model="tiny", messages=messages(question, *addresses), temperature=0, **options
    )


def local(tiny, question: str, *images, **settings) -> tuple[str, int, int]:
    """The answer of the model itself, and the kept and all visual tokens."""
    model, processor = tiny
    content = [*[{"type": "image"}] * len(images), {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(images=list(images), text=[text], return_tensors="pt")
    generated = model.generate(
        **inputs, max_new_tokens=64, do_sample=False, return_dict_in_generate=True, **settings
    )
    answer = processor.decode(
        generated.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    total = sum(model.model.visual_counts(**inputs))
    record = getattr(cache_of(generated), "glimpse", None)
    return answer, total if record is None else record.kept, total


def counts(usage) -> tuple[int, int]:
    details = usage.prompt_tokens_details
    return details.kept_visual_tokens, details.visual_tokens


def test_models_and_health(address, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError, match="tiny.*requested 'another'"):
        client.chat.completions.create(model="another", messages=messages(QUESTION))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prune": False},
        {"max_keep_ratio": 0.05, "min_keep_tokens": 1},
        {"prune_threshold": 0.9, "min_keep_tokens": None},
        {"prune_layer": 1},
    ],
)
def test_settings_of_a_request(client, tiny, pages, settings):
    answer = ask(client, QUESTION, data_url(pages[0]), extra_body=settings)
    given = {name: value for name, value in settings.items() if value is not None}
    expected, kept, total = local(tiny, QUESTION, pages[0], **given)
    assert answer.choices[0].message.content == expected
    assert counts(answer.usage) == (kept, total)
    assert (kept == total) == (settings.get("prune") is False)


def test_a_second_question_finds_the_page_known(client, tiny, pages):
    url = data_url(pages[1])
    first = ask(client, "What is the value of AB?", url)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    second = ask(client, QUESTION, url)
    held = second.usage.prompt_tokens_details.cached_tokens
    assert counts(second.usage)[1] < held < second.usage.prompt_tokens
    assert second.choices[0].message.content == local(tiny, QUESTION, pages[1])[0]


def test_two_images(client, tiny, pages):
    answer = ask(client, QUESTION, data_url(pages[0]), data_url(pages[1]))
    expected, kept, total = local(tiny, QUESTION, pages[0], pages[1])
    assert answer.choices[0].message.content == expected
    assert counts(answer.usage) == (kept, total)


def test_a_streamed_answer_is_the_plain_one(client, pages):
    url = data_url(pages[0])
    plain = ask(client, QUESTION, url)
    chunks = list(ask(client, QUESTION, url, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == plain.choices[0].message.content
    assert sum(map(bool, pieces)) > 1
    assert chunks[-1].choices[0].finish_reason == plain.choices[0].finish_reason == "stop"
    assert counts(chunks[-1].usage) == counts(plain.usage)
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens


def test_an_image_behind_a_web_address(client, pages, tmp_path):
    pages[0].save(tmp_path / "page.png")
    (tmp_path / "words.txt").write_text("no image")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{web.server_port}"
        answer = ask(client, QUESTION, f"{url}/page.png")
        with pytest.raises(openai.BadRequestError, match="image 0 .*words.txt.*no image file"):
            ask(client, QUESTION, f"{url}/words.txt")
        with pytest.raises(openai.BadRequestError, match="none.png.*cannot be fetched.*404"):
            ask(client, QUESTION, f"{url}/none.png")
        web.shutdown()
    by_data = ask(client, QUESTION, data_url(pages[0]))
    assert answer.choices[0].message == by_data.choices[0].message


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("data:image/png;base64,bm8gaW1hZ2U=", "no image file"),
        ("data:image/png;base64,n", "not base64"),
        ("data:image/png,n", "must begin with data:image"),
        (str(SAMPLE_PAGE), "local files are refused"),
        (SAMPLE_PAGE.as_uri(), "local files are refused"),
    ],
)
def test_an_image_that_is_none(client, url, sentence, stream):
    with pytest.raises(openai.BadRequestError, match=sentence):
        ask(client, QUESTION, url, stream=stream)


@pytest.mark.parametrize(
    ("extra", "status", "sentence"),
    [
        ({"prune_threshold": 7}, 400, "prune_threshold must .* got 7"),
        ({"prune": "no"}, 400, "prune must be true or false, got 'no'"),
        ({"max_keep_ratio": "half"}, 400, "max_keep_ratio must .* got 'half'"),
        ({"keep_everything": True}, 422, "keep_everything"),
    ],
)
def test_settings_that_cannot_be(client, pages, extra, status, sentence):
    with pytest.raises(openai.APIStatusError, match=sentence) as raised:
        ask(client, QUESTION, data_url(pages[0]), extra_body=extra)
    assert raised.value.status_code == status


def test_other_interfaces_are_not_there(client):
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions alone"):
        client.responses.create(model="tiny", input=QUESTION)


def test_nothing_listens_elsewhere(address):
    """A server at 0.0.0.0 would answer at each address of the loopback network."""
    port = int(address.rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up(address, client, tiny, pages, stream):
    never = {str(token): -100.0 for token in tiny[0].generation_config.eos_token_id}
    endless = {"logit_bias": never, "max_tokens": LONG, "stream": stream}
    body = json.dumps(endless | {"messages": messages(QUESTION, data_url(pages[0]))}).encode()
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        if stream:
            heard = b""
            while heard.count(b"data:") < 4:
                heard += (piece := connection.recv(4096))
                assert piece, heard
        else:
            time.sleep(0.3)  # so that the answer is under way, on most machines
    answer = ask(client, QUESTION, data_url(pages[0]))
    assert answer.choices[0].message.content == local(tiny, QUESTION, pages[0])[0]


def test_thirty_two_clients_at_once(address, tiny, pages):
    questions = [QUESTION, "What is the value of AB?"]
    asked = [(question, page) for question in questions for page in pages[:2]] * 8
    expected = {(q, id(page)): local(tiny, q, page)[0] for q in questions for page in pages[:2]}

    def one(number: int) -> str:
        own = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        question, page = asked[number]
        together.wait()
        if number % 2:
            chunks = ask(own, question, data_url(page), stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return ask(own, question, data_url(page)).choices[0].message.content

    together = threading.Barrier(len(asked))
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(one, range(len(asked))))
    assert answers == [expected[question, id(page)] for question, page in asked]
