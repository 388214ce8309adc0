"""Worst errors and doubtful labels: planted ones are found, and bad input is refused."""

import json

import numpy as np
import pandas as pd
import pytest
from fabricate import make_predictions

from dermnb.core import ConfigError
from dermnb.metrics.errors import label_doubts, worst_errors

CLASSES = ["nv", "mel", "bkl", "df"]
SHARES = [0.6, 0.2, 0.15, 0.05]
HOSTILE = ["<script>alert(1)</script>", "../" * 20, "x" * 300, "\u202eמשפט", "a\x00b", "  "]


def predictions(lesions=1200, skill=2.0, classes=CLASSES, shares=SHARES, seed=0):
    return make_predictions(classes, lesions, skill, seed, shares)


def test_worst_errors_are_the_most_confident_ones():
    table = predictions(300)
    worst = worst_errors(table, CLASSES, most=5)
    test = table[table["split"] == "test"].set_index("image_id")
    p = test[[f"p_{c}" for c in CLASSES]]
    wrong = p.max(axis=1)[p.idxmax(axis=1).str[2:] != test["y_true"]].sort_values(ascending=False)
    assert [w["image_id"] for w in worst] == [*wrong.index[:5]]
    assert [w["p_predicted"] for w in worst] == [*wrong.iloc[:5]]
    assert worst_errors(table, CLASSES, most=0) == []
    assert len(worst_errors(table, CLASSES, most=10**6)) == len(wrong)
    right = table.assign(**{f"p_{c}": (table["y_true"] == c).astype(float) for c in CLASSES})
    assert worst_errors(right, CLASSES) == []
    hostile = table.assign(lesion_id=HOSTILE[0], image_id=[f"{HOSTILE[3]}{i}" for i in table.index])
    assert worst_errors(hostile, CLASSES)[0]["lesion_id"] == HOSTILE[0]


def planted(skill=4.0, share=0.05):
    table = predictions(1500, skill)
    rng = np.random.default_rng(1)
    number = pd.factorize(table["lesion_id"])[0]
    wrong = (rng.random(number.max() + 1) < share)[number]
    place = pd.Index(CLASSES).get_indexer(table["y_true"])
    moved = (place + rng.integers(1, 4, number.max() + 1)[number]) % 4
    table["y_true"] = np.array(CLASSES)[np.where(wrong, moved, place)]
    return table, set(table["image_id"][wrong])


def test_planted_label_errors_are_found():
    table, wrong = planted()
    doubts = label_doubts(table, CLASSES, most=100)
    assert np.mean([r["image_id"] in wrong for r in doubts["rows"][:50]]) > 0.9
    assert 0.5 * len(wrong) < doubts["expected"] < 1.5 * len(wrong)
    assert [r["margin"] for r in doubts["rows"]] == sorted(
        (r["margin"] for r in doubts["rows"]), reverse=True
    )
    assert sum(p["expected"] for p in doubts["pairs"]) == pytest.approx(doubts["expected"])
    assert any("validation" in note for note in doubts["notes"])
    assert f"{doubts['found']:,} of {doubts['judged']:,} labels" in doubts["summary"]
    clean = label_doubts(predictions(1500, 8.0), CLASSES)
    assert clean["expected"] < 0.1 * doubts["expected"]


def test_rows_of_training_are_not_used_and_runs_are_joined():
    table, _ = planted()
    trained = table.assign(split="train")
    trained["image_id"] = "t" + trained["image_id"]
    alone = label_doubts(table, CLASSES)
    assert label_doubts(pd.concat([table, trained]), CLASSES) == alone
    folds = [table[: len(table) // 2], table[len(table) // 2 :]]
    assert label_doubts(folds, CLASSES)["rows"] == alone["rows"]
    twice = label_doubts([table, table.sample(frac=1, random_state=0)], CLASSES)
    assert {r["networks"] for r in twice["rows"]} == {2}
    assert [r["image_id"] for r in twice["rows"]] == [r["image_id"] for r in alone["rows"]]
    with pytest.raises(ConfigError, match="another label"):
        label_doubts([table, table.assign(y_true="nv")], CLASSES)


def test_doubts_are_refused_where_there_is_too_little():
    table, _ = planted()
    for few, why in (
        (table.head(1), "1 lesion that"),
        (table[table["y_true"] == "nv"], "Fewer than two classes"),
        (predictions(600, 0.0), "too poorly"),
        (table.assign(split="train"), "0 lesions that"),
    ):
        doubts = label_doubts(few, CLASSES)
        assert why in doubts["reason"] and doubts["rows"] == [] and doubts["expected"] is None
        json.dumps(doubts)
    rare = table[(table["y_true"] != "df") | (table["lesion_id"] == table["lesion_id"].iloc[0])]
    assert label_doubts(rare, CLASSES)["few"] == ["df"]
    rows = label_doubts(rare, CLASSES)["rows"]
    assert not any("df" in (r["given"], r["suggested"]) for r in rows)


@pytest.mark.parametrize("function", [worst_errors, label_doubts])
def test_tables_that_are_not_sound(function):
    table = predictions(100)
    with pytest.raises(ConfigError, match="missing or infinite"):
        function(table.assign(p_nv=np.nan), CLASSES)
    with pytest.raises(ConfigError, match="'y_true' is missing"):
        function(table.drop(columns="y_true"), CLASSES)
    with pytest.raises(ConfigError, match="one run or more"):
        label_doubts([], CLASSES)
