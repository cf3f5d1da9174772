"""The page of `glimpseprune demo`, laid out with Gradio: the only file that knows of it."""

import logging
import socket
from collections.abc import Callable
from threading import Lock

import gradio as gr
import uvicorn
from fastapi import FastAPI
from PIL import Image
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..commands.ask import SAMPLE_QUESTION
from ..package_files import SAMPLE_PAGE
from .session import Session, Settings, Visitor
from .words import Shown, redrawn, shown, trouble_of

logger = logging.getLogger(__name__)
HOUR = 3600  # seconds after which what nobody uses is forgotten
SESSIONS = 16  # kept at once: each holds what was seen of an image
LARGEST_FILE = "64mb"
OWN_CONTENT = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
STYLE = """
#trouble:not(:has(.part > *)) { display: none; }
#whole:not(:has(.part > *)) { display: none; }
#earlier:not(:has(.part > *)) { display: none; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
.pictures figure { flex: 1 1 12rem; min-width: 0; margin: 0; }
.pictures img { width: 100%; height: auto; }
.question { font-style: italic; overflow-wrap: anywhere; }
.answer { font-size: 1.5rem; font-weight: bold; overflow-wrap: anywhere; }
#trouble p { border-left: 0.3rem solid #c00; padding-left: 0.6rem; font-weight: bold; }
"""
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])


class OwnContentOnly:
    """Middleware that has browsers load nothing from other hosts."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", OWN_CONTENT.encode())
                message = message | {"headers": [*message["headers"], policy]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def build(open_session: Callable[[], Session], name: str) -> gr.Blocks:
    """The page, which `PageServer` serves.

    Args:
        open_session: makes the session of a person who comes to the page.
        name: of the model.
    """
    model_config = open_session().model.config
    first = Settings.of_model(model_config)
    with gr.Blocks(
        title="GlimpsePrune", analytics_enabled=False, delete_cache=(HOUR, HOUR)
    ) as page:
        visitor = gr.State(Visitor(), time_to_live=HOUR)
        gr.Markdown(
            f"# GlimpsePrune\n`{name}` glimpses at an image and goes on with the visual tokens "
            "that a question needs. Each question is asked by itself, over one look at the image."
        )
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    label="Image", sources=["upload", "clipboard"], height=300, format="png"
                )
                image.preprocess = _file_of  # read where errors become sentences
                sample = gr.Button("Take the sample page", size="sm")
                question = gr.Textbox(label="Question", lines=1, max_lines=1, elem_id="question")
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", min_width=100)
                    whole = gr.Button("Compare with all tokens", min_width=100)
                parts = _parts("trouble", "answer", "whole", "earlier")
            with gr.Column():
                sliders = _sliders(first, model_config)
                parts |= _parts("kept", "pictures")
        _connect(open_session, visitor, image, question, sliders, parts, ask, whole)
        sample.click(
            lambda: (Image.open(SAMPLE_PAGE), SAMPLE_QUESTION),
            outputs=[image, question],
            queue=False,
            api_visibility="private",
        )
    return page


class PageServer(uvicorn.Server):
    """Serves a page. It listens from when it is made, and answers once it runs.

    Gradio's own `launch` asks the page for itself, by way of proxies, and where that fails it asks
    for a public link.

    Raises:
        OSError: when the address cannot be had.
    """

    def __init__(self, page: gr.Blocks, host: str, port: int):
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self.listener = socket.create_server((host, port), family=family)
        except OSError as error:
            raise OSError(
                f"cannot listen at {host}, port {port}: choose another --host or --port ({error})"
            ) from error
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        page.state_session_capacity = SESSIONS
        app = gr.mount_gradio_app(
            FastAPI(middleware=[Middleware(OwnContentOnly)]),
            page,
            path="/",
            server_name=host,
            server_port=port,
            footer_links=[],
            max_file_size=LARGEST_FILE,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            show_error=False,
            theme=THEME,
            css=STYLE,
        )
        # At the end it does not wait for open pages, and does not call that an error.
        options = {"log_level": "critical", "timeout_graceful_shutdown": 1}
        super().__init__(uvicorn.Config(app, **options))

    def run(self) -> None:
        """Answer, until a signal comes or `should_exit` is set."""
        super().run(sockets=[self.listener])


def _file_of(sent) -> str | None:
    """The path of a file that was sent."""
    return None if sent is None else sent.path


def _parts(*names: str) -> dict[str, gr.HTML]:
    """Parts of the page that show what `Shown` says."""
    return {name: gr.HTML(elem_id=name, elem_classes="part", padding=False) for name in names}


def _sliders(first: Settings, model_config) -> list[gr.Slider]:
    """Threshold, cap and prune layer."""
    threshold = gr.Slider(
        0, 1, first.prune_threshold, step=0.001, label="Threshold", elem_id="threshold",
        info="Tokens that score above it are kept",
    )  # fmt: skip
    cap = gr.Slider(
        0.01, 1, first.max_keep_ratio, step=0.01, label="Cap", elem_id="cap",
        info="The largest share of the tokens that is kept; 1 is no cap",
    )  # fmt: skip
    layer = gr.Slider(
        0, max(1, model_config.glimpse_layer), first.prune_layer, step=1, label="Prune layer",
        info="Where tokens are dropped; counts from the next question on", elem_id="layer",
        interactive=model_config.glimpse_layer > 0,
    )  # fmt: skip
    return [threshold, cap, layer]


def _connect(
    open_session: Callable[[], Session],
    visitor: gr.State,
    image: gr.Image,
    question: gr.Textbox,
    sliders: list[gr.Slider],
    parts: dict[str, gr.HTML],
    ask: gr.Button,
    whole: gr.Button,
) -> None:
    """Say what happens when something is pressed or moved.

    Each request is answered by its own response. By way of Gradio's queue the answers of a page
    come over one stream, which closes when none is waited for; an answer that is asked for in that
    moment is lost, and the page waits for ever.
    """

    model_in_use = Lock()

    def step(do: Callable[..., object]) -> Callable[..., tuple]:
        """Do something with the session, and show it; what goes wrong becomes a sentence."""

        def run(visitor: Visitor, path: str | None, *values: object) -> tuple:
            *given, threshold, cap, layer = values
            settings, said = Settings(threshold, cap, int(layer)), ""
            with model_in_use:
                try:
                    do(visitor.session_at(path, open_session), settings, *given)
                except Exception as error:
                    if not isinstance(error, (ValueError, OSError)):
                        logger.exception("an error that the page shows in a sentence")
                    said = trouble_of(error)
                return visitor, *shown(visitor.session, settings, said)

        return run

    def nothing_more(current: Session, settings: Settings) -> None:
        """The session shows the page's image whatever is done."""

    def answer(current: Session, settings: Settings, text: str) -> None:
        current.ask(text, settings)

    def compare(current: Session, settings: Settings) -> None:
        current.ask_whole()

    def redraw(visitor: Visitor, *values: float) -> tuple[str, str]:
        return redrawn(visitor.session or open_session(), Settings(*values))

    outputs = [visitor, *(parts[name] for name in Shown._fields)]
    by_itself = {"queue": False, "api_visibility": "private"}
    image.change(step(nothing_more), [visitor, image, *sliders], outputs, **by_itself)
    gr.on(
        [ask.click, question.submit],
        step(answer),
        [visitor, image, question, *sliders],
        outputs,
        **by_itself,
    )
    whole.click(step(compare), [visitor, image, *sliders], outputs, **by_itself)
    for slider in sliders:
        slider.change(
            redraw,
            [visitor, *sliders],
            [parts["kept"], parts["pictures"]],
            show_progress="hidden",
            trigger_mode="always_last",
            **by_itself,
        )
