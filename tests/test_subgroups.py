"""Subgroups: against other ways, and with bad input."""

import json
import time

import numpy as np
import pandas as pd
import pytest
from fabricate import make_predictions

from dermnb.core import ConfigError
from dermnb.data.datasets import MANIFEST_COLUMNS
from dermnb.metrics import subgroups as module
from dermnb.metrics.scores import evaluate
from dermnb.metrics.subgroups import FACT_KINDS, MOST_VALUES, subgroups

CLASSES = ["nv", "mel", "bkl", "df"]
SHARES = [0.6, 0.2, 0.15, 0.05]
HOSTILE = ["<script>alert(1)</script>", "../" * 20, "x" * 300, "\u202eמשפט", "a\x00b", "  "]


def predictions(lesions=1200, skill=2.0, classes=CLASSES, shares=SHARES, seed=0):
    return make_predictions(classes, lesions, skill, seed, shares)


def facts_of(table, seed=0):
    rng = np.random.default_rng(seed)
    number = pd.factorize(table["lesion_id"])[0]

    def draw(values):
        each = rng.integers(0, len(values), number.max() + 1)
        return np.asarray(values, dtype=object)[each][number]

    return table[["image_id"]].assign(
        age=draw([20.0, 35.0, 50.0, 70.0, 85.0, None]),
        sex=draw(["female", "male", None]),
        site=draw(["back", "face", "arm"]),
        source=draw(["here", "there"]),
        size_mm=draw([3.0, 8.0, 15.0, 30.0]),
        skin_tone=draw(["I", "III", "VI"]),
    )


def row_of(found, kind, value):
    return next(r for r in found["rows"] if (r["kind"], r["value"]) == (kind, value))


def test_a_subgroup_is_what_evaluate_says_of_its_rows():
    table = predictions(2400, shares=[0.5, 0.2, 0.2, 0.1])
    facts = facts_of(table)
    found = subgroups(table, facts, CLASSES)
    row = row_of(found, "sex", "female")
    ids = set(facts["image_id"][facts["sex"] == "female"])
    part = table[table["image_id"].isin(ids) & (table["split"] == "test")]
    alone = evaluate(part, CLASSES, resamples=500)["splits"]["test"]
    assert (row["n"], row["lesions"]) == (alone["n"], alone["lesions"])
    assert row["classes"] == CLASSES and row["metrics"].keys() == {*found["metrics"]}
    for metric, cell in row["metrics"].items():
        known = alone["metrics"][metric]
        assert cell["value"] == pytest.approx(known["value"], abs=1e-12)
        # The AUC's interval is computed and not resampled.
        assert cell["low"] == pytest.approx(known["low"], abs=0.03)
        assert cell["high"] == pytest.approx(known["high"], abs=0.03)
    rest = table[~table["image_id"].isin(ids) & (table["split"] == "test")]
    others = evaluate(rest, CLASSES, resamples=100)["splits"]["test"]
    assert row["rest"] == {"n": others["n"], "lesions": others["lesions"]}
    for metric, cell in row["difference"].items():
        apart = alone["metrics"][metric]["value"] - others["metrics"][metric]["value"]
        assert cell["value"] == pytest.approx(apart, abs=1e-12)
        assert 0 <= cell["p"] <= cell["p_holm"] <= 1


def test_two_classes_have_sensitivity_and_specificity():
    table = predictions(600, classes=["benign", "malignant"], shares=[0.7, 0.3])
    found = subgroups(table, facts_of(table), ["benign", "malignant"], positive="malignant")
    row = row_of(found, "sex", "male")
    assert {"sensitivity", "specificity"} <= row["metrics"].keys()
    mean = (row["metrics"]["sensitivity"]["value"] + row["metrics"]["specificity"]["value"]) / 2
    assert row["metrics"]["balanced_accuracy"]["value"] == pytest.approx(mean)
    ns = [row["metrics"][m]["n"] for m in ("sensitivity", "specificity")]
    assert sum(ns) == row["n"]
    with pytest.raises(ConfigError, match="did you mean 'malignant'"):
        subgroups(table, None, ["benign", "malignant"], positive="malignent")


def test_a_planted_weakness_is_found_and_no_other():
    table = predictions(2400, 3.0)
    facts = facts_of(table)
    p = [f"p_{c}" for c in CLASSES]
    old = table["image_id"].isin(facts["image_id"][facts["site"] == "face"]).to_numpy()
    shuffled = np.random.default_rng(0).permuted(table.loc[old, p].to_numpy(), axis=1)
    table.loc[old, p] = shuffled
    found = subgroups(table, facts, CLASSES)
    worse = [
        r["value"]
        for r in found["rows"]
        if r["difference"]
        and r["difference"]["accuracy"]["p_holm"] < 0.05
        and r["difference"]["accuracy"]["value"] < 0
    ]
    assert worse == ["face"]
    assert "body site face" in found["summary"] and found["summary"].startswith("1 of ")


def test_p_of_a_difference_is_that_of_a_permutation():
    rng = np.random.default_rng(0)
    unit = np.repeat(np.arange(120), rng.integers(1, 4, 120))
    right = rng.random(120)[unit] + 0.3 * rng.random(len(unit)) > 0.6
    inside = rng.random(120) < 0.25
    variance = module._by_chance(right, unit, inside[unit])
    drawn = []
    for _ in range(3000):
        mask = rng.permutation(inside)[unit]
        drawn.append(right[mask].mean() - right[~mask].mean())
    assert variance == pytest.approx(np.var(drawn), rel=0.1)


def test_bands_take_their_lower_end_and_unknown_is_a_row():
    table = predictions(200)
    table = table[table["split"] == "test"].head(8)
    ages = [0.0, 29.9, 30.0, 44.0, 45.0, 74.5, 75.0, None]
    found = subgroups(table, table[["image_id"]].assign(age=ages), CLASSES)
    rows = {r["value"]: r["n"] for r in found["rows"]}
    assert rows == {
        "under 30 years": 2,
        "30 to 44 years": 2,
        "45 to 59 years": 1,
        "60 to 74 years": 1,
        "75 years and over": 1,
        "not known": 1,
    }
    assert found["rows"][-1]["known"] is False
    assert all(r["metrics"] is None and "needs 30" in r["reason"] for r in found["rows"])
    assert found["kinds"][0]["known"] == 7 and "7 of 8" in found["kinds"][0]["text"]


def test_what_no_image_has_is_named():
    table = predictions(200)
    empty = facts_of(table).assign(skin_tone=None, size_mm=np.nan)
    for facts in (None, table[["image_id"]], empty):
        found = subgroups(table, facts, CLASSES)
        kinds = {k["title"].lower() for k in found["kinds"] if not k["known"]}
        assert {"skin tone", "lesion size"} <= kinds
        assert len(found["silent"]) == len(kinds)
        assert any(s.endswith("darker skin: skin tone is not known.") for s in found["silent"])
    assert subgroups(table, None, CLASSES)["rows"] == []
    assert "No subgroup" in subgroups(table, None, CLASSES)["summary"]


def test_small_subgroups_and_rare_classes_have_no_figure():
    table = predictions(400, shares=[0.8, 0.17, 0.02, 0.01])
    found = subgroups(table, facts_of(table), CLASSES)
    for row in found["rows"]:
        assert (row["metrics"] is None) == bool(row["reason"])
        assert not {*row["classes"]} & {*row["few"]}
    one = subgroups(table[table["y_true"] == "nv"], facts_of(table), CLASSES)
    assert "only one class has 10" in one["overall"]["reason"]
    single = subgroups(table[table["split"] == "test"].head(1), facts_of(table), CLASSES)
    assert single["overall"]["reason"] == "1 lesion; a figure needs 30"
    assert json.dumps(single) and json.dumps(one)


def test_hostile_values_stay_text_and_many_values_share_a_row():
    table = predictions(300)
    rng = np.random.default_rng(0)
    facts = table[["image_id"]].assign(
        site=rng.choice(np.array(HOSTILE, dtype=object), len(table)),
        source=[f"source {i:04}" for i in range(len(table))],
        skin_tone=rng.choice([1.0, 4.0, np.nan], len(table)),
    )
    found = subgroups(table, facts, CLASSES)
    sites = [r["value"] for r in found["rows"] if r["kind"] == "site"]
    texts = {h.strip() for h in HOSTILE if any(map(str.isalnum, h))}  # "../" says nothing
    assert {*sites} == texts | {"not known"}
    sources = [r for r in found["rows"] if r["kind"] == "source"]
    assert len(sources) == MOST_VALUES + 1 and sources[-1]["value"].startswith("other (")
    assert sum(r["n"] for r in sources) == found["n"]
    tones = [r["value"] for r in found["rows"] if r["kind"] == "skin_tone"]
    assert tones == ["1", "4", "not known"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.drop(columns="image_id"), "'image_id' is missing"),
        (lambda f: pd.concat([f, f]), "occurs more than once"),
        (lambda f: f.assign(age="old"), "'old' is not a number of years"),
        (lambda f: f.assign(age=-5.0), "not a number of years from 0"),
        (lambda f: f.assign(size_mm=np.inf), "not a number of millimet"),
    ],
)
def test_facts_that_are_not_sound(change, says):
    table = predictions(100)
    with pytest.raises(ConfigError, match=says):
        subgroups(table, change(facts_of(table)), CLASSES)


def test_tables_that_are_not_sound():
    table = predictions(100)
    for wrong, says in (
        (table.assign(p_nv=np.nan), "missing or infinite"),
        (table.drop(columns="y_true"), "'y_true' is missing"),
        (table.assign(split="val"), "no test images"),
    ):
        with pytest.raises(ConfigError, match=says):
            subgroups(wrong, None, CLASSES)
    with pytest.raises(ConfigError, match="level"):
        subgroups(table, None, CLASSES, level=95)


def test_the_order_of_rows_decides_nothing_and_it_is_quick():
    table = predictions(2600)
    facts = facts_of(table)
    subgroups(table.head(100), facts, CLASSES)  # loads what it needs
    started = time.process_time()
    found = subgroups(table, facts, CLASSES)
    assert time.process_time() - started < 2, "a page of 20 runs has seconds"
    assert len(found["rows"]) > 19 and found["n"] > 1500
    mixed = table.sample(frac=1, random_state=0), facts.sample(frac=1, random_state=1)
    again = subgroups(*mixed, CLASSES)
    assert json.dumps(again) == json.dumps(found)


def test_every_kind_of_fact_is_a_column_of_runs():
    assert {k.column for k in FACT_KINDS} <= {*MANIFEST_COLUMNS}
