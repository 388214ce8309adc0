"""What several tests need: a small generated dataset, made once, and where real data may lie."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    "Keep decoded images of tests out of the project."
    os.environ["DERMNB_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory):
    "About 200 generated images in ISIC 2019's format."
    from dermnb.data.synthetic import generate_demo

    return generate_demo(tmp_path_factory.mktemp("demo") / "demo", lesions=100, seed=7)
