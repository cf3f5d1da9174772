"""`glimpseprune serve`: answer over HTTP as OpenAI's chat completions do."""

import argparse
from importlib.util import find_spec
from pathlib import Path

LOCALHOST = "127.0.0.1"
NEEDED = ("fastapi", "openai", "pydantic", "uvicorn")
MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "repository", nargs="?", help="folder or Hub repository (default: the tiny model)"
    )
    parser.add_argument("--name", help="the model's name in requests (default: the repository)")
    parser.add_argument(
        "--host", default=LOCALHOST, help="address to listen at; others than %(default)s are open"
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="auto", help="default: a GPU if there is one")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--allow-local-files",
        type=Path,
        metavar="FOLDER",
        help="requests may name image files in it (default: local files are refused)",
    )
    parser.add_argument(
        "--prefix-memory",
        type=int,
        default=2048,
        metavar="MIB",
        help="memory for what was seen of images, on the model's device; 0 looks anew each time",
    )


def run(arguments: argparse.Namespace) -> int:
    check_installed()
    folder = arguments.allow_local_files
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--allow-local-files must name a folder, and {folder} is none")
    if arguments.prefix_memory < 0:
        raise ValueError(f"--prefix-memory must not be negative, got {arguments.prefix_memory}")

    from ..loading import tiny_repository
    from ..serving.image_reader import ImageReader
    from ..serving.prefix_store import PrefixStore
    from ..serving.stock_server import serve

    repository = arguments.repository or str(tiny_repository())
    name = arguments.name or repository
    print(f"{name} at http://{arguments.host}:{arguments.port}/v1, one request after the other")
    try:
        serve(
            repository,
            name,
            ImageReader(folder),
            PrefixStore(arguments.prefix_memory * MIB),
            host=arguments.host,
            port=arguments.port,
            device=arguments.device,
            dtype=arguments.dtype,
        )
    except KeyboardInterrupt:
        print("ended")
    return 0


def check_installed() -> None:
    """See whether there is a server to start.

    Raises:
        ValueError: saying what to install.
    """
    if find_spec("transformers.cli") is None:
        import transformers

        raise ValueError(
            "serve starts the server of transformers 5, and installed is transformers "
            f"{transformers.__version__}: pip install 'glimpseprune[serve]'"
        )
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"serve needs {', '.join(missing)}: pip install 'glimpseprune[serve]'")
