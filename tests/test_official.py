"""Official metrics and submissions against what ISIC's own scorer said (see `isic_oracle.py`), and by definition."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fabricate import make_predictions
from sklearn import metrics as sk

from dermnb.core import ConfigError
from dermnb.data.taxonomies import load_taxonomy
from dermnb.metrics.calibration import Decision
from dermnb.metrics.official import CHALLENGES, official_score
from dermnb.runs.bundle import Bundle
from dermnb.serve.predict import Answer
from dermnb.serve.submissions import above_half, check_submission, submission_table, write_submission

SCORED = json.loads(Path(__file__).with_name("official.json").read_text())
REAL = Path(os.environ.get("DERMNB_REAL_DATA", "absent")) / "isic2018"


def bundle_of(classes, titles=None) -> Bundle:
    return Bundle(Path(), "suite/net", tuple(classes), titles or {}, Decision(), "", False)


def answers_of(paths, classes, p, novelty=None) -> list[Answer]:
    rows = [dict(zip(classes, row, strict=True)) for row in np.asarray(p).tolist()]
    return [Answer(Path(a).name, a, probabilities=row, novelty=novelty) for a, row in zip(paths, rows, strict=True)]


def table_of(ids, classes, p, truth) -> pd.DataFrame:
    table = pd.DataFrame(p, columns=[f"p_{c}" for c in classes])
    return table.assign(image_id=ids, lesion_id=ids, split="test", y_true=truth)


@pytest.mark.parametrize("case", SCORED, ids=lambda c: f"{c['challenge']}-{len(c['classes'])}")
def test_as_the_scorer_says(case):
    classes, name = case["classes"], case["challenge"]
    table = table_of(case["ids"], classes, case["p"], case["truth"])
    found = official_score(table, classes, name, resamples=50)["test"]
    assert found["value"] == pytest.approx(case["official"], abs=1e-9)
    counted = table[table["image_id"] != "ISIC_0035068"]
    rarest = counted.groupby("y_true")["lesion_id"].nunique().min()
    assert found["low"] is None if rarest < 5 else found["low"] < found["value"] < found["high"]
    assert found["n"] == len(table) - 1  # ISIC_0035068 has no weight
    # What is written says the same, by the rule of the challenge alone.
    folder = "IL_{:07}/" if name == "milk10k" else ""
    paths = [folder.format(i) + f"{image}.jpg" for i, image in enumerate(case["ids"])]
    sent, _ = submission_table(answers_of(paths, classes, case["p"]), bundle_of(classes), name)
    assert tuple(sent) == (CHALLENGES[name].id, *CHALLENGES[name].columns) and len(sent) == len(table)
    if name == "milk10k":
        true, kept = np.eye(11)[[classes.index(c) for c in case["truth"]]], table["image_id"].ne("ISIC_0035068")
        f1 = sk.f1_score(true[kept], sent[classes].to_numpy()[kept] > 0.5, average="macro")
        assert f1 == pytest.approx(case["official"], abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_partial_auc_as_the_kaggle_metric_defines_it(seed):
    classes = load_taxonomy("isic8").classes
    table = make_predictions(list(classes), 150, 0.8, seed)
    malignant = table["y_true"].isin(["MEL", "BCC", "AK", "SCC"])
    score = table[["p_MEL", "p_BCC", "p_AK", "p_SCC"]].sum(axis=1)
    found = official_score(table, classes, "isic2024", resamples=20)
    for split, values in found.items():
        part = table["split"] == split
        # Labels and scores turned round; then from scikit-learn's range of 0.5 to 1 to that of an area.
        scaled = sk.roc_auc_score(1 - malignant[part], 1 - score[part], max_fpr=0.2)
        assert values["value"] == pytest.approx(0.02 + (0.2 - 0.02) / 0.5 * (scaled - 0.5), abs=1e-9)


def test_one_class_of_each_row_is_above_half():
    rng = np.random.default_rng(0)
    p = np.vstack([rng.dirichlet(np.ones(6), 300), np.full((1, 6), 1 / 6), np.eye(6)])
    chosen = p.argmax(axis=1)
    moved = above_half(p, chosen)
    assert np.array_equal(moved > 0.5, np.eye(6, dtype=bool)[chosen])
    assert np.abs(moved - p)[p.max(axis=1) > 0.5].max() == 0
    other = above_half(p, (chosen + 1) % 6)  # as where UNK is chosen for other reasons
    assert ((other > 0.5).sum(axis=1) == 1).all() and 0 <= other.min() and other.max() <= 1


def test_unknown_is_what_is_out_of_distribution():
    isic8 = load_taxonomy("isic8")
    p = np.random.default_rng(1).dirichlet(np.ones(8), 3)
    answers = answers_of(["a/ISIC_1.jpg", "b/ISIC_2.jpg", "ISIC_3.jpg"], isic8.classes, p)
    for answer, novelty in zip(answers, (0.5, 4.0, np.inf), strict=True):
        answer.novelty = novelty
    sent, said = submission_table(answers, bundle_of(isic8.classes), "isic2019")
    assert sent["UNK"].tolist() == pytest.approx([1 / 3, 0.8, 1.0]) and "in 2 of 3 rows" in said[0]
    assert (sent.set_index("image").idxmax(axis=1) == "UNK").tolist() == [False, True, True]
    sent, said = submission_table(answers_of(["a.jpg"], isic8.classes, p[:1]), bundle_of(isic8.classes), "isic2019")
    assert sent["UNK"].tolist() == [0] and "does not tell" in said[0]


@pytest.mark.parametrize(
    ("challenge", "classes", "paths", "out", "said"),
    [
        ("isic2018", ["MEL", "NV", "INF"], ["a.jpg"], "o.csv", "isic2018 has no column for INF"),
        ("isic2019", ["akiec", "nv"], ["a.jpg"], "o.csv", "isic2019 has no column for akiec"),
        ("isic2020", ["nv", "bkl"], ["a.jpg"], "o.csv", "none is"),
        ("isic2018", ["AK", "SCC"], ["a.jpg"], "o.csv", "all of AK and SCC are AKIEC"),
        ("isic2018", ["MEL", "NV"], ["x/a.jpg", "y/a.png"], "o.csv", "two images are called a"),
        ("milk10k", ["MEL", "NV"], ["IL_1/a.jpg"], "o.csv", "does not lie in the folder"),
        ("isic2018", ["MEL", "NV"], ["a.jpg"], "o.parquet", "is a CSV file"),
        ("isic2021", ["MEL", "NV"], ["a.jpg"], "o.csv", "did you mean"),
    ],
)
def test_what_cannot_be_sent_is_a_sentence(challenge, classes, paths, out, said):
    with pytest.raises(ConfigError, match=said):
        check_submission(challenge, bundle_of(classes), paths, out)


@pytest.mark.skipif(not REAL.is_dir(), reason="DERMNB_REAL_DATA has no isic2018")
def test_a_public_network_on_the_test_images_of_2018(tmp_path):
    given = pd.read_csv(REAL / "peer_sklesion_0.2.2_test.csv")
    truth = pd.read_csv(REAL / "ISIC2018_Task3_Test_GroundTruth.csv").set_index("image")
    dx7 = load_taxonomy("dx7")
    paths = [f"{image}.jpg" for image in given["image_id"]]
    bundle = bundle_of(dx7.classes, dx7.titles)
    assert check_submission("isic2018", bundle, paths, "o.csv") == []
    answers = answers_of(paths, dx7.classes, given[list(dx7.classes)])
    write_submission(answers, tmp_path / "o.csv", bundle, "isic2018")
    sent = pd.read_csv(tmp_path / "o.csv").set_index("image")
    assert list(sent) == list(truth) and set(sent.index) == set(truth.index)
    known = truth.loc[sent.index].idxmax(axis=1)
    table = table_of(given["image_id"], dx7.classes, given[list(dx7.classes)].to_numpy(), known.str.lower().to_numpy())
    found = official_score(table, dx7.classes, "isic2018", resamples=20)["test"]
    # isic-challenge-scoring 5.8.0 says this of the written file.
    assert found["value"] == pytest.approx(0.6999134873394883, abs=1e-9)
    weighed = sent.index != "ISIC_0035068"
    assert sk.balanced_accuracy_score(known[weighed], sent[weighed].idxmax(axis=1)) == pytest.approx(found["value"])
