"""Claims that cannot be true, paired differences, what a leak is worth, and their errors."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from fabricate import make_predictions
from sklearn import metrics as sk

from dermnb.compare import (
    check_claims,
    claim_faults,
    claim_verdict,
    comparison_verdict,
    leak_effect,
    load_claims,
    paired_difference,
    paired_differences,
    resolve_metric,
    scores_from_confusion,
    summarise_repeats,
)
from dermnb.core import ConfigError
from dermnb.evaluate import CLASS_METRICS, METRICS, evaluate

CLASSES = ["a", "b", "c", "d"]
PUBLISHED = [
    [490, 101, 74, 60, 15, 10],
    [89, 334, 38, 41, 4, 4],
    [10, 1, 295, 15, 1, 0],
    [10, 10, 10, 106, 0, 0],
    [114, 20, 32, 43, 986, 166],
    [53, 21, 16, 23, 116, 620],
]


def claims(*rows, **more):
    given = [{"run": "a", "metric": m, "value": v} | more for m, v in rows]
    return load_claims(given, ["a", "b"])


def test_published_matrix_gives_the_published_figures():
    scores = scores_from_confusion(PUBLISHED)
    shown = {m: f"{100 * v:.2f}" for m, v in scores.items()}
    assert shown["accuracy"] == "72.07" and shown["weighted_f1"] == "72.69"
    assert shown["macro_f1"] == "68.54" and shown["macro_recall"] == "74.31"
    assert shown["macro_precision"] == "66.36"
    needing = {"macro_auc", "macro_average_precision", "log_loss", "brier"}
    assert set(scores) == set(METRICS) - needing - {"calibration_error"}
    rows = [(m, round(v, 4)) for m, v in scores.items()]
    for check in check_claims(claims(*rows, confusion=PUBLISHED, n=3928)):
        assert not check.fault and "Follows" in check.support


def test_confusion_scores_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    y, called = rng.integers(0, 4, (2, 300))
    scores = scores_from_confusion(sk.confusion_matrix(y, called))
    for average in ("macro", "weighted"):
        expected = sk.f1_score(y, called, average=average)
        assert scores[f"{average}_f1"] == pytest.approx(expected, abs=1e-12)
    assert scores["balanced_accuracy"] == pytest.approx(
        sk.balanced_accuracy_score(y, called)
    )


@pytest.mark.parametrize(
    "rows, more, wrong, sentence",
    [
        (
            [("macro_precision", 0.6538), ("macro_recall", 0.6229), ("macro_f1", 0.6718)],
            {},
            2,
            "at most the mean of precision and recall so averaged, here 0.63835",
        ),
        (
            [("weighted_precision", 0.7), ("accuracy", 0.6), ("weighted_f1", 0.67)],
            {"digits": 2},
            2,
            "at most",
        ),
        (
            [("macro_precision", 0.95), ("balanced_accuracy", 0.95), ("macro_f1", 0.5)],
            {},
            2,
            "at least precision plus recall minus 1, here 0.9000",
        ),
        (
            [("precision:x", 0.8), ("recall:x", 0.4), ("f1:x", 0.6)],
            {"digits": 2},
            2,
            "harmonic mean of precision and recall, here 0.53, not 0.60",
        ),
        ([("weighted_recall", 0.71), ("accuracy", 0.73)], {}, 1, "the same quantity"),
        ([("accuracy", 0.925)], {"digits": 3, "n": 30}, 0, "No whole number of 30"),
        ([("accuracy", 0.73)], {"confusion": PUBLISHED}, 0, "gives 0.7207, not 0.7300"),
        ([("accuracy", 0.7207)], {"confusion": PUBLISHED, "n": 4000}, 0, "counts 3,928"),
    ],
)
def test_faults(rows, more, wrong, sentence):
    found = claim_faults(claims(*rows, **more))
    assert sentence in found[wrong]
    assert not any(
        f for i, f in enumerate(found) if i != wrong and "same quantity" not in f
    )


def test_no_fault_within_rounding_or_between_sources():
    rows = [("macro_precision", 0.65), ("macro_recall", 0.62), ("macro_f1", 0.64)]
    assert claim_faults(claims(*rows, digits=2)) == [""] * 3
    assert claim_faults(claims(*rows, digits=4))[2]
    apart = claims(("accuracy", 0.7), source="x") + claims(
        ("weighted_recall", 0.6), source="y"
    )
    assert claim_faults(apart) == ["", ""]
    for k in range(601):  # every accuracy that 600 images can give, as it is printed
        for digits in (2, 3, 4):
            value = round(k / 600, digits)
            assert claim_faults(claims(("accuracy", value), n=600, digits=digits)) == [""]


@pytest.mark.parametrize("seed", range(20))
def test_true_figures_are_never_faulted(seed):
    rng = np.random.default_rng(seed)
    k, digits = int(rng.integers(2, 9)), int(rng.integers(2, 5))
    matrix = rng.integers(0, 30, (k, k)) * (rng.random((k, k)) < 0.6)
    matrix += np.eye(k, dtype=int) * rng.integers(0, 60)
    matrix[0, 0] += 1
    scores = scores_from_confusion(matrix)
    rows = [(m, round(v, digits)) for m, v in scores.items()]
    found = claims(*rows, digits=digits, confusion=matrix.tolist())
    assert claim_faults(found) == [""] * len(rows)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"metric": "acuracy", "value": 0.7}, "did you mean 'accuracy'"),
        ({"metric": "recal:x", "value": 0.7}, "unknown metric 'recal:x'"),
        ({"metric": "recall:", "value": 0.7}, "unknown metric"),
        ({"metric": "accuracy", "value": 0.7, "run": "aa"}, "unknown run 'aa': did you"),
        ({"metric": "accuracy", "better_than": "c"}, "unknown run 'c'"),
        ({"metric": "accuracy", "value": 72.07}, "share from 0 to 1: 72.07 % is 0.7207"),
        ({"metric": "accuracy", "value": -1}, "share from 0 to 1"),
        ({"metric": "accuracy", "value": "high"}, "value = 'high' does not fit"),
        ({"metric": "accuracy"}, "either a value or better_than"),
        ({"metric": "accuracy", "value": 0.7, "better_than": "b"}, "either a value"),
        ({"metric": "accuracy", "better_than": "a"}, "better than itself"),
        ({"value": 0.7}, "metric is missing"),
        ({"metric": "accuracy", "value": 0.7, "split": "train"}, "split = 'train'"),
        ({"metric": "accuracy", "value": 0.7, "confusion": [[1, 2]]}, "as many columns"),
        ({"metric": "accuracy", "value": 0.7, "confusion": [[1, -2], [0, 1]]}, "counts"),
        ({"metric": "accuracy", "valeu": 0.7}, "did you mean 'value'"),
    ],
)
def test_claim_errors_are_one_sentence(wrong, sentence):
    with pytest.raises(ConfigError, match="mine.yaml, claim 2") as caught:
        good = {"run": "a", "metric": "accuracy", "value": 0.5}
        load_claims([good, {"run": "a"} | wrong], ["a", "b"], "mine.yaml")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_claims_and_no_list():
    assert load_claims(None, []) == load_claims([], []) == []
    for wrong in ("text", {"run": "a"}, 3):
        with pytest.raises(ConfigError, match="must be a list"):
            load_claims(wrong, ["a"])
    with pytest.raises(ConfigError, match="is no claim"):
        load_claims(["accuracy .7"], ["a"])


def test_verdicts():
    claim = claims(("accuracy", 0.7207))[0]
    inside = {"value": 0.7, "low": 0.67, "high": 0.73}
    below, above = inside | {"high": 0.71}, inside | {"value": 0.8, "low": 0.75, "high": 0.9}
    assert claim_verdict(claim, [inside]) == "interval contains the claim"
    assert claim_verdict(claim, [below]) == "measured below the claim"
    assert claim_verdict(claim, [above]) == "measured above the claim"
    assert "1 of 3 repeats" in claim_verdict(claim, [inside, below, above])
    assert "in all 2" in claim_verdict(claim, [below, below])
    assert "both sides" in claim_verdict(claim, [below, above])
    assert claim_verdict(claim, [{"value": None}]) == "not measured"
    alone = {"value": 0.72073, "low": None, "high": None}
    assert "printed digits" in claim_verdict(claim, [alone])
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
        paired_difference(a, b, ["b", "m"], "specificity_at_95_sensitivity")


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


def test_rarest():
    counts = {"nv": 600, "df": 0, "vasc": 9, "mel": 9}
    assert resolve_metric("recall:rarest", counts) == "recall:vasc"
    assert resolve_metric("f1:mel", counts) == "f1:mel"
    with pytest.raises(ConfigError, match="not known"):
        resolve_metric("recall:rarest", {})


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


def test_summarise_repeats():
    assert summarise_repeats([]) == dict.fromkeys(("mean", "sd", "min", "max")) | {"n": 0}
    one = summarise_repeats([0.5, None, float("nan")])
    assert one == {"mean": 0.5, "sd": None, "min": 0.5, "max": 0.5, "n": 1}
    many = summarise_repeats([0.1, 0.2, 0.6])
    assert many["sd"] == pytest.approx(np.std([0.1, 0.2, 0.6], ddof=1))


def test_loads_no_deep_learning_framework():
    code = (
        "import sys, dermnb.compare;"
        "heavy = {'tensorflow', 'keras', 'keras_cv', 'jax', 'torch'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
