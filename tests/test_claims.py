"""Claims that cannot be true, claims under other conditions, and what a verdict says."""

import numpy as np
import pytest
from sklearn import metrics as sk

from dermnb.core import ConfigError
from dermnb.metrics.claims import (
    Conditions,
    check_claims,
    check_metric,
    claim_verdict,
    condition_differences,
    load_claims,
    metric_title,
    resolve_metric,
    scores_from_confusion,
)
from dermnb.metrics.scores import METRICS

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
    assert shown["macro_f1"] == "68.54" and shown["balanced_accuracy"] == "74.31"
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


def faults_of(given):
    return [check.fault for check in check_claims(given)]


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
        (
            [("balanced_accuracy", 0.71), ("macro_recall", 0.73)],
            {},
            1,
            "Macro recall and balanced accuracy are the same quantity",
        ),
        ([("accuracy", 0.925)], {"digits": 3, "n": 30}, 0, "No whole number of 30"),
        ([("accuracy", 0.73)], {"confusion": PUBLISHED}, 0, "gives 0.7207, not 0.7300"),
        ([("accuracy", 0.7207)], {"confusion": PUBLISHED, "n": 4000}, 0, "counts 3,928"),
    ],
)
def test_faults(rows, more, wrong, sentence):
    found = faults_of(claims(*rows, **more))
    assert sentence in found[wrong]
    assert not any(
        f for i, f in enumerate(found) if i != wrong and "same quantity" not in f
    )


def test_no_fault_within_rounding_or_between_sources():
    rows = [("macro_precision", 0.65), ("macro_recall", 0.62), ("macro_f1", 0.64)]
    assert faults_of(claims(*rows, digits=2)) == [""] * 3
    assert faults_of(claims(*rows, digits=4))[2]
    apart = claims(("accuracy", 0.7), source="x") + claims(
        ("weighted_recall", 0.6), source="y"
    )
    assert faults_of(apart) == ["", ""]
    for k in range(601):  # every accuracy that 600 images can give, as it is printed
        for digits in (2, 3, 4):
            value = round(k / 600, digits)
            assert faults_of(claims(("accuracy", value), n=600, digits=digits)) == [""]


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
    assert faults_of(found) == [""] * len(rows)


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
        ({"metric": "brier", "value": 2.5}, "does not fit: it lies from 0 to 2"),
        ({"metric": "cohen_kappa", "value": -1.5}, "it lies from -1 to 1"),
        ({"metric": "log_loss", "value": -0.1}, "it lies from 0 to inf"),
        ({"metric": "accuracy", "value": "high"}, "value = 'high' does not fit"),
        ({"metric": "accuracy"}, "either a value or better_than"),
        ({"metric": "accuracy", "value": 0.7, "better_than": "b"}, "either a value"),
        ({"metric": "accuracy", "better_than": "a"}, "better than itself"),
        ({"value": 0.7}, "metric is missing"),
        ({"metric": "accuracy", "value": 0.7, "split": "train"}, "split = 'train'"),
        ({"metric": "accuracy", "value": 0.7, "confusion": [[1, 2]]}, "as many columns"),
        ({"metric": "accuracy", "value": 0.7, "confusion": [[1, -2], [0, 1]]}, "counts"),
        ({"metric": "accuracy", "valeu": 0.7}, "did you mean 'value'"),
        ({"metric": "accuracy", "value": 0.7, 3: 4}, "unknown field '3'"),
        (
            {"metric": "accuracy", "value": 0.7, "conditions": {"epoch": 4}},
            "conditions: unknown field 'epoch': did you mean 'epochs'?",
        ),
        (
            {"metric": "accuracy", "value": 0.7, "conditions": {"epochs": "many"}},
            "conditions.epochs = 'many' does not fit",
        ),
        (
            {"metric": "accuracy", "value": 0.7, "conditions": {"epochs": -1}},
            "conditions.epochs = -1 does not fit",
        ),
        (
            {"metric": "accuracy", "value": 0.7, "conditions": {"weights": "best"}},
            "conditions.weights = 'best' does not fit",
        ),
        ({"metric": "accuracy", "value": 0.7, "conditions": 4}, "conditions = 4 does not fit"),
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


def test_rarest():
    counts = {"nv": 600, "df": 0, "vasc": 9, "mel": 9}
    assert resolve_metric("recall:rarest", counts) == "recall:vasc"
    assert resolve_metric("f1:mel", counts) == "f1:mel"
    with pytest.raises(ConfigError, match="not known"):
        resolve_metric("recall:rarest", {})


def test_macro_recall_is_balanced_accuracy():
    assert check_metric("macro_recall") == "balanced_accuracy"
    assert resolve_metric("macro_recall", {}) == "balanced_accuracy"
    claim = claims(("macro_recall", 0.7431), confusion=PUBLISHED)[0]
    assert claim.metric == "macro_recall" and metric_title(claim.metric) == "Macro recall"
    assert "Follows" in check_claims([claim])[0].support
    assert metric_title("recall:mel") == "Recall of mel" and metric_title("auc") == "AUC"


HERE = {"dataset": "ham10000", "classes": 7, "split": "lesion", "weights": "none"}
HERE |= {"epochs": 12, "image_size": 32, "images": 10015, "test_images": 1503}


@pytest.mark.parametrize(
    "there, said, decisive",
    [
        ({}, [], 0),
        ({"dataset": "HAM 10000", "note": "peak over epochs"}, [], 0),
        ({"dataset": "ISIC archive"}, ["ham10000 against ISIC archive"], 1),
        ({"classes": 9}, ["7 classes against 9"], 1),
        ({"weights": "imagenet"}, ["random weights against ImageNet"], 1),
        ({"split": "image"}, ["split by lesion against by image"], 1),
        ({"split": "official"}, ["split by lesion against as published"], 0),
        ({"split": "kfold"}, ["split by lesion against in folds"], 0),
        ({"epochs": 23}, ["12 epochs against 23"], 0),
        ({"epochs": 24}, ["12 epochs against 24"], 1),
        ({"epochs": 6}, ["12 epochs against 6"], 1),
        ({"image_size": 224}, ["32 px against 224"], 1),
        ({"images": 25331}, ["10,015 images in all against 25,331"], 1),
        ({"images": 11526}, ["10,015 images in all against 11,526"], 0),
        ({"test_images": 60000}, ["1,503 evaluated images against 60,000"], 0),
        (
            {"test_images": 9, "epochs": 400, "classes": 8},
            ["7 classes against 8", "12 epochs against 400", "1,503 evaluated images against 9"],
            2,
        ),
    ],
)
def test_conditions_that_differ(there, said, decisive):
    found = condition_differences(Conditions(**there), Conditions(**HERE))
    assert [d.text for d in found] == said
    assert [d.decisive for d in found] == [True] * decisive + [False] * (len(found) - decisive)
    back = condition_differences(Conditions(**HERE), Conditions(**there))
    assert [d.decisive for d in back] == [d.decisive for d in found]


def test_what_is_decisive_is_the_verdict():
    claim = claims(("accuracy", 0.72), n=600, conditions={"epochs": 400, "image_size": 224})[0]
    measured = [{"value": 0.7, "low": 0.67, "high": 0.73}]
    apart = condition_differences(claim.stated, Conditions(**HERE))
    said = claim_verdict(claim, measured, apart)
    assert said == "not comparable: 12 epochs against 400; 32 px against 224"
    assert claim_verdict(claim, [{"value": None}], apart) == "not measured"
    minor = [d for d in apart if not d.decisive]
    assert [d.name for d in minor] == ["test_images"]
    assert claim_verdict(claim, measured, minor) == "interval contains the claim"
    many = Conditions(dataset="x", classes=2, weights="imagenet", epochs=1, split="image")
    assert claim_verdict(claim, measured, condition_differences(many, Conditions(**HERE))) == (
        "not comparable: ham10000 against x; 7 classes against 2; split by lesion against by image"
    )
    generated = Conditions(dataset="demo", epochs=1)
    found = condition_differences(many, generated)
    assert [d.text for d in found] == ["generated images against x"]


def test_conditions_may_be_a_text():
    claim = claims(("accuracy", 0.72), conditions="224 px, peak over epochs")[0]
    assert claim.conditions == Conditions(note="224 px, peak over epochs")
    assert claims(("accuracy", 0.72))[0].conditions == Conditions()
    assert claims(("accuracy", 0.72), confusion=PUBLISHED)[0].stated.test_images == 3928
    dumped = claim.model_dump(exclude_unset=True)["conditions"]
    assert dumped == {"note": "224 px, peak over epochs"}
    assert Conditions(**HERE, note="of two clinics").text == (
        "ham10000; 7 classes; split by lesion; random weights; 12 epochs; 32 px; "
        "10,015 images in all; 1,503 evaluated images; of two clinics"
    )
