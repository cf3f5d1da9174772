"""A stub of OpenAI's chat interface on loopback, which misbehaves as told."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JudgeServer(ThreadingHTTPServer):
    """Replies `reply(message)` to every message, after the misbehaviour planned for it.

    Attributes:
        plan: for each of the first requests, a status to answer with, or seconds to be silent.
        requests: headers and body of all requests.
    """

    daemon_threads = True

    def __init__(self, reply: Callable[[str], str], plan: list[int | float] | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.plan, self.requests = reply, list(plan or []), []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        status = 200
        if self.server.plan:
            planned = self.server.plan.pop(0)
            if isinstance(planned, float):
                time.sleep(planned)
                return
            status = planned
        message = self.server.reply(body["messages"][0]["content"])
        if status != 200:
            message = f"told to fail; you sent {self.headers['Authorization']}"
        content = json.dumps({"choices": [{"message": {"content": message}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextmanager
def judge_server(reply: Callable[[str], str], plan: list[int | float] | None = None):
    """A running server."""
    server = JudgeServer(reply, plan)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
