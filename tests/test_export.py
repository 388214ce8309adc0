"""Exported networks and ensembles answer as dermnb does, and are whole or absent."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dermnb.serve import export
from dermnb.runs.bundle import Bundle, BundleMember
from dermnb.metrics.calibration import Decision, temper
from dermnb.core import ConfigError, read_json
from dermnb.runs.ensemble import mix_probabilities
from dermnb.serve.export import FORMS, TOLERANCE, export_bundle
from dermnb.data.images import resize_image
from dermnb.nets.models import (
    Classifier,
    build_classifier,
    load_classifier,
    save_classifier,
    set_batch_norm_momentum,
)
from dermnb.data.synthetic import draw_lesion, render_view

CLASSES = ("mel", "nv", "bcc", "df")
METADATA = {
    "age_mean": 50.0,
    "age_sd": 20.0,
    "sexes": ["female", "male"],
    "sites": ["back"],
}
PATIENTS = pd.DataFrame(
    {
        "age": [30, None, 71],
        "sex": ["male", "female", None],
        "site": ["back", None, None],
    }
)


def pictures(n: int = 3) -> list[np.ndarray]:
    return [render_view(draw_lesion(2, i), size=(150, 110))[0] for i in range(n)]


def squares(classifier) -> np.ndarray:
    how = classifier.image_size, classifier.resize
    return np.stack([resize_image(Image.fromarray(p), *how) for p in pictures()])


def network(
    backbone="cnn", size=32, resize="crop", fusion="none", seed=0
) -> Classifier:
    "Untrained, but made to tell images apart."
    columns = 7 if fusion != "none" else 0
    model = build_classifier(
        backbone, len(CLASSES), size, fusion=fusion, metadata_columns=columns, seed=seed
    )
    meta = {"metadata": METADATA} if columns else {}
    found = Classifier(model, CLASSES, size, resize, meta)
    if set_batch_norm_momentum(model, 0.0):  # as training would: else the signal dies
        seen = [resize_image(Image.fromarray(p), size, resize) for p in pictures(24)]
        given = np.stack(seen).astype("float32")
        if columns:
            given = {"image": given, "metadata": np.eye(24, 7, dtype="float32")}
        for _ in range(2):
            model(given, training=True)
    last = model.get_layer("logits")
    kernel = last.get_weights()[0]
    logits = np.log(
        found.predict(squares(found), metadata=PATIENTS if columns else None)
    )
    scale = 1 / logits.std(axis=0).mean()
    last.set_weights([kernel * scale, -logits.mean(axis=0) * scale])
    return found


def bundle_of(classifier=None, temperature=1.0, **kwargs) -> Bundle:
    titles = {c: c.upper() for c in CLASSES}
    decision = Decision(
        temperature=temperature, set_threshold=0.9, min_confidence=0.5, n=99
    )
    name = kwargs.pop("name", "study/one")
    return Bundle(
        Path("nowhere"),
        name,
        CLASSES,
        titles,
        decision,
        "0",
        True,
        classifier,
        **kwargs,
    )


def ensemble_of(parts, temperature=1.0, combine="mean") -> Bundle:
    members = tuple(
        BundleMember(f"m{i}", weight, bundle_of(c))
        for i, (weight, c) in enumerate(parts)
    )
    return bundle_of(
        None, temperature, name="study/both", members=members, combine=combine
    )


@pytest.fixture(scope="module")
def cnn():
    return network()


@pytest.fixture(scope="module")
def parts(cnn):
    "Weights and networks of two sizes, some with metadata."
    return [
        (0.2, cnn),
        (0.5, network(size=24, resize="pad", fusion="concat", seed=1)),
        (0.3, network(size=24, resize="pad", fusion="metablock", seed=2)),
        (0.0, network(size=16, seed=3)),  # asked for nothing, and named all the same
    ]


def test_a_network_of_many_layers_answers_the_same(tmp_path, capfd):
    classifier = network("mobilenetv2")
    folder = tmp_path / "out"
    record = export_bundle(bundle_of(classifier, 0.8), folder, "onnx", pictures())
    assert record["check"]["greatest_difference"] <= TOLERANCE
    assert record == read_json(folder / "export.json")
    assert [x["name"] for x in record["inputs"]] == ["image"]
    assert record["inputs"][0]["shape"] == ["N", 32, 32, 3]
    images = squares(classifier)
    expected = temper(classifier.predict(images), 0.8)
    assert expected.max() > 0.5  # and not a row of equal probabilities
    ask = export._FORMS["onnx"].open(folder / record["file"])
    for n in (3, 1, 2):  # the batch size is free
        found = ask({"image": images[:n].astype("float32")})
        np.testing.assert_allclose(found, expected[:n], atol=TOLERANCE)
    assert not capfd.readouterr().out


@pytest.mark.parametrize("form", FORMS)
def test_an_ensemble_of_two_sizes_with_metadata_is_one_graph(
    form, parts, tmp_path, capfd
):
    bundle = ensemble_of(parts, temperature=2.5, combine="learned")
    record = export_bundle(bundle, tmp_path / "out", form)
    inputs = {x["name"]: x for x in record["inputs"]}
    assert {*inputs} == {"image_32_crop", "image_24_pad", "image_16_crop", "metadata"}
    assert inputs["metadata"]["columns"] == parts[1][1].encoder.columns
    assert [x["weight"] for x in record["networks"]] == [0.2, 0.5, 0.3, 0.0]
    each = [
        c.predict(squares(c), metadata=PATIENTS if c.encoder else None)
        for _, c in parts
    ]
    expected = temper(mix_probabilities(each, [w for w, _ in parts]), 2.5)
    given = {
        f"image_{c.image_size}_{c.resize}": squares(c).astype("float32")
        for _, c in parts
    }
    given["metadata"] = parts[1][1].encoder.encode(PATIENTS)
    ask = export._FORMS[form].open(tmp_path / "out" / record["file"])
    np.testing.assert_allclose(ask(given), expected, atol=TOLERANCE)
    assert not capfd.readouterr().out


def test_metadata_alone_and_encoders_that_differ(tmp_path):
    only = network(fusion="only", seed=4)
    record = export_bundle(bundle_of(only), tmp_path / "only")
    assert [x["name"] for x in record["inputs"]] == ["metadata"]
    other = replace(only, meta={"metadata": METADATA | {"age_mean": 40.0}})
    record = export_bundle(ensemble_of([(0.5, only), (0.5, other)]), tmp_path / "two")
    assert [x["name"] for x in record["inputs"]] == ["metadata_1", "metadata_2"]
    assert [x["age_mean"] for x in record["inputs"]] == [50, 40]


def test_the_page_says_how_and_its_code_does_it(cnn, tmp_path):
    pad = network(size=24, resize="pad", fusion="concat", seed=1)
    bundle = ensemble_of([(0.5, cnn), (0.5, pad)], temperature=1.5)
    folder = tmp_path / "out"
    export_bundle(bundle, folder, images=pictures(1))
    assert {p.name for p in folder.iterdir()} == {
        "model.onnx",
        "export.json",
        "README.md",
    }
    page = (folder / "README.md").read_text()
    assert "generated images" in page and "no medical device" in page
    assert "below 0.5" in page and "`age=missing`" in page
    # A large JPEG on its side: decoded at a part of its size, then turned.
    turned = Image.Exif()
    turned[0x0112] = 6
    lesion = Image.fromarray(render_view(draw_lesion(3, 1), size=(400, 300))[0])
    lesion.save(folder / "lesion.jpg", quality=90, exif=turned)
    space = {}
    with contextlib.chdir(folder):
        exec(page.split("```")[1].removeprefix("python"), space)
    data = (folder / "lesion.jpg").read_bytes()
    for c, name in ((cnn, "image_32_crop"), (pad, "image_24_pad")):
        square = resize_image(data, c.image_size, c.resize)
        np.testing.assert_array_equal(space["inputs"][name][0], square)
    unknown = pad.encoder.encode(pd.DataFrame(index=[0]))
    np.testing.assert_array_equal(space["inputs"]["metadata"], unknown)


def test_a_loaded_network_with_a_card_is_exported(cnn, tmp_path):
    save_classifier(cnn.model, tmp_path / "model", CLASSES, {"resize": "crop"})
    (tmp_path / "model" / "README.md").write_text("the card")
    bundle = replace(
        bundle_of(load_classifier(tmp_path / "model")), folder=tmp_path / "model"
    )
    export_bundle(bundle, tmp_path / "deep" / "out", "litert", images=pictures(2))
    assert (tmp_path / "deep" / "out" / "model_card.md").read_text() == "the card"


def test_a_wrong_file_is_removed(cnn, tmp_path, monkeypatch):
    real = export._joint_graph

    def wrong(networks, temperature, names):
        return real(networks, temperature * 1.01, names)

    monkeypatch.setattr(export, "_joint_graph", wrong)
    with pytest.raises(
        ConfigError, match="predicts differently.* by up to 0.0.* itself by"
    ):
        export_bundle(bundle_of(cnn), tmp_path / "out")

    def broken(*_):
        raise RuntimeError("no such\n  operation")

    monkeypatch.setattr(export, "_joint_graph", broken)
    with pytest.raises(
        ConfigError, match=r"\(no such operation\): try litert, saved_model"
    ):
        export_bundle(bundle_of(cnn), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_said_in_a_sentence(cnn, tmp_path, monkeypatch):
    bundle, out = bundle_of(cnn), tmp_path / "out"
    with pytest.raises(ConfigError, match="export form 'tflite': .*onnx, litert"):
        export_bundle(bundle, out, "tflite")
    ranked = ensemble_of([(0.5, cnn), (0.5, cnn)], combine="rank")
    nested = replace(
        ranked, combine="mean", members=(BundleMember("a", 1.0, ranked),) * 2
    )
    for one in (ranked, nested):
        with pytest.raises(
            ConfigError, match="combines ranks .* combined by 'mean' or"
        ):
            export_bundle(one, out)
    with pytest.raises(ConfigError, match="image 1 .* must be uint8"):
        export_bundle(bundle, out, images=[pictures(1)[0], np.zeros((3, 3))])
    with pytest.raises(ConfigError, match="no image to check"):
        export_bundle(bundle, out, images=[])
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(ConfigError, match=r"tf2onnx.*pip install 'dermnb\[export\]'"):
        export_bundle(bundle, out)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ConfigError, match="KERAS_BACKEND=tensorflow"):
        export_bundle(bundle, out, "litert")
    assert not list(tmp_path.iterdir())
    out.write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        export_bundle(bundle, out, "litert")
    assert out.read_text() == "mine"


def test_half_precision_is_repeated_by_saved_model_alone(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half = bundle_of(network())
    finally:
        keras.config.set_dtype_policy("float32")
    for form in ("onnx", "litert"):
        with pytest.raises(ConfigError, match="computes in bfloat16.*as 'saved_model'"):
            export_bundle(half, tmp_path / "out", form)
    export_bundle(half, tmp_path / "out", "saved_model", images=pictures())


def test_a_temperature_of_any_size_loses_no_small_probability(cnn, tmp_path):
    # Weights that differ by far, and an answer sharpened twentyfold.
    bundle = ensemble_of([(1 - 1e-6, cnn), (1e-6, network(seed=5))], temperature=0.05)
    record = export_bundle(bundle, tmp_path / "cold", images=pictures())
    assert record["check"]["greatest_difference"] <= TOLERANCE
    hot = replace(bundle, decision=Decision(temperature=20.0))
    export_bundle(hot, tmp_path / "hot", images=pictures())
