"""Every suite that comes with the project, from its file to its report, on generated images.

The name puts this file first, so that its long runs start while the other tests run beside them.
Kernels are warm but for those of `test_folds`, which loads all again as a run outside of tests does.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from warm_kernel import warm_kernels

from dermnb.core import read_json
from dermnb.runs.folders import validate_run
from dermnb.runs.suites import load_suite, resolve_suite

ROOT = Path(__file__).resolve().parent.parent
DERMNB = Path(sys.executable).parent / "dermnb"


def run_smoke(suite, reports, data_dir, *more, env=None) -> tuple[dict, dict[str, dict], str]:
    "suite.json, run.json of every run, and the report's text."
    file = suite if isinstance(suite, Path) else Path(f"nbs/suites/{suite}.yaml")
    command = [str(DERMNB), "run", str(file), "--profile", "smoke", "--workers", "2"]
    command += ["--reports", str(reports), "--data-dir", str(data_dir), *more]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=540,
            env=os.environ | (env or {}),
        )
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"still running after {late.timeout} s: {late.stdout}\n{late.stderr}")
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    folder = Path(reports) / f"{file.stem}-smoke"
    record = read_json(folder / "suite.json")
    assert {r["status"] for r in record["runs"]} == {"done"}
    runs = {r["run"]: validate_run(folder / r["run"]) for r in record["runs"]}
    page = (folder / "index.html").read_text()
    for name in runs:
        assert name in page
        assert (folder / name / "report.html").is_file()
    return record, runs, re.sub(r"\s+", " ", page)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    with warm_kernels(tmp_path_factory.mktemp("warm")) as env:
        yield env


def test_derm_categories(reports, demo_dir, warm):
    _, runs, page = run_smoke("derm_categories", reports, demo_dir, env=warm)
    base = reports / "derm_categories-smoke" / "xception_weighted"
    trained = pd.read_parquet(base / "split.parquet").query("split == 'train'")["image_id"]
    specialists = [name for name, run in runs.items() if run["notebook"] == "transfer"]
    assert specialists == ["acne_rosacea", "bullous", "eczema", "skin_cancer"]
    for name in specialists:
        run = runs[name]
        assert list(run["parents"]) == ["xception_weighted"]
        assert [s["train"] for s in run["stages"]] == ["head", "layers:5"]
        folder = base.parent / name
        tested = pd.read_parquet(folder / "predictions.parquet")["image_id"]
        assert not set(tested) & set(trained)
    assert runs["skin_cancer"]["classes"] == ["MEL", "BCC", "SCC"]
    assert "Claimed and measured" in page


def test_cnn_ensemble_on_turkish_folders(reports, demo_dir, warm, tmp_path):
    "Six folders with Turkish names, read by a taxonomy file alone."
    from dermnb.data.datasets import load_dataset

    names = ["Enfeksiyonel", "Ekzama", "Akne", "Pigment bozuklukları"]
    names += ["Benign pigmentli lezyonlar", "Malign"]
    manifest = load_dataset("demo", demo_dir).manifest
    for i, label in enumerate(["DF", "VASC", "AK", "BKL", "NV", "MEL"]):
        folder = tmp_path / names[i]
        folder.mkdir()
        for path in manifest.query("label == @label")["path"]:
            shutil.copy(path, folder)
    more = ["-p", "dataset=folders", "-p", "taxonomy=cilt6", "-p", "subset=0"]
    _, runs, page = run_smoke("cnn_ensemble", reports, tmp_path, *more, env=warm)
    draws = {r["train_draw"]["hash"] for r in runs.values() if r["notebook"] == "train"}
    assert len(draws) == 1
    hashes = {r["dataset"]["manifest_hash"] for r in runs.values()}
    assert len(hashes) == 1
    assert runs["ensemble"]["classes"][0] == "Enfeksiyonel"
    assert "Pigment bozuklukları" in page
    weights = [m["weight"] for m in runs["ensemble"]["ensemble"]["members"]]
    assert weights == pytest.approx([0.3, 0.3, 0.4])
    assert "63.84" in page or "0.638" in page  # the claimed F1 that cannot be


def test_binary_lesions(reports, demo_dir, warm):
    _, runs, page = run_smoke("binary_lesions", reports, demo_dir, env=warm)
    assert runs["alexnet"]["classes"] == ["benign", "malignant"]
    folder = reports / "binary_lesions-smoke"
    for name, run in runs.items():
        val = run["split"]["val"]["per_class"]
        assert val["benign"] == val["malignant"]
        scored = read_json(folder / name / "metrics.json")["splits"]["test"]["binary"]
        assert scored["positive"] == "malignant"
        assert 0 <= scored["metrics"]["partial_auc"]["value"] <= 0.2
    assert "partial AUC" in page or "Partial AUC" in page


def test_ham10000(reports, demo_dir, warm):
    _, runs, page = run_smoke("ham10000", reports, demo_dir, env=warm)
    assert runs["cnn_focal"]["leak"] == {"lesions": 0, "val_images": 0, "test_images": 0}
    assert runs["cnn_focal_image_split"]["leak"]["test_images"] > 0
    assert all(s["early_stopping"] == 0 for r in runs.values() for s in r["stages"])
    assert "Leakage" in page


def test_isic2019(reports, demo_dir, warm):
    _, runs, _ = run_smoke("isic2019", reports, demo_dir, env=warm)
    looked = read_json(reports / "isic2019-smoke" / "cnn" / "explain.json")
    assert looked["n"] == 8 and looked["masks"] == "dataset"
    page = (reports / "isic2019-smoke" / "cnn" / "report.html").read_text()
    assert ">Saliency" in page and page.count("data:image/jpeg") == 2 * len(looked["gallery"])
    assert not (reports / "isic2019-smoke" / "efficientnetb5" / "explain.json").exists()
    assert runs["cnn"]["config"]["loss"] == "focal"
    assert runs["cnn"]["stages"][0]["decay"] == "plateau"
    assert runs["efficientnetb5"]["config"]["optimizer"] == "sgd"


def test_backbones(reports, demo_dir, warm):
    _, runs, _ = run_smoke("backbones", reports, demo_dir, env=warm)
    networks = {r["model"]["backbone"] for r in runs.values()}
    assert networks >= {"cnn", "xception", "efficientnetb0"}
    plan = resolve_suite(load_suite("backbones"), profile="gpu")
    large = {"efficientnetb5", "efficientnetb7"}  # of which B0 stands for the first here
    assert large | networks >= {p.config.backbone for p in plan} >= large


def test_multimodal(reports, demo_dir, warm):
    _, runs, page = run_smoke("multimodal", reports, demo_dir, env=warm)
    assert runs["concat"]["metadata"]["fusion"] == "concat"
    assert runs["concat_shuffled"]["metadata"]["shuffled"] is True
    assert runs["image_only"]["metadata"] is None
    assert len({r["dataset"]["manifest_hash"] for r in runs.values()}) == 1
    assert "Paired differences" in page


def test_folds(tmp_path, demo_dir):
    "Every image is tested once, and the page shows each fold and their mean."
    (tmp_path / "cv.yaml").write_text(
        "{title: Two folds, question: Do they agree, repeats: {folds: 2}, runs: {cnn: {}},"
        " defaults: {dataset: demo},"
        " profiles: {smoke: {image_size: 32, epochs: 1, bootstrap: 100}}}"
    )
    record, runs, page = run_smoke(tmp_path / "cv.yaml", tmp_path, demo_dir)
    assert [r["repeat"] for r in record["runs"]] == ["fold 0", "fold 1"]
    assert list(runs) == ["cnn-fold0", "cnn-fold1"]
    tables = [
        pd.read_parquet(tmp_path / "cv-smoke" / name / "predictions.parquet")
        for name in runs
    ]
    tested = [set(t.query("split == 'test'")["image_id"]) for t in tables]
    assert not tested[0] & tested[1]
    split = pd.read_parquet(tmp_path / "cv-smoke" / "cnn-fold0" / "split.parquet")
    assert tested[0] | tested[1] == set(split["image_id"])
    assert "Repeats" in page
