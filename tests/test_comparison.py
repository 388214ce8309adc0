"""Paired tests against statsmodels, ranks, and what data leakage adds."""

import json
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from fabricate import make_predictions
from sklearn import metrics as sk
from statsmodels.stats.contingency_tables import mcnemar as sm_mcnemar
from statsmodels.stats.multitest import multipletests

from dermnb.core import ConfigError
from dermnb.metrics.comparison import (
    auc_components,
    compare_all,
    comparison_verdict,
    holm,
    leak_effect,
    mcnemar,
    paired_differences,
    rank_ranges,
    summarize_repeats,
)
from dermnb.metrics.scores import CLASS_METRICS, METRICS, evaluate

CLASSES = ["a", "b", "c", "d"]


def paired_difference(a, b, classes, metric, **more):
    return paired_differences(a, b, classes, [metric], **more)[0]


def test_comparison_verdicts():
    for (low, high), word in {(0.1, 0.2): "supported", (-0.2, -0.1): "contradicted"}.items():
        row = {"value": (low + high) / 2, "low": low, "high": high}
        assert comparison_verdict(row).startswith(word)
    worse = {"metric": "log_loss", "value": 0.2, "low": 0.1, "high": 0.3}
    assert comparison_verdict(worse) == "contradicted: the interval lies above 0"
    row = {"value": 0.01, "low": -0.1, "high": 0.1}
    assert comparison_verdict(row) == "not supported: the interval contains 0"


ALL = [*METRICS, *(f"{m}:{c}" for m in CLASS_METRICS for c in "abcd")]


def test_a_table_does_not_differ_from_itself():
    table = make_predictions(CLASSES, 150, 1.0, 1)
    shuffled = table.sample(frac=1, random_state=0)
    for row in paired_differences(table, shuffled, CLASSES, ALL, resamples=100):
        assert (row["value"], row["low"], row["high"]) == (0.0, None, None), row
        assert row["a"] == row["b"] is not None


def test_differences_are_antisymmetric_and_agree_with_the_metrics():
    a, b = (make_predictions(CLASSES, 150, s, s) for s in (1, 2))
    forth = paired_differences(a, b, CLASSES, ALL, resamples=200)
    back = paired_differences(b, a, CLASSES, ALL, resamples=200)
    scored = [evaluate(t, CLASSES, resamples=10)["splits"]["test"] for t in (a, b)]
    for x, y in zip(forth, back, strict=True):
        assert x["value"] == pytest.approx(-y["value"])
        assert x["low"] == pytest.approx(-y["high"])
        kind, _, name = x["metric"].partition(":")
        for side, test in zip("ab", scored, strict=True):
            rows = {row["class"]: row for row in test["per_class"]}
            cell = rows[name][kind] if name else test["metrics"][kind]
            assert x[side] == pytest.approx(cell["value"], abs=1e-12)
        assert x["n"] == (rows[name]["n"] if name else scored[0]["n"])
        assert x["lesions"] == (rows[name] if name else scored[0])["lesions"]
    one = paired_difference(a, b, CLASSES, "recall:c", resamples=200)
    assert one == next(r for r in forth if r["metric"] == "recall:c")


def test_two_classes():
    a, b = (make_predictions(["b", "m"], 150, s, s) for s in (1, 2))
    metrics = ["auc", "partial_auc", "sensitivity", "specificity"]
    rows = paired_differences(a, b, ["b", "m"], metrics, positive="b", resamples=50)
    test = evaluate(a, ["b", "m"], resamples=10, positive="b")["splits"]["test"]
    for row in rows:
        cell = test["binary"]["metrics"][row["metric"]]
        assert row["a"] == pytest.approx(cell["value"], abs=1e-12)
        assert row["low"] < row["value"] < row["high"]
    with pytest.raises(ConfigError, match="threshold of its own"):
        paired_difference(a, b, ["b", "m"], "specificity_at_95_sensitivity", positive="b")
    with pytest.raises(ConfigError, match="none is named: say which of b and m"):
        paired_difference(a, b, ["b", "m"], "sensitivity")


def correlated(seed, lesions=150, gap=0.0):
    "Two networks whose answers share what a lesion looks like; b is right less often by gap."
    rng = np.random.default_rng(seed)
    hard = rng.random(lesions)
    tables = []
    for level in (0.7, 0.7 - gap):
        right = hard + rng.normal(0, 0.1, lesions) < level
        p = np.where(right, 0.9, 0.2)
        ids = [f"i{i}" for i in range(lesions)]
        columns = {"image_id": ids, "lesion_id": ids, "split": "test", "y_true": "a"}
        tables.append(pd.DataFrame(columns | {"p_a": p, "p_b": 1 - p}))
    return tables


def test_paired_interval_is_narrower_for_correlated_predictions():
    a, b = correlated(0, 400)
    row = paired_difference(a, b, ["a", "b"], "accuracy")
    alone = [evaluate(t, ["a", "b"])["splits"]["test"]["metrics"]["accuracy"] for t in (a, b)]
    unpaired = np.hypot(*(c["high"] - c["low"] for c in alone))
    assert row["high"] - row["low"] < 0.7 * unpaired


def test_paired_intervals_cover():
    "About 95 of 100 intervals of the difference contain the true one."
    truth = np.mean([paired_value(s) for s in range(1000, 1400)])
    hits = 0
    for seed in range(100):
        a, b = correlated(seed, gap=0.05)
        row = paired_difference(a, b, ["a", "b"], "accuracy", resamples=300)
        hits += row["low"] <= truth <= row["high"]
    assert 88 <= hits <= 100


def paired_value(seed):
    a, b = correlated(seed, gap=0.05)
    return (a["p_a"] > 0.5).mean() - (b["p_a"] > 0.5).mean()


def test_repeats_are_averaged():
    seeds = [make_predictions(CLASSES, 150, 2.0, s) for s in (1, 2, 3)]
    base = [make_predictions(CLASSES, 150, 1.0, s) for s in (4, 5, 6)]
    whole = paired_difference(seeds, base, CLASSES, "accuracy")
    each = [
        paired_difference(a, b, CLASSES, "accuracy")
        for a, b in zip(seeds, base, strict=True)
    ]
    assert whole["value"] == pytest.approx(np.mean([r["value"] for r in each]))
    assert whole["n"] == each[0]["n"]  # the same images each time
    folds = [t.assign(image_id=f"{i}" + t["image_id"]) for i, t in enumerate(seeds)]
    other = [t.assign(image_id=f"{i}" + t["image_id"]) for i, t in enumerate(base)]
    apart = paired_difference(folds, other, CLASSES, "accuracy")
    assert apart["n"] == 3 * each[0]["n"]
    with pytest.raises(ConfigError, match="as many tables"):
        paired_difference(seeds, base[:2], CLASSES, "accuracy")


def test_networks_that_differ_by_their_seeds_alone_are_not_told_apart():
    rng = np.random.default_rng(0)
    verdicts = 0
    for _ in range(20):
        sides = [
            [
                make_predictions(CLASSES, 120, rng.normal(1.0, 0.2), rng.integers(10**6))
                for _ in range(3)
            ]
            for _ in range(2)
        ]
        row = paired_difference(*sides, CLASSES, "accuracy", resamples=100)
        verdicts += row["low"] > 0 or row["high"] < 0
    assert verdicts <= 2


A = make_predictions(CLASSES, 60, 1.0, 1)


@pytest.mark.parametrize(
    "b, metric, sentence",
    [
        (A.iloc[4:], "accuracy", "only in the first run (such as 'DEMO_0000000')"),
        (A.assign(image_id="x" + A["image_id"]), "accuracy", "only in the second run"),
        (A.assign(y_true=A["y_true"].replace({"a": "b"})), "accuracy", "the true class of"),
        (A.assign(lesion_id="L" + A["lesion_id"]), "accuracy", "the lesion of"),
        (A.assign(split="val"), "accuracy", "second run has no test images"),
        (A, "acuracy", "did you mean 'accuracy'"),
        (A, "recall:aa", "unknown class 'aa'"),
        (A, "auc", "for two classes"),
        (A.drop(columns="p_a"), "accuracy", "column 'p_a' is missing"),
    ],
)
def test_what_cannot_be_compared(b, metric, sentence):
    with pytest.raises(ConfigError) as caught:
        paired_difference(A, b, CLASSES, metric, resamples=10)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_leak_effect():
    table = make_predictions(CLASSES, 400, 1.0, 1)
    test = table[table["split"] == "test"]
    trained = sorted(test["lesion_id"].unique())[::2]
    rows = test["lesion_id"].isin(trained)
    p = [f"p_{c}" for c in CLASSES]
    table.loc[rows[rows].index, p] = pd.get_dummies(test["y_true"])[CLASSES][
        rows
    ].to_numpy(float)
    split = pd.DataFrame({"lesion_id": [*trained, None], "split": "train"})
    found = leak_effect(table, split, resamples=100)
    assert found["seen"]["accuracy"]["value"] == 1.0
    assert found["seen"]["n"] == int(rows.sum()) and found["seen"]["lesions"] == len(trained)
    part = test[~rows]
    called = np.array(CLASSES)[part[p].to_numpy().argmax(axis=1)]
    unseen = found["unseen"]
    assert unseen["accuracy"]["value"] == pytest.approx((called == part["y_true"]).mean())
    assert unseen["balanced_accuracy"]["value"] == pytest.approx(
        sk.balanced_accuracy_score(part["y_true"], called)
    )
    assert found["difference"]["low"] > 0 and unseen["absent"] == []
    # Beside a clean run: its images of lesions that have several.
    clean = make_predictions(CLASSES, 400, 1.0, 2)
    beside = leak_effect(table, split, (clean, clean), resamples=100)
    tested = clean[clean["split"] == "test"]
    several = tested["lesion_id"].map(clean["lesion_id"].value_counts()) > 1
    assert beside["unseen"]["n"] == several.sum() and beside["seen"] == found["seen"]
    # An image without a lesion has not been seen; a class without images is named.
    table["lesion_id"] = None
    alone = leak_effect(table[table["y_true"] != "b"], split, resamples=20)
    assert alone["seen"]["n"] == 0 and alone["seen"]["accuracy"]["value"] is None
    assert alone["unseen"]["absent"] == ["b"]
    assert alone["difference"]["value"] is None
    with pytest.raises(ConfigError, match="column 'split' is missing"):
        leak_effect(table, split[["lesion_id"]])


@pytest.mark.parametrize("n", [4, 30, 400])
@pytest.mark.parametrize("seed", range(4))
def test_mcnemar_is_that_of_statsmodels(n, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.random((2, n)) < [[0.7], [0.6]]
    found = mcnemar(a, b, rng.permutation(n))
    table = sk.confusion_matrix(a, b, labels=[False, True])
    assert (found["b01"], found["b10"]) == (table[0, 1], table[1, 0])
    few = found["b01"] + found["b10"] < 25
    expected = sm_mcnemar(table, exact=few, correction=False)
    assert found["p"] == pytest.approx(expected.pvalue, abs=1e-9)
    assert found["test"].startswith("exact" if few else "chi-squared")


@pytest.mark.parametrize("seed", range(6))
def test_clustered_mcnemar_by_its_definition(seed):
    "Durkalski et al.: cluster by cluster; and copies of photographs are no evidence."
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 120, 500)
    hard = rng.random(120)[group]
    a, b = rng.random((2, 500)) > hard * [[0.8], [0.9]]
    top = bottom = 0.0
    for k in set(group):
        d = (a[group == k].mean() - b[group == k].mean()).item()
        top, bottom = top + d, bottom + d * d
    z = abs(top) / np.sqrt(bottom)
    normal = sm_mcnemar([[0, z * z], [0, 0]], exact=False, correction=False)
    found = mcnemar(a, b, group)
    assert found["p"] == pytest.approx(normal.pvalue, abs=1e-9)
    again = mcnemar(*(np.repeat(x, 2) for x in (a, b, group)))
    assert again["p"] == pytest.approx(found["p"], abs=1e-12)
    # Lesion numbers may have gaps; without a difference p is 1.
    assert mcnemar(a, b, group * 7)["p"] == pytest.approx(found["p"], abs=1e-12)
    assert mcnemar(a, a, group) == {"b01": 0, "b10": 0, "test": "exact, by lesion", "p": 1.0}


def test_mcnemar_keeps_its_level_for_lesions_with_several_photographs():
    rng = np.random.default_rng(0)
    wrong = {"by lesion": 0, "by image": 0}
    for _ in range(400):
        group = np.repeat(np.arange(90), rng.choice([1, 2, 6], 90))
        a, b = (rng.random((2, 90)) > rng.random(90))[:, group]
        wrong["by lesion"] += mcnemar(a, b, group)["p"] <= 0.05
        wrong["by image"] += mcnemar(a, b, np.arange(len(group)))["p"] <= 0.05
    assert wrong["by lesion"] <= 32 and wrong["by image"] > 60


@pytest.mark.parametrize("seed", range(6))
def test_holm_is_that_of_statsmodels(seed):
    rng = np.random.default_rng(seed)
    p = rng.random(190) ** 3
    if seed % 2:
        p = p.round(2)  # ties, and 0
    expected = multipletests(p, method="holm")[1]
    assert holm(list(p)) == pytest.approx(list(expected), abs=1e-9)
    some = [None if i % 3 else v for i, v in enumerate(p)]
    expected = multipletests(p[::3], method="holm")[1]
    assert holm(some)[::3] == pytest.approx(list(expected), abs=1e-9)
    assert holm(some)[1] is None and holm([]) == [] and holm([None]) == [None]


def delong(positive, first, second):
    "Two areas and their covariance, pair by pair as DeLong et al. define it."
    def wins(s):
        x, y = s[positive][:, None], s[~positive][None, :]
        return (x > y) + 0.5 * (x == y)

    both = [wins(s) for s in (first, second)]
    m, n = both[0].shape
    v = np.array([w.mean(axis=1) for w in both])
    w = np.array([w.mean(axis=0) for w in both])
    return [x.mean() for x in both], np.cov(v) / m + np.cov(w) / n


@pytest.mark.parametrize("seed", range(8))
def test_areas_have_delongs_covariance(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(20, 150))
    y = rng.permutation(np.arange(n) % 3)
    ps = [rng.dirichlet(np.ones(3), n) + 0.3 * np.eye(3)[y] for _ in range(2)]
    ps = [(p / p.sum(axis=1, keepdims=True)).round(1 + seed % 3) for p in ps]
    group = rng.permutation(n)
    found = [auc_components(y, p, group) for p in ps]
    for c in range(3):
        areas, covariance = delong(y == c, *(p[:, c] for p in ps))
        mine = np.array([parts[:, c] for _, parts in found])
        assert [auc[c] for auc, _ in found] == pytest.approx(areas, abs=1e-9)
        assert areas[0] == pytest.approx(sk.roc_auc_score(y == c, ps[0][:, c]), abs=1e-9)
        assert np.allclose(mine @ mine.T, covariance, rtol=0, atol=1e-9)


def test_areas_of_lesions_by_obuchowskis_definition():
    rng = np.random.default_rng(0)
    group = np.sort(rng.integers(0, 40, 120))
    group = np.unique(group, return_inverse=True)[1]
    positive = (rng.random(40) < 0.4)[group]
    s = rng.normal(size=120) + positive
    p = np.transpose([1 / (1 + np.exp(s)), 1 - 1 / (1 + np.exp(s))])
    auc, parts = auc_components(positive.astype(int), p, group)
    x, y = s[positive], s[~positive]
    wins = (x[:, None] > y) + 0.5 * (x[:, None] == y)
    variance = 0.0
    for side, share in ((positive, wins.mean(axis=1)), (~positive, wins.mean(axis=0))):
        ids = group[side]
        sums = [(share[ids == k] - wins.mean()).sum() for k in set(ids)]
        lesions = len(sums)
        variance += lesions / (lesions - 1) * np.square(sums).sum() / len(share) ** 2
    assert auc[1] == pytest.approx(wins.mean(), abs=1e-9)
    assert (parts[:, 1] ** 2).sum() == pytest.approx(variance, abs=1e-9)
    # Seen from the other class it is the same area.
    assert auc[0] == pytest.approx(auc[1]) and np.allclose(parts[:, 0], parts[:, 1])
    # Photographs copied under their lesion change nothing.
    copied = auc_components(*(np.repeat(v, 3, axis=0) for v in (positive * 1, p, group)))
    assert np.allclose(copied[1], parts)


def test_macro_area_agrees_with_the_bootstrap():
    a, b = (make_predictions(CLASSES, 900, s, i) for i, s in enumerate((1.0, 1.3)))
    row = compare_all({"a": a, "b": b}, CLASSES, "macro_auc", resamples=1500)[0]
    assert row["delong"]["value"] == pytest.approx(row["value"], abs=1e-12)
    width = row["delong"]["high"] - row["delong"]["low"]
    assert width == pytest.approx(row["high"] - row["low"], rel=0.1)
    assert row["delong"]["p"] == pytest.approx(row["p"], rel=1, abs=0.01)


def test_areas_that_are_not_defined():
    y, group = np.zeros(5, int), np.arange(5)
    p = np.full((5, 2), 0.5)
    assert np.isnan(auc_components(y, p, group)[0]).all()
    auc, parts = auc_components(np.array([0, 0, 0, 0, 1]), p, group)
    assert auc.tolist() == [0.5, 0.5] and np.isnan(parts).all()  # one positive lesion
    table = make_predictions(CLASSES, 60, 1.0, 1)
    one = table[table["y_true"] == "a"]
    other = make_predictions(CLASSES, 60, 1.0, 2)
    row = compare_all({"a": one, "b": other[other["y_true"] == "a"]}, CLASSES)[0]
    assert row["delong"] == dict.fromkeys(("value", "low", "high", "p", "p_holm"))
    assert row["p"] is not None and row["mcnemar"]["p"] is not None
    json.dumps(row, allow_nan=False)


def test_all_pairs():
    runs = {f"r{i}": make_predictions(CLASSES, 200, 1 + 0.4 * i, i) for i in range(4)}
    rows = compare_all(runs, CLASSES, resamples=300)
    names = [(row["a"], row["b"]) for row in rows]
    assert names == [(f"r{i}", f"r{j}") for i in range(4) for j in range(i + 1, 4)]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    for row in rows:
        alone = paired_difference(
            runs[row["a"]], runs[row["b"]], CLASSES, "balanced_accuracy", resamples=300
        )
        for key in ("value", "low", "high", "p", "n", "lesions"):
            assert row[key] == alone[key]
        assert (row["value_a"], row["value_b"]) == (alone["a"], alone["b"])
        assert row["p_holm"] >= row["p"] and row["repeats"] == 1 and row["reason"] == ""
    for block in ("mcnemar", "delong"):
        p = [row[block]["p"] for row in rows]
        expected = multipletests(p, method="holm")[1]
        assert [row[block]["p_holm"] for row in rows] == pytest.approx(list(expected))
    # One test image of another name, one set of classes, no test images, no tables.
    table = runs["r0"]
    odd = {
        "other": table.assign(image_id="x" + table["image_id"]),
        "classes": make_predictions(["a", "b"], 50),
        "val": table[table["split"] == "val"],
        "nothing": [],
    }
    more = compare_all(runs | odd, CLASSES, resamples=300)
    assert [r for r in more if r["a"] in runs and r["b"] in runs] == rows
    said = {r["b"]: r["reason"] for r in more if r["a"] == "r0" and r["b"] in odd}
    assert "only in the second run (such as 'xDEMO" in said["other"]
    assert said["classes"] == "classes: it tells other classes apart (p_a, p_b)."
    assert said["val"] == "val: it has no test images."
    assert said["nothing"] == "nothing: it has no predictions."
    for row in more:
        assert (row["p"] is None) == bool(row["reason"]) == (row["repeats"] == 0)
    json.dumps(more, allow_nan=False)
    with pytest.raises(ConfigError, match="bad: predictions: a probability of image"):
        compare_all({"bad": table.assign(p_a=np.nan)}, CLASSES)
    with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
        compare_all(runs, CLASSES, "acuracy")
    assert compare_all({}, CLASSES) == compare_all({"a": table}, CLASSES) == []


def test_the_same_answers_do_not_differ():
    table = make_predictions(CLASSES, 80, 1.0, 1)
    row = compare_all({"a": table, "b": table.copy()}, CLASSES, resamples=50)[0]
    assert (row["value"], row["low"], row["p"], row["p_holm"]) == (0.0, None, 1.0, 1.0)
    assert row["mcnemar"]["p"] == row["delong"]["p"] == 1.0
    one = table[table["split"] == "test"].iloc[:1]
    row = compare_all({"a": one, "b": one}, CLASSES, resamples=50)[0]
    assert row["n"] == 1 and row["value"] == 0 and row["delong"]["value"] is None


def test_repeats_enter_together():
    seeds = [make_predictions(CLASSES, 150, 2.0, s) for s in (1, 2, 3)]
    base = [make_predictions(CLASSES, 150, 1.0, s) for s in (4, 5, 6)]
    row = compare_all({"a": seeds, "b": base}, CLASSES, resamples=200)[0]
    alone = paired_difference(seeds, base, CLASSES, "balanced_accuracy", resamples=200)
    assert [row[k] for k in ("value", "low", "high", "p", "n")] == [
        alone[k] for k in ("value", "low", "high", "p", "n")
    ]
    assert row["repeats"] == 3 and row["n"] == (seeds[0]["split"] == "test").sum()
    test = [t[t["split"] == "test"] for t in (*seeds, *base)]
    truth = test[0]["y_true"].map(CLASSES.index).to_numpy()
    p = [t[[f"p_{c}" for c in CLASSES]].to_numpy() for t in test]
    areas = [sk.roc_auc_score(truth, q / q.sum(1, keepdims=True), multi_class="ovr") for q in p]
    assert row["delong"]["value"] == pytest.approx(np.mean(areas[:3]) - np.mean(areas[3:]))
    right = [q.argmax(1) == truth for q in p]
    only = sum((x & ~y).sum() for x, y in zip(right[:3], right[3:], strict=True))
    assert row["mcnemar"]["b10"] == only
    # One run against three seeds: it stands beside each. The order of folds does not matter.
    single = compare_all({"a": seeds, "b": base[0]}, CLASSES, resamples=200)[0]
    each = paired_difference(seeds, [base[0]] * 3, CLASSES, "balanced_accuracy", resamples=200)
    assert single["repeats"] == 3 and single["low"] == pytest.approx(each["low"])
    sides = [
        [t.assign(**{c: f"F{i}" + t[c] for c in ("image_id", "lesion_id")}) for i, t in k]
        for k in (list(enumerate(seeds)), list(enumerate(base)))
    ]
    folds = compare_all({"a": sides[0], "b": sides[1]}, CLASSES, resamples=200)[0]
    turned = compare_all({"a": sides[0], "b": sides[1][::-1]}, CLASSES, resamples=200)[0]
    assert folds["n"] == 3 * row["n"] and folds["value"] == pytest.approx(row["value"])
    assert turned["low"] == pytest.approx(folds["low"])
    assert folds["delong"]["high"] - folds["delong"]["low"] == pytest.approx(
        row["delong"]["high"] - row["delong"]["low"], rel=0.3
    )
    part = compare_all({"a": sides[0], "b": sides[1][:2]}, CLASSES, resamples=50)[0]
    assert "only in the first run (such as 'F2DEMO" in part["reason"]


def test_p_values_keep_their_level():
    "Of networks that are equally good, about one pair in 20 has a p-value below 0.05."
    below, pairs = 0, 0
    for seed in range(30):
        runs = {f"{i}": make_predictions(CLASSES, 150, 1.0, 10 * seed + i) for i in range(4)}
        rows = compare_all(runs, CLASSES, "accuracy", resamples=150)
        below += sum(row["p"] < 0.05 for row in rows)
        pairs += len(rows)
    assert 0.01 < below / pairs < 0.10


@pytest.mark.parametrize("once", [1, 8])
def test_repeats_of_equal_recipes_keep_their_level(once):
    "Training varies, the recipe does not: also where one run stands beside several."
    rng = np.random.default_rng(once)
    below = 0
    for trial in range(25):
        tables = [
            make_predictions(CLASSES, 200, rng.normal(1.0, 0.6), 100 * trial + i)
            for i in range(once + 8)
        ]
        sides = {"a": tables[:once], "b": tables[once:]}
        below += compare_all(sides, CLASSES, "accuracy", resamples=60)[0]["p"] < 0.05
    assert below <= 4  # a variance without the single run gave 20 of 50


def test_few_lesions_in_a_class_are_allowed_for():
    "Six lesions of the rarest class: the normal distribution would be wrong twice as often."
    below, normal, pairs = 0, 0, 0
    for seed in range(60):
        runs = {
            f"{i}": make_predictions(CLASSES, 400, 1.0, 5000 + 10 * seed + i, [7, 2, 0.7, 0.3])
            for i in range(2)
        }
        row = compare_all(runs, CLASSES, resamples=200)[0]
        below, pairs = below + (row["p"] < 0.05), pairs + 1
        normal += not row["low"] <= 0 <= row["high"]
    assert below <= min(normal, 0.12 * pairs)


def test_hostile_names_are_only_names():
    names = ["<script>alert(1)</script>", "../../x", "y" * 300, "\u202eabc"]
    runs = {n: make_predictions(names, 60, 1.0, i) for i, n in enumerate(names)}
    plain = {str(i): make_predictions(CLASSES, 60, 1.0, i) for i in range(4)}
    rows = compare_all(runs, names, f"recall:{names[0]}", resamples=30)
    same = compare_all(plain, CLASSES, "recall:a", resamples=30)
    for row, other in zip(rows, same, strict=True):
        assert row["metric"] == f"recall:{names[0]}"
        for key in row.keys() - {"a", "b", "metric"}:
            assert row[key] == other[key]
    assert set(rank_ranges(rows, names)) == set(names)
    odd = runs[names[0]].assign(**{f"p_{names[1]}": 2.0})
    with pytest.raises(ConfigError) as caught:
        compare_all({names[3]: odd}, names)
    assert "outside 0 to 1" in str(caught.value) and "\n" not in str(caught.value)


def test_ranks_do_not_say_more_than_is_known():
    def row(a, b, value, p, metric="accuracy"):
        return {"a": a, "b": b, "value": value, "p_holm": p, "metric": metric}

    names = ["a", "b", "c"]
    assert rank_ranges([], names) == dict.fromkeys(names, (1, 3))
    clear = [row("a", "b", 0.1, 0.001), row("a", "c", 0.2, 0.001), row("b", "c", 0.1, 0.05)]
    assert rank_ranges(clear, names) == {"a": (1, 1), "b": (2, 2), "c": (3, 3)}
    tied = [row("a", "b", 0.1, 0.2), row("a", "c", 0.2, 0.01), row("b", "c", 0.1, 0.06)]
    assert rank_ranges(tied, names) == {"a": (1, 2), "b": (1, 3), "c": (2, 3)}
    loss = [row("a", "b", 0.1, 0.001, "log_loss"), row("a", "c", None, None, "log_loss")]
    assert rank_ranges(loss, names) == {"a": (2, 3), "b": (1, 2), "c": (1, 3)}
    # A run that is not ranked does not count.
    assert rank_ranges(clear, ["b", "c"]) == {"b": (1, 1), "c": (2, 2)}


def test_twenty_runs_are_compared_in_a_second():
    letters = list("abcdefg")
    runs = {f"r{i}": make_predictions(letters, 1900, 1 + 0.03 * i, i) for i in range(20)}
    compare_all(dict(list(runs.items())[:2]), letters, resamples=10)  # SciPy is loaded once
    start = time.process_time()
    rows = compare_all(runs, letters)
    assert time.process_time() - start < 5  # about 0.6 s; a slow or busy processor takes four times that
    assert len(rows) == 190 and rows[0]["n"] > 1500


def test_summarize_repeats():
    assert summarize_repeats([]) == dict.fromkeys(("mean", "sd", "min", "max")) | {"n": 0}
    one = summarize_repeats([0.5, None, float("nan")])
    assert one == {"mean": 0.5, "sd": None, "min": 0.5, "max": 0.5, "n": 1}
    many = summarize_repeats([0.1, 0.2, 0.6])
    assert many["sd"] == pytest.approx(np.std([0.1, 0.2, 0.6], ddof=1))


def test_loads_no_deep_learning_framework():
    code = (
        "import sys, dermnb.metrics.comparison;"
        "heavy = {'tensorflow', 'keras', 'keras_cv', 'jax', 'torch'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
