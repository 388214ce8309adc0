"""JAX without TensorFlow: in an environment of its own on a newer Python, installed by the lock, `on_jax.py` is run.

What it has to agree with is computed here, on TensorFlow. The environment is made once, in .venv/jax; DERMNB_JAX_PYTHON names
another Python that has what is needed.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from dermnb.core import backend, make_config, write_json
from dermnb.data import images
from dermnb.nets.models import build_classifier, probabilities, save_classifier
from dermnb.runs.prepare import prepare_data
from dermnb.runs.train import build_model, predict_splits, train_model

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".venv" / "jax"

# No dropout, which each framework draws by itself, and only full batches: of eight classes.
RUN = {"dataset": "demo", "backbone": "cnn", "image_size": 32, "balance": 4, "batch_size": 16, "epochs": 2}
RUN |= {"dropout": 0.0, "augment": "light", "audit": "none", "bootstrap": 100, "seed": 5}


def newer_python() -> str:
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for name in ("python3.12", "python3.13", *sorted(map(str, pyenv.glob("3.1[23].*/bin/python")))):
        try:  # also one that is there may be no Python: a shim
            subprocess.run([name, "-c", "import venv, ensurepip"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return name
    pytest.skip("no Python 3.12 or 3.13 is here, and JAX is tested on one")


@pytest.fixture(scope="module")
def python() -> str:
    if given := os.environ.get("DERMNB_JAX_PYTHON"):
        return given
    python, done = HOME / "bin" / "python", HOME / ".installed"
    needs = [ROOT / "pyproject.toml", ROOT / "requirements.lock"]
    if done.is_file() and done.stat().st_mtime > max(file.stat().st_mtime for file in needs):
        return str(python)
    subprocess.run([newer_python(), "-m", "venv", "--clear", str(HOME)], check=True)
    what = ["--constraint", "requirements.lock", "--editable", ".[jax]", "pytest", "pytest-timeout"]
    # uv is several times as fast, but reads no settings of pip, which a package mirror may need.
    uv = [sys.executable, "-m", "uv", "pip", "install", "--python", str(python)]
    for install in (uv, [str(python), "-m", "pip", "install"]):
        made = subprocess.run([*install, "--quiet", *what], cwd=ROOT, capture_output=True, text=True)
        if made.returncode == 0:
            break
    assert made.returncode == 0, made.stderr[-2000:]
    done.touch()
    return str(python)


@pytest.fixture(scope="module")
def given(tmp_path_factory, demo_dir) -> Path:
    "Answers of TensorFlow, a network that it saved, and a suite."
    folder = tmp_path_factory.mktemp("given")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 32, 32, 3)).astype("uint8")
    arrays = {"pixels": pixels}
    for name in ("cnn", "mobilenetv2"):
        network = build_classifier(name, 5, 32, head=[6], dropout=0.0, seed=3)
        arrays[name] = probabilities(network, [pixels.astype("float32")])
        save_classifier(network, folder / name, list("abcde"), {"image_size": 32, "backbone": name})
    settings = images._dermoscopy_settings(8, 32, np.random.default_rng(1))
    settings |= {"compress": settings["compress"][:0], "quality": settings["quality"][:0]}
    arrays["varied"] = images._dermoscopy_function(32)(pixels, settings)
    arrays |= {f"setting_{k}": v for k, v in settings.items()}
    config = make_config(RUN | {"data_dir": str(demo_dir)})
    data = prepare_data(config.data)
    network = build_model(config, data)
    train_model(config, data, network)
    predict_splits(config, data, network).to_parquet(folder / "trained.parquet")
    np.savez(folder / "arrays.npz", **arrays)
    suite = {"title": "On JAX", "question": "Does it run?", "expected": "It does.", "runs": {"cnn": {}}}
    suite |= {"profiles": {"smoke": {}}, "defaults": RUN | {"explain": 2}}
    (folder / "on_jax.yaml").write_text(yaml.safe_dump(suite))
    write_json(folder / "about.json", {"data_dir": str(demo_dir)})
    return folder


@pytest.mark.skipif(backend() != "tensorflow", reason="it compares with TensorFlow")
def test_jax_without_tensorflow(python, given):
    env = {k: v for k, v in os.environ.items() if k not in ("KERAS_BACKEND", "PYTHONPATH")}
    env |= {"PYTHONPATH": str(ROOT), "DERMNB_GIVEN": str(given)}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations", "5", "tests/on_jax.py"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
