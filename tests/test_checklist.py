"""The reporting checklist: what records answer, and records of any kind."""

import json
import subprocess
import sys
from importlib.resources import files

import yaml
from fabricate import make_predictions

from dermnb.metrics.scores import evaluate
from dermnb.metrics.subgroups import subgroups
from dermnb.report.build import SECTIONS
from dermnb.report.checklist import STATUSES, checklist

CLASSES = ["nv", "mel", "bkl", "df"]
HOSTILE = ["<script>alert(1)</script>", "../" * 20, "x" * 300, "\u202eמשפט", "a\x00b", "  "]


def test_every_item_of_the_checklist_has_an_answer():
    text = (files("dermnb") / "checklists" / "reporting.yaml").read_text("utf-8")
    items = [item for group in yaml.safe_load(text) for item in group["items"]]
    assert 30 <= len(items) <= 45
    sections = {s.id for s in SECTIONS}
    for item in items:
        assert item.get("claim") or item.get("tripod"), item
        assert {*item} <= {*"claim tripod asked needs cases status answer where".split()}, item
        assert item.get("where", "data") in sections, item
        for case in [item, *item.get("cases", ())]:
            assert case is item or len({"if", "unless"} & {*case}) == 1, case
            status = case.get("status", "reported")
            assert status in STATUSES, case
            assert status == "reported" or case["answer"].endswith("."), "it says why"
            assert status != "reported" or item["where"], "it says where"
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
    assert aims == ("reported", "")
    alone = answers([record()], [metrics], {"question": "Is it?"})
    partly = ("partly", "Is it? What was expected is not recorded.")
    assert alone["Aims and hypotheses, stated beforehand"] == partly
    status, said = full["Fairness between groups of people"]
    assert status == "partly" and "Results by age and sex. Not known, so not analyzed:" in said
    assert "skin tone" in said
    assert full["Test on data of another source"][0] == "not done"
    assert full["How many cases were needed, and why"][0] == "not known"
    assert full["Protocol and registration"][0] == "not done"
    assert full["Where code, model and data are"][0] == "reported"
    assert full["Measures of uncertainty"][0] == "reported"
    assert full["How predictions are explained (saliency)"][0] == "reported"
    dirty = record(provenance={"git_commit": "abc", "git_dirty": True})
    assert answers([dirty])["Where code, model and data are"][0] == "partly"
    leaking = answers([record(), record(config={"split": "image"})])
    assert leaking["At which level these are disjoint"][0] == "reported", "that they are not"
    made = record(dataset={"title": "Demo", "synthetic": True})
    assert answers([made])["Prospective or retrospective, and to what end"][0] == "not applicable"
    combined = answers([record(config={"members": ["a", "b"], "combine": "rank"})])
    assert combined["Models combined"] == ("reported", "")


def test_the_checklist_asks_all_runs_of_a_suite():
    asked, gaps = "At which level these are disjoint", "What was done about missing values"

    def audited(**more):
        return record(audit={"method": "network", "leaks": {"same lesion": 2}, "note": ""} | more)

    assert answers([audited()] * 5)[asked] == ("reported", "")
    status, said = answers([audited(), record()])[asked]
    assert status == "partly" and "not compared in all runs" in said
    assert answers([audited(method="none")])[asked] == answers([record()])[asked]
    status, said = answers([audited(note="no second pass.")])[asked]
    assert status == "partly" and said.endswith("But no second pass.")

    counted = record(dataset={"images": 900, "problems": {}})
    assert answers([counted])[gaps] == ("reported", "")
    assert answers([record()])[gaps][0] == "partly", "there is no record of it"
    assert answers([counted, record()])[gaps][0] == "partly"
    chosen = answers([record()])["How the final model was chosen"]
    assert chosen[0] == "partly" and "is not recorded" in chosen[1]


def test_what_a_run_does_not_record_is_named():
    asked = "What was done to the images before the model saw them"
    assert answers([record()])[asked][0] == "reported"
    silent = record()
    del silent["config"]["image_size"]
    unknown = ("not known", "The runs do not record config.image_size.")
    assert answers([silent])[asked] == unknown
    unknown = ("not known", "Not all runs record config.image_size.")
    assert answers([record(), silent])[asked] == unknown
    silent["config"]["members"] = ["a", "b"]
    assert answers([record(), silent])[asked][0] == "reported", "members have an ensemble's settings"
    assert answers([silent])[asked][0] == "not known"


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
    assert any(r["answer"].startswith(HOSTILE[2]) for r in rows)
    rows = checklist([record()], suite={"question": HOSTILE[0]})
    assert any(HOSTILE[0] in r["answer"] for r in rows), "text as it is: the page escapes it"


def test_checklist_loads_no_framework():
    code = (
        "import sys, dermnb.report.checklist as r; r.checklist([{}]);"
        "assert not {'keras', 'tensorflow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
