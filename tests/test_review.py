"""Pairs that a person judges: asked on a page of this machine, kept line by line, honored by splits, told by reports."""

import http.client
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest
from PIL import Image

from dermnb.audit.duplicates import Audit, group_duplicates
from dermnb.audit.leakage import audit_record, audit_split, judged_record
from dermnb.audit.review import Review, append_verdict, pairs_to_judge
from dermnb.core import ConfigError, make_config
from dermnb.data.datasets import inspect_dataset, load_dataset
from dermnb.data.splits import make_split
from dermnb.data.synthetic import draw_lesion, render_view
from dermnb.data.tables import read_judged
from dermnb.report.leakage import leakage_audit_blocks
from dermnb.report.sections import Page

HEADER = "image_a,image_b,verdict,judged_at,reader\n"


@pytest.fixture
def folder(tmp_path):
    "A dataset of eight images, 0 to 7; the first is stored on its side."
    data = tmp_path / "clinic"
    data.mkdir()
    for k in range(8):
        image = Image.fromarray(render_view(draw_lesion(3, k), 0, (120, 80))[0])
        exif = image.getexif()
        if k == 0:
            exif[0x0112] = 6  # the right side is up
        image.save(data / f"{k}.jpg", exif=exif)
    rows = "".join(f"{k},{'nv' if k % 2 else 'mel'}\n" for k in range(8))
    (data / "list.csv").write_text("image_id,label\n" + rows)
    return data


def audit_of(*candidates, pairs=()):
    "An audit that found these pairs, and left those candidates open."
    tables = [pd.DataFrame(list(t), columns=["a", "b"], dtype=object) for t in (pairs, candidates)]
    found = tables[0].assign(kind="same lesion", bits=20, agreement=0.7)
    return Audit("hashes", found, 8, 0, candidates=tables[1])


class Visitor:
    "A review that runs, and raw requests to it."

    def __init__(self, folder, audit, reader=""):
        self.file = folder / "pairs.csv"
        dataset = inspect_dataset("csv", folder, verify=False)
        pairs = pairs_to_judge(dataset.manifest, audit, dataset.judged)
        self.review = Review(dataset.manifest, pairs, self.file, reader)
        self.host = f"127.0.0.1:{self.review.server_port}"
        threading.Thread(target=self.review.serve_forever, args=(0.02,), daemon=True).start()

    def ask(self, what="", said=None, token=None, **headers):
        wire = http.client.HTTPConnection(self.host, timeout=10)
        body = said if said is None or isinstance(said, str) else json.dumps(said)
        form = {"Content-Type": "application/json"} if body else {}
        path = f"/{self.review.token if token is None else token}/{what}"
        wire.request("POST" if body else "GET", path, body, {"Host": self.host} | form | headers)
        answer = wire.getresponse()
        data = answer.read()
        wire.close()
        found = json.loads(data) if answer.headers["Content-Type"] == "application/json" else data
        return answer.status, found, answer.headers

    def judge(self, k, verdict):
        status, found, _ = self.ask("verdict", {"pair": k, "verdict": verdict})
        assert status == 200, found
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.review.shutdown()
        self.review.server_close()


AUDIT = audit_of(("0", "1"), ("2", "3"), ("1", "2"), ("0", "2"), pairs=[("6", "7")])


def test_verdicts_are_lines_at_once_and_a_restart_resumes(folder):
    with Visitor(folder, AUDIT, "KL") as page:
        _, state, _ = page.ask("state")
        assert state["verdicts"] == [None] * 4 and not page.file.exists()  # 6 and 7 are grouped
        assert page.judge(2, "same") == {"conflict": "", "pairs": []}
        page.judge(0, "unsure")
        page.judge(0, "same")
        lines = page.file.read_text().splitlines(keepends=True)
        assert lines[0] == HEADER
        line = r"1,2,same,\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00,KL\n"
        assert re.fullmatch(line, lines[1]) and len(lines) == 4
    with Visitor(folder, AUDIT, "KL") as page:
        assert page.ask("state")[1]["verdicts"] == ["same", "same", None, None]
        assert [page.ask(f"pair/{k}")[1]["b"] for k in range(4)] == ["2", "1", "3", "2"]
        found = page.judge(3, "different")  # of 0 and 2, which are the same through 1
        assert found["conflict"].startswith("0 and 2 were judged different, but the same through")
        assert [k for k, _ in found["pairs"]] == [3, 1, 0]
        assert page.judge(3, "unsure") == {"conflict": "", "pairs": []}
    with Visitor(folder, AUDIT, "MN") as page:  # a second reader has said nothing yet
        assert page.ask("state")[1]["verdicts"] == [None] * 4
        page.judge(0, "different")
    judged = read_judged(folder / "pairs.csv")
    assert (judged.readers, judged.disagreed, judged.counts["same"]) == (2, 1, 1)


def test_nobody_else_is_answered(folder):
    with Visitor(folder, AUDIT) as page:
        verdict = {"pair": 0, "verdict": "same"}
        host, port = page.host.split(":")
        assert page.review.server_address == (host, int(port)) == ("127.0.0.1", int(port))
        refused = {
            403: [
                page.ask("state", Host=f"evil.example:{port}"),  # DNS rebinding
                page.ask("state", Host="127.0.0.1"),
                page.ask("verdict", verdict, Origin="http://evil.example"),
                page.ask("verdict", verdict, Origin="null"),
            ],
            404: [
                page.ask("state", token="wrong"),
                page.ask("verdict", verdict, token=""),
                page.ask("../../etc/passwd"),
                page.ask("image/0/..%2f..%2fpairs.csv"),
                page.ask("image//etc/passwd"),
                page.ask("image/4/a"),
                page.ask("pair/-1"),
            ],
            400: [
                page.ask("verdict", {"pair": 4, "verdict": "same"}),
                page.ask("verdict", {"pair": "0", "verdict": "same"}),
                page.ask("verdict", {"pair": True, "verdict": "same"}),
                page.ask("verdict", "{"),
                page.ask("verdict", "[1]"),
                page.ask("verdict", json.dumps(verdict), **{"Content-Type": "text/plain"}),
                page.ask("state", verdict),
            ],
            409: [page.ask("verdict", {"pair": 0, "verdict": "sane"})],
        }
        for status, answers in refused.items():
            assert [(a[0], "error" in a[1]) for a in answers] == [(status, True)] * len(answers)
        assert not page.file.exists()
        status, html, headers = page.ask()
        policy = headers["Content-Security-Policy"]
        assert status == 200 and "default-src 'none'" in policy and "unsafe" not in policy
        assert headers["Cache-Control"] == "no-store"
        assert b"NONCE" not in html and b"http://" not in html.replace(b"http://www.w3.org", b"")


def test_thumbnails_are_upright_and_what_cannot_be_read_is_said(folder):
    with Visitor(folder, AUDIT) as page:
        _, data, headers = page.ask("image/0/a")
        image = Image.open(io.BytesIO(data))
        assert image.size == (80, 120) and headers["Content-Type"] == "image/jpeg" and not image.getexif()
        (folder / "3.jpg").write_bytes(b"\xff\xd8\xff")
        status, found, _ = page.ask("image/1/b")
        assert status == 409 and "3.jpg" in found["error"]


def test_a_line_that_cannot_be_written_is_taken_back(folder, monkeypatch):
    file = folder / "pairs.csv"
    file.write_text("verdict,image_b,image_a\nsame,1,0")  # by hand, without a last newline
    append_verdict(file, "2", "3", "different", "KL")
    before = file.read_bytes()
    assert before == b"verdict,image_b,image_a\nsame,1,0\ndifferent,3,2\n"
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match="No space left"):
        append_verdict(file, "4", "5", "same")
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("image_a,image_b\n0,1\n", "verdict"),
        (HEADER, "no rows"),
        (HEADER + "0,1,sane,,\n", "did you mean 'same'"),
        (HEADER + "0,0,same,,\n", "two images"),
        (HEADER + "0,1,same,,\n0,", "ends within a row"),
        (HEADER + "0,1,same,,\n1,2,same,,\n0,2,different,,\n", "0 and 1, 1 and 2"),
        ("image_a;image_b;verdict\n0;1;same\n", None),  # read; but not appended to
    ],
)
def test_a_broken_file_is_one_sentence(folder, text, told):
    (folder / "pairs.csv").write_text(text)
    if told is None:
        assert load_dataset("csv", folder).judged.counts["same"] == 1
        told = "commas"
    else:
        with pytest.raises(ConfigError, match=told):
            load_dataset("csv", folder)
    if "0,2" in text:  # verdicts that clash are mended on the page
        with Visitor(folder, AUDIT) as page:
            assert told in page.ask("state")[1]["conflict"]
        return
    with pytest.raises(ConfigError, match=told):
        Visitor(folder, AUDIT)


def test_splits_honor_verdicts_and_reports_name_them(folder):
    (folder / "pairs.csv").write_text(
        HEADER + "0,1,same,,KL\n2,1,same,,KL\n3,4,different,,KL\n5,6,unsure,,KL\n7,x,same,,KL\n"
    )
    dataset = load_dataset("csv", folder)
    assert "pairs" in dict(dataset.account.found) and "pairs.csv" not in str(dataset.account.not_used)
    # 3 is like 4, and both like 5: a reader said that 3 and 4 are two
    audit = audit_of(pairs=[("3", "4"), ("3", "5"), ("4", "5")])
    unread, _ = group_duplicates(dataset.manifest, audit.pairs)
    assert unread["lesion_id"].fillna("").tolist() == ["", "", "", *["found:3"] * 3, "", ""]
    manifest, pairs = group_duplicates(dataset.manifest, audit.pairs, dataset.judged)
    assert manifest["lesion_id"].fillna("").tolist() == [*["found:0"] * 3, "found:3", "", "found:3", "", ""]
    for seed in range(5):
        config = make_config({"split_seed": seed, "val_fraction": 0.3, "test_fraction": 0.3})
        split = make_split(manifest, config)
        assert split["split"][:3].nunique() == 1
        assert not (audit_split(split, pairs)["finding"] == "across parts").any()
    torn = manifest.assign(split=["train", "test"] * 4, lesion_id=None)
    assert "judged same" in set(audit_split(torn, pairs)["kind"])
    audit = Audit("hashes", audit.pairs, 8, 0, judged=judged_record(dataset.judged, manifest))
    record = audit_record(audit, pairs, audit_split(split, pairs))
    assert (record["pairs"]["judged same"], record["judged"]["absent"]) == (2, 1)
    (text, *_) = leakage_audit_blocks(Page([]), [{"runs": [], "record": record, "named": False}])
    judged = f"5 pairs were judged by one reader (pairs.csv, SHA-256 {dataset.judged.digest[:12]}): "
    assert judged + "3 the same lesion, 1 different, 1 unsure. 1 of them names images" in text.text


def test_the_command_serves_until_it_is_interrupted(folder):
    command = [sys.executable, "-m", "dermnb.cli", "audit", f"csv={folder}", "--review", "--reader", "KL"]
    shutil.copy(folder / "1.jpg", folder / "9.jpg")
    with Image.open(folder / "1.jpg") as image:  # alike, but not enough to be grouped
        image.rotate(31).save(folder / "8.jpg")
    (folder / "list.csv").write_text((folder / "list.csv").read_text() + "8,nv\n")
    (folder / "pairs.csv").write_text(HEADER + "0,1,different,,KL\n")
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        told, url = process.stdout.readline(), process.stdout.readline().strip()
        assert "Ctrl-C ends" in told
        wire = http.client.HTTPConnection(url.split("/")[2], timeout=10)
        form = {"Content-Type": "application/json"}
        wire.request("POST", f"/{url.split('/')[3]}/verdict", '{"pair": 0, "verdict": "same"}', form)
        assert wire.getresponse().status == 200
    finally:
        process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0].startswith("1 judged in pairs.csv: 1 same") and process.returncode == 0


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
def test_a_person_judges_by_keyboard(folder):
    api = pytest.importorskip("playwright.sync_api")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    audit = audit_of(("0", "1"), ("2", "3"))
    turn = [[0.0, -1.0, 0.7, 1.0, 0.0, 0.0], None]
    audit = Audit("hashes", audit.pairs, 8, 0, candidates=audit.candidates.assign(affine=turn))
    with Visitor(folder, audit) as visitor, api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page, asked, said = browser.new_page(), [], []
        page.on("request", lambda r: asked.append(r.url))
        page.on("console", lambda m: said.append(m.text))
        page.goto(visitor.review.url)

        def until(what):
            for _ in range(200):
                if page.evaluate(what):
                    return
                time.sleep(0.02)
            raise AssertionError(what)

        until("seen && verdicts.length === 2")
        assert page.locator("#top").get_attribute("transform") == "matrix(0 1 -1 0 700 0)"
        for width in (1200, 400):
            for scheme in ("light", "dark"):
                page.set_viewport_size({"width": width, "height": 800})
                page.emulate_media(color_scheme=scheme)
                found = axe.run(page).response["violations"]
                assert not [v["id"] for v in found if v["impact"] in ("serious", "critical")]
                assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.keyboard.press("b")
        page.keyboard.press("s")
        until("at === 1 && seen")
        assert page.locator("#a").get_attribute("alt") == "Image A, 2"
        page.keyboard.press("ArrowLeft")
        until("at === 0 && seen")
        assert page.locator("[aria-pressed=true][data-verdict]").inner_text().startswith("Same")
        page.uncheck("#keys")
        page.keyboard.press("d")
        page.get_by_role("button", name="Unsure").click()
        until("at === 1 && seen")
        page.get_by_role("button", name="Different").click()
        until("verdicts[1] === 'different'")
        assert "All pairs are judged" in page.locator("#told").inner_text()
        browser.close()
    counts = read_judged(folder / "pairs.csv").counts
    assert counts == {"same": 0, "different": 1, "unsure": 1} and not said
    assert {u.split("/")[2] for u in asked if not u.startswith("data:")} == {visitor.host}
