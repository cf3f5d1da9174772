"""Fresh processes of python that need not import torch again.

One server a test process imports torch and torchvision, and nothing that depends on the environment
or on a release of transformers. Each fresh process is forked from it, so that it starts in a tenth
of a second instead of several; whatever else it needs it imports by itself, from the folders and
under the variables that are given here. This file is the server when it is run.
"""

import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
import types
from functools import cache
from pathlib import Path

_server: subprocess.Popen | None = None


def run_fresh(
    *arguments: object, cwd: Path, env: dict[str, str], timeout: float = 300
) -> subprocess.CompletedProcess:
    """Run python as `subprocess.run([sys.executable, *arguments], ...)` would, text captured.

    Args:
        arguments: `-c` and code, `-m` and a module, or a script; and what follows.
        cwd: where it is started.
        env: all of its variables.
        timeout: seconds.

    Raises:
        subprocess.TimeoutExpired: when it takes longer.
    """
    global _server
    command = [str(each) for each in arguments]
    if _server is None or _server.poll() is not None:
        _server = _start_server()
    with tempfile.TemporaryDirectory() as folder:
        streams = [os.path.join(folder, name) for name in ("out", "err")]
        task = {"command": command, "cwd": str(cwd), "env": dict(env), "streams": streams}
        _server.stdin.write(json.dumps(task) + "\n")
        _server.stdin.flush()
        if not select.select([_server.stdout], [], [], timeout)[0]:
            os.killpg(_server.pid, 9)
            _server.wait()
            raise subprocess.TimeoutExpired(command, timeout)
        code = json.loads(_server.stdout.readline())
        out, err = (Path(stream).read_text() for stream in streams)
    return subprocess.CompletedProcess(command, code, out, err)


@cache
def _plain_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _start_server() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__],
        env=_plain_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _next_fork() -> dict:
    """Serve, and return in each fork the task that it is there for."""
    for line in iter(sys.stdin.readline, ""):
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def _become(task: dict) -> list[str]:
    """Take over a task's streams, folder, variables and search path; return its command."""
    for number, name in enumerate([os.devnull, *task["streams"]]):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        file = os.open(name, flags)
        os.dup2(file, number)
        os.close(file)
    os.chdir(task["cwd"])
    os.environ.clear()
    os.environ.update(task["env"])
    first, *rest = task["command"]
    place = {"-c": "", "-m": task["cwd"]}.get(first, os.path.dirname(os.path.abspath(first)))
    given = [path for path in task["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [place, *given, *sys.path[1:]]
    sys.path_importer_cache.clear()
    return [first, *rest]


def _run(first: str, *rest: str) -> None:
    """Run code, a module or a script as the main one, with its arguments."""
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv = [*rest]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    _run(*_become(_next_fork()))
