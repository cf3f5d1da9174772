"""`glimpseprune demo`: ask about an image in the browser, and see which tokens are kept."""

import argparse
from importlib.util import find_spec

LOCALHOST = "127.0.0.1"
QUIET = {  # what Gradio is told before it is imported
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "repository", nargs="?", help="folder or Hub repository (default: the tiny model)"
    )
    parser.add_argument(
        "--host", default=LOCALHOST, help="address to listen at; others than %(default)s are open"
    )
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--max-pixels", type=int, help="larger images are refused")


def run(arguments: argparse.Namespace) -> int:
    import os
    import signal
    from tempfile import TemporaryDirectory

    check_installed()
    for name in ("max_new_tokens", "max_pixels"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    open_session = sessions_of(arguments)
    os.environ |= QUIET
    for ending in (signal.SIGINT, signal.SIGTERM):  # either way what was sent is removed
        signal.signal(ending, signal.default_int_handler)
    with TemporaryDirectory(prefix="glimpseprune-demo-") as sent:
        os.environ["GRADIO_TEMP_DIR"] = sent
        from ..demo.page import PageServer, build

        name = arguments.repository or "the tiny model"
        server = PageServer(build(open_session, name), arguments.host, arguments.port)
        print(f"{name} at {server.address} (ends with Ctrl-C)", flush=True)
        try:
            server.run()
        except KeyboardInterrupt:
            print("ended")
    return 0


def sessions_of(arguments: argparse.Namespace):
    """What makes a session with the model, which has answered a question of its own by then."""
    from functools import partial

    from ..demo.session import MOST_PIXELS, Session, Settings
    from ..loading import load_model
    from ..package_files import SAMPLE_PAGE

    model, processor = load_model(arguments.repository, arguments.device, arguments.dtype)
    trial = Session(model, processor, max_new_tokens=1)
    trial.show(SAMPLE_PAGE.read_bytes())
    trial.ask("?", Settings.of_model(model.config))
    largest = arguments.max_pixels or MOST_PIXELS
    return partial(Session, model, processor, arguments.max_new_tokens, largest)


def check_installed() -> None:
    """See whether there is a page to open.

    Raises:
        ValueError: saying what to install.
    """
    if find_spec("gradio") is None:
        raise ValueError("demo needs gradio: pip install 'glimpseprune[demo]'")
