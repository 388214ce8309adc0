"""Bundles, and what is asked of them: answers, refusals, and files that nobody should open."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
import yaml
from bundles import CLASSES, make_bundle, make_ensemble, photographs
from PIL import Image
from tolerances import FLOAT32

from dermnb.bundle import load_bundle
from dermnb.calibrate import temper
from dermnb.core import ConfigError, read_json, write_json
from dermnb.evaluate import probability_columns
from dermnb.predict import (
    Predictor,
    cam_paths,
    find_images,
    read_image,
    read_metadata,
    square_of,
    write_answers,
)

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = probability_columns(CLASSES)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return make_bundle(folder, "first"), make_bundle(folder, "second", 24, seed=1)


@pytest.fixture(scope="module")
def images():
    return photographs()


def table_of(answers):
    return np.array([[a.probabilities[c] for c in CLASSES] for a in answers])


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_answers_are_the_runs_predictions_after_its_temperature(runs, images):
    run, table = runs[0]
    predictor = Predictor(run)
    decision = predictor.bundle.decision
    assert decision.n == 12 and decision.temperature != 1
    answers = predictor(images)
    expected = temper(table[COLUMNS].to_numpy(), decision.temperature)
    assert np.allclose(table_of(answers), expected, atol=FLOAT32)
    for answer, p in zip(answers, expected, strict=True):
        assert answer.predicted == CLASSES[p.argmax()] == answer.classes_90[0]
        assert answer.abstains == bool(answer.reasons)


@pytest.mark.parametrize("combine", ["mean", "rank"])
def test_an_ensemble_answers_as_its_run_did(runs, images, combine, tmp_path):
    folder, table = make_ensemble(tmp_path, runs, [0.3, 0.7], combine)
    for run, _ in runs:  # members are inside: their runs are not needed
        assert not (folder / "model" / "members" / run.name).exists()
    moved = shutil.move(folder, tmp_path / "moved")
    predictor = Predictor(moved)
    answers = predictor(images, cam=True)
    expected = temper(table[COLUMNS].to_numpy(), predictor.bundle.decision.temperature)
    # A rank among 12 validation images, itself one of them, moves by half a place if its
    # probability moves at all.
    near = 0.5 / 12 if combine == "rank" else 0
    assert np.abs(table_of(answers) - expected).max() <= near + FLOAT32
    assert set(answers[0].members) == {"first", "second"}
    cam = answers[0].cam
    assert cam.shape == (448, 448) and cam.min() >= 0 and cam.max() <= 1


def test_the_map_of_an_ensemble_is_the_weighted_mean_of_its_members(runs, images, tmp_path):
    folder, _ = make_ensemble(tmp_path, runs, [0.25, 0.75])
    both = Predictor(folder)([images[0]], cam=True, target="BCC")[0]
    single = [Predictor(run)([images[0]], cam=True, target="BCC")[0].cam for run, _ in runs]
    assert np.allclose(both.cam, 0.25 * single[0] + 0.75 * single[1], atol=FLOAT32)
    assert both.cam_class == "BCC"


def test_metadata_changes_the_answer_and_may_be_unknown(images, tmp_path):
    run, _ = make_bundle(tmp_path, "with_metadata", fusion="concat")
    predictor = Predictor(run)
    assert predictor.bundle.wants_metadata
    table = tmp_path / "patients.csv"
    table.write_text("image,age,sex\na.png,20,male\nb,80,\n")
    for name, image in zip(("a.png", "b.png"), images, strict=False):
        Image.fromarray(images[0]).save(tmp_path / name)
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    known = table_of(predictor.stream(paths, metadata=read_metadata(table, paths)))
    unknown = table_of(predictor.stream(paths))
    assert np.allclose(unknown[0], unknown[1], atol=FLOAT32) and not np.allclose(known[0], known[1])
    assert predictor([images[0]], cam=True)[0].cam.max() <= 1
    for text, said in (
        ("image,weight\na.png,70\n", "any of age, sex and site"),
        ("image,age\na.png,20\na.png,30\n", "twice"),
        ("image,age\na.png,old\n", "no number of years"),
        ("image,age\nz.png,20\n", "names none of the 2"),
    ):
        table.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_metadata(table, paths)
    table.write_text("image,age\na.png,20\n")
    with pytest.raises(ConfigError, match="give their paths"):
        read_metadata(table, ["one/a.png", "two/a.png"])


def test_abstains_below_the_confidence_asked_for(runs, images):
    run, _ = runs[0]
    never = Predictor(run, min_confidence=0)(images)
    always = Predictor(run, min_confidence=1)(images)
    assert not any("too uncertain" in " ".join(a.reasons) for a in never)
    assert all(a.abstains and "too uncertain" in a.reasons[-1] for a in always)
    with pytest.raises(ConfigError, match="from 0 to 1"):
        Predictor(run, min_confidence=2)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda i: b"", "is empty"),
        (lambda i: b"GIF89a is no JPEG", "not an image"),
        (lambda i: encoded(i, "GIF"), "not an image in one of the formats"),
        (lambda i: encoded(i, "JPEG")[:1500], "ends too early"),
        (lambda i: encoded(i)[:1500], "cannot be decoded"),
        (lambda i: encoded(i.resize((1, 1))), "has 1 x 1 pixels"),
        (lambda i: encoded(Image.new("1", (30_000, 30_000))), "too many pixels|at most 80 million"),
        (lambda i: encoded(Image.new("1", (9_500, 9_500))), "9,500 x 9,500"),
        (lambda i: encoded(i, save_all=True, append_images=[i]), "holds 2 pictures"),
        (lambda i: encoded(i, "TIFF", save_all=True, append_images=[i]), "holds 2 pictures"),
        (lambda i: encoded(i, "JPEG") + bytes(51 * 10**6), "may have at most 50 MB"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_sentence_and_the_rest_goes_on(runs, images, make, said):
    broken = make(Image.fromarray(images[0]))
    good = encoded(Image.fromarray(images[1]))
    hostile = "<img src=x onerror=alert(1)>.png"
    answers = Predictor(runs[0][0])([broken, good], names=[hostile, "good.png"])
    error = answers[0].error
    assert pytest.importorskip("re").search(said, error), error
    assert error.count(". ") == 0 and error.endswith(".") and hostile in error
    assert answers[0].to_dict() == {"image": hostile, "error": error}
    assert not answers[1].error and answers[1].predicted


@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        (lambda i: encoded(i.convert("L")), "a.png", "grey"),
        (lambda i: encoded(i.convert("CMYK"), "JPEG"), "a.jpg", "CMYK"),
        (lambda i: encoded(i.convert("RGBA")), "a.png", "transparent"),
        (lambda i: encoded(Image.fromarray(np.asarray(i.convert("L"), "uint16") * 257)), "a.png", "16 bits"),
        (lambda i: encoded(i), "a.jpg", "ends in .jpg, but it is a PNG"),
        (lambda i: encoded(i), "noend", ""),
        (lambda i: encoded(i, "MPO", save_all=True, append_images=[i]), "a.jpg", ""),
    ],
)  # fmt: skip
def test_what_is_converted_is_said(images, make, name, said):
    picture = read_image(make(Image.fromarray(images[0])), name)
    assert square_of(picture, 32, "crop").shape == (32, 32, 3)
    assert said in " ".join(picture.notes) and bool(said) == bool(picture.notes)


def test_orientation_is_honoured(runs, images, tmp_path):
    upright = Image.fromarray(images[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    answers = Predictor(runs[0][0])([encoded(upright), encoded(turned, exif=exif)])
    assert np.allclose(*table_of(answers), atol=FLOAT32)


def test_the_card_is_a_hub_card(runs):
    card = load_bundle(runs[0][0]).card
    head = yaml.safe_load(card.split("---\n")[1])
    (entry,) = head["model-index"]
    assert entry["name"] == "study/first" and head["library_name"] == "keras"
    results = {r["dataset"]["split"]: r for r in entry["results"]}
    accuracy = next(m for m in results["test"]["metrics"] if m["type"] == "accuracy")
    assert 0 <= accuracy["value"] <= 1 and "95 % interval" in accuracy["name"]
    for section in ("Intended use", "Training data and split", "Scores", "Limits", "Use"):
        assert f"\n## {section}\n" in card
    assert "generated images" in card and "must not be used on patients" in card


def rewrite(path, old, new):
    "A .keras file with one text in its description changed; without one, without weights."
    other = path.with_suffix(".zip")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for item in source.namelist():
            data = source.read(item)
            if item == "config.json" and old:
                assert old in data
                data = data.replace(old, new, 1)
            if old or item != "model.weights.h5":
                target.writestr(item, data)
    other.replace(path)


def damage(folder, what):
    "Make a good bundle a bad one."
    model = folder / "model"
    if what == "lambda":
        x = keras.Input((32, 32, 3), name="image")
        y = keras.layers.Lambda(lambda x: x[:, 0, 0], output_shape=(3,))(x)
        keras.Model(x, y).save(model / "model.keras")
    elif what == "module":
        rewrite(model / "model.keras", b'"module": "keras.layers"', b'"module": "os.path"')
    elif what == "dotted":
        rewrite(model / "model.keras", b'"class_name": "Dense"', b'"class_name": "layers.Lambda"')
    elif what == "weights":
        rewrite(model / "model.keras", None, None)
    elif what in ("classes", "resize", "metadata"):
        odd = {"classes": ["a", "b"], "resize": "zoom", "metadata": {"a": 1}}[what]
        write_json(model / "labels.json", read_json(model / "labels.json") | {what: odd})
    elif what == "limit":
        found = dict(np.load(model / "novelty.npz"))
        np.savez(model / "novelty.npz", **(found | {"threshold": np.nan}))
    elif what == "cut":
        path = model / "model.keras"
        path.write_bytes(path.read_bytes()[:2000])
    elif what == "pickle":
        np.savez(model / "novelty.npz", features=np.array([{}], dtype=object), threshold=1.0)
    elif what == "later":
        write_json(model / "decision.json", read_json(model / "decision.json") | {"schema": 2})
    elif what == "temperature":
        write_json(model / "decision.json", read_json(model / "decision.json") | {"temperature": -1})
    else:
        (model / what).unlink()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("lambda", "could run code: it is not loaded"),
        ("module", "could run code: it is not loaded"),
        ("dotted", "could run code: it is not loaded"),
        ("weights", "cannot be loaded"),
        ("classes", "does not fit the network"),
        ("resize", "unknown resize method"),
        ("metadata", "cannot be loaded|does not fit"),
        ("limit", "is not what dermnb writes"),
        ("cut", "is not a whole .keras file"),
        ("pickle", "cannot be read"),
        ("later", "later version"),
        ("temperature", "temperature"),
        ("model.keras", "holds neither"),
        ("labels.json", "labels.json"),
        ("decision.json", "dermnb explain"),
    ],
)
def test_a_bad_bundle_is_one_sentence(runs, tmp_path, what, said):
    run = tmp_path / "run"
    shutil.copytree(runs[0][0], run)
    damage(run, what)
    with pytest.raises(ConfigError, match=said):
        load_bundle(run)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"combine": "median"}, "unknown way to combine"),
        ({"schema": 9}, "another version"),
        ({"weight": float("inf")}, "weights must be"),
        ({"folder": "../first"}, "must be a plain name"),
        ({"link": True}, "is a link"),
    ],
)
def test_a_bad_ensemble_is_one_sentence(runs, tmp_path, change, said):
    model = make_ensemble(tmp_path, runs, [0.5, 0.5])[0] / "model"
    record = read_json(model / "ensemble.json")
    member = record["members"][0]
    if "link" in change:
        inside = model / "members" / member["folder"]
        shutil.move(inside, tmp_path / "outside")
        inside.symlink_to(tmp_path / "outside")
    member.update({k: v for k, v in change.items() if k in ("weight", "folder")})
    record.update({k: v for k, v in change.items() if k in ("combine", "schema")})
    write_json(model / "ensemble.json", record)
    with pytest.raises(ConfigError, match=said):
        load_bundle(model)


def test_hard_links_do_not_tie_runs_together(runs, tmp_path):
    copies = []
    for run, table in runs:
        shutil.copytree(run, tmp_path / run.name)
        copies.append((tmp_path / run.name, table))
    folder, _ = make_ensemble(tmp_path, copies, [0.5, 0.5])
    shutil.rmtree(copies[0][0])
    assert len(load_bundle(folder).members) == 2


def test_an_interrupted_table_leaves_nothing(runs, images, tmp_path):
    predictor = Predictor(runs[0][0])

    def stopped():
        yield from predictor(images[:3])
        raise KeyboardInterrupt

    for name in ("out.csv", "out.parquet"):
        with pytest.raises(KeyboardInterrupt):
            write_answers(stopped(), tmp_path / name, CLASSES, rows=2)
    assert list(tmp_path.iterdir()) == []


def test_finds_images_in_folders_archives_and_patterns(images, tmp_path):
    photo = encoded(Image.fromarray(images[0]))
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.PNG", "sub/notes.txt"):
        (tmp_path / name).write_bytes(photo)
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.writestr("in/c.png", photo)
    found = find_images([tmp_path, tmp_path / "*.png"])
    assert [Path(f).name for f in found] == ["a.png", "b.PNG", "c.png"]
    with pytest.raises(ConfigError, match="has no image"):
        find_images([tmp_path / "*.jpg"])


def test_maps_replace_no_image_and_no_other_map(tmp_path):
    (tmp_path / "a.png").touch()
    paths = ["one/x.jpg", "two/x.png", "two/y.jpg"]
    names = [p.name for p in cam_paths("maps", paths)]
    assert names == ["x_map.png", "x_map_2.png", "y_map.png"]
    with pytest.raises(ConfigError, match="would replace the image"):
        cam_paths(tmp_path / "a.png", [tmp_path / "a.png"])
    with pytest.raises(ConfigError, match="one file for the maps of 3"):
        cam_paths("maps.png", paths)


@pytest.mark.parametrize("form", ["TIFF", "PNG", "JPEG", "BMP", "WEBP"])
def test_damaged_files_are_refused_or_read(images, form):
    "Whatever byte is wrong, it is an answer or a sentence, and never a traceback."
    data = bytearray(encoded(Image.fromarray(images[0]), form))
    rng = np.random.default_rng(0)
    for _ in range(150):
        broken = data.copy()
        for place in rng.integers(0, min(len(data), 400), 3):
            broken[place] = rng.integers(0, 256)
        try:
            square_of(read_image(bytes(broken)), 32, "crop")
        except ConfigError as error:
            assert len(str(error)) < 400


def test_two_classes_have_a_threshold(runs, images):
    bundle = load_bundle(runs[0][0])
    for level, sure in ((0.0, True), (1.0, False)):
        decision = replace(bundle.decision, positive="MEL", positive_threshold=level)
        answer = Predictor(replace(bundle, decision=decision))(images[:1])[0]
        assert answer.positive is sure and answer.to_dict()["positive"] is sure
    assert Predictor(bundle)(images[:1])[0].positive is None


def dermnb(*args):
    env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    run = "from dermnb.cli import main; main()"
    command = [sys.executable, "-c", run, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def test_the_command_line(runs, images, tmp_path):
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    (tmp_path / "broken.jpg").write_bytes(b"no")
    done = dermnb(
        "predict", tmp_path, "--model", runs[0][0], "--json", "--cam", tmp_path / "maps",
        "--out", tmp_path / "out.csv",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0]["image"] == "a.png" and lines[0]["path"] == str(tmp_path / "a.png")
    assert set(lines[0]["probabilities"]) == set(CLASSES)
    assert "not an image" in lines[1]["error"]
    assert "1 of 2 images could not be read" in done.stderr
    assert Image.open(tmp_path / "maps" / "a_map.png").size == (904, 448)
    assert list(pd.read_csv(tmp_path / "out.csv")["image"]) == ["a.png", "broken.jpg"]
    wrong = dermnb("predict", tmp_path / "a.png", "--model", tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.startswith("dermnb: ")
    assert wrong.stdout == "" and len(wrong.stderr.splitlines()) == 1


REAL = Path(os.environ.get("DERMNB_REAL_DATA", ROOT / ".." / "shared" / "data"))
ARCHIVE = REAL / "ham10000" / "HAM10000_images_part_1.zip"


@pytest.mark.skipif(
    not ARCHIVE.is_file(),
    reason=f"real images are absent: set DERMNB_REAL_DATA (looked in {REAL})",
)
def test_photographs_and_their_export(runs, tmp_path):
    "An ensemble on photographs, and the ONNX file of it run by onnxruntime."
    runtime = pytest.importorskip("onnxruntime")
    from dermnb.export import TOLERANCE, export_bundle

    folder, _ = make_ensemble(tmp_path, runs, [0.3, 0.7])
    predictor = Predictor(folder)
    paths = find_images([ARCHIVE])[:12]
    answers = predictor(paths)
    assert [a.name for a in answers] == [p.rpartition("/")[2].rpartition("::")[2] for p in paths]
    assert not any(a.error or a.notes for a in answers)
    pictures = [read_image(p) for p in paths]
    export_bundle(predictor.bundle, tmp_path / "onnx", "onnx", [p.pixels() for p in pictures])
    session = runtime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    given = {
        f"image_{size}_crop": np.stack([square_of(p, size, "crop") for p in pictures])
        for size in (32, 24)
    }
    given = {k: v.astype("float32") for k, v in given.items()}
    (found,) = session.run(["probabilities"], given)
    assert np.abs(found - table_of(answers)).max() < TOLERANCE
