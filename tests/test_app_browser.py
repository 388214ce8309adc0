"""The page in a real browser: a person with a keyboard, on a telephone, and nobody else listening."""

import http.client
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from PIL import Image

from dermnb.core import read_json, write_json
from dermnb.serve.examples import EXAMPLE_CLASSES, example_bundle, example_images

pytest.importorskip("streamlit")
api = pytest.importorskip("playwright.sync_api")
BROWSER = (
    shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")

# What reaches over the right edge, but for what scrolls inside a box of its own.
WIDE = """() => [...document.querySelectorAll('[data-testid=stMain] *')].filter(e => {
    if (e.getBoundingClientRect().right <= innerWidth + 1) return false;
    for (let up = e.parentElement; up.dataset.testid != 'stMain'; up = up.parentElement)
        if (getComputedStyle(up).overflowX != 'visible') return false;
    return true;
}).map(e => e.outerHTML.slice(0, 99))"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    "Where `serve` runs."
    run, _ = example_bundle(tmp_path_factory.mktemp("runs"))
    path = run / "model" / "decision.json"
    write_json(path, read_json(path) | {"min_confidence": 0.0})
    (run / "model" / "novelty.npz").unlink()
    port = free_port()
    code = f"import sys; from dermnb.serve.app import serve; sys.exit(serve({str(run)!r}, port={port}))"
    home = tmp_path_factory.mktemp("home")  # with no settings of Streamlit's in it
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=home, env=os.environ | {"HOME": str(home)}
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=5).read()
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    with pytest.raises(OSError):  # the server went with the command
        urllib.request.urlopen(url, timeout=5)


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox"]
        )
        yield found
        found.close()


def image(name="mole.jpg"):
    file = io.BytesIO()
    Image.fromarray(example_images(1, (160, 120))[0]).save(file, "JPEG")
    return {"name": name, "mimeType": "image/jpeg", "buffer": file.getvalue()}


def test_a_person_uploads_reads_and_moves_the_slider(browser, address):
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, accept_downloads=True
    )
    page, asked, complaints = context.new_page(), [], []
    page.set_default_timeout(60_000)
    page.on("request", lambda r: asked.append(r.url))
    page.on("websocket", lambda s: asked.append(s.url))
    page.on(
        "console", lambda m: complaints.append(m.text) if m.type == "error" else None
    )
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.goto(address)
    page.get_by_text("Research only, no diagnosis").wait_for()
    page.get_by_text("Trained on generated images", exact=True).wait_for()
    assert page.title() == "dermnb"

    upload = page.locator("input[type=file]")
    assert {".jpg", ".jpeg", ".png"} < set(upload.get_attribute("accept").split(","))
    long = "a_very_long_name_without_any_space_" * 4
    upload.set_input_files(image(f"{long}.jpg"))
    page.get_by_text("Image with map (PNG)").wait_for()
    answer = page.get_by_role("heading", level=3).first.inner_text()
    assert answer in EXAMPLE_CLASSES.values()
    assert page.get_by_text("Confidence").first.is_visible()
    assert page.get_by_role("progressbar").count() == 3

    overlay = page.get_by_alt_text(f"map for {answer}")
    before = overlay.get_attribute("src")
    slider = page.get_by_role("slider", name="Opacity of the map")
    assert slider.input_value() == "50"
    slider.focus()
    start = time.perf_counter()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "([alt, src]) => document.querySelector(`img[alt*='${alt}']`)?.src.endsWith(src) === false",
        arg=[f"map for {answer}", before],
    )
    assert time.perf_counter() - start < 10
    assert slider.input_value() == "55"

    page.get_by_text("About this network").click()
    page.get_by_text("Training data and split").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    wide = page.evaluate(WIDE)
    assert not wide, wide

    with page.expect_download() as download:
        page.get_by_role("button", name="Image with map (PNG)").click()
    with Image.open(download.value.path()) as saved:
        assert saved.size == (448, 448) and not saved.info and not saved.getexif()

    # A file that is none, beside the first: the page lives and says so.
    upload.set_input_files(
        {"name": "notes.png", "mimeType": "image/png", "buffer": b"no image"}
    )
    page.get_by_text("2 images: 1 predicted and 1 not read.").wait_for()
    # One that the page does not take at all.
    upload.set_input_files(
        {"name": "notes.pdf", "mimeType": "application/pdf", "buffer": b"%PDF"}
    )
    page.get_by_text("application/pdf files are not allowed").wait_for()

    hosts = {
        url.split("/")[2] for url in asked if not url.startswith(("data:", "blob:"))
    }
    assert hosts == {address.split("/")[2]}, hosts
    assert not complaints, complaints
    context.close()


def test_other_pages_cannot_use_it(address):
    "No upload without the token, no answer under another name than this machine's."
    request = urllib.request.Request(
        f"{address}/_stcore/upload_file/x/y", b"data", method="PUT"
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 403
    here = address.removeprefix("http://")
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
    }
    headers |= {
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
        "Sec-WebSocket-Protocol": "streamlit",
    }
    for host, status in ((here, 101), (here.replace("127.0.0.1", "evil.example"), 403)):
        connection = http.client.HTTPConnection(here, timeout=10)
        connection.request("GET", "/_stcore/stream", headers=headers | {"Host": host})
        assert connection.getresponse().status == status
        connection.close()
