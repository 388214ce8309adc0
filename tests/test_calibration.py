"""Temperature, sets and abstaining against brute force, and on tables that are odd."""

import json
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from fabricate import make_predictions
from scipy.special import softmax
from sklearn.metrics import brier_score_loss, log_loss

from dermnb.metrics.calibration import (
    COLDEST,
    HOTTEST,
    Decision,
    calibration_summary,
    conformal_sets,
    conformal_threshold,
    error_by_chance,
    fit_decision,
    fit_temperature,
    risk_coverage,
    temper,
)
from dermnb.core import ConfigError
from dermnb.metrics.scores import evaluate

CLASSES = ["a", "b", "c"]


def drawn(n=4000, k=3, seed=0, factor=1.0):
    "Logits times a factor, and truth drawn from the softmax of the logits without it."
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, k))
    p = softmax(logits, axis=1)
    y = (rng.random((n, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(0, k - 1)
    return factor * logits, softmax(factor * logits, axis=1), y


def table_of(p, y, split="val", lesions=None):
    ids = np.arange(len(y))
    columns = {
        "image_id": [f"{split}{i:05d}" for i in ids],
        "lesion_id": [f"{split}{i}" for i in (ids if lesions is None else lesions)],
        "split": split,
        "y_true": np.array(CLASSES)[y],
    }
    return pd.DataFrame(columns).join(pd.DataFrame(p, columns=[f"p_{c}" for c in CLASSES]))


@pytest.mark.parametrize("t", [0.05, 0.4, 1.0, 3.0, 20.0])
def test_tempering_is_the_softmax_of_divided_logits(t):
    logits, p, _ = drawn(200)
    assert np.allclose(temper(p, t), softmax(logits / t, axis=1), atol=1e-9)
    assert (temper(p, t).argmax(axis=1) == p.argmax(axis=1)).all()
    hard = temper(np.array([[0, 0.3, 0.7], [1, 0, 0], [0.5, 0.5, 0]]), t)
    assert np.isfinite(hard).all() and (hard[:, 0][[0]] == 0).all()
    assert np.allclose(hard.sum(axis=1), 1) and hard[1].tolist() == [1, 0, 0]
    assert temper(np.zeros((0, 3)), t).shape == (0, 3)


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5, 6.0])
def test_the_temperature_has_the_least_log_loss(factor):
    _, p, y = drawn(factor=factor)
    t = fit_temperature(p, y)
    assert t == pytest.approx(factor, rel=0.08)
    best = log_loss(y, temper(p, t))
    for other in np.geomspace(COLDEST, HOTTEST, 60):
        assert log_loss(y, temper(p, other)) >= best - 1e-9
    assert log_loss(y, p) >= best


def test_a_temperature_stays_in_its_bounds():
    right = np.array([[0.6, 0.4], [0.3, 0.7]])
    assert fit_temperature(right, [0, 1]) == pytest.approx(COLDEST, rel=1e-3)
    assert fit_temperature(right, [1, 0]) == pytest.approx(HOTTEST, rel=1e-3)
    assert fit_temperature(np.eye(3), [0, 1, 2]) == 1
    assert np.isfinite(fit_temperature(np.eye(3), [1, 1, 1]))
    assert fit_temperature(np.ones((5, 1)), [0] * 5) == 1  # one class


@pytest.mark.parametrize("n", [1, 8, 9, 10, 19, 57, 200])
@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.95])
def test_the_threshold_is_that_of_the_definition(n, coverage):
    _, p, y = drawn(n, seed=n)
    scores = sorted(1 - p[np.arange(n), y])
    rank = int(np.ceil(round((n + 1) * coverage, 9)))
    expected = scores[rank - 1] if rank <= n else None
    assert conformal_threshold(p, y, coverage) == expected
    sets = conformal_sets(p, expected)
    assert sets[np.arange(n), p.argmax(axis=1)].all()
    inside = sets[np.arange(n), y].mean()
    assert inside >= coverage - 1e-9 and (expected is not None or inside == 1)


def test_new_images_are_covered_and_a_rare_class_is_not():
    rng = np.random.default_rng(1)
    _, p, y = drawn(20_000, factor=3)  # overconfident: the promise does not mind
    found = []
    for _ in range(200):
        fit, new = np.split(rng.choice(len(y), 198, replace=False), 2)
        sets = conformal_sets(p[new], conformal_threshold(p[fit], y[fit]))
        found.append(sets[np.arange(99), y[new]].mean())
    assert 0.89 < np.mean(found) < 0.92
    table = make_predictions(CLASSES, 3000, 1.5, 0, [0.75, 0.22, 0.03])
    summary = calibration_summary(table, CLASSES, fit_decision(table, CLASSES), resamples=50)
    test = summary["splits"]["test"]
    assert test["coverage"]["value"] == pytest.approx(0.9, abs=0.03)
    assert test["per_class"][2]["coverage"]["value"] < 0.75


def test_risk_coverage_by_hand_and_with_ties():
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.6, 0.4]])
    curve = risk_coverage(p, [0, 1, 1, 0])
    assert curve["confidence"].tolist() == [0.9, 0.8, 0.6, 0.6]
    assert curve["coverage"].tolist() == [0.25, 0.5, 0.75, 1]
    # One of two equally sure images is wrong: at 3 of 4 answered, half an error.
    assert np.allclose(curve["risk"], [0, 0, 0.5 / 3, 0.25])
    back = risk_coverage(p[::-1], [0, 1, 1, 0][::-1])
    assert np.allclose(back, curve)
    assert risk_coverage(p[:0], []).empty


def test_decision_is_of_validation_alone_and_reads_back():
    table = make_predictions(CLASSES, 400, 1.0, 0)
    decision = fit_decision(table, CLASSES)
    val = table[table["split"] == "val"].sample(frac=1, random_state=0)
    assert fit_decision(val, CLASSES) == decision
    assert decision.n == len(val) and decision.positive_threshold is None
    q = temper(val[["p_a", "p_b", "p_c"]].to_numpy(), decision.temperature)
    reached = (q.max(axis=1) >= decision.min_confidence).mean()
    assert 0.8 <= reached < 0.8 + 2 / len(val)
    text = json.dumps(decision.to_dict(), allow_nan=False)
    assert Decision.from_dict(json.loads(text)) == decision
    assert Decision.from_dict({}) == Decision()


def test_two_classes_have_a_threshold():
    table = make_predictions(["benign", "malignant"], 500, 1.5)
    for positive in ("benign", "malignant"):
        decision = fit_decision(table, ["benign", "malignant"], positive)
        val = table[table["split"] == "val"]
        q = temper(val[["p_benign", "p_malignant"]].to_numpy(), decision.temperature)
        found = q[:, int(positive == "malignant")] >= decision.positive_threshold
        hit = found[val["y_true"] == positive].mean()
        assert 0.95 <= hit < 0.97 and decision.positive == positive
    unnamed = fit_decision(table, ["benign", "malignant"])
    assert unnamed.positive == "" and unnamed.positive_threshold is None
    assert unnamed.temperature == decision.temperature


def test_nothing_one_image_and_an_absent_class():
    table = make_predictions(CLASSES, 200)
    no_val = table[table["split"] == "test"]
    assert fit_decision(no_val, CLASSES) == Decision()
    summary = calibration_summary(no_val, CLASSES, Decision(), resamples=20)
    test = summary["splits"]["test"]
    assert list(summary["splits"]) == ["test"] and test["coverage"]["value"] == 1
    assert test["set_size"]["value"] == 3 and test["abstain"]["answered"]["value"] == 1
    assert test["log_loss"]["difference"]["value"] == 0
    for one in (table[:1], no_val[:1]):
        decision = fit_decision(one, CLASSES)
        assert decision.set_threshold is None
        summary = calibration_summary(one, CLASSES, decision, resamples=20)
        (found,) = summary["splits"].values()
        assert found["n"] == 1 and found["coverage"]["low"] is None
        json.dumps(summary, allow_nan=False)
    lacking = table[table["y_true"] != "c"]
    decision = fit_decision(lacking, CLASSES)
    found = calibration_summary(lacking, CLASSES, decision, resamples=20)["splits"]["test"]
    assert found["per_class"][2]["n"] == 0
    assert found["per_class"][2]["coverage"]["value"] is None
    json.dumps(found, allow_nan=False)


def test_certain_and_wrong_predictions_are_finite():
    y = np.arange(60) % 3
    p = np.eye(3)[np.where(np.arange(60) < 20, y, 0)]
    table = pd.concat([table_of(p, y), table_of(p, y, "test")])
    decision = fit_decision(table, CLASSES)
    summary = calibration_summary(table, CLASSES, decision, resamples=20)
    losses = summary["splits"]["test"]["log_loss"]
    assert losses["after"]["value"] <= losses["before"]["value"] < 30
    json.dumps(summary, allow_nan=False)


def test_summary_is_that_of_the_table():
    _, p, y = drawn(400, factor=2)
    table = pd.concat([table_of(p[:200], y[:200]), table_of(p[200:], y[200:], "test")])
    decision = fit_decision(table, CLASSES)
    summary = calibration_summary(table, CLASSES, decision, resamples=50)
    q, y = temper(p[200:], decision.temperature), y[200:]
    found = summary["splits"]["test"]
    sets = conformal_sets(q, decision.set_threshold)
    inside = sets[np.arange(200), y]
    assert found["coverage"]["value"] == pytest.approx(inside.mean())
    assert found["set_size"]["value"] == pytest.approx(sets.sum(axis=1).mean())
    assert found["single"]["value"] == pytest.approx((sets.sum(axis=1) == 1).mean())
    assert found["log_loss"]["before"]["value"] == pytest.approx(log_loss(y, p[200:]))
    assert found["log_loss"]["after"]["value"] == pytest.approx(log_loss(y, q))
    curve = risk_coverage(q, y)
    assert found["aurc"]["value"] == pytest.approx(curve["risk"].mean())
    for row in found["risk"]:
        at = curve.iloc[row["risk"]["n"] - 1]
        assert row["risk"]["value"] == pytest.approx(at["risk"])
        assert row["confidence"] == at["confidence"]
        assert at["coverage"] == pytest.approx(row["coverage"])
    sure = q.max(axis=1) >= decision.min_confidence
    right = q.argmax(axis=1) == y
    assert found["abstain"]["answered"]["value"] == pytest.approx(sure.mean())
    assert found["abstain"]["accuracy"]["value"] == pytest.approx(right[sure].mean())
    assert found["abstain"]["accuracy"]["n"] == sure.sum()
    for c, row in enumerate(found["per_class"]):
        assert row["coverage"]["value"] == pytest.approx(inside[y == c].mean())
        assert row["n"] == (y == c).sum()
    assert calibration_summary(table.sample(frac=1), CLASSES, decision, resamples=50) == summary


@pytest.mark.parametrize("ties", [False, True])
def test_reliability_is_that_of_the_table(ties):
    _, p, y = drawn(460, factor=2)
    if ties:
        p = p.round(1) + 1e-3
        p /= p.sum(axis=1, keepdims=True)
    table = pd.concat([table_of(p[:230], y[:230]), table_of(p[230:], y[230:], "test")])
    decision = fit_decision(table, CLASSES)
    summary = calibration_summary(table, CLASSES, decision, resamples=100)
    whole = evaluate(table, CLASSES, resamples=50)
    for split, found in summary["splits"].items():
        part = slice(230) if split == "val" else slice(230, None)
        stages = {"before": p[part], "after": temper(p[part], decision.temperature)}
        for stage, q in stages.items():
            rows, truth = found["reliability"][stage], y[part]
            confidence, right = q.max(axis=1), q.argmax(axis=1) == truth
            assert sum(row["n"] for row in rows) == len(truth) and 1 < len(rows) <= 15
            sizes = [row["n"] for row in rows]
            assert ties or max(sizes) - min(sizes) <= 1
            for row, after in zip(rows, [*rows[1:], None], strict=True):
                assert after is None or row["highest"] < after["lowest"]
                inside = (confidence >= row["lowest"]) & (confidence <= row["highest"])
                assert row["n"] == row["accuracy"]["n"] == inside.sum()
                assert row["accuracy"]["value"] == pytest.approx(right[inside].mean())
                assert row["confidence"] == pytest.approx(confidence[inside].mean())
            gaps = [abs(r["confidence"] - r["accuracy"]["value"]) * r["n"] for r in rows]
            error = found["calibration_error"]
            assert error[stage]["value"] == pytest.approx(sum(gaps) / len(truth), abs=1e-9)
            assert error[stage]["low"] < error[stage]["value"] < error[stage]["high"]
            assert error["by_chance"][stage] == error_by_chance(confidence)
            brier = brier_score_loss(truth, q, scale_by_half=False)
            assert found["brier"][stage]["value"] == pytest.approx(brier, abs=1e-9)
        for name in ("log_loss", "brier", "calibration_error"):
            ends = [found[name][end]["value"] for end in ("before", "after", "difference")]
            assert ends[2] == pytest.approx(ends[1] - ends[0])
            scored = whole["splits"][split]["metrics"][name]["value"]
            assert ends[0] == pytest.approx(scored, abs=1e-9)
    assert found["calibration_error"]["difference"]["high"] < 0  # overconfident by 2
    json.dumps(summary, allow_nan=False)


def test_bootstrap_is_over_lesions():
    _, p, y = drawn(300, seed=3)
    once = pd.concat([table_of(p, y), table_of(p, y, "test")])
    thrice = [0, 1, 2] * 300
    rows = np.repeat(np.arange(300), 3)
    copied = pd.concat([table_of(p, y), table_of(p[rows], y[rows], "test", rows)])
    assert len(thrice) == (copied["split"] == "test").sum()
    width = {}
    for name, table in (("once", once), ("copied", copied)):
        decision = fit_decision(table, CLASSES)
        found = calibration_summary(table, CLASSES, decision, resamples=600)
        found = found["splits"]["test"]
        cells = (found["coverage"], found["aurc"], found["risk"][3]["risk"])
        width[name] = [e["high"] - e["low"] for e in cells]
    assert np.allclose(width["once"], width["copied"], rtol=0.25)
    # The resampled accuracy spreads as theory says.
    a = found["abstain"]["all"]
    half = 1.96 * np.sqrt(a["value"] * (1 - a["value"]) / 300)
    assert (a["high"] - a["low"]) / 2 == pytest.approx(half, rel=0.15)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0}, "temperature must be a number from 0.05 to 20"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": None}, "temperature must be"),
        ({"set_threshold": 1.5}, "set_threshold must be a number from 0 to 1 or null"),
        ({"min_confidence": "0.5"}, "min_confidence must be"),
        ({"n": -1}, "n must be a number of at least 0"),
        ({"positive": 3}, "positive must be a class"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ([], "a decision holds temperature"),
    ],
)
def test_a_decision_that_cannot_be_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Decision.from_dict(values)


def test_arrays_that_do_not_fit_are_refused():
    _, p, y = drawn(10)
    for call in (
        lambda: temper(p[0], 1),
        lambda: temper(p, float("inf")),
        lambda: fit_temperature(p, y[:9]),
        lambda: fit_temperature(p, y + 5),
        lambda: fit_temperature(p[:0], []),
        lambda: conformal_threshold(p, y, 1.0),
        lambda: risk_coverage(p, -y - 1),
        lambda: fit_decision(table_of(p, y), CLASSES, answered=1.5),
        lambda: fit_decision(table_of(2 * p, y), CLASSES),
    ):
        with pytest.raises(ConfigError):
            call()


def test_is_fast_and_loads_little():
    table = make_predictions(list("abcdefgh"), 3000, 1.0)
    fit_decision(table, list("abcdefgh"))  # scipy is loaded once
    start = time.process_time()
    decision = fit_decision(table, list("abcdefgh"))
    calibration_summary(table, list("abcdefgh"), decision)
    assert time.process_time() - start < 3  # about 0.2 s
    code = (
        "import sys, dermnb.metrics.calibration;"
        "heavy = {'tensorflow', 'keras', 'jax', 'torch', 'scipy'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
