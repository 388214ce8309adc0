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
