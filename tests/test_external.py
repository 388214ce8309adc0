"""A finished run on other collections: classes, what it was trained on, figures of both, and where all is kept."""

import shutil

import numpy as np
import pandas as pd
import pytest
from fabricate import ISIC8, make_run
from pages import ReadPage
from test_datasets import jpeg, put
from tolerances import FLOAT32

from dermnb.audit.hashes import fingerprints
from dermnb.cli import _test_suite
from dermnb.core import ConfigError, cache_dir, read_json, write_json
from dermnb.data.datasets import load_dataset
from dermnb.metrics.calibration import temper
from dermnb.metrics.comparison import independent_difference
from dermnb.metrics.scores import TableScores, evaluate, probability_columns, unit_numbers
from dermnb.runs.bundle import load_bundle, write_bundle
from dermnb.runs.external import (
    external_results,
    has_network,
    predict_images,
    predict_outside,
    run_external,
)
from dermnb.runs.results import load_run
from dermnb.runs.suites import ExternalTest
from dermnb.serve.examples import example_bundle, example_ensemble
from dermnb.serve.predict import Predictor

KNOWN = 12  # images of the collection that the run was trained on


def add_network(run, seed=0):
    from dermnb.nets.models import build_classifier, save_classifier

    model = build_classifier("cnn", len(ISIC8), 16, seed=seed)
    logits = model.get_layer("logits")
    kernel, bias = logits.get_weights()
    logits.set_weights([kernel * 6, bias])  # else it says the same of every image
    about = {"resize": "crop", "backbone": "cnn", "synthetic": True, "titles": ISIC8, "metadata": None}
    save_classifier(model, run / "model", list(ISIC8), about)
    record, table = read_json(run / "run.json"), pd.read_parquet(run / "predictions.parquet")
    write_bundle(run / "model", record, read_json(run / "metrics.json"), table)


@pytest.fixture(scope="module")
def suite(tmp_path_factory, demo_dir):
    "A run with a network, trained on some images of the generated collection; and one without."
    folder = tmp_path_factory.mktemp("external") / "s"
    for name in ("net", "table"):
        make_run(folder / name, 2.0, facts=True, resamples=50, notebook=False, lesions=200)
    run, manifest = folder / "net", load_dataset("demo", demo_dir).manifest
    add_network(run)
    trained = manifest.iloc[:KNOWN]
    split = pd.read_parquet(run / "split.parquet")
    extra = trained[["image_id", "lesion_id", "label", "age", "sex"]].assign(split="train")
    split = split.assign(image_id="own" + split["image_id"], lesion_id="own" + split["lesion_id"])
    pd.concat([split, extra]).to_parquet(run / "split.parquet", index=False)
    fingerprints(trained, cache_dir()).to_parquet(run / "fingerprints.parquet", index=False)
    states = [{"run": name, "status": "done"} for name in ("net", "table")]
    write_json(folder / "suite.json", {"title": "S", "suite": "s", "runs": states})
    return folder


@pytest.fixture(scope="module")
def tested(suite, demo_dir):
    (place,) = predict_outside(suite / "net", [ExternalTest(dataset="demo", data_dir=str(demo_dir))], say=str)
    return place


def test_predictions_are_those_of_the_network_without_what_it_was_trained_on(suite, tested, demo_dir):
    record, table = read_json(tested / "external.json"), pd.read_parquet(tested / "predictions.parquet")
    manifest = load_dataset("demo", demo_dir).manifest
    lesions = manifest["lesion_id"].iloc[:KNOWN]
    assert record["shared"]["same bytes"] == KNOWN
    assert set(table["image_id"]) == set(manifest.loc[~manifest["lesion_id"].isin(lesions), "image_id"])
    assert sum(record["shared"].values()) + len(table) == len(manifest)
    assert record["dataset"]["synthetic"] and {"age", "sex"} <= set(table)
    paths = manifest.set_index("image_id")["path"]
    answers = Predictor(suite / "net")(paths[table["image_id"][:5]].tolist())
    p = table[probability_columns(ISIC8)].to_numpy()[:5]
    expected = temper(p, Predictor(suite / "net").bundle.decision.temperature)
    found = np.array([[a.probabilities[c] for c in ISIC8] for a in answers])
    assert np.allclose(found, expected, atol=FLOAT32)


def test_what_is_done_is_used_again_until_the_network_changes(suite, tested, demo_dir, tmp_path):
    run, said = tmp_path / "s" / "net", []
    shutil.copytree(suite / "net", run)
    test = ExternalTest(dataset="demo", data_dir=str(demo_dir))
    predict_outside(run, [test], say=said.append)
    assert said == ["net on demo: already done"]
    before = pd.read_parquet(run / "external" / "demo" / "predictions.parquet")
    add_network(run, seed=1)
    predict_outside(run, [test], say=said.append)
    after = pd.read_parquet(run / "external" / "demo" / "predictions.parquet")
    assert len(said) == 2 and not np.allclose(before["p_NV"], after["p_NV"])
    (run / "external" / "demo" / "predictions.parquet").write_bytes(b"cut")
    assert "cannot be read" in external_results(load_run(run))[1][0]
    shutil.copy(suite / "net" / "external" / "demo" / "predictions.parquet", run / "external" / "demo")
    table = pd.read_parquet(run / "predictions.parquet")
    table.sample(frac=1, random_state=0).to_parquet(run / "predictions.parquet")
    assert "other results now" in external_results(load_run(run))[1][0]


def test_other_classes_are_mapped_or_counted(suite, tmp_path):
    folder = tmp_path / "clinic"
    for name, n in (("Malignant melanoma in situ", 2), ("Nevi", 6), ("melanoma", 5), ("wart", 4)):
        for i in range(n):
            put(folder / name / f"{name}{i}.jpg", jpeg(len(name) * 10 + i))
    test = ExternalTest(dataset="folders", data_dir=str(folder), name="clinic")
    (place,) = predict_outside(suite / "net", [test], say=str)
    record = read_json(place / "external.json")
    rows = {row["label"]: (row["class"], row["images"]) for row in record["mapping"]}
    assert rows == {"Nevi": ("NV", 6), "melanoma": ("MEL", 5), "wart": ("", 4), "Malignant melanoma in situ": ("", 2)}
    assert record["absent"] == ["BCC", "AK", "BKL", "DF", "VASC", "SCC"] and record["images"] == 11
    (result,) = [r for r in external_results(load_run(suite / "net"))[0] if r.name == "clinic"]
    own = load_run(suite / "net").predictions.query("split == 'test'")["y_true"].isin(["MEL", "NV"])
    assert result.measured["own"]["scores"]["n"] == own.sum()
    (tmp_path / "mine.yaml").write_text("classes: {MEL: [melanoma, Malignant melanoma in situ], NV: [Nevi, wart]}")
    mapped = test.model_copy(update={"taxonomy": str(tmp_path / "mine.yaml"), "name": "mapped"})
    (place,) = predict_outside(suite / "net", [mapped], say=str)
    assert pd.read_parquet(place / "predictions.parquet")["y_true"].value_counts().to_dict() == {"NV": 10, "MEL": 7}
    (tmp_path / "mine.yaml").write_text("classes: {MEL: [melanoma], skin: [Nevi, wart]}")
    with pytest.raises(ConfigError, match="'skin', which the network does not know"):
        predict_outside(suite / "net", [mapped], say=str)
    shutil.rmtree(place.parent / "clinic"), shutil.rmtree(place)


def test_an_ensemble_is_mixed_and_a_bundle_without_its_run_is_tested(tmp_path, demo_dir):
    members = [example_bundle(tmp_path, "a"), example_bundle(tmp_path, "b", 24, seed=1)]
    both, _ = example_ensemble(tmp_path, members, [0.25, 0.75])
    manifest = load_dataset("demo", demo_dir).manifest.iloc[:6]
    bundle = load_bundle(both)
    first, second = (predict_images(member.bundle, manifest) for member in bundle.members)
    assert np.allclose(predict_images(bundle, manifest), 0.25 * first + 0.75 * second)
    said, alone = [], members[0][0] / "model"
    assert run_external([alone], [ExternalTest(dataset="demo", data_dir=str(demo_dir))], say=said.append) == []
    assert "not known here: nothing was compared" in said[0]
    assert (alone / "external" / "demo" / "predictions.parquet").is_file()


def test_a_run_without_a_network_says_so(suite, demo_dir):
    assert not has_network(suite / "table")
    faults = run_external([suite / "table"], [ExternalTest(dataset="demo", data_dir=str(demo_dir))])
    assert len(faults) == 1 and "has no network here" in faults[0]


def test_thresholds_and_figures_are_the_runs_own(suite, tested):
    run = load_run(suite / "net")
    (result,) = external_results(run)[0]
    outside, own = result.measured["outside"], result.measured["own"]
    assert own["scores"]["metrics"]["accuracy"]["value"] == run.score("accuracy")["value"]
    assert result.measured["temperature"] == run.calibration.decision.temperature
    table = result.table
    for row in outside["thresholds"]:
        val = run.predictions.query("split == 'val' and y_true == @row['class']")[f"p_{row['class']}"]
        cut = np.sort(val)[::-1][int(np.ceil(0.95 * len(val) - 1e-9)) - 1]
        assert row["threshold"] == pytest.approx(cut)
        caught = table.loc[table["y_true"] == row["class"], f"p_{row['class']}"] >= cut
        assert row["sensitivity"]["value"] == pytest.approx(caught.mean())
    q = temper(table[probability_columns(ISIC8)].to_numpy(), result.measured["temperature"])
    out = q.max(axis=1) < result.measured["least"]
    wrong = q.argmax(axis=1) != pd.Index(list(ISIC8)).get_indexer(table["y_true"])
    assert outside["abstained"]["value"] == pytest.approx(wrong[out].mean())


def test_a_difference_has_the_interval_that_resampling_both_gives():
    tables, samples = [], []
    for seed, (n, right) in enumerate(((300, 0.9), (500, 0.7))):
        rng = np.random.default_rng(seed)
        y = rng.integers(0, 2, n)
        answer = np.where(rng.random(n) < right, y, 1 - y)
        table = pd.DataFrame({"image_id": [f"i{i}" for i in range(n)], "lesion_id": None, "split": "test"})
        table = table.assign(y_true=np.array(["a", "b"])[y], p_a=1.0 - answer, p_b=answer.astype(float))
        tables.append(evaluate(table, ["a", "b"], resamples=2000)["splits"]["test"]["metrics"]["accuracy"])
        scorer = TableScores(y, table[["p_a", "p_b"]].to_numpy(), unit_numbers(table), curves=False)
        samples.append(scorer.resample(4000, rng)[0]["accuracy"])
    found = independent_difference(tables[1], tables[0])
    expected = np.quantile(samples[1] - samples[0], [0.025, 0.975])
    assert np.abs(np.array([found["low"], found["high"]]) - expected).max() < 0.006  # of an interval 0.1 wide


def test_the_report_and_a_suite_file_set_both_side_by_side(suite, tested, demo_dir, capsys):
    states = [{"run": name, "status": "done"} for name in ("net", "table")]
    tests = [ExternalTest(dataset="demo", data_dir=str(demo_dir), name="again", recalibrate=True)]
    assert _test_suite(suite, states, tests) == []
    said = capsys.readouterr()
    assert "net on again: balanced accuracy" in said.out and "without a network here" in said.err
    text, index = (ReadPage(p).said("external") for p in (suite / "net" / "report.html", suite / "index.html"))
    for result in external_results(load_run(suite / "net"))[0]:
        value = result.measured["outside"]["scores"]["metrics"]["balanced_accuracy"]["value"]
        assert f"{value:.3f}" in text and f"{value:.3f}" in index
    assert "Abstained rightly" in text and "Recalibration on k images" in text and "same bytes 12" in text
    assert _test_suite(suite, [{"run": "net", "status": "stopped"}], tests) == []


@pytest.mark.parametrize("without", [[], ["theirs"]])
def test_an_ensemble_with_a_table_among_its_members_has_no_network(without, tmp_path):
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model" / "ensemble.json", {"without_network": without})
    assert has_network(tmp_path) is not bool(without)
