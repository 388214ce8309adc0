"""The reporting checklist: what records answer, and records of any kind."""

import json
import subprocess
import sys
from importlib.resources import files

import yaml
from fabricate import make_predictions

from dermnb.metrics.scores import evaluate
from dermnb.metrics.subgroups import subgroups
from dermnb.report import checklist as answered
from dermnb.report.checklist import STATUSES, checklist

CLASSES = ["nv", "mel", "bkl", "df"]
HOSTILE = ["<script>alert(1)</script>", "../" * 20, "x" * 300, "\u202eמשפט", "a\x00b", "  "]


def test_every_item_of_the_checklist_has_an_answer():
    text = (files("dermnb") / "checklists" / "reporting.yaml").read_text("utf-8")
    items = [item for group in yaml.safe_load(text) for item in group["items"]]
    assert 30 <= len(items) <= 45
    for item in items:
        assert item.get("claim") or item.get("tripod"), item
        assert all(isinstance(item.get(k, ""), str) for k in ("claim", "tripod", "asked", "answer"))
        if "fact" in item:
            assert callable(answered._FACTS[item["fact"]])
        else:
            assert item["status"] in STATUSES and item["answer"].endswith(".")
    facts = [i["fact"] for i in items if "fact" in i]
    assert {*facts} == {*answered._FACTS} and len(facts) == len({*facts})
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
    table = make_predictions(CLASSES, 400, 2.0, 0, [0.6, 0.2, 0.15, 0.05])
    facts = table[["image_id"]].assign(age=50.0, sex="female", skin_tone=None)
    found = subgroups(table, facts, CLASSES)
    metrics = evaluate(table, CLASSES, resamples=100)
    suite = {"question": "Is it?", "expected": "It is.", "caveats": ["No."]}
    full = answers([record()], [metrics], suite, found, explained=True)
    aims = full["Aims and hypotheses, stated beforehand"]
    assert aims == ("reported", "Is it? Expected beforehand: It is.")
    status, said = full["Fairness between groups of people"]
    assert status == "partly" and "Results by age and sex. Not known, so not analyzed:" in said
    assert "skin tone" in said
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


def test_checklist_loads_no_framework():
    code = (
        "import sys, dermnb.report.checklist as r; r.checklist([{}]);"
        "assert not {'keras', 'tensorflow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
