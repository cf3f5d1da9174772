"""Requests a second, and seconds to the first token, of `glimpseprune serve` and the stock server.

    python -m benchmarks.serving --output benchmarks/results/serving.json

Three servers run on this machine: `transformers serve` with a stock model, and `glimpseprune serve`
with the same weights and a glimpse, with and without prefixes. They are asked in turn, so that what
else the machine does falls on all of them. Weights are random and the kept share is forced, so
nothing is downloaded. Pages are noise, and each question but the second about a page brings a page
of its own.
"""

import argparse
import base64
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import requests
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import Qwen2_5_VLProcessor

from benchmarks.efficiency.__main__ import describe_machine
from benchmarks.efficiency.workload import SCALED, build_config, build_pair
from glimpseprune.hub.shards import read_json
from glimpseprune.loading import load_processor, tiny_repository
from glimpseprune.portable import write_json
from glimpseprune.training.repository import write_repository

TOKEN = 28  # pixels a side of a visual token
OF_THE_TOKENIZER = ("image_token_id", "video_token_id", "vision_start_token_id")
OF_THE_TOKENIZER += ("vision_end_token_id",)
QUESTIONS = ("What is the value of CS?", "What is the value of AB?")
Ask = Callable[..., dict]  # a page, a question and a number of tokens to the answer's usage
STOCK, LOOKS_ANEW, KEEPS = "stock", "pruned, no prefixes kept", "pruned"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--side", type=int, default=24, help="visual tokens a side of a page")
    parser.add_argument("--keep-ratio", type=float, default=0.1)
    parser.add_argument("--prune-layer", type=int, help="default: the glimpse layer")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument(
        "--requests", type=int, default=8, help="at least, of each number of clients"
    )
    parser.add_argument("--repetitions", type=int, default=9, help="of a first and second question")
    parser.add_argument("--rounds", type=int, default=2, help="of each number of clients")
    arguments = parser.parse_args()
    results = measure(arguments)
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    content = {"machine": describe_machine("cpu"), "settings": settings, "results": results}
    write_json(arguments.output, content)
    print(json.dumps(results, indent=2))


def measure(arguments: argparse.Namespace) -> dict[str, dict]:
    """Figures of each server."""
    pruning = {"prune_threshold": 0.0, "max_keep_ratio": arguments.keep_ratio}
    if arguments.prune_layer is not None:
        pruning["prune_layer"] = arguments.prune_layer
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        stock, pruned = write_models(Path(scratch))
        device = ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
        ours = ["-m", "glimpseprune.cli", "serve", str(pruned), *device]
        servers = {
            STOCK: (["-m", "transformers.cli.transformers", "serve", str(stock), *device], {}),
            LOOKS_ANEW: ([*ours, "--prefix-memory", "0"], pruning),
            KEEPS: (ours, pruning),
        }
        asks = {}
        for index, (name, (command, fields)) in enumerate(servers.items()):
            log = Path(scratch) / f"log_{index}.txt"
            asks[name] = partial(request, stack.enter_context(running(command, log)), fields)
        return measure_servers(asks, arguments)


def measure_servers(asks: dict[str, Ask], arguments: argparse.Namespace) -> dict[str, dict]:
    """Seconds to the first token, and requests a second by number of clients, of each server."""
    pages = Pages(arguments.side)
    results = {}
    for name, ask in asks.items():  # the first question of all is slow
        usage = ask(pages.next(), QUESTIONS[0], arguments.new_tokens)
        details = usage.get("prompt_tokens_details") or {}
        results[name] = {"prompt_tokens": usage["prompt_tokens"], **details}
    seconds = defaultdict(lambda: ([], []))
    for _ in tqdm(range(arguments.repetitions), desc="first tokens"):
        page = pages.next()
        for name, ask in asks.items():
            for found, question in zip(seconds[name], QUESTIONS, strict=True):
                start = time.perf_counter()
                ask(page, question, 1)
                found.append(time.perf_counter() - start)
    for name, (first, second) in seconds.items():
        results[name]["first_question_seconds"] = statistics.median(first)
        results[name]["second_question_seconds"] = statistics.median(second)
        results[name]["requests_a_second"] = {}
    for clients in arguments.clients:
        spent = dict.fromkeys(asks, 0.0)
        count = max(clients, arguments.requests)
        for _ in tqdm(range(arguments.rounds), desc=f"{clients} clients"):
            for name, ask in asks.items():
                asked = [pages.next() for _ in range(count)]
                start = time.perf_counter()
                with ThreadPoolExecutor(clients) as pool:
                    one = partial(ask, question=QUESTIONS[0], new_tokens=arguments.new_tokens)
                    list(pool.map(one, asked))
                spent[name] += time.perf_counter() - start
        for name, taken in spent.items():
            rate = count * arguments.rounds / taken
            results[name]["requests_a_second"][str(clients)] = rate
    return results


def write_models(folder: Path) -> tuple[Path, Path]:
    """Repositories of a stock and a GlimpsePrune model with the tiny model's tokenizer."""
    processor = load_processor(tiny_repository())
    tiny = read_json(Path(tiny_repository()) / "config.json")
    config = build_config(SCALED, None) | {name: tiny[name] for name in OF_THE_TOKENIZER}
    config["vocab_size"] = tiny["text_config"]["vocab_size"]
    torch.manual_seed(0)
    pair = build_pair(config, torch.device("cpu"), torch.float32)
    stock, pruned = folder / "stock", folder / "pruned"
    pair.stock.save_pretrained(stock)
    parts = (processor.image_processor, processor.tokenizer, processor.video_processor)
    Qwen2_5_VLProcessor(*parts, chat_template=processor.chat_template).save_pretrained(stock)
    write_repository(pair.pruned, processor, pruned, torch.float32, {})
    return stock, pruned


class Pages:
    """Data URLs of square pages of noise, each another one.

    Args:
        side: visual tokens.
    """

    def __init__(self, side: int):
        self.side, self.generator = side * TOKEN, np.random.default_rng(0)

    def next(self) -> str:
        cells = self.generator.integers(0, 256, (self.side // 7, self.side // 7, 3), np.uint8)
        image = Image.fromarray(cells).resize((self.side, self.side), Image.Resampling.NEAREST)
        image.save(buffer := io.BytesIO(), "PNG")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def request(address: str, fields: dict, page: str, question: str, new_tokens: int) -> dict:
    """The usage of an answer of a given length.

    Raises:
        ValueError: when it is of another length, or an error.
    """
    parts = [{"type": "image_url", "image_url": {"url": page}}, {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": new_tokens}
    response = requests.post(f"{address}/v1/chat/completions", json=body | fields, timeout=600)
    if not response.ok or response.json()["usage"]["completion_tokens"] != new_tokens:
        raise ValueError(f"not an answer of {new_tokens} tokens: {response.text}")
    return response.json()["usage"]


@contextmanager
def running(command: list[str], log: Path) -> Iterator[str]:
    """The address of a server while it runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=file, stderr=file
        )
    try:
        while process.poll() is None:
            try:
                requests.get(f"{address}/health", timeout=5).raise_for_status()
                break
            except requests.ConnectionError:
                time.sleep(0.2)
        else:
            raise RuntimeError(f"the server did not come up: {log.read_text()}")
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
