"""Checks of explanations, on models and maps whose answers are known."""

import os
import shutil
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats
from tolerances import FLOAT32

from dermnb.core import ConfigError, make_config, read_json
from dermnb.data.datasets import load_dataset
from dermnb.runs.ensemble import run_ensemble
from dermnb.serve import explain
from dermnb.serve.explain import explain_run
from dermnb.serve.saliency import (
    _random_field,
    border_only,
    central_masks,
    cover_lesion,
    deletion_insertion,
    inside_share,
    parameter_randomization,
    rank_correlation,
    reinitialized_weights,
)
from dermnb.nets.gradcam import CamNetwork
from dermnb.nets.models import build_classifier, load_classifier, save_classifier
from dermnb.serve.predict import Predictor
from dermnb.runs.folders import runs_of
from dermnb.runs.train import run_experiment


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def pictures(rng, n=3, side=16) -> np.ndarray:
    return rng.integers(0, 256, (n, side, side, 3)).astype("uint8")


def test_no_order_beats_that_of_a_sum(rng):
    "If each pixel counts for itself, its contribution is the best of all maps."
    images = pictures(rng)
    weights = rng.normal(size=(16, 16))
    shown = []

    def ask(given):
        assert given.dtype == "uint8" and given.shape == images.shape
        shown.append(given)
        p = 0.5 + (given.mean(axis=3) / 255 * weights).sum((1, 2)) / 200
        return np.stack([1 - p, p], axis=1)

    deletion_insertion(ask, images, np.zeros((3, 16, 16)), [1] * 3, steps=1)
    assert len(shown) == 2  # nothing gone, and everything
    blurred = shown[1]
    lost = (images.mean(axis=3) - blurred.mean(axis=3)) * weights
    shown.clear()
    best = deletion_insertion(ask, images, lost, [1] * 3, steps=8)
    assert len(shown) == 4 * 8 - 2
    np.testing.assert_array_equal(shown[0], images)
    np.testing.assert_array_equal(shown[1], blurred)
    for _ in range(5):
        other = deletion_insertion(ask, images, rng.random((3, 16, 16)), [1] * 3, steps=8)
        assert (best["deletion"]["area"] < other["deletion"]["area"]).all()
        assert (best["insertion"]["area"] > other["insertion"]["area"]).all()
        # The baseline is that of the seed, whatever the map.
        for part in ("deletion", "insertion"):
            np.testing.assert_array_equal(other[part]["random"], best[part]["random"])
    for part in (best["deletion"], best["insertion"]):
        # The trapezium rule over the curve of one image; their mean is that of the curves.
        assert part["area"].mean() == pytest.approx(np.trapezoid(part["curve"], best["share"]))
        assert part["area"].shape == part["random_area"].shape == (3,)
        assert part["curve"].shape == part["random"].shape == (9,)
    # The other class loses what this one gains.
    turned = deletion_insertion(ask, images, lost, [0] * 3, steps=8)["deletion"]["area"]
    np.testing.assert_allclose(turned, 1 - best["deletion"]["area"], atol=1e-12)
    mixed = deletion_insertion(ask, images, lost, [0, 1, 0], steps=8)["deletion"]["area"]
    np.testing.assert_allclose(mixed[:2], [turned[0], best["deletion"]["area"][1]])


def test_random_order_is_no_better_than_a_random_map(rng):
    "A map that knows nothing has the baseline's area, up to chance."
    side, n = 32, 200
    images = np.zeros((n, side, side, 3), "uint8")
    where = rng.integers(0, side - 8, (n, 2))
    for image, (y, x) in zip(images, where, strict=True):
        image[y : y + 8, x : x + 8] = 255

    def ask(given):
        p = np.stack(
            [g[y : y + 8, x : x + 8].mean() / 255 for g, (y, x) in zip(given, where, strict=True)]
        )
        return np.stack([1 - p, p], axis=1)

    maps = np.stack([_random_field(rng, 8, side) for _ in range(n)])
    found = deletion_insertion(ask, images, maps, [1] * n, steps=8)["deletion"]
    difference = found["area"] - found["random_area"]
    assert abs(difference.mean()) < 3 * difference.std() / np.sqrt(n)


def test_rank_correlation(rng):
    a = rng.random((4, 5, 5)).round(1)  # with ties
    b = rng.random((4, 5, 5)).round(1)
    expected = [stats.spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(rank_correlation(a, b), expected)
    np.testing.assert_allclose(rank_correlation(a, np.exp(3 * a)), 1)
    np.testing.assert_allclose(rank_correlation(a, -a), -1)
    assert np.isnan(rank_correlation(a, np.ones_like(a))).all()


def values(model) -> dict:
    return {x.name: x.get_weights() for x in model.layers if x.weights}


def reinitialized(model, part, seed=0) -> dict:
    with reinitialized_weights(model, part, seed):
        return values(model)


def changed(a, b) -> set[str]:
    assert a.keys() == b.keys()
    pairs = {k: zip(a[k], b[k], strict=True) for k in a}
    return {k for k, v in pairs.items() if not all(np.array_equal(x, y) for x, y in v)}


@pytest.mark.parametrize("fusion", ["concat", "metablock"])
def test_reinitialization_of_a_saved_network(fusion, tmp_path, rng):
    "With metadata, batch normalization and half precision, and the softmax of a saved one."
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = build_classifier(
            "cnn", 3, 16, [8], batch_norm=True, fusion=fusion, metadata_columns=4
        )
    finally:
        keras.config.set_dtype_policy("float32")
    for layer in model.layers:  # as if trained: no value is that of an initializer
        layer.set_weights([w + rng.uniform(0.1, 0.2, w.shape) for w in layer.get_weights()])
    save_classifier(model, tmp_path, "abc")
    model = load_classifier(tmp_path).model
    head = {"head_dense_1", "head_bn_1", "logits"}
    trained, every = values(model), reinitialized(model, "all")
    assert changed(trained, reinitialized(model, "head")) == head
    assert changed(trained, every) == set(trained)
    assert not changed(every, reinitialized(model, "all"))
    assert changed(every, reinitialized(model, "all", seed=1)) > {"conv1", "logits"}
    with pytest.raises(ZeroDivisionError), reinitialized_weights(model, "all"):
        raise ZeroDivisionError
    assert not changed(trained, values(model))
    given = {"image": pictures(rng), "metadata": rng.normal(size=(3, 4))}
    other = build_classifier("cnn", 3, 16, seed=1, fusion=fusion, metadata_columns=4)
    networks = [CamNetwork(m, "cnn") for m in (model, other)]

    def maps_of():
        return np.mean([n.explain(given, [0, 1, 2])[2] for n in networks], 0)

    before = maps_of()
    found = parameter_randomization([model, other], maps_of, repeats=1)
    assert list(found) == ["head", "head_chance", "all", "all_chance"]
    for v in found.values():  # NaN where an untrained network's map is even
        assert v.shape == (3,) and not ((v < 0) | (v > 1)).any()
    assert not changed(trained, values(model))  # left as it was
    same = parameter_randomization([model], lambda: before, repeats=2)
    np.testing.assert_allclose([same["head"], same["all"]], 1)
    # Not 1 - before: in float32 that makes one of two values that differ by less than 6e-8.
    inverted = parameter_randomization(
        [model], lambda: -before if changed(trained, values(model)) else before
    )
    np.testing.assert_allclose(inverted["all"], 1)


def test_preprocessing_is_not_reinitialized(rng):
    model = build_classifier("efficientnetb0", 3, 32)
    norm = next(x for x in model.layers if isinstance(x, keras.layers.Normalization))
    given = pictures(rng, side=32).astype("float32")
    normalized = keras.Model(model.input, norm.output)
    before = keras.ops.convert_to_numpy(normalized(given))
    with reinitialized_weights(model, "all"):
        np.testing.assert_array_equal(normalized(given), before)
    other = changed(values(model), reinitialized(model, "all"))
    assert norm.name not in other and "stem_conv" in other


def test_inside_share(rng):
    masks = rng.random((5, 9, 9)) < 0.3
    maps = rng.random((5, 9, 9)) * np.array([1, 1e-9, 1e9, 1, 1])[:, None, None]
    share, area = inside_share(maps, masks)
    rest, other = inside_share(maps, ~masks)
    np.testing.assert_allclose(share + rest, 1)
    np.testing.assert_allclose(area + other, 1)
    np.testing.assert_allclose(inside_share(np.full_like(maps, 2), masks)[0], area)
    np.testing.assert_allclose(inside_share(maps, 255 * masks)[0], share)


def test_covered_and_border(rng):
    images, masks = pictures(rng, side=20), np.zeros((3, 20, 20), bool)
    masks[0, 5:8, 6:9] = True
    masks[1] = True
    covered = cover_lesion(images, masks, margin=0.1)
    inside = np.zeros((20, 20), bool)
    inside[3:10, 4:11] = True
    np.testing.assert_array_equal(covered[0][~inside], images[0][~inside])
    mean = images[0][~inside].mean(axis=0).round()
    assert (covered[0][inside] == mean).all()
    assert (covered[1] == images[1].mean((0, 1)).round()).all()
    np.testing.assert_array_equal(covered[2], images[2])
    border = border_only(images, 0.1)
    assert (border != images).any(axis=(0, 3)).sum() == 16 * 16
    np.testing.assert_array_equal(border_only(border, 0.1), border)
    for size in (16, 33):
        middle = central_masks(2, size)
        assert middle.shape == (2, size, size) and middle.dtype == bool
        np.testing.assert_array_equal(middle, middle[:, ::-1, ::-1])
        assert middle.mean() == pytest.approx(0.33, abs=0.02)


def test_bad_input(rng):
    images = pictures(rng)
    maps = np.zeros((3, 16, 16))
    with pytest.raises(ConfigError, match="must be uint8"):
        cover_lesion(images.astype("float32"), maps)
    with pytest.raises(ConfigError, match="maps of shape"):
        deletion_insertion(None, images, maps[:2], [0, 0, 0])
    with pytest.raises(ConfigError, match="1 step or more"):
        deletion_insertion(None, images, maps, [0, 0, 0], steps=0)
    with pytest.raises(ConfigError, match="border width 0 "):
        border_only(images, 0)


@pytest.fixture(scope="module")
def suite(demo_dir, tmp_path_factory):
    "Two small runs, one with metadata, and their ensemble."
    folder = tmp_path_factory.mktemp("suite")
    small = {"image_size": 32, "epochs": 1, "batch_size": 16, "bootstrap": 100}
    small["data_dir"] = str(demo_dir)
    for name, metadata in (("plain", "none"), ("fused", "concat")):
        config = make_config({**small, "run": name, "metadata": metadata})
        run_experiment(config, folder / name)
    both = {"run": "both", "members": ["plain", "fused"], "member_weights": [1, 3]}
    run_ensemble(make_config({**both, "bootstrap": 100}), folder / "both")
    return folder


def without_some(paths, size, method, whole=explain._masks):
    masks, masked = whole(paths, size, method)
    masks[:3], masked[:3] = True, False
    return masks, masked


@pytest.mark.parametrize("name", ["plain", "fused", "both"])
def test_a_run_is_explained(suite, demo_dir, name, monkeypatch):
    if name == "fused":  # as if three images had no mask
        monkeypatch.setattr(explain, "_masks", without_some)
    report = explain_run(suite / name, str(demo_dir), images=10)
    masked = 7 if name == "fused" else 10
    assert report["masked"] == report["inside"]["share"]["n"] == masked
    assert {report["shortcuts"][v]["accuracy"]["n"] for v in ("plain", "covered")} == {masked}
    assert report == read_json(suite / name / "explain.json")
    assert report["n"] == 10 and report["masks"] == "dataset" and report["synthetic"]
    tested = pd.read_parquet(suite / name / "predictions.parquet").set_index("image_id")
    for entry in report["gallery"]:
        row = tested.loc[entry["image_id"]]
        assert row["split"] == "test" and row["y_true"] == entry["y_true"]
        right = entry["y_true"] == entry["predicted"]
        assert entry["group"].startswith("right" if right else "wrong")
        for file in (entry["file"], entry["map"]):
            assert Image.open(suite / name / file).size == (224, 224)
    for part in ("deletion", "insertion"):
        found = report[part]
        assert len(found["curve"]) == len(found["random"]) == len(found["share"]) == 11
        area = np.trapezoid(found["curve"], found["share"])
        assert found["area"]["value"] == pytest.approx(area) and found["area"]["n"] == 10
    assert all(0 <= r["value"] <= 1 for r in report["randomization"].values())
    plain = report["shortcuts"]["plain"]["accuracy"]
    shown = tested.loc[tested["split"] == "test"]
    assert 0 <= plain["value"] <= 1 and report["shortcuts"]["majority"] >= 1 / len(shown)
    assert {f["kind"] for f in report["foreign"]} >= {"uniform noise", "one color"}
    assert sum(f["refused"] for f in report["foreign"]) >= 40
    assert list(report["fields"].values()) == [16] * (2 if name == "both" else 1)


def test_a_bundle_of_an_earlier_version_is_completed(suite, demo_dir, tmp_path):
    old = tmp_path / "suite"
    shutil.copytree(suite, old)
    whole = Predictor(old / "both")
    for name in ("plain", "fused", "both"):
        for file in ("decision.json", "README.md", "novelty.npz"):
            (old / name / "model" / file).unlink(missing_ok=True)
    shutil.rmtree(old / "both" / "model" / "members")
    with pytest.raises(ConfigError, match="dermnb explain"):
        Predictor(old / "both")
    assert [run.name for run in runs_of(old)] == ["fused", "plain", "both"]
    explain_run(old / "both", str(demo_dir), images=4)
    again = Predictor(old / "both")
    assert again.bundle.decision == whole.bundle.decision
    image = next((demo_dir / "ISIC_2019_Training_Input").glob("*.jpg"))
    one, other = (p([image])[0] for p in (whole, again))
    assert one.probabilities == pytest.approx(other.probabilities, abs=FLOAT32)
    # A distance of 1e-2 or more from a cosine near 1, and its limit: both within FLOAT32.
    assert one.novelty == pytest.approx(other.novelty, rel=2 * FLOAT32 / 1e-2)


def test_what_cannot_be_explained(suite, demo_dir, tmp_path):
    from dermnb.data.synthetic import generate_demo

    with pytest.raises(ConfigError, match="neither a finished run"):
        runs_of(tmp_path)
    other = generate_demo(tmp_path / "demo", lesions=5, seed=1)
    with pytest.raises(ConfigError, match="not in the data folder"):
        explain_run(suite / "plain", str(other))
    shutil.copytree(suite / "plain", tmp_path / "lost")
    (tmp_path / "lost" / "model" / "model.keras").unlink()
    with pytest.raises(ConfigError, match="has lost its network"):
        explain_run(tmp_path / "lost", str(demo_dir))


REAL = os.environ.get("DERMNB_REAL_DATA", Path(__file__).parents[2] / "shared" / "data")
REAL = Path(REAL) / "ham10000"


@pytest.mark.skipif(
    not (REAL / "HAM10000_segmentations_lesion_tschandl.zip").is_file(),
    reason=f"real masks are absent: set DERMNB_REAL_DATA (looked in {REAL})",
)
def test_every_image_of_ham10000_has_its_mask_and_two_have_no_border():
    masks = load_dataset("ham10000", REAL).manifest.set_index("image_id")["mask"]
    ids = masks.str.extract(r"/(ISIC_\d+)_segmentation\.png$")[0]
    assert (ids == ids.index).all() and len(ids) == 10_015
    filled = masks[["ISIC_0026042", "ISIC_0029819"]]
    some = pd.concat([masks.drop(filled.index).sample(20, random_state=0), filled])
    found, masked = explain._masks(some, 64, "crop")
    assert masked.tolist() == [True] * 20 + [False] * 2
    assert 0.05 < found[:20].mean() < 0.6
