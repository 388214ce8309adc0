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
from PIL import Image
from tolerances import FLOAT32

from dermnb.runs.bundle import bundle_folder, load_bundle
from dermnb.metrics.calibration import temper
from dermnb.cli import app
from dermnb.core import ConfigError, read_json, write_json
from dermnb.metrics.scores import probability_columns
from dermnb.data.images import resize_image
from dermnb.data.decoding import shown
from dermnb.serve.answers import cam_paths, save_cam, write_answers
from dermnb.serve.examples import EXAMPLE_CLASSES, example_bundle, example_ensemble, example_images
from dermnb.serve.export import make_engines
from dermnb.serve.inputs import find_images, read_image, read_metadata, short_names
from dermnb.serve.predict import Engine, Predictor, engine_file, installed_engines

CLASSES = list(EXAMPLE_CLASSES)

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = probability_columns(CLASSES)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return example_bundle(folder, "first"), example_bundle(folder, "second", 24, seed=1)


@pytest.fixture(scope="module")
def images():
    return example_images()


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


WITHOUT_KERAS = """
import json, sys
from dermnb.serve.predict import Predictor
predictor = Predictor(sys.argv[1], engine="onnx")
answer = predictor(sys.argv[2:])[0].to_dict()
loaded = [name for name in ("keras", "tensorflow", "jax") if name in sys.modules]
print(json.dumps({"answer": answer, "loaded": loaded}))
"""


@pytest.fixture(scope="module")
def ready(runs, tmp_path_factory):
    "An ensemble whose networks, one of which takes metadata, are ready for engines but Keras."
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("ready")
    patient = example_bundle(folder, "patient", fusion="concat")
    both, _ = example_ensemble(folder, [runs[0], patient], [0.3, 0.7])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DERMNB_CACHE", str(folder / "cache"))
        record = make_engines(load_bundle(both))
        assert make_engines(load_bundle(both)) == record  # nothing is made twice
        yield both, runs[0][0], folder / "cache"


def test_engines_answer_as_keras_does(ready, images):
    both, _, _ = ready
    people = pd.DataFrame({"age": [50.0] * len(images), "sex": "female", "site": None})
    expected = Predictor(both, engine="keras")(images, metadata=people)
    for engine in installed_engines():
        predictor = Predictor(both, engine=engine)
        answers = predictor(images, metadata=people)
        assert set(predictor.engines.values()) == {engine}
        assert np.abs(table_of(answers) - table_of(expected)).max() < 1e-4
        novelty = [[a.novelty for a in some] for some in (answers, expected)]
        assert np.allclose(*novelty, rtol=1e-3)
        one = predictor(images[:1], cam=True, metadata=people[:1])[0]  # by Keras
        theirs = Predictor(both, engine="keras")(images[:1], cam=True, metadata=people[:1])[0]
        assert np.allclose(one.cam, theirs.cam, atol=FLOAT32)


def test_an_engine_needs_no_keras(ready, images, tmp_path):
    _, run, cache = ready
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    command = [sys.executable, "-c", WITHOUT_KERAS, str(run), str(tmp_path / "a.png")]
    env = os.environ | {"DERMNB_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    expected = Predictor(run, engine="keras")(images[:1])[0]
    assert found["loaded"] == []
    for name, p in expected.probabilities.items():
        assert found["answer"]["probabilities"][name] == pytest.approx(p, abs=1e-4)


def test_an_engine_is_of_one_network_and_of_no_other(ready, tmp_path):
    _, run, _ = ready
    other, _ = example_bundle(tmp_path, seed=7)
    with pytest.raises(ConfigError, match="study/tiny was not yet made ready for engine 'onnx'"):
        Predictor(other, engine="onnx")
    with pytest.raises(ConfigError, match="unknown engine 'onx': did you mean 'onnx'"):
        Predictor(run, engine="onx")
    assert set(Predictor(other).engines.values()) == {"keras"}
    record = engine_file(run / "model").with_suffix(".json")
    whole = record.read_text()
    fast = read_json(record)["seconds"] | {"keras": {"1": 9.0, "16": 9.0}}
    write_json(record, read_json(record) | {"seconds": fast})
    assert "keras" not in Predictor(run).engines.values()  # auto takes what is faster
    assert set(Predictor(load_bundle(run)).engines.values()) == {"keras"}  # its weights may change
    record.write_text(whole[:50])
    assert set(Predictor(run).engines.values()) == {"keras"}
    record.write_text(whole)
    labels = read_json(run / "model" / "labels.json")
    copy = shutil.copytree(run, tmp_path / "copy")
    write_json(copy / "model" / "labels.json", labels | {"classes": labels["classes"][:2]})
    with pytest.raises(ConfigError, match="labels.json does not fit the network beside it"):
        Predictor(copy, engine="onnx")


def test_what_answers_otherwise_is_not_made(runs, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("DERMNB_CACHE", str(tmp_path))
    answers = Engine.predict

    def off(engine, inputs):
        p, features = answers(engine, inputs)
        return p + 2e-4, features

    monkeypatch.setattr(Engine, "predict", off)
    with pytest.raises(ConfigError, match="answers otherwise than in Keras"):
        make_engines(load_bundle(runs[0][0]))
    assert [p.suffix for p in (tmp_path / "engines").iterdir()] in ([], [".lock"])


@pytest.mark.parametrize("combine", ["mean", "rank"])
def test_an_ensemble_answers_as_its_run_did(runs, images, combine, tmp_path):
    folder, table = example_ensemble(tmp_path, runs, [0.3, 0.7], combine)
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
    folder, _ = example_ensemble(tmp_path, runs, [0.25, 0.75])
    both = Predictor(folder)([images[0]], cam=True, target="BCC")[0]
    single = [Predictor(run)([images[0]], cam=True, target="BCC")[0].cam for run, _ in runs]
    assert np.allclose(both.cam, 0.25 * single[0] + 0.75 * single[1], atol=FLOAT32)
    assert both.cam_class == "BCC"


def test_metadata_changes_the_answer_and_may_be_unknown(images, tmp_path):
    run, _ = example_bundle(tmp_path, "with_metadata", fusion="concat")
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
        ("image,age\na.png,20\na,30\n", "two rows"),
        ("image,sex\na.png,H\nb.png,M\n", "may be male, or mujer"),
        ("image,age\nz.png,20\n", "names none of the 2"),
    ):
        table.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_metadata(table, paths)
    table.write_bytes(b"image,site\na.png,R\xfccken\n")
    with pytest.raises(ConfigError, match="save it as UTF-8.$"):
        read_metadata(table, paths)
    table.write_text("image,age\na.png,20\n")
    with pytest.raises(ConfigError, match="give their paths"):
        read_metadata(table, ["one/a.png", "two/a.png"])


def test_metadata_is_read_as_the_training_table_is(images, tmp_path):
    run, _ = example_bundle(tmp_path, "with_metadata", fusion="concat")
    predictor, paths = Predictor(run), [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        Image.fromarray(images[0]).save(path)

    def answers(text):
        (tmp_path / "table.csv").write_text(text)
        said = []
        rows = read_metadata(tmp_path / "table.csv", paths, said.append)
        return predictor(paths, metadata=rows), said

    plain, said = answers("image,age,sex,site\na.png,45,male,back\nb.png,,,\n")
    assert not said and not plain[0].notes
    assert plain[1].notes == ["Nothing is known of the patient's age, sex and site."]
    for text in (
        "image,age,sex,site\na.png,45,M,Back\nb.png,unknown,unknown,NA\n",
        "isic_id,age_approx,gender,anatom_site_general,dx\na,45.0,Man,back,nv\nb,-1,u,,\n",
    ):
        others, said = answers(text)
        assert np.allclose(table_of(others), table_of(plain), rtol=0, atol=FLOAT32)
        assert [a.notes for a in others] == [a.notes for a in plain]
    assert said == [f"columns of {tmp_path / 'table.csv'} that are not used: dx."]
    _, said = answers("image,age\na.png,45\n")
    assert said == [f"1 of 2 images have no row in {tmp_path / 'table.csv'}."]
    odd, _ = answers("image,site\na.png,Moon\nb.png,back\n")
    assert "site 'moon' is not one of the training images' (back)" in odd[0].notes[0]
    frame = pd.DataFrame({"Age": ["45", "unknown"], "Gender": ["M", None], "site": ["Back", ""]})
    assert np.allclose(table_of(predictor(paths, metadata=frame)), table_of(plain), rtol=0, atol=FLOAT32)
    # A wrong cell refuses its own image, and is nothing to those of other rows.
    wrong, _ = answers("image;Alter;sex\na.png;150;M\nb.png;45;M\nz.png;old;M\n")
    assert "Alter '150' is not a number of years from 0 to 120" in wrong[0].error
    right, _ = answers("image,age,sex\na.png,45,male\nb.png,45,male\n")
    assert np.allclose(table_of(wrong[1:]), table_of(right[1:]), rtol=0, atol=FLOAT32)
    read, _ = answers('image,age\na.png,18 months\nb.png,">90"\n')
    assert [a.notes for a in read] == [
        ["The age '18 months' was read as 1.5."],
        ["The age '>90' was read as 90."],
    ]
    wrong = predictor(paths, metadata=pd.DataFrame({"age": [-5, 45]}))
    assert "age '-5' is not" in wrong[0].error and not wrong[1].error


def test_one_image_that_fails_ends_no_other(runs, images, tmp_path, monkeypatch):
    from dermnb.serve import predict

    predictor, decode, answer = Predictor(runs[0][0]), predict.resize_image, predict._answer
    plain = table_of(predictor(images[:3]))

    def decoding(picture, *how):
        if picture.name == "bad":
            raise MemoryError
        return decode(picture, *how)

    monkeypatch.setattr(predict, "resize_image", decoding)
    found = predictor(images[:3], names=["a", "bad", "c"])
    assert found[1].error == "bad could not be worked on (MemoryError)."
    assert np.array_equal(table_of([found[0], found[2]]), plain[[0, 2]])

    def answering(predictor, answers, *how):
        if any(a.name == "worse" for a in answers):
            raise RuntimeError("out of memory\nof the device")
        answer(predictor, answers, *how)

    monkeypatch.setattr(predict, "_answer", answering)
    found = predictor(images[:3], names=["a", "b", "worse"])
    assert "RuntimeError: out of memory of the device" in found[2].error
    assert np.allclose(table_of(found[:2]), plain[:2], atol=1e-6)
    table = pd.read_csv(write_answers(found, tmp_path / "out.csv", CLASSES))
    assert list(table["error"].isna()) == [True, True, False]


def test_a_folder_is_answered_as_its_files_are(runs, images, tmp_path):
    photo = Image.fromarray(images[0])
    for name, data in {
        os.fsdecode(b"caf\xe9.jpg"): encoded(photo, "JPEG"),
        "UPPER.JPG": encoded(photo, "JPEG"),
        "a.webp": encoded(photo, "WEBP"),
        "b.HEIC": b"\0\0\0\x18ftypheic" + bytes(80),
        "c.jpg": encoded(photo, "GIF"),
        "noend": encoded(photo),
        os.fsdecode(b"t\xff.csv"): b"image,age",
    }.items():
        (tmp_path / name).write_bytes(data)
    predictor = Predictor(runs[0][0])
    of_folder = predictor(find_images([tmp_path]), cam=True)
    files = [path for path in tmp_path.iterdir() if path.suffix != ".csv"]
    of_files = {shown(a.path): a for file in files for a in predictor([file])}
    assert len(of_folder) == len(of_files) == 6
    for answer in of_folder:
        other = of_files[shown(answer.path)]
        assert (answer.name, answer.error) == (other.name, other.error)
        if not answer.error:
            assert np.allclose(table_of([answer]), table_of([other]), atol=1e-6)
            assert json.dumps(answer.to_dict(), ensure_ascii=False).encode("utf-8")
    assert sum(bool(a.error) for a in of_folder) == 2
    for name in ("out.csv", "out.parquet"):
        out = write_answers(of_folder, tmp_path / name, CLASSES)
        table = pd.read_csv(out) if name == "out.csv" else pd.read_parquet(out)
        assert r"caf\udce9.jpg" in set(table["image"]) and len(table) == 6
    targets = cam_paths(tmp_path / "maps", [a.path for a in of_folder])
    assert len({save_cam(a, t) for a, t in zip(of_folder, targets) if not a.error}) == 4


def test_what_cannot_be_written_is_a_sentence(runs, images, tmp_path):
    (tmp_path / "file").touch()
    answers = Predictor(runs[0][0])(images[:1], cam=True)
    with pytest.raises(ConfigError, match="out.csv cannot be written"):
        write_answers(answers, tmp_path / "file" / "out.csv", CLASSES)
    with pytest.raises(ConfigError, match="map.png cannot be written"):
        save_cam(answers[0], tmp_path / "file" / "map.png")
    long = cam_paths("maps", ["x" * 250 + ".jpg"])[0]
    assert len(long.name) < 100


def test_a_map_of_nothing_is_said(runs, images, monkeypatch):
    predictor = Predictor(runs[0][0])
    zero = np.zeros((1, 448, 448), "float32")
    monkeypatch.setattr(Predictor, "_maps", lambda *_: zero)
    answer = predictor(images[:1], cam=True, target="NV")[0]
    assert "zero everywhere" in answer.notes[-1] and "Melanocytic nevus" in answer.notes[-1]
    assert not predictor(images[:1])[0].notes


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
        (lambda i: b"GIF89a is no JPEG", "of the format GIF"),
        (lambda i: b"no image", "not an image in one of the formats"),
        (lambda i: encoded(i, "JPEG")[:1500], "ends too early"),
        (lambda i: encoded(i)[:1500], "cannot be decoded"),
        (lambda i: encoded(i.resize((1, 1))), "has 1 x 1 pixels"),
        (lambda i: encoded(Image.new("1", (30_000, 30_000))), "too many pixels|at most 80 million"),
        (lambda i: encoded(Image.new("1", (9_500, 9_500))), "9,500 x 9,500"),
        (lambda i: encoded(i, save_all=True, append_images=[i]), "holds 2 pictures"),
        (lambda i: encoded(i, "TIFF", save_all=True, append_images=[i]), "holds 2 pictures"),
        (lambda i: encoded(i, "JPEG") + bytes(251 * 10**6), "may have at most 250 MB"),
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
        (lambda i: encoded(i.convert("L")), "a.png", "gray"),
        (lambda i: encoded(i.convert("CMYK"), "JPEG"), "a.jpg", "CMYK"),
        (lambda i: encoded(i.convert("RGBA")), "a.png", "transparent"),
        (lambda i: encoded(Image.fromarray(np.asarray(i.convert("L"), "uint16") * 257)), "a.png", "more than 8 bits"),
        (lambda i: encoded(i), "a.jpg", "ends in .jpg, but it is a PNG"),
        (lambda i: encoded(i), "noend", ""),
        (lambda i: encoded(i, "MPO", save_all=True, append_images=[i]), "a.jpg", ""),
    ],
)  # fmt: skip
def test_what_is_converted_is_said(images, make, name, said):
    picture = read_image(make(Image.fromarray(images[0])), name)
    assert resize_image(picture, 32, "crop").shape == (32, 32, 3)
    assert said in " ".join(picture.notes) and bool(said) == bool(picture.notes)


def test_orientation_is_honored(runs, images, tmp_path):
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
        ("decision.json", "but not decision.json beside it"),
    ],
)
def test_a_bad_bundle_is_one_sentence(runs, tmp_path, what, said):
    run = tmp_path / "run"
    shutil.copytree(runs[0][0], run)
    damage(run, what)
    with pytest.raises(ConfigError, match=said):
        load_bundle(run)


def test_what_is_no_run_is_named(runs, tmp_path):
    for name, said in {
        "a.h5": "HDF5 form",
        "b.weights.h5": "HDF5 form",
        "c.keras": "as Keras saves it",
        "d.pth": "PyTorch",
        "junk.keras": "does not hold what its ending .keras says: give",
        "packed.zip": "is an archive, which has to be unpacked first: give the `model` folder",
        "foreign/model.keras": "as Keras saves it",
        "foreign": "but not labels.json and decision.json beside it",
        "saved": "holds a SavedModel",
        "onnx": "holds an ONNX file",
        "empty": "holds neither",
        "suite": "holds the runs one, two, of which one has to be named",
        "published": "holds runs without their networks",
        "published/one": "whose network is not here",
        "suite/three": "since its run is not finished",
        "suite/.part-three": "not finished",
        "nowhere": "is not there",
    }.items():
        path = tmp_path / name
        if name in ("junk.keras", "packed.zip"):
            path.write_bytes(b"junk")
        elif path.suffix in (".h5", ".keras", ".pth"):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes({".h5": b"\x89HDF", ".keras": b"PK\3\4"}.get(path.suffix, b"x"))
        elif name in ("saved", "onnx", "empty", "suite", "published"):
            path.mkdir()
            inside = {"saved": "saved_model.pb", "onnx": "model.onnx"}.get(name)
            if inside:
                (path / inside).touch()
            for run in ("one", "two") if name in ("suite", "published") else ():
                (path / run).mkdir()
                (path / run / "run.json").write_text("{}")
                if name == "suite":
                    shutil.copytree(runs[0][0] / "model", path / run / "model")
                    (path / ".part-three").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match="give the `model` folder") as error:
            bundle_folder(path)
        assert said in str(error.value), (name, str(error.value))
    one = tmp_path / "suite" / "one"
    for path in (one, one / "model", one / "model" / "model.keras"):
        assert bundle_folder(path) == one / "model"
    (one / "model" / "decision.json").unlink()
    with pytest.raises(ConfigError, match="dermnb explain"):  # there it would help
        bundle_folder(one)


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
    model = example_ensemble(tmp_path, runs, [0.5, 0.5])[0] / "model"
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
    folder, _ = example_ensemble(tmp_path, copies, [0.5, 0.5])
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
    photo, odd = encoded(Image.fromarray(images[0])), tmp_path / "odd [2019]"
    (odd / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.PNG", "sub/noend", "sub/c.jfif", "d.HEIC"):
        (odd / name).write_bytes(photo)
    (odd / "notes.txt").write_text("no image")
    with zipfile.ZipFile(odd / "more.zip", "w") as archive:
        for name in ("in/e.png", "in/ISIC_1_segmentation.png"):
            archive.writestr(name, photo)
        archive.writestr("in/inner.zip", b"PK\3\4")
    (odd / "half.zip").write_bytes((odd / "more.zip").read_bytes()[:99])
    said = []
    found = [Path(f).name for f in find_images([odd], said.append)]
    assert found == "a.png d.HEIC half.zip e.png inner.zip b.PNG c.jfif noend".split()
    assert said == ["skipped: 1 .txt, 1 lesion mask(s), by their names."]
    # Brackets belong to the name of a folder that is there, and to the pattern elsewhere.
    assert find_images([odd / "[ab].png", odd / "a*"]) == [str(odd / "a.png")]
    assert find_images([f"{odd}/**/*.PNG"]) == [str(odd / "sub" / "b.PNG")]
    assert [Path(f).name for f in find_images([f"{odd}/s*"])] == ["b.PNG", "c.jfif", "noend"]
    inside = f"{odd / 'more.zip'}::in"
    assert find_images([inside + "/e.png"]) == [inside + "/e.png"]
    assert len(find_images([inside])) == 2
    with pytest.raises(ConfigError, match="no file matches"):
        find_images([odd, odd / "*.jpg"])


def test_one_bad_entry_is_refused_and_the_others_are_answered(runs, images, tmp_path, monkeypatch):
    photo, said = encoded(Image.fromarray(images[0])), []
    for name in ("a.png", "in/a.png", "closed/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(photo)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "in/segmentation_masks").mkdir()
    scan = os.scandir

    def refusing(path):  # as for a folder of somebody else
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    paths = find_images([tmp_path], said.append)
    assert not said and short_names(paths) == [
        f"{tmp_path.name}/a.png", "closed", "in/a.png", "loop",
    ]  # fmt: skip
    answers = Predictor(runs[0][0])(paths)
    assert [bool(a.error) for a in answers] == [False, True, False, True]
    assert "Too many levels of symbolic links." in answers[3].error


def test_an_image_is_asked_about_once_by_whatever_route(images, tmp_path, monkeypatch):
    (tmp_path / "br[1]").mkdir()
    (tmp_path / "br[1]/a.png").write_bytes(encoded(Image.fromarray(images[0])))
    (tmp_path / "link").symlink_to("br[1]")
    monkeypatch.chdir(tmp_path)
    assert find_images(["br[1]/*.png", "br[1]", "link", "link/a.png"]) == ["br[1]/a.png"]
    with zipfile.ZipFile("x.zip", "w") as archive:
        for name in ("./one/a.png", "two/a.png", "../a.png"):
            archive.writestr(name, encoded(Image.fromarray(images[0])))
    said = []
    assert short_names(find_images(["x.zip"], said.append)) == ["one/a.png", "two/a.png"]
    assert said == ["../a.png of x.zip would lie outside its folder, and is not used."]
    assert len(find_images(["x.zip::one", "x.zip"])) == 2


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
            resize_image(read_image(bytes(broken)), 32, "crop")
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
    assert "1 of 2 images were refused" in done.stderr
    assert Image.open(tmp_path / "maps" / "a_map.png").size == (904, 448)
    assert list(pd.read_csv(tmp_path / "out.csv")["image"]) == ["a.png", "broken.jpg"]
    wrong = dermnb("predict", tmp_path / "a.png", "--model", tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.startswith("dermnb: ")
    assert wrong.stdout == "" and len(wrong.stderr.splitlines()) == 1
    args = ["predict", str(tmp_path / "a.png"), "--model", str(runs[0][0]), "--target", "NV"]
    with pytest.raises(ConfigError, match="say with --cam"):
        app(args, standalone_mode=False)


REAL = Path(os.environ.get("DERMNB_REAL_DATA", ROOT / ".." / "shared" / "data"))
ARCHIVE = REAL / "ham10000" / "HAM10000_images_part_1.zip"


@pytest.mark.skipif(
    not ARCHIVE.is_file(),
    reason=f"real images are absent: set DERMNB_REAL_DATA (looked in {REAL})",
)
def test_photographs_and_their_export(runs, tmp_path):
    "An ensemble on photographs, and the ONNX file of it run by onnxruntime."
    runtime = pytest.importorskip("onnxruntime")
    from dermnb.serve.export import TOLERANCE, export_bundle

    folder, _ = example_ensemble(tmp_path, runs, [0.3, 0.7])
    predictor = Predictor(folder)
    paths = find_images([ARCHIVE])[:12]
    answers = predictor(paths)
    assert [a.name for a in answers] == [p.rpartition("/")[2].rpartition("::")[2] for p in paths]
    assert not any(a.error or a.notes for a in answers)
    pictures = [read_image(p) for p in paths]
    export_bundle(predictor.bundle, tmp_path / "onnx", "onnx", [np.asarray(p.rgb()) for p in pictures])
    session = runtime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    given = {
        f"image_{size}_crop": np.stack([resize_image(p, size, "crop") for p in pictures])
        for size in (32, 24)
    }
    given = {k: v.astype("float32") for k, v in given.items()}
    (found,) = session.run(["probabilities"], given)
    assert np.abs(found - table_of(answers)).max() < TOLERANCE
