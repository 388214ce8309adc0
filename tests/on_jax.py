"""Run by test_jax.py, on a Python without TensorFlow: the same networks and pixels as there, and a suite from file to answers."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dermnb.core import backend, read_arrays, read_json
from dermnb.data import images
from dermnb.nets import device, features
from dermnb.nets.gradcam import cam_network
from dermnb.nets.models import build_classifier, load_classifier, probabilities
from dermnb.runs.folders import validate_run

GIVEN = Path(os.environ["DERMNB_GIVEN"])
ARRAYS = read_arrays(GIVEN / "arrays.npz")
PIXELS = ARRAYS["pixels"].astype("float32")
FLOAT = 2e-6  # of a probability: sums of some thousand float32 products in another order


def test_there_is_no_tensorflow():
    assert backend() == "jax" and find_spec("tensorflow") is None and find_spec("keras_cv") is None
    required = [r for r in importlib.metadata.requires("dermnb") or () if "extra ==" not in r]
    assert required and not [r for r in required if re.match("tensorflow|keras-cv|jax", r)]


@pytest.mark.parametrize("name", ["cnn", "mobilenetv2"])
def test_a_seed_gives_the_network_that_it_gives_on_tensorflow(name):
    network = build_classifier(name, 5, 32, head=[6], dropout=0.0, seed=3)
    np.testing.assert_allclose(probabilities(network, [PIXELS]), ARRAYS[name], atol=FLOAT)


def test_a_network_saved_on_tensorflow_answers_here_and_is_compiled_once():
    network = load_classifier(GIVEN / "cnn").model
    seer = cam_network(network)
    for n in (8, 5, 7):
        seen = seer.see(PIXELS[:n])
        np.testing.assert_allclose(seen.probabilities, ARRAYS["cnn"][:n], atol=FLOAT)
        assert seer.maps(seen).shape[0] == n and len(seen.features) == n


def test_pixels_are_varied_as_by_keras_cv():
    settings = {k.removeprefix("setting_"): v for k, v in ARRAYS.items() if k.startswith("setting_")}
    varied = images._dermoscopy_in_jax()(ARRAYS["pixels"], settings)
    assert np.abs(varied - ARRAYS["varied"]).max() < 0.05  # of 255, by all steps together
    drawn = images.batch_generator(0, 1, 2)
    first = images.augment_images(ARRAYS["pixels"], "dermoscopy", drawn)  # with JPEG
    again = images.augment_images(ARRAYS["pixels"], "dermoscopy", images.batch_generator(0, 1, 2))
    np.testing.assert_array_equal(first, again)


def test_batches_of_training_have_one_size():
    class Store:
        def read(self, rows):
            return ARRAYS["pixels"][rows]

    for count, sizes in ((8, [3, 3, 3]), (7, [3, 3, 3]), (2, [2])):
        batches = images.make_batches(Store(), np.arange(count), np.zeros(count, int), 2, 3, shuffle=True)
        assert [len(batches[i][0]) for i in range(len(batches))] == sizes
        order = np.concatenate([batches.positions(i) for i in range(len(batches))])
        assert sorted(order[:count]) == list(range(count))
        np.testing.assert_array_equal(order[count:], order[: len(order) - count])


def test_a_view_has_each_image_once_though_batches_are_filled():
    class Store:
        def read(self, rows):
            return ARRAYS["pixels"][rows]

    train, val = (
        images.make_batches(Store(), rows, np.zeros(len(rows), int), 2, 3, shuffle, "light")
        for rows, shuffle in ((np.arange(5), True), (np.arange(5, 8), False))
    )
    known = features._Images(train, val, views=2)
    read = [which for which, _ in known.read(np.ones(len(known.ids), bool), 64)]
    assert sorted(np.concatenate(read)) == [*range(3 + 2 * 5)]


def dermnb(*args: str) -> str:
    command = [sys.executable, "-c", "from dermnb.cli import main; main()", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_suite_from_its_file_to_answers(tmp_path):
    data_dir = read_json(GIVEN / "about.json")["data_dir"]
    suite = ["run", str(GIVEN / "on_jax.yaml"), "--profile", "smoke", "--data-dir", data_dir]
    dermnb(*suite, "--reports", str(tmp_path))
    folder = tmp_path / "on_jax-smoke" / "cnn"
    record = validate_run(folder)
    assert record["provenance"]["backend"] == "jax" and "tensorflow" not in record["provenance"]["packages"]
    page = (folder / "report.html").read_text()
    assert "Saliency" in page
    # The same weights at first, the same batches: what TensorFlow trained, but for rounding.
    ours, theirs = pd.read_parquet(folder / "predictions.parquet"), pd.read_parquet(GIVEN / "trained.parquet")
    assert ours["image_id"].tolist() == theirs["image_id"].tolist()
    names = [c for c in theirs if c.startswith("p_")]
    np.testing.assert_allclose(ours[names], theirs[names], atol=1e-3)
    photographs = sorted(map(str, Path(data_dir).rglob("*.jpg")))[:3]
    said = dermnb("predict", *photographs, "--model", str(folder), "--json")
    answers = [json.loads(line) for line in said.splitlines()]
    assert [len(answer["probabilities"]) for answer in answers] == [8, 8, 8]


TRAIN_ON_DEVICE = """
import sys
import keras
import numpy as np
from dermnb.core import make_config
from dermnb.data.images import ImageStore, make_batches
from dermnb.nets.backbones import BACKBONES
from dermnb.nets.device import share_devices
from dermnb.nets.finetune import Stage, fit_stages
from dermnb.nets.models import build_classifier

print("devices", share_devices())
rng = np.random.default_rng(0)
labels = rng.integers(0, 3, 91)
pixels = (rng.integers(0, 90, (91, 32, 32, 3)) + 60 * labels[:, None, None, None]).astype("uint8")
store = ImageStore(pixels, {}, 32, "crop", "", 0, 0.0, {}, np.zeros(91, np.uint32), np.ones(91, bool))
network = build_classifier("cnn", 3, 32, head=[4], dropout=0.0, seed=0)
train = make_batches(store, np.arange(60), labels[:60], 3, 16, True, "light", "mixup", seed=3)
val = make_batches(store, np.arange(60, 91), labels[60:], 3, 16)
stage = Stage("all", 2, train_batch_norm=True, warmup_epochs=0.5, decay="cosine")
loss = keras.losses.CategoricalCrossentropy(from_logits=True)
history = fit_stages(network, BACKBONES["cnn"], (stage,), train, val, loss, make_config({}))
columns = ["loss", "accuracy", "val_loss", "val_accuracy"]
np.savez(sys.argv[1], *network.get_weights(), history=history[columns])
"""


TWO = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def test_an_epoch_on_the_device_is_the_plain_one_also_divided_between_two(tmp_path):
    "60 and 31 images in batches of 16: the last one is filled, for validation with images that do not count."
    found = {}
    for name, env in (
        ("plain", {"DERMNB_ON_DEVICE": "0"}),
        ("one", {"DERMNB_ON_DEVICE": "1"}),
        ("two", {"DERMNB_ON_DEVICE": "1", **TWO}),
        ("two plain", {"DERMNB_ON_DEVICE": "0", **TWO}),
    ):
        file = tmp_path / f"{name}.npz"
        command = [sys.executable, "-c", TRAIN_ON_DEVICE, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"devices {2 if name.startswith('two') else 1}\n" in done.stdout
        assert ("images (0.00 GB) lie on" in done.stdout) == ("plain" not in name)
        found[name] = np.load(file)
    for name in ("one", "two", "two plain"):
        for key in found["plain"].files:
            np.testing.assert_allclose(found[name][key], found["plain"][key], rtol=2e-4, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_convolutions_as_products_are_convolutions(stride, padding):
    from jax import lax

    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 8, 4)).astype("float32")
    for k in (1, 3, 5):
        for function, shape, groups in (
            (device.depthwise_products, (k, k, 4, 1), 4),
            (device.patch_products, (k, k, 4, 6), 1),
        ):
            w = rng.normal(size=shape).astype("float32")
            plain = lax.conv_general_dilated(
                *(x, w.reshape(k, k, 4 // groups, -1), (stride, stride), padding.upper()),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )
            np.testing.assert_allclose(function(x, w, stride, padding), plain, rtol=1e-4, atol=1e-5)
