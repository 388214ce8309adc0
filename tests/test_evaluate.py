"""Metrics against scikit-learn on random tables, the bootstrap against brute force, bad tables."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from fabricate import make_predictions
from sklearn import metrics as sk

from dermnb.core import ConfigError
from dermnb.evaluate import (
    BINARY_METRICS,
    CLASS_METRICS,
    METRICS,
    RankedScores,
    bootstrap_scores,
    choose_threshold,
    evaluate,
    scores_from_counts,
)

CLASSES = ["a", "b", "c", "d"]


def random_table(seed, classes=CLASSES, lesions=150):
    "Random skill, shares and rounding: some classes are rare, absent or never predicted."
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(len(classes)) * 0.6)
    table = make_predictions(classes, lesions, rng.uniform(0, 2), seed, shares)
    if seed % 3 == 0:  # ties between scores
        p = table[[f"p_{c}" for c in classes]].round(1) + 1e-3
        table[p.columns] = p.div(p.sum(axis=1), axis=0)
    if seed % 4 == 0:  # a class that is never predicted
        p = table[[f"p_{c}" for c in classes]]
        p = p.assign(p_a=p["p_a"] * 1e-6)
        table[p.columns] = p.div(p.sum(axis=1), axis=0)
    return table


@pytest.mark.parametrize("seed", range(24))
def test_agrees_with_scikit_learn(seed):
    table = random_table(seed)
    result = evaluate(table, CLASSES, resamples=10)
    for split, scored in result["splits"].items():
        part = table[table["split"] == split]
        y = part["y_true"].to_numpy(dtype=object)
        p = part[[f"p_{c}" for c in CLASSES]].to_numpy()
        called = np.array(CLASSES, dtype=object)[p.argmax(axis=1)]
        present = [c for c in CLASSES if (y == c).any()]
        assert scored["absent"] == [c for c in CLASSES if c not in present]
        kw = {"labels": present, "zero_division": 0}
        auc = [sk.roc_auc_score(y == c, p[:, CLASSES.index(c)]) for c in present]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of predicted classes that are absent
            balanced = sk.balanced_accuracy_score(y, called)
        expected = {
            "accuracy": sk.accuracy_score(y, called),
            "balanced_accuracy": balanced,
            "macro_auc": np.mean(auc),
        }
        for average in ("macro", "weighted"):
            expected |= {
                f"{average}_precision": sk.precision_score(
                    y, called, average=average, **kw
                ),
                f"{average}_recall": sk.recall_score(y, called, average=average, **kw),
                f"{average}_f1": sk.f1_score(y, called, average=average, **kw),
            }
        assert set(expected) == set(scored["metrics"]) == set(METRICS)
        for name, value in expected.items():
            assert scored["metrics"][name]["value"] == pytest.approx(
                value, abs=1e-9
            ), name
            assert scored["metrics"][name]["n"] == len(part)
        rows = {row["class"]: row for row in scored["per_class"]}
        each = {
            "precision": sk.precision_score(y, called, average=None, **kw),
            "recall": sk.recall_score(y, called, average=None, **kw),
            "f1": sk.f1_score(y, called, average=None, **kw),
            "auc": auc,
        }
        for metric, values in each.items():
            for c, value in zip(present, values, strict=True):
                assert rows[c][metric]["value"] == pytest.approx(value, abs=1e-9)
        assert (
            scored["confusion"]
            == sk.confusion_matrix(y, called, labels=CLASSES).tolist()
        )


def test_macro_auc_is_scikit_learns_when_all_classes_are_there():
    table = make_predictions(CLASSES, 400, 0.8, 3)
    part = table[table["split"] == "test"]
    p = part[[f"p_{c}" for c in CLASSES]].to_numpy()
    p = p / p.sum(axis=1, keepdims=True)
    y = part["y_true"].to_numpy(dtype=object)
    expected = sk.roc_auc_score(y, p, multi_class="ovr", labels=CLASSES)
    value = evaluate(table, CLASSES, resamples=10)["splits"]["test"]["metrics"][
        "macro_auc"
    ]
    assert value["value"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_weighted_forms_equal_repeated_images(seed):
    "What the bootstrap computes from weights is what scikit-learn gives on repeated rows."
    rng = np.random.default_rng(seed)
    n, k = 200, 3
    y, group = rng.integers(0, k, n), rng.integers(0, 60, n)
    p = rng.dirichlet(np.ones(k), n).round(1 + seed % 3)
    times = rng.integers(0, 4, (60, 5)).astype(np.int32)
    for r in range(5):
        rows = np.repeat(np.arange(n), times[group, r])
        yy, pp = y[rows], p[rows]
        counts = sk.confusion_matrix(yy, pp.argmax(1), labels=range(k))
        overall, _ = scores_from_counts(counts)
        assert overall["macro_f1"] == pytest.approx(
            sk.f1_score(yy, pp.argmax(1), average="macro", zero_division=0), abs=1e-12
        )
        for c in range(k):
            fast = RankedScores(p[:, c], y == c).auc(times, group)[r]
            assert fast == pytest.approx(sk.roc_auc_score(yy == c, pp[:, c]), abs=1e-12)


def test_bootstrap_draws_whole_lesions():
    "The vectorised bootstrap has the spread of one that repeats rows one resample at a time."
    table = make_predictions(CLASSES, 120, 1.0, 5)
    y = table["y_true"].map(CLASSES.index).to_numpy()
    p = table[[f"p_{c}" for c in CLASSES]].to_numpy()
    group = np.unique(table["lesion_id"], return_inverse=True)[1]
    overall, per_class = bootstrap_scores(y, p, group, 3000, np.random.default_rng(0))
    rng, values = np.random.default_rng(1), []
    members = [np.flatnonzero(group == g) for g in range(group.max() + 1)]
    for _ in range(600):
        rows = np.concatenate(
            [members[g] for g in rng.integers(0, len(members), len(members))]
        )
        values.append(sk.recall_score(y[rows], p[rows].argmax(1), average="macro"))
    assert overall["balanced_accuracy"].mean() == pytest.approx(
        np.mean(values), abs=0.005
    )
    assert overall["balanced_accuracy"].std() == pytest.approx(np.std(values), rel=0.12)
    assert per_class["auc"].shape == (3000, 4)


def test_intervals_cover():
    "About 95 of 100 intervals for the accuracy contain the true one."
    hits, truth = 0, 0.7
    for seed in range(100):
        rng = np.random.default_rng(seed)
        right = rng.random(150) < truth
        p = np.where(right, 0.9, 0.2)
        table = pd.DataFrame(
            {
                "image_id": [str(i) for i in range(150)],
                "lesion_id": [str(i) for i in range(150)],
                "split": "test",
                "y_true": "a",
                "p_a": p,
                "p_b": 1 - p,
            }
        )
        cell = evaluate(table, ["a", "b"], resamples=300)["splits"]["test"]["metrics"][
            "accuracy"
        ]
        hits += cell["low"] <= truth <= cell["high"]
    assert 88 <= hits <= 100


def test_does_not_depend_on_row_order_or_other_splits():
    table = make_predictions(CLASSES, 200, 1.0, 2)
    whole = evaluate(table, CLASSES, resamples=50, seed=4)
    shuffled = evaluate(
        table.sample(frac=1, random_state=0), CLASSES, resamples=50, seed=4
    )
    assert whole == shuffled
    alone = evaluate(table[table["split"] == "test"], CLASSES, resamples=50, seed=4)
    assert alone["splits"] == {"test": whole["splits"]["test"]}
    other = evaluate(table, CLASSES, resamples=50, seed=5)
    assert other["splits"]["test"]["metrics"] != whole["splits"]["test"]["metrics"]
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole


def test_images_without_lesion_stand_for_themselves():
    table = make_predictions(CLASSES, 100, 1.0, 0)
    table["lesion_id"] = pd.array([pd.NA] * len(table), dtype="string")
    result = evaluate(table, CLASSES, resamples=20)
    assert result["unit"] == "image"
    assert result["splits"]["test"]["lesions"] == result["splits"]["test"]["n"]


def test_where_the_bootstrap_knows_nothing():
    "One image only, one class only, and all right: values without an interval."
    row = {
        "image_id": "i",
        "lesion_id": "l",
        "split": "test",
        "y_true": "a",
        "p_a": 0.9,
        "p_b": 0.1,
    }
    for n in (1, 5):
        table = pd.DataFrame(
            [row | {"image_id": f"i{i}", "lesion_id": f"l{i}"} for i in range(n)]
        )
        scored = evaluate(table, ["a", "b"], resamples=20)["splits"]["test"]
        accuracy = scored["metrics"]["accuracy"]
        assert accuracy == {"value": 1.0, "low": None, "high": None, "n": n}
        assert scored["metrics"]["macro_auc"]["value"] is None
        assert scored["absent"] == ["b"]
        assert all(scored["per_class"][1][m]["value"] is None for m in CLASS_METRICS)


def partial_auc(y, scores):
    "scikit-learn's, with the curve turned round and unscaled: area above 80 % sensitivity."
    scaled = sk.roc_auc_score(~y, -scores, max_fpr=0.2)
    return 0.02 + (0.2 - 0.02) * (scaled - 0.5) / 0.5


@pytest.mark.parametrize("seed", range(16))
def test_two_classes_agree_with_scikit_learn(seed):
    shares = [0.5 + 0.03 * seed, 0.5 - 0.03 * seed]
    table = make_predictions(["b", "m"], 150, seed % 5 * 0.5, seed, shares)
    if seed % 2:
        table["p_m"] = table["p_m"].round(1 + seed % 3)  # ties, also at the threshold
        table["p_b"] = 1 - table["p_m"]
    name = "m" if seed % 3 else "b"
    result = evaluate(table, ["b", "m"], resamples=20, positive=name)
    val = table[table["split"] == "val"]
    y, s = (val["y_true"] == name).to_numpy(), val[f"p_{name}"].to_numpy()
    reach = [t for t in np.unique(s) if (s[y] >= t).mean() >= 0.95]
    for split, scored in result["splits"].items():
        part = table[table["split"] == split]
        y = (part["y_true"] == name).to_numpy()
        s = part[f"p_{name}"].to_numpy()
        columns = part[["p_b", "p_m"]].to_numpy()
        called = np.array(["b", "m"])[columns.argmax(axis=1)] == name
        binary = scored["binary"]
        assert binary["positive"] == name and set(binary["metrics"]) == set(
            BINARY_METRICS
        )
        assert binary["threshold"] == max(reach)
        expected = {
            "sensitivity": sk.recall_score(y, called),
            "specificity": sk.recall_score(~y, ~called),
            "auc": sk.roc_auc_score(y, s),
            "partial_auc": partial_auc(y, s),
            "specificity_at_95_sensitivity": np.mean(s[~y] < max(reach)),
            "sensitivity_at_threshold": np.mean(s[y] >= max(reach)),
        }
        for metric, value in expected.items():
            cell = binary["metrics"][metric]
            assert cell["value"] == pytest.approx(value, abs=1e-9), metric
            n = {"sen": y.sum(), "spe": (~y).sum()}.get(metric[:3], len(y))
            assert cell["n"] == n
        if split == "val":
            assert binary["metrics"]["sensitivity_at_threshold"]["value"] >= 0.95


@pytest.mark.parametrize("seed", range(6))
def test_weighted_partial_auc_equals_repeated_images(seed):
    rng = np.random.default_rng(seed)
    y, group = rng.random(200) < 0.3, rng.integers(0, 60, 200)
    s = (rng.random(200) + 0.3 * y).round(1 + seed % 3)
    times = rng.integers(0, 4, (60, 5)).astype(np.int32)
    fast = RankedScores(s, y).partial_auc(times, group)
    for r in range(5):
        rows = np.repeat(np.arange(200), times[group, r])
        assert fast[r] == pytest.approx(partial_auc(y[rows], s[rows]), abs=1e-12)


def test_two_classes_only_and_without_validation():
    table = make_predictions(["b", "m"], 80, 1.0, 1)
    alone = evaluate(table[table["split"] == "test"], ["b", "m"], resamples=20)
    binary = alone["splits"]["test"]["binary"]
    assert binary["positive"] == "m" and binary["threshold"] is None
    for name in ("specificity_at_95_sensitivity", "sensitivity_at_threshold"):
        assert binary["metrics"][name]["value"] is None
    assert binary["metrics"]["partial_auc"]["low"] < binary["metrics"]["partial_auc"]["high"]
    assert "binary" not in evaluate(GOOD, CLASSES, resamples=10)["splits"]["test"]
    json.dumps(alone, allow_nan=False)
    one = evaluate(table[table["y_true"] == "b"], ["b", "m"], resamples=20)
    values = one["splits"]["test"]["binary"]["metrics"]
    assert values["sensitivity"]["value"] is None and values["auc"]["value"] is None
    assert choose_threshold(np.arange(20.0), np.ones(20, bool)) == 1.0
    with pytest.raises(ConfigError, match="unknown positive class 'n'"):
        evaluate(table, ["b", "m"], positive="n")
    with pytest.raises(ConfigError, match="for two classes"):
        evaluate(GOOD, CLASSES, positive="a")


GOOD = make_predictions(CLASSES, 40, 1.0, 0)


@pytest.mark.parametrize(
    "table, classes, sentence",
    [
        (GOOD.iloc[:0], CLASSES, "empty"),
        (GOOD.drop(columns="p_b"), CLASSES, "column 'p_b' is missing"),
        (GOOD.drop(columns="lesion_id"), CLASSES, "column 'lesion_id' is missing"),
        (GOOD.assign(p_e=0.0), CLASSES, "unknown column 'p_e'"),
        (GOOD.assign(p_a=np.nan), CLASSES, "missing or infinite"),
        (GOOD.assign(p_a=np.inf), CLASSES, "missing or infinite"),
        (GOOD.assign(p_a=GOOD["p_a"] + 0.01), CLASSES, "not to 1"),
        (GOOD.assign(p_a=-0.1), CLASSES, "outside 0 to 1"),
        (GOOD.assign(p_a="high"), CLASSES, "must hold numbers"),
        (GOOD.assign(y_true="aa"), CLASSES, "unknown class 'aa': did you mean 'a'"),
        (GOOD.assign(split="tset"), CLASSES, "did you mean 'test'"),
        (GOOD.assign(y_true=None), CLASSES, "y_true is empty"),
        (pd.concat([GOOD, GOOD]), CLASSES, "more than once"),
        (GOOD, [], "classes"),
        (GOOD, ["a", "a"], "classes"),
    ],
)
def test_bad_tables_are_one_sentence(table, classes, sentence):
    with pytest.raises(ConfigError, match="predictions") as caught:
        evaluate(table, classes, resamples=10)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
