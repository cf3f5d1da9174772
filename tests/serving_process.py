"""Servers as processes of their own on loopback, and whether there can be any here."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import requests

from glimpseprune.commands.serve import NEEDED

STARTS_WITHIN = 300.0  # seconds; a busy machine loads slowly
ENDS_WITHIN = 120.0


def needs_serving() -> None:
    """Skip a module where the server cannot be started."""
    if find_spec("transformers.cli") is None:
        pytest.skip("transformers 4.57 has no such server", allow_module_level=True)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        why = f"serving needs {', '.join(missing)}: pip install '.[serve]'"
        pytest.skip(why, allow_module_level=True)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def running(command: list[str], port: int, log: Path, path: str = "/health") -> Iterator[str]:
    """The address of a server while it runs; it ends as by Ctrl-C, with exit code 0.

    Args:
        command: arguments of python that start it.
        log: file for what it prints.
        path: answered once the server is there.
    """
    address = f"http://127.0.0.1:{port}"
    variables = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command], env=variables, stdout=file, stderr=file
        )
    try:
        wait_for(address + path, process, log)
        yield address
        process.send_signal(signal.SIGINT)
        assert process.wait(ENDS_WITHIN) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    """Wait until a server answers at an address.

    Raises:
        RuntimeError: with what it printed, when it ends or does not come up.
    """
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(address, timeout=5).ok:
                return
        except (requests.ConnectionError, requests.Timeout):
            time.sleep(0.1)
    raise RuntimeError(f"the server did not come up:\n{log.read_text()}")
