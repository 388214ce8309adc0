"""Predictions that anybody made: how tables are read, what they refuse, and runs and pages made of them."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fabricate import make_run

from dermnb.core import PEER_FIELDS, ConfigError, ExperimentConfig, make_config, read_json, write_json
from dermnb.report.build import build_suite_page
from dermnb.runs.bundle import bundle_folder
from dermnb.runs.ensemble import run_ensemble
from dermnb.runs.folders import is_done, why_stale
from dermnb.runs.peer import predictions_of, read_answers, read_truth, reader_rows, run_peer
from dermnb.runs.plan import plan_suite
from dermnb.runs.suites import load_suite, resolve_suite

ROOT = Path(__file__).resolve().parent.parent
LABELS = "image,dx,lesion_id,split\n" + "".join(
    f"i{i},{'mel nv bkl'.split()[i % 3]},l{i // 2},{'val' if i < 12 else 'test'}\n" for i in range(36)
)


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def table(header="image_id,mel,nv,bkl", ids=range(36), row=".7,.2,.1"):
    return f"{header}\n" + "".join(f"i{i},{row}\n" for i in ids)


def said(write, text, labels=LABELS, **more):
    truth = read_truth(write("labels.csv", labels))
    with pytest.raises(ConfigError) as error:
        predictions_of(read_answers(write("given.csv", text), truth, **more), truth, "given.csv")
    sentence = str(error.value)
    assert "given.csv" in sentence and sentence.endswith(".") and "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (table(ids=range(30)), "6 of 36 images of labels.csv have no prediction, such as 'i30', 'i31', 'i32' and 3 more"),
        (table(ids=range(38)), "2 of 38 images have no label in labels.csv, such as 'i36' and 'i37'"),
        (table() + "i3,.7,.2,.1\n", "image 'i3' is there more than once (1 such image)"),
        (table(ids=range(35)) + "i35,.7,.2,\n", "column 'bkl' of image 'i35' is empty"),
        (table(ids=range(35)) + "i35,.7,.2,high\n", "column 'bkl' of image 'i35' holds 'high'"),
        (table(ids=range(35)) + "i35,.7,.2,inf\n", "column 'bkl' of image 'i35' holds 'inf'"),
        (table(ids=range(35)) + "i35,.70,.25,.15\n", "image 'i35' sum to 1.1, not to 1 (1 such row)"),
        (table(row="70,20,10"), "image 'i0' sum to 100, not to 1 (36 such rows)"),
        (table("image_id,mel,nv,scc"), "and 'scc', which labels.csv does not name: none is of class bkl"),
        (table("image_id,mel,nv,bkl,scc", row=".7,.2,.1,.4"), "'scc' is no class of labels.csv (its classes: bkl, mel and nv)"),
        (table("image_id,mel,nv,MEL"), "columns 'mel' and 'MEL' are both of class mel"),
        (table("image_id,prediction", row="scc"), "'scc' of column 'prediction' is no class"),
        (table("a,mel,nv,bkl"), "no column of image ids (there are: a, mel, nv and bkl)"),
        (table("image_id,a,b,c"), "neither a column for each class (bkl, mel and nv) nor one that names the class"),
        (table("image_id,reader,dx", row="R1,mel") + "i3,R1,nv\n", "reader 'R1' answers image 'i3' more than once"),
    ],
)
def test_what_is_not_sound_is_one_sentence(write, text, words):
    assert words in said(write, text)


def test_one_table_in_its_usual_forms(write):
    truth, rng = read_truth(write("labels.csv", LABELS)), np.random.default_rng(0)
    z = rng.normal(size=(36, 3))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    ids = [f"i{i}" for i in range(36)]

    def read(values, columns, name="image_id", ids=ids, **more):
        frame = pd.DataFrame(values, columns=columns).assign(**{name: ids})
        path = write("given.csv", frame.sample(frac=1, random_state=0).to_csv(index=False))
        return predictions_of(read_answers(path, truth, **more), truth, path)

    plain, notes = read(p, ["mel", "nv", "bkl"])
    assert notes == [] and plain["image_id"].tolist() == ids
    np.testing.assert_allclose(plain[["p_mel", "p_nv", "p_bkl"]], p, atol=1e-12)
    for columns, values, more in (
        (["p_MEL", "p_NV", "p_BKL"], p, {"name": "isic_id", "ids": [f"{i.upper()}.jpg" for i in ids]}),
        (["logit_mel", "logit_nv", "logit_bkl"], z, {}),
        (["mel", "nv", "bkl"], z - z.min(), {"form": "logits"}),
    ):
        np.testing.assert_allclose(read(values, columns, **more)[0][["p_mel", "p_nv", "p_bkl"]], p, atol=1e-9)
    other, _ = read(np.c_[0.9 * p, np.full(36, 0.1)], ["mel", "nv", "bkl", "vasc"])  # a class that no image is of
    assert list(other)[-4:] == ["p_bkl", "p_mel", "p_nv", "p_vasc"]
    rounded, notes = read(p.round(2), ["mel", "nv", "bkl"])
    assert np.allclose(rounded.filter(like="p_").sum(axis=1), 1) and "rescaled to 1" in notes[0]
    test, notes = read(p[12:], ["mel", "nv", "bkl"], ids=ids[12:])
    assert set(test["split"]) == {"test"} and notes == ["it gives no predictions for validation images, so nothing is calibrated"]
    binary = read_truth(write("two.csv", "image,dx\na,mel\nb,nv\n"))
    one = read_answers(write("one.csv", "image,mel\na,.9\nb,.2\n"), binary).table
    assert one["nv"].tolist() == pytest.approx([0.1, 0.8])


def test_readers_and_their_majority(write):
    labels = "image,dx,patient_id,skin_type\n" + "".join(f"i{i},{'mel' if i < 4 else 'nv'},p{i},2\n" for i in range(10))
    truth = read_truth(write("labels.csv", labels))
    calls = {"R1": "mmmmnnnnnn", "R2": "mmnnnnnnnn", "R3": "nnnmmnnn  "}
    names = {"m": "melanoma, mel", "n": "nv"}
    rows = [(f"i{i}", r, c) for r, of in calls.items() for i, c in enumerate(of) if c != " "]
    text = "image_id,reader,diagnosis\n" + "".join(f"{i},{r},{names[c].split(', ')[-1]}\n" for i, r, c in rows)
    answers = read_answers(write("readers.csv", text), truth)
    table, notes = predictions_of(answers, truth, "readers.csv")
    assert notes == ["there are no validation images, so nothing is calibrated"]
    found = reader_rows(answers, table, 100, "mel")
    assert [(r["reader"], r["n"], r["sensitivity"]["value"], r["specificity"]["value"]) for r in found] == [
        ("R1", 10, 1.0, 1.0),
        ("R2", 10, 0.5, 1.0),
        ("R3", 8, 0.25, 0.75),
    ]
    voted = (table["p_mel"] > 0.5).to_numpy()
    assert voted.tolist() == [True, True, False, True, *[False] * 6]
    # Tied: the class that is named more often, wherever it stands.
    tied = read_answers(write("tied.csv", "image,reader,dx\ni0,A,mel\ni0,B,nv\ni1,A,mel\ni1,B,mel\n"), truth)
    two = read_truth(write("two.csv", "image,dx\ni0,mel\ni1,nv\n"))
    table, notes = predictions_of(tied, two, "tied.csv")
    assert table["p_mel"][0] > 0.5 and "of 1 image the votes are tied" in notes[1]


def peer_of(run, tmp_path, split=("val", "test"), seed=0):
    "A table of somebody else's predictions, and the labels, of the images of a run."
    own = pd.read_parquet(run / "predictions.parquet")
    classes = read_json(run / "run.json")["classes"]
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(len(classes)), len(own)) + 0.5 * (own["y_true"].to_numpy()[:, None] == np.array(classes))
    given = pd.DataFrame(p / p.sum(1, keepdims=True), columns=classes).assign(image_id=own["image_id"])
    given[own["split"].isin(split)].to_csv(tmp_path / "given.csv", index=False)
    own.rename(columns={"y_true": "dx"})[["image_id", "dx", "lesion_id", "split"]].to_csv(tmp_path / "labels.csv", index=False)
    return {"predictions": str(tmp_path / "given.csv"), "labels": str(tmp_path / "labels.csv")}


def test_a_member_of_the_suite_like_any_other(tmp_path):
    suite = tmp_path / "reports" / "s"
    make_run(suite / "net", 1.0, 0, notebook=False, resamples=50)
    (suite / "net" / "model").mkdir(exist_ok=True)
    with zipfile.ZipFile(suite / "net" / "model" / "model.keras", "w") as archive:
        archive.writestr("model.weights.h5", "")
    write_json(suite / "net" / "model" / "labels.json", {})
    peer = peer_of(suite / "net", tmp_path, ("test",))
    classes = ",".join(read_json(suite / "net" / "run.json")["classes"])
    (tmp_path / "own.yaml").write_text(f"classes: {{{', '.join(f'{c}: []' for c in classes.split(','))}}}")
    config = make_config({"suite": "s", "run": "peer", "peer": peer, "bootstrap": 100, "taxonomy": str(tmp_path / "own.yaml")})
    folder = run_peer(config, suite / "peer")
    assert is_done(folder, config) and is_done(folder, config.model_copy(update={"dataset": "ham10000", "epochs": 3}))
    both = make_config({"suite": "s", "run": "both", "members": ["net", "peer"], "bootstrap": 100})
    run_ensemble(both, suite / "both")
    assert set(pd.read_parquet(suite / "both" / "predictions.parquet")["split"]) == {"test"}
    text = build_suite_page(suite).read_text()
    for words in ("peer minus net", "it gives no predictions for validation images", "It combines predictions made elsewhere (peer)", "What the predictions of peer cost is not known"):
        assert words in text or words.replace("peer minus net", "net minus peer") in text, words
    for run, words in (("peer", "of a table of predictions, whose network is elsewhere"), ("both", "combines peer, of which there are predictions and no network")):
        with pytest.raises(ConfigError, match=words):
            bundle_folder(suite / run)
    with pytest.raises(ConfigError, match="needs validation images"):
        run_ensemble(both.model_copy(update={"combine": "learned"}), suite / "learned")
    with open(peer["predictions"], "a") as file:
        file.write("\n")
    assert why_stale(folder, config) == ["data changed"]


def test_the_plan_of_a_suite_with_tables(tmp_path):
    for name in ("given.csv", "labels.csv"):
        (tmp_path / name).write_text("image_id,dx\n")
    files = f"predictions: {tmp_path}/given.csv, labels: {tmp_path}/labels.csv"
    head = "title: t\nquestion: q?\ndefaults: {explain: 4, epochs: 2, schedule: scratch}\n"

    def plan(runs, **more):
        (tmp_path / "s.yaml").write_text(f"{head}runs:\n{runs}")
        return resolve_suite(load_suite(tmp_path / "s.yaml"), "cpu", **more)

    (run,) = plan(f"  table: {{peer: {{{files}}}}}\n", repeats={"seeds": 3})
    assert run.config.explain == 0 and not run.config.trains and not run.config.needs_data
    looked = plan_suite([run], tmp_path / "reports")
    assert looked.problems == [] and looked.runs["basis"].tolist() == [""]
    (run, *_) = plan(f"  table: {{peer: {{predictions: {tmp_path}/given.csv}}}}\n", repeats={"folds": 2})
    assert run.config.needs_data and (run.config.split, run.config.folds) == ("kfold", 2)
    for runs, words in (
        (f"  t: {{peer: {{{files}}}, epochs: 3}}\n", "epochs says nothing of it"),
        ("  t: {peer: {predictions: none.csv}}\n", "peer: predictions 'none.csv' is no file"),
        ("  t: {peer: {labels: none.csv}}\n", "peer needs a table"),
        (f"  t: {{peer: {{{files}, fomr: logits}}}}\n", "peer 'fomr' is none of predictions"),
        (f"  t: {{peer: {{{files}}}}}\n  u: {{base: t}}\n", "has no backbone to start from"),
    ):
        with pytest.raises(ConfigError, match=words):
            plan(runs)


NOTEBOOK = ROOT / "nbs" / "experiments" / "peer.ipynb"


def test_the_notebook_writes_the_run_that_the_library_writes(tmp_path):
    papermill = pytest.importorskip("papermill")
    (tagged,) = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if "parameters" in c["metadata"].get("tags", [])]
    values = {}
    exec("".join(tagged["source"]), {}, values)
    fields = {*PEER_FIELDS, "data_dir"}
    assert values.pop("folder") == "" and set(values) == fields
    assert values == {f: ExperimentConfig.model_fields[f].default for f in fields}
    make_run(tmp_path / "net", 1.0, 0, notebook=False, resamples=50)
    config = make_config({"suite": "s", "run": "peer", "bootstrap": 100, "peer": peer_of(tmp_path / "net", tmp_path)})
    part = tmp_path / "part"
    part.mkdir()
    parameters = config.model_dump(include=set(config.deciding)) | {"folder": str(part)}
    done = papermill.execute_notebook(str(NOTEBOOK), str(part / "notebook.ipynb"), parameters=parameters, progress_bar=False, cwd=str(ROOT))
    assert is_done(part, config)
    library = run_peer(config, tmp_path / "peer")
    for name in ("predictions.parquet", "metrics.json", "model/peer.json"):
        assert (part / name).read_bytes() == (library / name).read_bytes()
    assert "balanced accuracy of 0." in done.cells[-1]["outputs"][0]["text"]


WITHOUT_KERAS = """
import sys
from dermnb.cli import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
found = {"keras", "tensorflow", "jax", "torch"} & set(sys.modules)
assert not found, found
"""


def report(*words):
    return subprocess.run([sys.executable, "-c", WITHOUT_KERAS, "report", *map(str, words)], check=False, capture_output=True, text=True)


def test_a_report_of_two_tables_loads_no_framework(tmp_path):
    make_run(tmp_path / "net", 1.0, 0, notebook=False, resamples=50)
    peer = peer_of(tmp_path / "net", tmp_path)
    page = tmp_path / "reports" / "suite" / "page"
    done = report(peer["predictions"], "--labels", peer["labels"], "--out", page)
    assert done.returncode == 0, done.stderr
    text = Path(done.stdout.strip()).read_text()
    assert Path(done.stdout.strip()) == page / "report.html"
    assert "Predictions made elsewhere" in text and "Temperature" in text and "http-equiv" not in text
    assert not list(tmp_path.rglob("plotly.min.js"))  # the page is whole without it
    refused = report(peer["predictions"], "--labels", peer["labels"], "--out", tmp_path)
    assert "holds something else than such a report" in refused.stderr


def test_a_public_peer_reaches_the_figures_that_are_known_of_it(tmp_path):
    place = Path(os.environ.get("DERMNB_REAL_DATA", "")) / "isic2018"
    given = place / "peer_sklesion_0.2.2_test.csv"
    if not os.environ.get("DERMNB_REAL_DATA") or not given.is_file():
        pytest.skip("DERMNB_REAL_DATA has no isic2018/peer_sklesion_0.2.2_test.csv")
    labels = place / "ISIC2018_Task3_Test_GroundTruth.csv"
    done = report(given, "--labels", labels, "--metadata", place / "metadata.csv", "--out", tmp_path / "page")
    assert done.returncode == 0, done.stderr
    test = read_json(tmp_path / "page" / "metrics.json")["splits"]["test"]
    assert (test["n"], test["lesions"]) == (1512, 1223)
    for metric, value in (("accuracy", 0.818), ("balanced_accuracy", 0.700), ("macro_auc", 0.932)):
        assert test["metrics"][metric]["value"] == pytest.approx(value, abs=5e-4)
