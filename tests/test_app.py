"""The page, driven without a browser: what it says, what it withholds, and that it lives on."""

import io
import json
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from PIL import Image

pytest.importorskip("streamlit")
import streamlit as st
from starlette.formparsers import MultiPartParser
from streamlit.testing.v1 import AppTest

from dermnb.serve import app
from dermnb.core import ConfigError, read_json, write_json
from dermnb.serve.examples import EXAMPLE_CLASSES, example_bundle, example_ensemble, example_images
from dermnb.serve.predict import Predictor

HOSTILE = "<img src=x onerror=alert(1)> **b** $\\frac{1}{0}$ [a](http://x.example) :red[c]\u202e.jpg"


def with_decision(run, name, **values):
    "A copy of a run that decides otherwise, and finds nothing strange."
    copy = shutil.copytree(run, run.parent / name)
    path = copy / "model" / "decision.json"
    write_json(path, read_json(path) | values)
    for found in copy.rglob("novelty.npz"):
        found.unlink()
    return copy


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    one, two = example_bundle(folder, "one"), example_bundle(folder, "two", 24, 1, "concat")
    both, _ = example_ensemble(folder, [one, two], [0.5, 0.5])
    answers = {"min_confidence": 0.0}
    return SimpleNamespace(
        sure=with_decision(one[0], "sure", **answers),
        shy=with_decision(one[0], "shy", min_confidence=1.0),
        patient=with_decision(two[0], "patient", **answers),
        both=with_decision(both, "pair", **answers),
    )


def opened(model):
    script = f"from dermnb.serve.app import page\npage({str(model)!r})"
    page = AppTest.from_string(script, default_timeout=60).run()
    assert not page.exception
    return page


def upload(page, *files):
    "The page after it has been given (name, content) pairs, which replace those before."
    page.file_uploader[0].set_value(
        [(n, data, "image/jpeg") for n, data in files]
    ).run()
    assert not page.exception
    return page


def encoded(image, form="JPEG", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def photos():
    return [encoded(image) for image in example_images(6, (160, 120))]


def said(page, *types):
    types = types or (
        "header",
        "subheader",
        "caption",
        "markdown",
        "warning",
        "error",
        "progress",
    )
    found = []
    for x in page.main:
        if x.type == "progress":
            found += [x.proto.text] * (x.type in types)
        elif x.type in types:
            found.append(x.value)
    card = [i for i, text in enumerate(found) if "written by dermnb" in text]
    return found[: card[0]] if card else found


def results(page):
    return list(page.session_state["results"].values())


def test_the_empty_page_says_what_it_is(models):
    page = opened(models.sure)
    assert "no medical device" in page.info[0].value and "doctor" in page.info[0].value
    assert page.info[0].proto.title == "Research only, no diagnosis"
    assert "trained on generated images alone" in page.warning[0].value
    assert not page.header and not page.slider and not page.error
    assert page.file_uploader[0].proto.max_upload_size_mb == 50
    assert MultiPartParser.spool_max_size > 50 * 2**20  # no upload is spilled to disk
    assert any("## Intended use" in m.value for m in page.markdown)


def test_an_answer_has_class_confidence_bars_set_and_map(models, photos):
    page = upload(opened(models.sure), ("mole.jpg", photos[0]))
    answer = results(page)[0].answer
    assert page.subheader[0].value == EXAMPLE_CLASSES[answer.predicted]
    share = f"{round(100 * answer.confidence)} %"
    assert f"**Confidence {share}.**" in said(page, "markdown")[0]
    bars = [x.proto for x in page.get("progress")]
    assert bars[0].text == f"**{answer.title}**, {share}" and len(bars) == 3
    assert sum(b.value for b in bars) in range(98, 103)
    sentence = said(page, "markdown")[1]
    assert "At 90 % coverage" in sentence
    kept = [title for title in EXAMPLE_CLASSES.values() if title in sentence]
    assert (
        len(kept) == len(answer.classes_90) % 3
        or "no class can be ruled out" in sentence
    )
    alts = [i.proto.imgs[0].alt for i in page.get("image")]
    assert (
        len(alts) == 3
        and f"map for {answer.title}" in alts[1]
        and "blue to yellow" in alts[2]
    )
    assert page.selectbox[0].value == answer.predicted
    assert [b.proto.label for b in page.get("download_button")] == [
        "Result (JSON)",
        "Image with map (PNG)",
    ]


def test_an_abstention_does_not_look_like_an_answer(models, photos):
    page = upload(opened(models.shy), ("mole.jpg", photos[0]))
    answer = results(page)[0].answer
    assert page.subheader[0].value == "No prediction"
    assert "too uncertain" in page.warning[1].value
    assert not page.get("progress") and not page.slider
    assert not any(title in text for title in EXAMPLE_CLASSES.values() for text in said(page))
    page.toggle[0].set_value(True).run()
    assert page.subheader[0].value == "No prediction" and len(page.get("progress")) == 3
    assert answer.title in "".join(said(page, "progress"))
    # Another abstaining image starts hidden again.
    assert not upload(page, ("other.jpg", photos[1])).get("progress")


def bad_files(photos):
    "Name: (content, a part of the sentence, or the note if it is read after all)."
    image = Image.fromarray(example_images(1, (120, 120))[0])
    deep = Image.fromarray(np.asarray(image.convert("L")).astype("uint16") * 257)
    dark = Image.fromarray(np.asarray(image.convert("L")).astype("uint16") * 16)
    film = {"save_all": True, "append_images": [image.rotate(90)]}
    refused = {
        "text.jpg": (b"Dear diary", "not an image"),
        "empty.png": (b"", "empty"),
        "cut.jpg": (photos[0][: len(photos[0]) // 2], "ends too early"),
        "head.png": (encoded(image, "PNG")[:20], "ends too early"),
        "dot.png": (encoded(image.resize((1, 1)), "PNG"), "1 x 1 pixels"),
        "bomb.png": (encoded(Image.new("1", (30_000, 30_000)), "PNG"), "pixels"),
        "film.png": (encoded(image, "PNG", **film), "2 pictures"),
        "huge.png": (bytes(50_000_001), "not an image"),
        "page.jpg": (b"<html><script>alert(1)</script></html>", "is a web page"),
        HOSTILE: (b"\xff\xd8\xff\xe0 no", "ends too early"),
        "film.jpg": (encoded(image, "GIF"), "of the format GIF"),
        "IMG_0001.HEIC": (b"\0\0\0\x18ftypheic" + bytes(80), "of the format HEIC"),
        "twelve.png": (encoded(dark, "PNG"), "seems to hold 12 bits"),
    }
    read = {
        "gray.jpg": (encoded(image.convert("L")), "gray"),
        "print.jpg": (encoded(image.convert("CMYK")), "CMYK"),
        "deep.png": (encoded(deep, "PNG"), "more than 8 bits"),
        "web.webp": (encoded(image, "WEBP"), ""),
        "clear.png": (encoded(image.convert("RGBA"), "PNG"), "transparent"),
        "really_png.jpg": (encoded(image, "PNG"), "PNG file"),
        "MOLE.JPEG": (photos[0], ""),
    }
    return refused, read


def test_bad_files_get_a_sentence_each_and_the_others_their_answers(models, photos):
    refused, read = bad_files(photos)
    files = [(n, data) for n, (data, _) in (refused | read).items()]
    page = upload(opened(models.sure), *files)
    assert (
        f"{len(files)} images: {len(read)} predicted and {len(refused)} not read."
        in said(page)
    )
    table = page.table[0].value
    assert list(table["Result"][: len(refused)]) == ["Not read"] * len(refused)
    options = page.selectbox[0].proto.options
    assert (
        options[0] == "1. text.jpg"
        and "onerror" in options[9]
        and "\u202e" not in options[9]
    )
    expected = zip(
        page.session_state["results"].items(), (refused | read).items(), strict=True
    )
    for (key, result), (name, (_, part)) in expected:
        if name in refused:
            assert part in result.error and result.error.endswith("."), (
                name,
                result.error,
            )
        else:
            assert part in " ".join(result.answer.notes), (name, result.answer.notes)
        if name not in ("bomb.png", HOSTILE, "clear.png"):
            continue
        page.selectbox(key="chosen").set_value(key).run()
        assert not page.exception
        if name in refused:
            (error,) = page.error
            assert error.value == app._plain(result.error)
            assert not page.subheader and not page.slider
        else:
            assert not page.error and page.slider
            assert app._plain(result.answer.notes[0]) in said(page, "caption")


def test_names_are_text_wherever_they_are_shown(models, photos):
    page = upload(opened(models.sure), (HOSTILE, photos[0]), (HOSTILE, photos[1]))
    marked = [*said(page), *page.table[0].value["Image"]]
    shown = [text for text in marked if "onerror" in text]
    assert len(shown) == 3
    for text in shown:
        text = text.replace("\\\\", "")
        for mark in "<>*$[]:":
            assert all(
                text[i - 1] == "\\" for i, c in enumerate(text) if c == mark
            ), text
    for text in marked:
        assert "\u202e" not in text and "\n\n" not in text.strip("\n")


def test_twenty_at_once_and_what_is_gone_is_forgotten(models, photos):
    page = opened(models.both)
    start = time.process_time()
    files = [(f"mole_{i}.jpg", photos[i % 6]) for i in range(20)]
    upload(page, *files)
    assert time.process_time() - start < 20
    assert len(page.table[0].value) == 20 and len(results(page)) == 20
    assert len(page.selectbox(key="chosen").options) == 20
    upload(page, files[3])
    assert len(results(page)) == 1 and page.header[0].value == "Result"
    assert len(page.session_state["maps"]) == 1
    upload(page)
    assert not results(page) and not page.header


def test_no_more_files_than_it_says(models, photos, monkeypatch):
    monkeypatch.setattr(app, "_MOST", 3)
    page = upload(opened(models.sure), *[(f"{i}.jpg", photos[i]) for i in range(5)])
    assert "Only the first 3 of 5 images are read" in page.warning[1].value
    assert len(results(page)) == 3


@pytest.fixture
def asked(monkeypatch):
    "Images that the predictor was asked about, and whether with a map."
    calls, ask = [], Predictor.__call__

    def count(self, images, cam=False, **options):
        calls.append((len(images), cam))
        return ask(self, images, cam=cam, **options)

    monkeypatch.setattr(Predictor, "__call__", count)
    return calls


def test_slider_and_class_ask_nothing_twice(models, photos, asked):
    page = upload(opened(models.sure), ("a.jpg", photos[0]), ("b.jpg", photos[1]))
    assert asked == [(2, False), (1, True)]
    pixels = page.get("image")[1].proto.imgs[0].url
    start = time.process_time()
    for opacity in (0, 25, 75, 100):
        page.slider[0].set_value(opacity).run()
    assert (time.process_time() - start) / 4 < 2
    assert page.get("image")[1].proto.imgs[0].url != pixels and len(asked) == 2
    other = next(c for c in EXAMPLE_CLASSES if c != results(page)[0].answer.predicted)
    for target in (other, results(page)[0].answer.predicted):
        page.selectbox[1].set_value(target).run()
    assert asked[2:] == [(1, True)]
    assert results(page)[0].answer.title in page.get("image")[1].proto.imgs[0].alt


def test_age_sex_and_site_change_the_answer_of_that_image(models, photos, asked):
    page = upload(opened(models.patient), ("a.jpg", photos[0]), ("b.jpg", photos[1]))
    before = [r.answer.probabilities for r in results(page)]
    key = page.selectbox(key="chosen").value
    page.number_input[0].set_value(85).run()
    assert [x.value for x in page.selectbox if x.label == "Sex"] == [None]
    page.selectbox(key=f"Site on the body {key}").set_value("back").run()
    after = results(page)
    assert after[0].person == (85, None, "back")
    assert after[0].answer.probabilities != before[0]
    assert after[1].answer.probabilities == before[1]
    # Kept while another image is on view, and gone with the file.
    keys = list(page.session_state["results"])
    page.selectbox(key="chosen").set_value(keys[1]).run()
    page.selectbox(key="chosen").set_value(keys[0]).run()
    assert page.number_input[0].value == 85
    assert sum(n for n, cam in asked if not cam) == 4
    upload(page, ("c.jpg", photos[2]))
    assert page.session_state["people"] == {} and page.number_input[0].value is None


def test_members_are_shown_one_by_one(models, photos):
    page = upload(opened(models.both), ("a.jpg", photos[0]))
    answer, table = results(page)[0].answer, page.table[0].value
    assert list(table["Network"]) == ["one", "two"]
    best = [EXAMPLE_CLASSES[max(p, key=p.get)] for p in answer.members.values()]
    assert list(table["Predicted class"]) == best
    agree = sum(b == answer.title for b in best)
    assert f"Same predicted class as the ensemble: {agree} of 2 networks." in " ".join(
        said(page, "markdown")
    )


def test_one_image_that_breaks_something_costs_the_others_nothing(
    models, photos, monkeypatch
):
    ask = Predictor.__call__

    def fail(self, images, **options):
        if photos[1] in images:
            raise MemoryError("secret path /srv/x")
        return ask(self, images, **options)

    monkeypatch.setattr(Predictor, "__call__", fail)
    page = upload(opened(models.sure), *[(f"{i}.jpg", photos[i]) for i in range(3)])
    assert [bool(r.error) for r in results(page)] == [False, True, False]
    assert (
        results(page)[1].error
        == "1.jpg could not be worked on: the log of the server says why."
    )
    monkeypatch.setattr(Predictor, "__call__", ask)
    assert not upload(page, ("1.jpg", photos[1])).error


def test_examples_say_that_they_are_generated(models):
    page = opened(models.sure)
    page.pills[0].set_value(["Melanoma"]).run()
    assert "Generated image: it shows no patient." in said(page, "caption")
    record = app._record(
        SimpleNamespace(name="x", version="1", synthetic=True),
        app._File("k", "n", b"", True),
        results(page)[0],
    )
    assert record["generated_image"] and record["model"]["trained_on_generated_images"]


def test_downloads_hold_the_answer_and_nothing_of_the_file(models, photos):
    image = Image.open(io.BytesIO(photos[0]))
    exif = Image.Exif()
    exif[274], exif[271] = 6, "SecretCamera"  # orientation, make
    exif.get_ifd(0x8825)[1] = "N"  # a position
    sent = encoded(image, exif=exif)
    page = upload(opened(models.sure), ("../mole of mine.jpg", sent))
    result = results(page)[0]
    upright = np.asarray(
        Image.open(io.BytesIO(sent)).transpose(Image.Transpose.ROTATE_270)
    )
    square = page.session_state["square"][1]
    assert np.abs(square[:, :, 0].mean() - upright[20:140, :, 0].mean()) < 4
    turned = np.asarray(Image.fromarray(square).resize((12, 12))).astype(int)
    expected = np.asarray(Image.fromarray(upright[20:140]).resize((12, 12))).astype(int)
    assert np.abs(turned - expected).mean() < 6
    assert result.person == ()
    bundle = Predictor(models.sure).bundle
    file = app._File("k", "../mole of mine.jpg", sent)
    record = json.loads(app._json(app._record(bundle, file, result)))
    assert record["probabilities"] == pytest.approx(result.answer.probabilities)
    assert record["image"] == file.name and "diagnosis" not in record
    assert "no medical device" in record["notice"] and "SecretCamera" not in app._json(
        record
    )
    png = app._encoded(square)
    with Image.open(io.BytesIO(png)) as again:
        assert not again.info and not again.getexif() and again.size == (448, 448)
    assert b"SecretCamera" in sent and b"SecretCamera" not in png and b"Exif" not in png


def test_a_network_that_sees_no_image_has_no_map(tmp_path, photos):
    run, _ = example_bundle(tmp_path, "ages", fusion="only")
    page = upload(
        opened(with_decision(run, "old", min_confidence=0.0)), ("a.jpg", photos[0])
    )
    assert any("there is no map" in text for text in said(page, "caption"))
    assert not page.slider and len(page.get("download_button")) == 1


def test_a_broken_model_is_a_sentence_on_the_page(models, tmp_path):
    page = AppTest.from_string(
        f"from dermnb.serve.app import page\npage({str(tmp_path)!r})", default_timeout=30
    ).run()
    assert not page.exception and "holds neither" in page.error[0].value
    assert not page.file_uploader


def test_the_file_itself_is_the_script(models, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py", str(models.sure)])
    page = AppTest.from_file(app.__file__, default_timeout=60).run()
    assert not page.exception and page.file_uploader


def test_cards_cannot_ask_other_servers():
    text = '---\nlicense: mit\n---\n# Card\n![a](http://x.example/a.png)\n![b][c]\n<img src="x">'
    card = app._card(text)
    assert card.startswith("#### Card") and "![" not in card and "license" not in card


def test_memory_stays_flat_from_file_to_file(models):
    large = [Image.fromarray(x).resize((2400, 1800)) for x in example_images(4)]
    files = [encoded(image) for image in large]
    page, process, used = opened(models.sure), psutil.Process(), []
    for i in range(12):
        upload(page, (f"{i}.jpg", files[i % 4]))
        assert len(results(page)) == len(page.session_state["maps"]) == 1
        used.append(process.memory_info().rss / 2**20)
    assert used[-1] - used[5] < 20, used  # six images of 12 MB each, decoded


def test_serve_refuses_before_it_starts(models, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a))
    with pytest.raises(ConfigError, match="holds neither model.keras"):
        app.serve(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="cannot listen on 127.0.0.1, port"):
            app.serve(models.sure, port=taken.getsockname()[1])
    with pytest.raises(ConfigError, match="choose another"):
        app.serve(models.sure, host="not an address")
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dermnb\[app\]'"):
        app.serve(models.sure)
    assert not started


def test_serve_is_private_unless_told_otherwise(models, monkeypatch):
    commands = []

    class Process:
        def __init__(self, command, env, stderr):
            commands.append(command)

        def wait(self):
            return 0

        poll = wait

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setenv("DERMNB_VERBOSE", "1")  # without the filter of what it says
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert app.serve(models.sure, port=port) == 0
    assert app.serve(models.sure, host="0.0.0.0", port=port) == 0
    options = [
        dict(x[2:].split("=", 1) for x in c if x.startswith("--") and "=" in x)
        for c in commands
    ]
    assert (
        options[0]["server.address"] == "127.0.0.1"
        and options[1]["server.address"] == "0.0.0.0"
    )
    assert "--server.allowedHosts=127.0.0.1" in commands[0]
    assert (
        "server.allowedHosts" in options[0] and "server.allowedHosts" not in options[1]
    )
    for found in options:
        assert found["browser.gatherUsageStats"] == "false"
        assert (
            found["server.enableXsrfProtection"] == found["server.enableCORS"] == "true"
        )
        assert found["server.fileWatcherType"] == "none"
        assert found["client.showErrorDetails"] == "none"
        assert found["server.maxUploadSize"] == "50"
    known = {option for option in st.config._config_options_template}
    assert set(options[0]) <= known
    assert commands[0][-2:] == ["--", str(models.sure / "model")]
