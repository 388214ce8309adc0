"""What several tests need: a small generated dataset, made once, and where real data may lie."""

import os
import sys
from pathlib import Path

import pytest

from dermnb.core import backend

backend()  # tests import Keras as they like

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    "Keep decoded images of tests out of the project."
    os.environ["DERMNB_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def precision():
    "A network that a test builds computes in float32, whatever the training before it was in."
    yield
    if "keras" in sys.modules:
        sys.modules["keras"].config.set_dtype_policy("float32")


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory):
    "About 200 generated images in ISIC 2019's format."
    from dermnb.data.synthetic import generate_demo

    return generate_demo(tmp_path_factory.mktemp("demo") / "demo", lesions=100, seed=7)


@pytest.fixture(scope="session")
def demo_suite(tmp_path_factory):
    "Pages of four networks, a run that failed and one that is missing."
    from fabricate import make_suite

    from dermnb.report.build import build_report

    folder = make_suite(tmp_path_factory.mktemp("reports") / "demo")
    build_report(folder)
    return folder


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    "Pages with claims, a leak, repeats, folds, an ensemble, and a run made from another."
    from fabricate import make_study

    from dermnb.report.build import build_report

    folder = make_study(tmp_path_factory.mktemp("reports") / "study", resamples=100)
    build_report(folder)
    return folder


@pytest.fixture(scope="session")
def four_runs(tmp_path_factory):
    "Two like networks, a much better one, and one that leaks by what the audit found."
    from fabricate import AUDIT, make_run

    from dermnb.report.build import build_report

    folder, quick = tmp_path_factory.mktemp("reports") / "s", {"resamples": 50, "notebook": False}
    clean = {"audit": AUDIT | {"leaks": {}, "findings": []}}
    make_run(folder / "a", 1.5, 0, facts=True, record=clean, **quick)
    make_run(folder / "b", 1.5, 1, facts=True, record=clean, **quick)
    make_run(folder / "c", 4.0, 2, facts=True, **quick)
    make_run(folder / "d", 4.0, 3, record={"audit": AUDIT}, allow_leakage=True, **quick)
    build_report(folder)
    return folder
