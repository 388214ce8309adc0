"""Subgroups, worst errors, doubtful labels and the checklist: against other ways, and with bad input."""

import json
import subprocess
import sys
import time
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
import yaml
from fabricate import make_predictions

from dermnb.metrics import subgroups as review
from dermnb.core import ConfigError
from dermnb.metrics.scores import evaluate
from dermnb.metrics.subgroups import (
    FACT_KINDS,
    STATUSES,
    checklist,
    label_doubts,
    subgroups,
    worst_errors,
)

CLASSES = ["nv", "mel", "bkl", "df"]
SHARES = [0.6, 0.2, 0.15, 0.05]
HOSTILE = ["<script>alert(1)</script>", "../" * 20, "x" * 300, "\u202eמשפט", "a\x00b", "  "]


def predictions(lesions=1200, skill=2.0, classes=CLASSES, shares=SHARES, seed=0):
    return make_predictions(classes, lesions, skill, seed, shares)


def facts_of(table, seed=0):
    rng = np.random.default_rng(seed)
    number = pd.factorize(table["lesion_id"])[0]

    def draw(values):
        return np.asarray(values, dtype=object)[rng.integers(0, len(values), number.max() + 1)][number]

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
    assert "body site face" in found["summary"] and " 1 of " in found["summary"]


def test_p_of_a_difference_is_that_of_a_permutation():
    rng = np.random.default_rng(0)
    unit = np.repeat(np.arange(120), rng.integers(1, 4, 120))
    right = rng.random(120)[unit] + 0.3 * rng.random(len(unit)) > 0.6
    inside = rng.random(120) < 0.25
    variance = review._by_chance(right, unit, inside[unit])
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
    for facts in (None, table[["image_id"]], facts_of(table).assign(skin_tone=None, size_mm=np.nan)):
        found = subgroups(table, facts, CLASSES)
        kinds = {k["title"].lower() for k in found["kinds"] if not k["known"]}
        assert {"skin tone", "lesion size"} <= kinds
        assert len(found["silent"]) == len(kinds)
        assert any("skin tone" in s and "nothing can be said" in s for s in found["silent"])
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
    assert len(sources) == review.MOST_VALUES + 1 and sources[-1]["value"].startswith("other (")
    assert sum(r["n"] for r in sources) == found["n"]
    tones = [r["value"] for r in found["rows"] if r["kind"] == "skin_tone"]
    assert tones == ["1", "4", "not known"]
    hostile = table.assign(lesion_id=HOSTILE[0], image_id=[f"{HOSTILE[3]}{i}" for i in table.index])
    assert worst_errors(hostile, CLASSES)[0]["lesion_id"] == HOSTILE[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.drop(columns="image_id"), "'image_id' is missing"),
        (lambda f: pd.concat([f, f]), "occurs more than once"),
        (lambda f: f.assign(age="old"), "'old' is not a number of years"),
        (lambda f: f.assign(age=-5.0), "not a number of years from 0"),
        (lambda f: f.assign(size_mm=np.inf), "not a number of millimeters"),
    ],
)
def test_facts_that_are_not_sound(change, says):
    table = predictions(100)
    with pytest.raises(ConfigError, match=says):
        subgroups(table, change(facts_of(table)), CLASSES)


def test_tables_that_are_not_sound():
    table = predictions(100)
    for function in (subgroups, worst_errors, label_doubts):
        given = (None, CLASSES) if function is subgroups else (CLASSES,)
        with pytest.raises(ConfigError, match="missing or infinite"):
            function(table.assign(p_nv=np.nan), *given)
        with pytest.raises(ConfigError, match="'y_true' is missing"):
            function(table.drop(columns="y_true"), *given)
    with pytest.raises(ConfigError, match="no test images"):
        subgroups(table.assign(split="val"), None, CLASSES)
    with pytest.raises(ConfigError, match="level"):
        subgroups(table, None, CLASSES, level=95)
    with pytest.raises(ConfigError, match="one run or more"):
        label_doubts([], CLASSES)


def test_the_order_of_rows_decides_nothing_and_it_is_quick():
    table = predictions(2600)
    facts = facts_of(table)
    subgroups(table.head(100), facts, CLASSES)  # loads what it needs
    started = time.process_time()
    found = subgroups(table, facts, CLASSES)
    assert time.process_time() - started < 2, "a page of 20 runs has seconds"
    assert len(found["rows"]) > 19 and found["n"] > 1500
    again = subgroups(table.sample(frac=1, random_state=0), facts.sample(frac=1, random_state=1), CLASSES)
    assert json.dumps(again) == json.dumps(found)


def test_worst_errors_are_the_most_confident_ones():
    table = predictions(300)
    worst = worst_errors(table, CLASSES, most=5)
    test = table[table["split"] == "test"].set_index("image_id")
    p = test[[f"p_{c}" for c in CLASSES]]
    wrong = p.max(axis=1)[p.idxmax(axis=1).str[2:] != test["y_true"]].sort_values(ascending=False)
    assert [w["image_id"] for w in worst] == [*wrong.index[:5]]
    assert [w["p_called"] for w in worst] == [*wrong.iloc[:5]]
    assert worst_errors(table, CLASSES, most=0) == []
    assert len(worst_errors(table, CLASSES, most=10**6)) == len(wrong)
    right = table.assign(**{f"p_{c}": (table["y_true"] == c).astype(float) for c in CLASSES})
    assert worst_errors(right, CLASSES) == []


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
    assert not any("df" in (r["given"], r["suggested"]) for r in label_doubts(rare, CLASSES)["rows"])


def test_every_item_of_the_checklist_has_an_answer():
    text = (files("dermnb") / "checklists" / "reporting.yaml").read_text("utf-8")
    items = [item for group in yaml.safe_load(text) for item in group["items"]]
    assert 30 <= len(items) <= 45
    for item in items:
        assert item.get("claim") or item.get("tripod"), item
        assert all(isinstance(item.get(k, ""), str) for k in ("claim", "tripod", "asked", "answer"))
        if "fact" in item:
            assert callable(getattr(review._Answers, item["fact"]))
        else:
            assert item["status"] in STATUSES and item["answer"].endswith(".")
    facts = [i["fact"] for i in items if "fact" in i]
    public = {n for n in vars(review._Answers) if not n.startswith("_")}
    assert {*facts} == public and len(facts) == len({*facts})
    claims = [n for i in items for n in i.get("claim", "").split(", ") if n]
    assert sorted(map(int, claims)) == list(range(1, 45)), "each item of CLAIM 2024 once"


def record(**more):
    config = {"split": "lesion", "seed": 0, "image_size": 64, "resize": "crop", "metadata": "none"}
    config |= {"epochs": 6, "weights": "imagenet", "optimizer": "adam", "loss": "focal"}
    return {
        "classes": CLASSES,
        "config": config | more.pop("config", {}),
        "dataset": {"title": "A set", "citation": "A, 2020", "license": "CC0", "images": 900},
        "provenance": {"packages": {"keras": "3"}, "git_commit": "abc", "git_dirty": False},
        "model": {"title": "A network", "parameters": 5},
    } | more


def answers(*args, **kwargs):
    return {r["asked"]: (r["status"], r["answer"]) for r in checklist(*args, **kwargs)}


def test_the_checklist_says_what_was_done_and_what_was_not():
    table = predictions(400)
    found = subgroups(table, facts_of(table).assign(skin_tone=None), CLASSES)
    metrics = evaluate(table, CLASSES, resamples=100)
    suite = {"question": "Is it?", "expected": "It is.", "caveats": ["No."]}
    full = answers([record()], [metrics], suite, found, explained=True)
    assert full["Aims and hypotheses, stated beforehand"] == ("reported", "Is it? Expected beforehand: It is.")
    status, said = full["Fairness between groups of people"]
    assert status == "partly" and "Not known, so not looked at: skin tone." in said
    assert full["Test on data of another source"][0] == "not done"
    assert full["How many cases were needed, and why"][0] == "not known"
    assert full["Protocol and registration"][0] == "not done"
    assert full["Where code, model and data are"][0] == "reported"
    assert "abc" in full["Where code, model and data are"][1]
    assert "lesion" in full["Measures of uncertainty"][1]
    dirty = record(provenance={"git_commit": "abc", "git_dirty": True})
    assert answers([dirty])["Where code, model and data are"][0] == "partly"
    leaking = answers([record(), record(config={"split": "image"})])
    assert "Not disjoint" in leaking["At which level these are disjoint"][1]
    made = record(dataset={"title": "Demo", "synthetic": True})
    assert answers([made])["Prospective or retrospective, and to what end"][0] == "not applicable"
    combined = answers([record(config={"members": ["a", "b"], "combine": "rank"})])
    assert combined["Models combined"] == ("reported", "Combined: a and b by rank.")


def test_the_checklist_counts_a_suite_once():
    asked, gaps = "At which level these are disjoint", "What was done about missing values"

    def audited(n, **more):
        return record(audit={"method": "network", "leaks": {"same lesion": n}, "note": ""} | more)

    status, said = answers([audited(16)] * 5)[asked]
    assert status == "reported" and "left across splits: 16." in said
    assert "left across splits: up to 16." in answers([audited(16), audited(0)])[asked][1]
    status, said = answers([audited(16), record()])[asked]
    assert status == "partly" and "in 1 of 2 runs" in said
    status, said = answers([audited(0, note="no second pass", refused_across=3)])[asked]
    assert status == "partly" and "But no second pass." in said and "and 3 that look" in said

    def left_out(n):
        return record(dataset={"images": 900, "problems": {"absent": n} if n else {}})

    both = answers([left_out(15316), left_out(2)])
    assert "up to 15,316 (absent)" in both[gaps][1]
    assert "up to 15,316 (absent)" in next(a for _, a in both.values() if "were used" in a)
    assert "No image of the dataset is missing." in answers([left_out(0)])[gaps][1]
    assert answers([record()])[gaps][0] == "partly", "there is no record of it"
    given = [
        record(config={"metadata": "concat"}, metadata={"missing": {"age": n}}) for n in (57, 3)
    ]
    assert "age of up to 57 images" in answers(given)[gaps][1]
    chosen = next(a for a in answers([record()]).values() if "The weights are" in a[1])
    assert chosen[0] == "partly" and "is not recorded" in chosen[1]


def test_the_checklist_bears_records_of_any_kind():
    empty = checklist([])
    assert {r["status"] for r in empty} <= {*STATUSES}
    assert all("fact" not in r for r in empty)
    odd = {
        "config": {"split": None, "epochs": "<script>", "metadata": ["x"], "members": 3},
        "dataset": "none",
        "split": [1],
        "leak": 5,
        "audit": {"method": "network", "leaks": 3},
        "model": {"title": HOSTILE[0], "parameters": None},
        "classes": None,
    }
    rows = checklist([odd, {}], [{}, {"splits": {}}], {"question": HOSTILE[2]})
    assert json.dumps(rows) and len(rows) == len(empty)
    assert HOSTILE[0] in rows[0]["answer"], "text as it is: the page escapes it"


def test_review_loads_no_framework():
    code = (
        "import sys, dermnb.metrics.subgroups as r; r.checklist([{}]);"
        "assert not {'keras', 'tensorflow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_kind_of_fact_is_a_column_of_runs():
    from dermnb.data.tables import MANIFEST_COLUMNS

    assert {k.column for k in FACT_KINDS} <= {*MANIFEST_COLUMNS}
