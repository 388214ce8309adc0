"""What a page says first: the answer to each kind of question, the context of it, and its banners.

Neither references nor leaking runs nor unsound predictions are ranked or named as the best.
"""

import re
from dataclasses import replace

import pandas as pd
import pytest
from fabricate import AUDIT, ISIC8, make_ensemble, make_predictions, make_run
from pages import ReadPage

from dermnb.core import write_json
from dermnb.metrics.comparison import paired_differences
from dermnb.report.answer import answer
from dermnb.report.build import build_report, build_run_page
from dermnb.report.records import limitations
from dermnb.report.sections import Page, best_of, leak_head, leak_text, ranked
from dermnb.runs.results import load_run, load_suite_runs

QUICK = {"resamples": 50, "notebook": False}


def said(runs, **suite):
    "Answer and context of runs, each as one text."
    found = answer(Page(runs, suite))
    return " ".join(found["answer"]), " ".join(found["context"])


def score(folder, name, metric="balanced_accuracy"):
    "As a sentence gives it: 0.905 (0.881 to 0.927)."
    cell = load_run(folder / name).score(metric)
    return f"{cell['value']:.3f} ({cell['low']:.3f} to {cell['high']:.3f})"


def suite_of(folder, *names, **more):
    "suite.json of finished runs."
    states = [{"run": n, "status": "done"} for n in names]
    write_json(folder / "suite.json", {"title": "S", "runs": states} | more)


def test_the_best_run(four_runs):
    runs = {n: load_run(four_runs / n) for n in "abcd"}
    first, context = said([runs[n] for n in "abc"], answer="best")
    wanted = f"c has the highest balanced accuracy: {score(four_runs, 'c')} on the test split"
    assert first == f"{wanted}; paired tests find it better than all others."
    assert "measured on the same 483 images of 300 lesions." in context
    assert "Always predicting NV would have an accuracy of 0.439" in context
    assert "a balanced accuracy of 0.125, the chance level" in context
    assert "The weakest class of c is" in context
    assert said([runs[n] for n in "abc"]) == (first, context), "the question of most suites"
    # Two that are alike are not put in an order.
    first, _ = said([runs["a"], runs["b"]])
    assert re.match(r"[ab] has the highest .*; paired tests do not tell it from [ab]\.", first)
    # One alone is compared with nothing.
    first, context = said([runs["c"]])
    assert first == f"c: balanced accuracy {score(four_runs, 'c')} on the test split."
    assert context.startswith("One run, measured on 483 images of 300 lesions.")


def test_the_order_is_that_of_paired_tests(four_runs):
    runs = [load_run(four_runs / n) for n in "cab"]
    page = Page(runs)
    turned = [p | {"value": -p["value"]} for p in page.pairs]
    vars(page)["pairs"] = turned
    text = " ".join(answer(page)["answer"])
    assert "find it better" not in text and "paired tests find a and b better" in text


def test_a_difference(four_runs):
    runs = [load_run(four_runs / n) for n in "abcd"]
    pairs = [["c", "a"], ["a", "b"], ["c", "x"], ["d", "a"]]
    found = answer(Page(runs, {"answer": "difference", "compare": pairs}))["answer"]
    tables = [[load_run(four_runs / n).predictions] for n in "ca"]
    row = paired_differences(*tables, list(ISIC8), ["balanced_accuracy"], resamples=50)[0]
    wanted = f"{row['value']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
    assert found[0] == f"Balanced accuracy, c minus a: {wanted}, c is ahead."
    assert found[1].endswith("not shown to differ.")
    assert found[2] == "c and x are not compared: x is no run of this suite."
    assert found[3].endswith("d is ahead. Data leakage in d makes this optimistic.")
    # Without pairs it is the best run that is told.
    assert said(runs, answer="difference")[0].startswith("c has the highest")


def test_an_ensemble(tmp_path):
    folder = tmp_path / "s"
    for i, name in enumerate(("a", "b")):
        make_run(folder / name, 1.5 + i, i, **QUICK)
    make_run(folder / "leaky", 1.5, 2, leaky=True, **QUICK)
    make_ensemble(folder / "both", ["a", "b"], [1, 1], resamples=50)
    make_ensemble(folder / "three", ["a", "b", "leaky"], [1, 1, 1], resamples=50)
    names = ("a", "b", "leaky", "both", "three")
    suite_of(folder, *names, answer="ensemble")
    page = Page(*reversed(load_suite_runs(folder)))
    both, three = answer(page)["answer"]
    assert re.match(r"Balanced accuracy, both minus b: [+−]0\.\d{3} \(.*\), .* \(b is its best", both)
    # A member that leaks is not the best of them.
    assert load_run(folder / "leaky").score()["value"] > load_run(folder / "b").score()["value"]
    assert three.startswith("Balanced accuracy, three minus b:")
    # Without an ensemble, or without any of its members, it is the best run that is told.
    runs = {r.name: r for r in page.runs}
    assert said([runs["a"], runs["b"]], answer="ensemble")[0].startswith("b has the highest")
    assert said([runs["both"]], answer="ensemble")[0].startswith("both: balanced accuracy")


def test_what_a_leak_adds(tmp_path):
    folder = tmp_path / "s"
    make_run(folder / "cnn", 1.2, 0, **QUICK)
    make_run(folder / "cnn_image", 1.2, 0, leaky=True, **QUICK)
    suite_of(folder, "cnn", "cnn_image", answer="leakage")
    page = ReadPage(build_report(folder))
    gain = [
        load_run(folder / "cnn_image").score(m)["value"] - load_run(folder / "cnn").score(m)["value"]
        for m in ("accuracy", "balanced_accuracy")
    ]
    text = page.said("answer")
    assert f"Split by image instead of by lesion, cnn gains accuracy {gain[0]:+.3f} (" in text
    assert f"balanced accuracy {gain[1]:+.3f} (" in text and "not shown to differ" not in text
    runs = [load_run(folder / n) for n in ("cnn", "cnn_image")]
    # Nothing is gained by a split that leaks no image that was answered better.
    same = [runs[0], replace(runs[1], metrics=runs[0].metrics)]
    assert "not shown to differ" in said(same, answer="leakage")[0]
    # A run that leaks by what the audit found was not split by image.
    config = runs[0].record["config"] | {"allow_leakage": True}
    found = runs[0].record | {"audit": AUDIT, "config": config}
    first, _ = said([runs[0], replace(runs[0], name="found", record=found)], answer="leakage")
    assert first.startswith("With lesions that splits share, cnn gains") and "by image" not in first
    first, _ = said(runs[:1], answer="leakage")
    assert first.startswith("No two runs differ in the split alone") and "cnn: balanced" in first


def test_repeats_and_folds(study):
    _, runs = load_suite_runs(study)
    first = answer(Page(runs, {"answer": "repeats"}))["answer"]
    values = [load_run(study / f"xception-seed{i}").score()["value"] for i in (1, 2, 3)]
    mean = sum(values) / 3
    sd = (sum((v - mean) ** 2 for v in values) / 2) ** 0.5
    spread = f"SD {sd:.3f}, {min(values):.3f} to {max(values):.3f}"
    assert first[0] == f"xception: mean balanced accuracy {mean:.3f} over 3 repeats ({spread})."
    assert first[1].startswith("folded: mean balanced accuracy") and "over 2 folds" in first[1]
    assert len(first) == 2, "one sentence a recipe that was repeated"
    first, _ = said([r for r in runs if r.name == "cnn"], answer="repeats")
    assert first.startswith("cnn: balanced accuracy")


def test_the_mean_of_repeats_is_the_best(study):
    first, context = said(load_suite_runs(study)[1])
    assert "xception has the highest balanced accuracy, leaking runs apart:" in first
    assert "(mean of 3 repeats, " in first and "cnn_image" not in first
    assert "its interval overlaps with those of" in first, "folds have other test images"
    assert "not all measured on the same images, so their order says little" in context
    assert "9 of 10 runs finished" in context and "mean recall" in context


def test_references_are_shown_and_neither_ranked_nor_named_the_best(tmp_path):
    folder = tmp_path / "s"
    for i, (name, skill) in enumerate((("a", 0.8), ("b", 2.2), ("pretrained", 5.0))):
        make_run(folder / name, skill, i, **QUICK)
    states = [{"run": n, "status": "done", "reference": n == "pretrained"} for n in ("pretrained", "a", "b")]
    write_json(folder / "suite.json", {"title": "S", "answer": "best", "runs": states})
    page = ReadPage(build_report(folder))
    text = page.said("answer")
    assert re.match("Answer b has the highest", text) and "of pretrained" not in text
    reference = f"pretrained {score(folder, 'pretrained')}"
    assert f"For reference, with another recipe and not ranked: {reference}." in text
    board = page.said("leaderboard")
    ranks = dict(re.findall(r"\b(a|b|pretrained) (?:reference )?Cnn (\S+)", board[: board.index("Validation")]))
    assert ranks == {"b": "1", "a": "2", "pretrained": "–"}
    assert "pretrained reference Cnn – reference" in board
    assert board.index(" b Cnn") < board.index(" a Cnn") < board.index("pretrained reference")
    assert "pretrained" not in page.said("pairs")
    assert "Confusion matrix of b" in page.said("confusion")
    assert "pretrained reference" in page.said("classes"), "but its figures are shown"
    # Where nothing but references ended, they are told like any run.
    runs = [r for r in load_suite_runs(folder)[1] if r.reference]
    assert said(runs)[0].startswith("pretrained: balanced accuracy")


def test_leaking_runs_are_neither_ranked_nor_named_the_best(study):
    page = ReadPage(study / "index.html")
    assert "cnn_image" not in page.said("answer")
    best = load_run(study / "cnn_image").score()["value"]
    for name in ("xception-seed1", "tuned", "both"):
        assert load_run(study / name).score()["value"] < best
    assert "cnn_image leaks Cnn – leaks" in page.said("leaderboard")
    assert page.said("leaderboard").count("cnn_image leaks") >= 2
    assert "cnn_image" not in page.said("pairs")
    assert "Confusion matrix of xception-seed2" in page.said("confusion")
    assert page.said("classes").count("cnn_image leaks") == 1
    assert "⚠ cnn_image" in page.parts["classes"], "and marked in the chart"
    shared = "lesions of 240 of its 483 test images are in training too. Its figures are optimistic."
    assert f"Data leakage into the test images. cnn_image : {shared}" in page.head
    own = ReadPage(study / "cnn_image" / "report.html").head
    assert f"Data leakage into the test images. L{shared[1:]}" in own


def test_a_suite_of_leaking_runs_says_so(tmp_path):
    for i, name in enumerate("ab"):
        make_run(tmp_path / "s" / name, seed=i, resamples=20, notebook=False, leaky=True)
    page = ReadPage(build_report(tmp_path / "s"))
    assert "Data leakage into the test images. a : lesions of" in page.head
    assert "among runs without leakage" not in page.said("answer")
    assert "every run leaks" in page.said("limits")
    assert "No run differs from a and b in the split alone" in page.said("leakage")


def test_an_unsound_table_removes_its_run_alone_and_is_named(tmp_path):
    folder = tmp_path / "s"
    for i, (name, skill) in enumerate((("a", 1.5), ("b", 4.0), ("broken", 6.0))):
        make_run(folder / name, skill, i, **QUICK)
    table = load_run(folder / "broken").predictions.copy()
    table.loc[3, "p_NV"] = float("nan")
    table.to_parquet(folder / "broken" / "predictions.parquet")
    why = "a probability of image 'DEMO_0000003' is missing or infinite"
    page = ReadPage(build_report(folder))
    text = page.said("pairs")
    assert f"broken is not compared: its predictions are not sound. Predictions: {why}" in text
    assert "a minus b" in text or "b minus a" in text
    assert "The pair differs in balanced accuracy" in text
    board = page.said("leaderboard")
    rank = {n: re.search(rf"\b{n} Cnn (\S+)", board)[1] for n in ("a", "b", "broken")}
    assert rank == {"a": "2", "b": "1", "broken": "–"} and "predictions not sound" in board
    _, runs = load_suite_runs(folder)
    assert [r.name for r in ranked(runs)] == ["b", "a", "broken"] and best_of(runs).name == "b"
    first, context = said(runs)
    assert first.startswith("b has the highest")
    assert "the predictions of broken are not sound" in context
    assert f"broken : Its predictions are not sound. Predictions: {why}" in page.head
    assert "Predictions that are not sound: broken." in page.said("calibration")
    own = ReadPage(folder / "broken" / "report.html")
    assert why in own.said("calibration") and why in own.said("subgroups") and why in own.said("errors")
    assert "There is no predictions table" not in own.prose
    assert why in own.head and own.head.index(why) < own.head.index("Contents")
    # Alone it is the best there is, and it is said what that is worth.
    assert "cannot be checked" in said([r for r in runs if r.unsound])[1]


def test_nothing_finished(tmp_path):
    states = [{"run": n, "status": "missing"} for n in "xy"]
    suite = {"title": "S", "runs": states, "answer": "leakage", "compare": [["x", "y"]]}
    write_json(tmp_path / "suite.json", suite)
    page = ReadPage(build_report(tmp_path))
    assert page.said("answer") == "Answer None of the 2 runs has results yet; see the reasons below."


def changed(run, audit=None, **config):
    record = dict(run.record) | {"config": run.record["config"] | config}
    return replace(run, record=record | ({"audit": audit} if audit else {}))


def test_what_an_audit_found_is_told(four_runs):
    a, b, c, d = (load_run(four_runs / n) for n in "abcd")
    assert "not looked for in one run" in said([a, b, c])[1]
    assert "not looked for in 2 runs" in said([a, c, replace(c, name="e")])[1]
    clean = "An audit of 1,400 images by ids and pictures found no lesion in two splits"
    assert f"{clean}; see the leakage audit for what was not compared." in said([a, b])[1]
    whole = [changed(r, r.record["audit"] | {"note": ""}) for r in (a, b)]
    assert f"{clean}." in said(whole)[1]
    assert "audit" not in said([a, d])[1], "a banner says it"
    chained = AUDIT | {"leaks": {}, "chains_refused": 5, "refused_across": 1, "note": ""}
    text = said([changed(r, chained) for r in (a, b)])[1]
    assert f"{clean}, but 1 pair across splits that may show one." in text


def test_what_is_not_shown_of_lesions_follows_the_audit(four_runs):
    a, b, c, d = (load_run(four_runs / n) for n in "abcd")

    def limits(*runs):
        return " ".join(s for s in limitations(Page(runs)) if s.startswith("Images of one lesion"))

    late = changed(c, AUDIT | {"afterwards": True})
    assert "lesion IDs and the audit know" in limits(a, b) and "audit" not in limits(c)
    assert "the audit where there was one" in limits(a, c)
    assert "do not all stay in one split: see the leakage audit" in limits(late)
    assert "stay in one split in" not in limits(late)
    assert "of c: see" in limits(a, late) and "in the other runs" in limits(a, late)
    assert "every run leaks" in limits(d) and "but for runs marked as leaking" in limits(a, d)
    assert limits(a, b, c, d) in ReadPage(four_runs / "index.html").said("limits")


def test_a_leak_into_validation_says_nothing_of_test_images(four_runs):
    row = AUDIT["findings"][0]
    found = {"leaks": {"near duplicate": 1}, "findings": [row | {"part_b": "val"}]}
    run = changed(load_run(four_runs / "a"), AUDIT | found, allow_leakage=True)
    assert run.leaks and not run.leaks_into_test and "test images" not in leak_text(run)
    assert leak_head([run]) == "Data leakage between splits."
    more = changed(run, AUDIT | found | {"leaks": {"near duplicate": 9}})
    assert more.leaks_into_test, "findings that are not listed may be of test images"
    assert load_run(four_runs / "d").leaks_into_test
    # Of ids there are cases, not pairs of images.
    by_patient = changed(run, AUDIT | {"leaks": {"patient id": 47}, "findings": []}, allow_leakage=True)
    assert "found 47 cases of one patient in different splits" in leak_text(by_patient)
    assert "lesion" not in leak_text(by_patient)


def test_leaks_are_on_top_of_every_page_they_touch(four_runs, tmp_path):
    shared = "2 pairs of images of one lesion in different splits (near duplicate: 2)"
    text = f"the audit found {shared}. Its figures are optimistic."
    assert f"Data leakage into the test images. d : {text}" in ReadPage(four_runs / "index.html").head
    head = ReadPage(four_runs / "d" / "report.html").head
    assert f"Data leakage into the test images. T{text[1:]}" in head
    assert head.index("Data leakage") < head.index("Contents")
    assert "Data leakage" not in ReadPage(four_runs / "a" / "report.html").head
    # Found, but with no leave to leak (as by an audit afterwards): said, and not taken out.
    run = make_run(tmp_path / "s" / "c", lesions=80, record={"audit": AUDIT | {"afterwards": True}}, **QUICK)
    found = load_run(run)
    assert found.found_leaks and not found.leaks
    page = ReadPage(build_run_page(run))
    late = f"An audit after training found {shared}, so figures may be slightly optimistic."
    assert late in page.head and page.head.index(late) < page.head.index("Contents")
    audit = page.said("audit")
    assert f"The audit found {shared}." in audit and "was made before that was known" in audit


def test_one_of_a_kind_is_written_as_one(tmp_path):
    table = make_predictions(list(ISIC8), 80)
    one = table[table["split"] == "test"].head(1).assign(y_true="NV")
    folder = tmp_path / "s"
    table = pd.concat([table[table["split"] == "val"], one])
    make_run(folder / "a", predictions=table, **QUICK)
    states = [{"run": "a", "status": "done"}, {"run": "b", "status": "missing"}]
    write_json(folder / "suite.json", {"runs": states})
    page = ReadPage(build_report(folder))
    text = page.said("answer")
    assert "1 of 2 runs finished (b has no results yet), measured on 1 image of 1 lesion." in text
    assert "one class alone says nothing" in text and "balanced accuracy of 1.000, the" not in text
    assert not re.search(r"\b1 (images|lesions|pairs|groups|runs)\b", page.prose)


def test_different_test_images_and_few_lesions_are_said(tmp_path):
    table = make_predictions(list(ISIC8), 200)
    make_run(tmp_path / "s" / "a", predictions=table[table["y_true"] != "DF"], **QUICK)
    make_run(tmp_path / "s" / "b", seed=1, **QUICK)
    page = ReadPage(build_report(tmp_path / "s"))
    assert "not all measured on the same images" in page.said("answer")
    assert "left out of averages: DF in the validation split" in page.said("leaderboard")
    assert "Used by a" in page.said("data") and "Used by b" in page.said("data")
    for i, name in enumerate("ab"):
        make_run(tmp_path / "few" / name, seed=i, lesions=30, **QUICK)
    page = ReadPage(build_report(tmp_path / "few"))
    assert "so few lesions cannot tell two runs apart" in page.said("answer")
    assert "Classes with fewer than 20 test lesions support no comparison" in page.said("limits")


@pytest.mark.parametrize("kind", ["best", "difference", "ensemble", "leakage", "repeats", "unheard of"])
def test_an_answer_is_few_sentences(four_runs, kind):
    _, runs = load_suite_runs(four_runs)
    found = answer(Page(runs, {"answer": kind}))
    assert 1 <= len(found["answer"]) <= 2 and len(found["context"]) <= 5
    assert all(s.endswith(".") and s[0].strip() for s in found["answer"] + found["context"])


def test_runs_with_one_score_share_the_first_place(four_runs):
    run = load_run(four_runs / "c")
    first, _ = said([run, replace(run, name="e")], answer="best")
    assert first.startswith("c and e share the highest balanced accuracy: ")


def test_every_kind_that_a_suite_may_ask_for_is_answered():
    from dermnb.report.answer import _ANSWERED_BY
    from dermnb.runs.suites import ANSWERS

    assert set(_ANSWERED_BY) == set(ANSWERS)
