"""`glimpseprune demo` in a browser: what a person presses, types and reads.

Skips where there is no Gradio, no playwright or no Chromium. The server runs in this process, so
that the tests can count what the model is asked to do; one test starts the command itself.
"""

import os
import re
import shutil
import socket
from functools import partial, partialmethod
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest
import requests
from PIL import Image
from serving_process import free_port, running

from glimpseprune.commands.ask import SAMPLE_QUESTION
from glimpseprune.commands.demo import LOCALHOST, QUIET
from glimpseprune.demo.session import NO_ANSWER, NO_IMAGE, NO_QUESTION, Session
from glimpseprune.loading import load_model
from glimpseprune.package_files import SAMPLE_PAGE, TINY_MODEL

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
if BROWSER is None:
    pytest.skip("there is no browser: apt-get install chromium", allow_module_level=True)
for name in ("gradio", "playwright"):
    if find_spec(name) is None:
        why = f"the browser test needs {name}: pip install '.[demo]' playwright"
        pytest.skip(why, allow_module_level=True)
os.environ |= QUIET

from playwright.sync_api import (  # noqa: E402
    FileChooser,
    Locator,
    Page,
    TimeoutError,
    expect,
    sync_playwright,
)

from glimpseprune.demo.page import PageServer, build  # noqa: E402

DESKTOP, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}
MOST_PIXELS = 10**6
PATIENCE = 60_000  # milliseconds; a busy machine answers slowly
OTHER_QUESTION = "What is the value of YU?"  # 52 on the sample page
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY_MODEL)


@pytest.fixture(scope="module")
def all_runs(tiny):
    """What the model is asked to do, a word each time."""
    model, done = type(tiny[0]), []

    def noted(self, method, *args, **kwargs):
        done.append(method.__name__)
        return method(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("look", "generate"):
            patch.setattr(model, name, partialmethod(noted, getattr(model, name)))
        yield done


@pytest.fixture
def runs(all_runs):
    all_runs.clear()
    return all_runs


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """Hosts that this process connects to."""
    hosts, connect = [], socket.socket.connect

    def noted(self, address):
        if isinstance(address, tuple):
            hosts.append(address[0])
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", noted)
        yield hosts


@pytest.fixture(scope="module")
def address(tiny, all_runs, called, tmp_path_factory):
    """Where the page is open."""
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("sent"))
    page = build(partial(Session, *tiny, 8, MOST_PIXELS), "the tiny model")
    server = PageServer(page, LOCALHOST, free_port())
    thread = Thread(target=server.run)
    thread.start()
    yield server.address
    server.should_exit = True
    thread.join()
    assert set(called) <= {LOCALHOST, "localhost"}


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        options = {"executable_path": BROWSER, "args": ["--no-sandbox", "--disable-gpu"]}
        browser = playwright.chromium.launch(**options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Opens the page in a window of its own; it may load nothing from elsewhere, nor wait for
    what Gradio's queue may lose (see `page._connect`)."""
    contexts, asked = [], []

    def opened(window: dict = DESKTOP, **options) -> Page:
        context = browser.new_context(viewport=window, **options)
        context.set_default_timeout(PATIENCE)
        context.on("request", lambda request: asked.append(request.url))
        contexts.append(context)
        page = context.new_page()
        page.goto(address)
        expect(button(page, "Ask")).to_be_visible()
        expect(page.get_by_label("File upload")).to_be_attached()
        return page

    yield opened
    for context in contexts:
        context.close()
    hosts = {urlsplit(url).hostname for url in asked if url.startswith(("http", "ws"))}
    assert hosts <= {LOCALHOST}
    assert asked and not [url for url in asked if "/queue/" in url]


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def question(page: Page) -> Locator:
    return page.get_by_label("Question")


def slider(page: Page, name: str) -> Locator:
    return page.get_by_label(f"range slider for {name}")


def part(page: Page, name: str) -> Locator:
    return page.locator(f"#{name}")


def choose(page: Page, file: str | Path | dict) -> None:
    """Choose a file; a picture is waited for, as what is pressed meanwhile may be lost."""
    page.get_by_label("File upload").set_input_files(file)
    if file == SAMPLE_PAGE:
        expect(button(page, "Remove Image")).to_be_visible()


def ask(page: Page, text: str = SAMPLE_QUESTION) -> None:
    """Type a question, press the button, and wait for its answer."""
    question(page).fill(text)
    button(page, "Ask").click()
    expect(part(page, "answer").locator(".question")).to_have_text(text)


def kept(page: Page) -> int:
    counts = re.compile(r"(\d+) of 144 visual tokens")
    expect(part(page, "kept")).to_contain_text(counts)
    return int(counts.search(part(page, "kept").inner_text())[1])


def press_for_a_file(page: Page) -> FileChooser:
    """Press Enter until the browser asks for a file; at first the page may not be awake."""
    for _ in range(20):
        try:
            with page.expect_file_chooser(timeout=2000) as chooser:
                page.keyboard.press("Enter")
            return chooser.value
        except TimeoutError:
            continue
    raise AssertionError("Enter opens no file chooser")


def file_of(name: str, content: bytes, kind: str = "image/png") -> dict:
    return {"name": name, "mimeType": kind, "buffer": content}


def test_ask_compare_and_ask_again(open_page, runs):
    page = open_page()
    choose(page, SAMPLE_PAGE)
    ask(page)
    expect(part(page, "answer").locator(".answer")).to_have_text("577")
    expect(part(page, "answer")).to_contain_text(re.compile(r"\d+\.\d\d s, after a look of \d+\."))
    assert 0 < kept(page) < 20
    pictures = part(page, "pictures").locator("img")
    expect(pictures).to_have_count(2)
    assert pictures.evaluate_all("images => images.every(image => image.naturalWidth > 500)")
    button(page, "Compare with all tokens").click()
    expect(part(page, "whole").locator(".answer")).to_have_text("577")
    expect(part(page, "whole")).to_contain_text("With all 144 visual tokens, the same answer")
    assert runs == ["look", "generate", "generate"]
    ask(page, OTHER_QUESTION)
    expect(part(page, "answer").locator(".answer")).to_have_text("52")
    expect(part(page, "whole")).to_have_text("")  # it was of another question
    expect(part(page, "earlier")).to_contain_text(f"{SAMPLE_QUESTION} 577 (")
    assert runs == ["look", "generate", "generate", "generate"]


def test_sliders_draw_without_the_model(open_page, runs):
    page = open_page()
    choose(page, SAMPLE_PAGE)
    ask(page)
    at_first, picture = kept(page), part(page, "pictures").locator("img").first
    drawn, done = picture.get_attribute("src"), list(runs)
    slider(page, "Threshold").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    expect(part(page, "kept")).to_contain_text(f"the answer saw {at_first}.")
    assert 0 < kept(page) < at_first and picture.get_attribute("src") != drawn
    slider(page, "Threshold").press("Home")
    expect(part(page, "kept")).to_contain_text("144 of 144 visual tokens (100.0%)")
    slider(page, "Cap").press("Home")
    expect(part(page, "kept")).to_contain_text("1 of 144 visual tokens (0.7%)")
    slider(page, "Prune layer").press("Home")
    expect(part(page, "kept")).to_contain_text("Of prune layer 0 the scores at hand say nothing")
    expect(part(page, "answer").locator(".answer")).to_have_text("577")
    assert runs == done
    button(page, "Ask").click()
    expect(part(page, "answer")).to_contain_text("Threshold 0, cap 0.01, prune layer 0.")
    assert kept(page) == 1 and runs == [*done, "look", "generate"]


def test_what_is_wrong_is_said(open_page, runs):
    page = open_page()
    button(page, "Ask").click()
    expect(part(page, "trouble")).to_have_text(NO_IMAGE)
    button(page, "Compare with all tokens").click()
    expect(part(page, "trouble")).to_have_text(NO_ANSWER)
    choose(page, file_of("notes.txt", b"no image", "text/plain"))
    expect(page.get_by_text("Invalid file type: notes.txt")).to_be_visible()
    choose(page, file_of("damaged.png", b"no image"))
    expect(part(page, "trouble")).to_contain_text("Cannot read the image you chose: it is no image")
    large = BytesIO()
    Image.new("1", (2000, 1000)).save(large, "PNG")
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    choose(page, file_of("large.png", large.getvalue()))
    expect(part(page, "trouble")).to_contain_text("too large: 2000 x 1000 pixels")
    button(page, "Ask").click()
    expect(part(page, "trouble")).to_have_text(NO_IMAGE)
    button(page, "Take the sample page").click()
    expect(question(page)).to_have_value(SAMPLE_QUESTION)
    expect(part(page, "trouble")).to_have_text("")
    question(page).fill(" ")
    button(page, "Ask").click()
    expect(part(page, "trouble")).to_have_text(NO_QUESTION)
    assert runs == [] and "Traceback" not in page.content()
    ask(page)
    expect(part(page, "trouble")).to_have_text("")


def test_the_keyboard_is_enough(open_page):
    page = open_page()

    def tab_to(wanted: Locator) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if wanted.evaluate("element => element === document.activeElement"):
                return
        raise AssertionError(f"Tab does not reach {wanted}")

    tab_to(page.get_by_label("Drop an image file here to upload"))
    press_for_a_file(page).set_files(SAMPLE_PAGE)
    tab_to(question(page))
    page.keyboard.type(SAMPLE_QUESTION)
    page.keyboard.press("Enter")
    expect(part(page, "answer").locator(".answer")).to_have_text("577")
    at_first = kept(page)
    tab_to(slider(page, "Threshold"))
    page.keyboard.press("PageUp")
    expect(part(page, "kept")).to_contain_text(f"the answer saw {at_first}.")
    tab_to(button(page, "Compare with all tokens"))
    page.keyboard.press("Space")
    expect(part(page, "whole").locator(".answer")).to_have_text("577")


def test_a_phones_width_is_enough(open_page):
    page = open_page(PHONE, has_touch=True, is_mobile=True)
    button(page, "Take the sample page").tap()
    expect(question(page)).to_have_value(SAMPLE_QUESTION)
    button(page, "Ask").tap()
    expect(part(page, "answer").locator(".answer")).to_have_text("577")
    button(page, "Compare with all tokens").tap()
    expect(part(page, "whole").locator(".answer")).to_have_text("577")
    ask(page, "x" * 200)  # a word that cannot be broken
    expect(part(page, "pictures").locator("img")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    shown = page.locator("button:visible, input:visible, img:visible, p:visible")
    boxes = shown.evaluate_all(
        "all => all.map(each => each.getBoundingClientRect()).map(box => [box.left, box.right])"
    )
    assert all(0 <= left and right <= PHONE["width"] for left, right in boxes), boxes


def test_people_do_not_see_each_other_and_a_new_image_clears_the_page(open_page):
    page, other = open_page(), open_page()
    choose(page, SAMPLE_PAGE)
    choose(other, SAMPLE_PAGE)
    ask(page)
    ask(other, OTHER_QUESTION)
    expect(part(other, "answer").locator(".answer")).to_have_text("52")
    expect(part(other, "earlier")).to_have_text("")
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    for name in ("answer", "earlier", "kept", "pictures"):
        expect(part(page, name)).to_have_text("")
    button(other, "Compare with all tokens").click()
    expect(part(other, "whole")).to_contain_text("With all 144")


def test_what_people_write_stays_text(open_page):
    page = open_page()
    choose(page, SAMPLE_PAGE)
    text = "${1 + 1} {{value}} <img src=x onerror=alert(1)> `a` $b$"
    ask(page, text)
    expect(part(page, "answer").locator("img")).to_have_count(0)
    ask(page)
    expect(part(page, "earlier")).to_contain_text(text)
    expect(part(page, "earlier").locator("img")).to_have_count(0)


def test_the_screenshot_of_the_readme(open_page, request, tmp_path):
    """`--screenshot docs/demo.png` writes it there."""
    page = open_page()
    choose(page, SAMPLE_PAGE)
    ask(page, OTHER_QUESTION)
    ask(page)
    button(page, "Compare with all tokens").click()
    expect(part(page, "whole").locator(".answer")).to_have_text("577")
    expect(part(page, "earlier")).to_contain_text(OTHER_QUESTION)
    page.mouse.move(0, 0)
    picture = Image.open(BytesIO(page.screenshot(full_page=True))).convert("RGB")
    place = request.config.getoption("--screenshot") or tmp_path / "demo.png"
    picture.quantize(128, dither=Image.Dither.NONE).save(place, optimize=True)
    assert Path(place).stat().st_size < 200_000


def test_a_port_that_is_taken(address, tiny):
    page = build(partial(Session, *tiny), "the tiny model")
    with pytest.raises(OSError, match="cannot listen at 127.0.0.1, port .* another --host or --p"):
        PageServer(page, LOCALHOST, urlsplit(address).port)


def test_the_command_opens_a_page_here_alone(browser, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    port, log = free_port(), tmp_path / "log.txt"
    command = ["-m", "glimpseprune.cli", "demo", str(TINY_MODEL), "--port", str(port)]
    with running(command, port, log, "/") as address:
        headers = requests.get(address, timeout=30).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        page = browser.new_page()
        page.goto(address)
        choose(page, SAMPLE_PAGE)
        ask(page)
        expect(part(page, "answer").locator(".answer")).to_have_text("577")
        page.close()
        sent = list(tmp_path.glob("glimpseprune-demo-*/**/*.png"))
        assert sent  # Gradio keeps what is sent in files
        listening = Path("/proc/net/tcp").read_text() if Path("/proc/net/tcp").exists() else ""
        places = re.findall(rf" (\w+):{port:04X} \w+:0000 0A ", listening)
        assert not listening or places == ["0100007F"]  # 127.0.0.1
    assert f"{address} (ends with Ctrl-C)" in log.read_text() and "ended" in log.read_text()
    assert not list(tmp_path.glob("glimpseprune-demo-*"))
