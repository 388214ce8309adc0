"""Metrics against scikit-learn on random tables, the bootstrap against brute force, bad tables."""

import json
import subprocess
import sys
import time
import warnings

import numpy as np
import pandas as pd
import pytest
from fabricate import make_predictions
from scipy.stats import binned_statistic
from sklearn import metrics as sk
from statsmodels.stats.inter_rater import cohens_kappa

from dermnb.core import ConfigError
from dermnb.metrics.scores import (
    BINARY_METRICS,
    CLASS_METRICS,
    METRICS,
    SCHEMA,
    RankedScores,
    TableScores,
    check_predictions,
    choose_specific_threshold,
    choose_threshold,
    confidence_bins,
    evaluate,
    intervals,
    log_losses,
    positive_class,
    recorded_positive,
    scores_from_counts,
    unit_numbers,
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


def partial_auc(y, scores):
    "scikit-learn's, with the curve turned round and unscaled: area above 80 % sensitivity."
    scaled = sk.roc_auc_score(~y, -scores, max_fpr=0.2)
    return 0.02 + (0.2 - 0.02) * (scaled - 0.5) / 0.5


def on_curve(y, scores):
    "By scikit-learn's curve: sensitivity at 95 % specificity, and the reverse."
    fpr, tpr, _ = sk.roc_curve(y, scores, drop_intermediate=False)
    return tpr[fpr <= 0.05 + 1e-9].max(), 1 - fpr[tpr >= 0.95 - 1e-9].min()


def curve_metrics(y, scores):
    "All of one class that the order of images decides."
    first, second = on_curve(y, scores)
    return {
        "auc": sk.roc_auc_score(y, scores),
        "average_precision": sk.average_precision_score(y, scores),
        "partial_auc": partial_auc(y, scores),
        "sensitivity_on_curve": first,
        "specificity_on_curve": second,
    }


def calibration_error(right, confidence):
    "As defined, bin by bin; with SciPy where no two images are equally confident."
    n = len(right)
    bins = [15 * sum(confidence < c) // n for c in confidence]
    gaps = [
        abs(sum(confidence[i] - right[i] for i in range(n) if bins[i] == b))
        for b in range(15)
    ]
    if len(set(confidence)) == n and n % 15 == 0:
        edges = np.append(np.sort(confidence)[:: n // 15], 1.1)
        means = binned_statistic(confidence, right - confidence, "mean", edges)[0]
        assert sum(gaps) / n == pytest.approx(np.abs(means).mean(), abs=1e-9)
    return sum(gaps) / n


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
        curves = [curve_metrics(y == c, p[:, CLASSES.index(c)]) for c in present]
        curves = {m: [row[m] for row in curves] for m in curves[0]}
        truth = np.array([CLASSES.index(c) for c in y])
        right = called == y
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of predicted classes that are absent
            balanced = sk.balanced_accuracy_score(y, called)
        expected = {
            "accuracy": sk.accuracy_score(y, called),
            "balanced_accuracy": balanced,
            "macro_auc": np.mean(curves["auc"]),
            "macro_average_precision": np.mean(curves["average_precision"]),
            "cohen_kappa": sk.cohen_kappa_score(y, called),
            "matthews": sk.matthews_corrcoef(y, called),
            "log_loss": sk.log_loss(truth, p, labels=range(4)),
            "brier": sk.brier_score_loss(truth, p, labels=range(4), scale_by_half=False),
            "calibration_error": calibration_error(right, p.max(axis=1)),
        }
        matrix = sk.confusion_matrix(y, called, labels=CLASSES)
        assert cohens_kappa(matrix).kappa == pytest.approx(expected["cohen_kappa"], abs=1e-9)
        for average in ("macro", "weighted"):
            expected |= {
                f"{average}_precision": sk.precision_score(
                    y, called, average=average, **kw
                ),
                f"{average}_recall": sk.recall_score(y, called, average=average, **kw),
                f"{average}_f1": sk.f1_score(y, called, average=average, **kw),
            }
        recall = expected.pop("macro_recall")  # by another name
        assert recall == pytest.approx(expected["balanced_accuracy"], abs=1e-9)
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
            **curves,
        }
        assert set(each) == set(CLASS_METRICS)
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
    group[:60] = np.arange(60)
    p = rng.dirichlet(np.ones(k), n).round(1 + seed % 3) + 1e-3
    p /= p.sum(axis=1, keepdims=True)
    times = rng.integers(0, 4, (60, 5)).astype(np.int32)
    table, _, _ = TableScores(y, p, group)(times)
    bins = confidence_bins(p.max(axis=1))
    for r in range(5):
        rows = np.repeat(np.arange(n), times[group, r])
        yy, pp = y[rows], p[rows]
        counts = sk.confusion_matrix(yy, pp.argmax(1), labels=range(k))
        overall, _ = scores_from_counts(counts)
        assert overall["macro_f1"] == pytest.approx(
            sk.f1_score(yy, pp.argmax(1), average="macro", zero_division=0), abs=1e-12
        )
        one = {
            "matthews": sk.matthews_corrcoef(yy, pp.argmax(1)),
            "cohen_kappa": sk.cohen_kappa_score(yy, pp.argmax(1)),
            "log_loss": sk.log_loss(yy, pp),
            "brier": sk.brier_score_loss(yy, pp, scale_by_half=False),
            "macro_auc": sk.roc_auc_score(yy, pp, multi_class="ovr"),
            # With the bins of the table as it is.
            "calibration_error": sum(
                abs((pp.max(1) - (pp.argmax(1) == yy))[bins[rows] == b].sum())
                for b in range(15)
            )
            / len(rows),
        }
        for metric, value in one.items():
            assert table[metric][r] == pytest.approx(value, abs=1e-12), metric
        for c in range(k):
            fast = RankedScores(p[:, c], y == c, group)(times)
            for metric, value in curve_metrics(yy == c, pp[:, c]).items():
                assert fast[metric][r] == pytest.approx(value, abs=1e-12), metric


def test_bootstrap_draws_whole_lesions():
    "The vectorized bootstrap has the spread of one that repeats rows one resample at a time."
    table = make_predictions(CLASSES, 120, 1.0, 5)
    y = table["y_true"].map(CLASSES.index).to_numpy()
    p = table[[f"p_{c}" for c in CLASSES]].to_numpy()
    group = np.unique(table["lesion_id"], return_inverse=True)[1]
    scores = TableScores(y, p, group)
    overall, per_class, _ = scores.resample(3000, np.random.default_rng(0))
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
    assert other["splits"]["test"]["per_class"] != whole["splits"]["test"]["per_class"]  # of resamples
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
        for undefined in ("macro_auc", "macro_average_precision", "cohen_kappa", "matthews"):
            assert scored["metrics"][undefined]["value"] is None
        assert scored["metrics"]["log_loss"]["value"] == pytest.approx(-np.log(0.9))
        assert scored["metrics"]["brier"]["value"] == pytest.approx(0.02)
        assert scored["metrics"]["calibration_error"]["value"] == pytest.approx(0.1)
        json.dumps(scored, allow_nan=False)
        assert scored["absent"] == ["b"]
        assert all(scored["per_class"][1][m]["value"] is None for m in CLASS_METRICS)


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
    # The lowest threshold lies just above the score of a negative image.
    spare = min(t for t in s[~y] if (s[~y] <= t).mean() >= 0.95)
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
            "sensitivity_at_95_specificity": np.mean(s[y] > spare),
            "specificity_at_specificity_threshold": np.mean(s[~y] <= spare),
        }
        assert binary["specificity_threshold"] == np.nextafter(spare, 1)
        rows = {row["class"]: row for row in scored["per_class"]}
        assert rows[name]["partial_auc"] == binary["metrics"]["partial_auc"]
        for metric, value in expected.items():
            cell = binary["metrics"][metric]
            assert cell["value"] == pytest.approx(value, abs=1e-9), metric
            n = {"sen": y.sum(), "spe": (~y).sum()}.get(metric[:3], len(y))
            assert cell["n"] == n
        if split == "val":
            assert binary["metrics"]["sensitivity_at_threshold"]["value"] >= 0.95
            kept = binary["metrics"]["specificity_at_specificity_threshold"]
            assert kept["value"] >= 0.95


def test_two_classes_only_and_without_validation():
    table = make_predictions(["b", "m"], 80, 1.0, 1)
    alone = evaluate(table[table["split"] == "test"], ["b", "m"], resamples=20, positive="m")
    binary = alone["splits"]["test"]["binary"]
    assert binary["positive"] == "m" and binary["threshold"] is None
    for name in list(BINARY_METRICS)[4:]:
        assert binary["metrics"][name]["value"] is None
    assert binary["metrics"]["partial_auc"]["low"] < binary["metrics"]["partial_auc"]["high"]
    assert "binary" not in evaluate(GOOD, CLASSES, resamples=10)["splits"]["test"]
    json.dumps(alone, allow_nan=False)
    one = evaluate(table[table["y_true"] == "b"], ["b", "m"], resamples=20, positive="m")
    values = one["splits"]["test"]["binary"]["metrics"]
    assert values["sensitivity"]["value"] is None and values["auc"]["value"] is None
    assert choose_threshold(np.arange(20.0), np.ones(20, bool)) == 1.0
    assert choose_specific_threshold(np.arange(20.0), np.ones(20, bool)) is None
    assert 18 < choose_specific_threshold(np.arange(20.0), np.zeros(20, bool)) < 18.001
    with pytest.raises(ConfigError, match="unknown positive class 'n'"):
        evaluate(table, ["b", "m"], positive="n")
    with pytest.raises(ConfigError, match="for two classes"):
        evaluate(GOOD, CLASSES, positive="a")


def test_no_class_is_positive_unless_it_is_named():
    table, classes = make_predictions(["melanoma", "nevus"], 80, 1.0, 1), ["melanoma", "nevus"]
    named, plain = (evaluate(table, classes, resamples=50, positive=p) for p in ("nevus", ""))
    for split, scored in named["splits"].items():
        del scored["binary"]
        assert plain["splits"][split] == scored  # all else is as it was
    record = {"classes": classes, "config": {"positive": ""}, "dataset": {"positive": ""}}
    assert positive_class(classes) is None and recorded_positive(record) == ""
    by_taxonomy = record | {"dataset": {"positive": "nevus"}}
    assert recorded_positive(by_taxonomy, record) == "nevus"
    by_config = by_taxonomy | {"config": {"positive": "melanoma"}}
    assert recorded_positive(by_config) == "melanoma"
    assert recorded_positive(by_config | {"classes": ["a", "b", "c"]}) == ""
    with pytest.raises(ConfigError, match="different positive classes, melanoma and nevus"):
        recorded_positive(by_config, by_taxonomy)


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


def test_every_metric_says_what_it_is():
    for table in (METRICS, CLASS_METRICS, BINARY_METRICS):
        for name, spec in table.items():
            assert spec.name == name and spec.title and spec.lowest < spec.highest
            assert len(spec.definition) > 15 and not spec.definition.endswith(".")
    down = {m for m, spec in METRICS.items() if not spec.higher_is_better}
    assert down == {"log_loss", "brier", "calibration_error"}
    result = evaluate(make_predictions(CLASSES, 100, 1.0, 0), CLASSES, resamples=20)
    assert result["schema"] == SCHEMA == 3
    for scored in result["splits"].values():
        for name, cell in scored["metrics"].items():
            spec = METRICS[name]
            assert spec.lowest <= cell["low"] <= cell["high"] <= spec.highest, name
        for row in scored["per_class"]:
            for name, spec in CLASS_METRICS.items():
                assert spec.lowest <= row[name]["value"] <= spec.highest, name


def test_wrong_and_certain_costs_much_but_not_infinitely_much():
    y, p = np.array([0, 0]), np.array([[1.0, 0.0], [0.0, 1.0]])
    assert np.allclose(log_losses(p, y), [0, -np.log(1e-12)], rtol=0, atol=1e-11)
    # Rows that rounding left a little off 1 are divided by their sum.
    off = p[:1] * 0.9 + 0.05
    assert log_losses(off * 1.00005, y[:1]) == pytest.approx(log_losses(off, y[:1]))


def test_calibration_error_by_hand_and_its_interval():
    assert (np.bincount(confidence_bins(np.arange(45.0))) == 3).all()
    assert confidence_bins(np.array([0.9, 0.5, 0.5, 0.7])).tolist() == [11, 0, 0, 7]
    assert confidence_bins(np.empty(0)).size == 0
    # The interval lies round the value, though resamples have more error than the table.
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 300)
    right = rng.random(300) < confidence
    p = np.where(right, confidence, 1 - confidence)
    ids = [str(i) for i in range(300)]
    table = pd.DataFrame({"image_id": ids, "lesion_id": ids, "split": "test", "y_true": "a"})
    table = table.assign(p_a=p, p_b=1 - p)
    scored = evaluate(table, ["a", "b"])["splits"]["test"]["metrics"]["calibration_error"]
    assert scored["low"] < scored["value"] < scored["high"]
    assert scored["value"] == pytest.approx(calibration_error(right, confidence), abs=1e-9)


def test_patients_are_drawn_where_they_are_known():
    table = make_predictions(CLASSES, 120, 1.0, 0)
    by_lesion = evaluate(table, CLASSES, resamples=200)
    number = table["lesion_id"].factorize()[0]
    table["patient_id"] = pd.Series(number // 4).map("P{}".format).astype("object")
    table.loc[table["lesion_id"].duplicated(), "patient_id"] = None  # known by its lesion
    by_patient = evaluate(table, CLASSES, resamples=200)
    assert by_lesion["unit"] == "lesion" and by_patient["unit"] == "patient"
    one, other = (m["splits"]["test"] for m in (by_lesion, by_patient))
    assert one["lesions"] == other["lesions"] == one["units"] > other["units"]
    for name, cell in one["metrics"].items():
        assert cell["value"] == pytest.approx(other["metrics"][name]["value"], abs=1e-12)
        assert cell["low"] != other["metrics"][name]["low"]
    assert len(set(unit_numbers(table))) == number.max() // 4 + 1
    # Whoever has no patient is drawn as a lesion.
    rest = table.assign(patient_id=table["patient_id"].where(number < 40))
    assert len(set(unit_numbers(rest))) == 10 + number.max() + 1 - 40
    nobody = evaluate(table.assign(patient_id=None), CLASSES, resamples=200)
    assert nobody == by_lesion


HOSTILE = ["<script>alert(1)</script>", "../../etc", "x" * 300, "\u202eمرحبا", "a:b", ""]


def test_hostile_names_are_only_names():
    table = make_predictions(HOSTILE, 150, 1.0, 0)
    names = {i: f"{HOSTILE[i % 5]}{i}" for i in range(len(table))}
    table["image_id"] = [names[i] for i in range(len(table))]
    plain = make_predictions([f"c{i}" for i in range(6)], 150, 1.0, 0)
    plain["image_id"] = table["image_id"]
    hostile = evaluate(table, HOSTILE, resamples=50)
    same = evaluate(plain, [f"c{i}" for i in range(6)], resamples=50)
    for split, scored in hostile["splits"].items():
        assert scored["metrics"] == same["splits"][split]["metrics"]
        assert [row["class"] for row in scored["per_class"]] == HOSTILE
    with pytest.raises(ConfigError) as caught:
        evaluate(table.assign(**{"p_<script>": 0.0}), HOSTILE)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="is missing or infinite"):
        check_predictions(table.assign(**{f"p_{HOSTILE[1]}": np.nan}), HOSTILE)


def test_is_quick_and_loads_little():
    "2,000 resamples of 10,000 images of 8 classes, every metric."
    rng = np.random.default_rng(0)
    p, y = rng.dirichlet(np.ones(8), 10_000), rng.integers(0, 8, 10_000)
    evaluate(GOOD, CLASSES, resamples=1)  # SciPy is loaded once
    start = time.process_time()
    TableScores(y, p, np.arange(10_000)).resample(2000, rng)
    assert time.process_time() - start < 6  # about 0.7 s; a slow or busy processor takes five times that
    code = (
        "import sys, dermnb.metrics.scores;"
        "heavy = {'tensorflow', 'keras', 'jax', 'torch', 'scipy', 'sklearn'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_intervals_cover_and_stop_where_a_class_has_three_lesions():
    "Balanced accuracy of 400 small sets, where quantiles cover nine in ten; the bounds are four standard errors."
    rng = np.random.default_rng(0)
    recall, hits, sizes = np.array([0.6, 0.8, 0.9]), 0, (6, 30, 120)
    y = np.repeat(np.arange(3), sizes)
    for _ in range(400):
        right = rng.random(len(y)) < recall[y]
        said = np.where(right, y, (y + 1) % 3)
        p = np.full((len(y), 3), 0.1) + 0.7 * np.eye(3)[said]
        value = np.mean([right[y == c].mean() for c in range(3)])
        low, high = intervals({"balanced_accuracy": value}, y, p, np.arange(len(y)))["balanced_accuracy"]
        hits += low <= recall.mean() <= high
    assert abs(hits / 400 - 0.95) < 4 * np.sqrt(0.05 * 0.95 / 400)
    keep = np.flatnonzero((y > 0) | (np.cumsum(y == 0) <= 3))
    values = {"balanced_accuracy": 0.8, "accuracy": 0.8}
    found = intervals(values, y[keep], p[keep], np.arange(len(keep)))
    assert found["balanced_accuracy"] == (None, None) and found["accuracy"][0] < 0.8
