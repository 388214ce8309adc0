"""What a skeptical reader asks of the pages: ranks, audit, subgroups, errors, costs, old records."""

import re
from dataclasses import replace

import pandas as pd
import pytest
from fabricate import AUDIT, COUNTED, ISIC8, make_predictions, make_run
from test_report import Page, section

from dermnb.metrics.comparison import compare_all
from dermnb.core import ConfigError, read_json, write_json
from dermnb.report.sections import leak_head, leak_text
from dermnb.report.pages import p_cell, signed_cell
from dermnb.report.build import build_report, build_run_page, limit_sentences, summary_sentences
from dermnb.report.sections import best_of, ranked
from dermnb.runs.results import load_run, load_suite_runs
from dermnb.metrics.subgroups import subgroups
from dermnb.report.scrutiny import audit_blocks
from dermnb.report.sections import compared_pairs, pairs_block

QUICK = {"resamples": 50, "notebook": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Two like networks, a much better one, and one that leaks by what the audit found."
    folder = tmp_path_factory.mktemp("reports") / "s"
    counted = {"audit": AUDIT | {"leaks": {}, "findings": []}, "energy": COUNTED}
    make_run(folder / "a", 1.5, 0, facts=True, record=counted, **QUICK)
    make_run(folder / "b", 1.5, 1, facts=True, record=counted, **QUICK)
    make_run(folder / "c", 4.0, 2, facts=True, **QUICK)
    make_run(folder / "d", 4.0, 3, record={"audit": AUDIT}, allow_leakage=True, **QUICK)
    build_report(folder)
    return folder


@pytest.fixture(scope="module")
def index(folder):
    return Page(folder / "index.html")


def test_what_the_data_cannot_tell_apart_shares_its_ranks(folder, index):
    text = section(index, "Leaderboard", "Every pair")
    # Of the three that do not leak, c is first, and a and b share the rest.
    rank = {name: re.search(rf"\b{name} (?:leaks )?Cnn (\S+)", text)[1] for name in "abcd"}
    assert rank == {"c": "1", "a": "2–3", "b": "2–3", "d": "–"}
    text = section(index, "Every pair", "Leakage")
    tables = {n: load_run(folder / n).predictions for n in "cab"}
    for pair in compare_all(tables, list(ISIC8), resamples=50):
        assert pair["reason"] == "" and f"{pair['mcnemar']['b01']:,} and" in text
    assert "2 of 3 pairs differ by more than chance" in text
    assert "not shown to differ does not show that it is equal" in text
    assert 'data-figure="pairs-plot"' in index.text


def test_the_summary_is_five_sentences_at_most(folder, tmp_path):
    _, runs = load_suite_runs(folder)
    sentences = summary_sentences(runs)
    assert len(sentences) == 5
    assert len(summary_sentences(runs[:1])) <= 5 and len(summary_sentences(runs[3:])) <= 5
    assert "paired tests find it better than all others" in Page(folder / "index.html").prose
    assert "Every run" not in sentences[1] and sentences[1].startswith("d leaks")
    # Without a leak the second one is about the audit.
    assert "not looked for in one run" in summary_sentences(runs[:3])[1]
    same = "images by ids and pictures found no lesion in two parts"
    assert same in summary_sentences(runs[:2])[1]
    late = [replace(r, record=r.record | {"audit": AUDIT | {"afterwards": True}}) for r in runs[:2]]
    found = sum(AUDIT["leaks"].values())
    said = summary_sentences(late)[1]
    assert f"found {found} pairs of images of one lesion" in said and "flatter a little" in said
    assert "told below" in said, "the note says that something was not compared"


def changed(run, audit=None, **config):
    record = dict(run.record) | {"config": run.record["config"] | config}
    return replace(run, record=record | ({"audit": audit} if audit else {}))


def test_what_is_not_shown_of_lesions_follows_the_audit(folder, index):
    a, b, c, d = (load_run(folder / n) for n in "abcd")

    def said(*runs):
        return " ".join(s for s in limit_sentences(runs) if s.startswith("Images of one lesion"))

    late = changed(c, AUDIT | {"afterwards": True})
    assert "numbers and the audit know" in said(a, b) and "audit" not in said(c)
    assert "the audit where there was one" in said(a, c)
    assert "do not all stay in one part of the split: see" in said(late)
    assert "stay in one split" not in said(late)
    assert "of c: see" in said(a, late) and "in the other runs" in said(a, late)
    assert "every run leaks" in said(d) and "but for runs marked as leaking" in said(a, d)
    assert said(a, b, c, d) in index.prose


def test_ids_are_no_pairs_of_images(folder):
    a, b = (load_run(folder / n) for n in "ab")
    by_patient = AUDIT | {"leaks": {"patient id": 47}, "findings": [], "note": ""}
    text = summary_sentences([changed(r, by_patient) for r in (a, b)])[1]
    assert "found 47 cases of one patient in different parts" in text and "lesion" not in text
    chained = AUDIT | {"leaks": {}, "chains_refused": 5, "refused_across": 1, "note": ""}
    runs = [changed(r, chained) for r in (a, b)]
    assert "no lesion in two parts of a split, but 1 pair across parts" in summary_sentences(runs)[1]
    text = " ".join(audit_blocks(runs)[0]["sentences"])
    assert "5 further pairs look alike but only through a chain" in text and "1 of them lies" in text
    assert "No pair lies" not in text
    old = changed(a, {k: v for k, v in chained.items() if k != "refused_across"})
    assert "was not recorded" in " ".join(audit_blocks([old])[0]["sentences"])


def test_a_leak_into_validation_says_nothing_of_test_images(folder):
    row = AUDIT["findings"][0]
    found = {"leaks": {"near duplicate": 1}, "findings": [row | {"part_b": "val"}]}
    run = changed(load_run(folder / "a"), AUDIT | found, allow_leakage=True)
    assert run.leaks and not run.leaks_into_test and "test images" not in leak_text(run)
    assert leak_head([run]) == "Parts of the split share lesions."
    text = summary_sentences([run])[1]
    assert "validation images show lesions" in text and "lesions of test images" not in text
    more = changed(run, AUDIT | found | {"leaks": {"near duplicate": 9}})
    assert more.leaks_into_test, "findings that are not listed may be of test images"
    assert load_run(folder / "d").leaks_into_test


def test_an_unsound_table_removes_its_run_alone_and_is_named(tmp_path):
    folder = tmp_path / "s"
    for i, (name, skill) in enumerate((("a", 1.5), ("b", 4.0), ("broken", 6.0))):
        make_run(folder / name, skill, i, **QUICK)
    table = load_run(folder / "broken").predictions.copy()
    table.loc[3, "p_NV"] = float("nan")
    table.to_parquet(folder / "broken" / "predictions.parquet")
    why = "a probability of image 'DEMO_0000003' is missing or infinite"
    page = Page(build_report(folder))
    assert f"broken is not compared: its predictions are not sound. Predictions: {why}" in page.prose
    text = section(page, "Every pair", "What the audit")
    assert "a minus b" in text or "b minus a" in text
    assert "the pair differs by more than chance" in text
    text = section(page, "Leaderboard", "Every pair")
    rank = {n: re.search(rf"\b{n} Cnn (\S+)", text)[1] for n in ("a", "b", "broken")}
    assert rank == {"a": "2", "b": "1", "broken": "–"} and "predictions not sound" in text
    _, runs = load_suite_runs(folder)
    assert [r.name for r in ranked(runs)] == ["b", "a", "broken"] and best_of(runs).name == "b"
    said = summary_sentences(runs)
    assert "the predictions of broken are not sound" in said[0] and said[2].startswith("b had the highest")
    own = Page(folder / "broken" / "report.html").prose
    assert why in section(Page(folder / "broken" / "report.html"), "How sure it is", "Worst errors")
    assert "There is no predictions table" not in own and own.index(why) < own.index("Contents")
    # Alone it is the best there is, and it is said what that is worth.
    assert "cannot be checked" in summary_sentences([r for r in runs if r.unsound])[0]


def test_the_order_is_said_to_be_found_only_where_the_pairs_favor_the_first(folder):
    runs = [load_run(folder / n) for n in "cab"]
    pairs = compared_pairs(runs)
    assert "paired tests find it better than all others" in " ".join(summary_sentences(runs, pairs))
    turned = [p | {"value": -p["value"]} for p in pairs]
    text = " ".join(summary_sentences(runs, turned))
    assert "find it better" not in text and "paired tests find a and b better" in text


def test_p_by_holm_is_the_adjusted_one(folder, index):
    found = load_run(folder / "c").subgroups
    text = section(Page(folder / "c" / "report.html"), "Subgroups", "Worst errors")
    main, raised = found["metrics"][0], False
    for row in found["rows"]:
        if row["difference"] and row["difference"][main]["p_holm"] is not None:
            cell = row["difference"][main]
            shown = f"{cell['p_holm']:.3f}" if cell["p_holm"] >= 0.001 else "< 0.001"
            gap = signed_cell(cell)
            assert f"{gap['text']} {gap['sub']} {shown}" in text
            raised |= f"{cell['p']:.3f}" != f"{cell['p_holm']:.3f}"
    assert raised
    pairs = compared_pairs([load_run(folder / n) for n in "abc"])
    for i, pair in enumerate(pairs):  # p-values of which every one is another
        for j, test in enumerate((pair, pair["mcnemar"], pair["delong"])):
            test["p"], test["p_holm"] = 0.1 + 0.1 * i + 0.02 * j, 0.51 + 0.1 * i + 0.02 * j
    rows = pairs_block(pairs, 0.95, True)["table"]["rows"]
    for pair, cells in zip(pairs, rows, strict=True):
        wanted = [pair["p_holm"], pair["mcnemar"]["p_holm"], pair["delong"]["p_holm"]]
        assert [cells[i]["text"] for i in (2, 3, 5)] == [p_cell(p)["text"] for p in wanted]


def test_metrics_of_other_predictions_are_refused(tmp_path):
    run = make_run(tmp_path / "s" / "a", 1.5, lesions=80, **QUICK)
    table = load_run(run).predictions.copy()
    first = table.index[(table["split"] == "test") & (table["y_true"] != "NV")][0]
    table.loc[first, [f"p_{c}" for c in ISIC8]] = [float(c == "NV") for c in ISIC8]
    right = load_run(run).predictions.loc[first]
    assert right[[f"p_{c}" for c in ISIC8]].astype(float).idxmax() != "p_NV"
    table.to_parquet(run / "predictions.parquet")
    with pytest.raises(ConfigError, match="was not computed from predictions.parquet; repeat"):
        load_run(run)
    assert load_suite_runs(tmp_path / "s")[1][0].status == "failed"


def test_one_of_a_kind_is_written_as_one(tmp_path):
    table = make_predictions(list(ISIC8), 80)
    one = table[table["split"] == "test"].head(1).assign(y_true="NV")
    folder = tmp_path / "s"
    table = pd.concat([table[table["split"] == "val"], one])
    make_run(folder / "a", predictions=table, **QUICK)
    states = [{"run": "a", "status": "done"}, {"run": "b", "status": "missing"}]
    write_json(folder / "suite.json", {"runs": states})
    text = Page(build_report(folder)).prose
    assert "1 of 2 runs finished (b has no results yet), measured on 1 image of 1 lesion." in text
    assert "one class alone says nothing" in text and "balanced accuracy of 1.000." not in text
    assert not re.search(r"\b1 (images|lesions|pairs|groups|runs)\b", text)


def test_figures_of_validation_are_not_called_test(tmp_path):
    table = make_predictions(list(ISIC8), 200)
    for i, name in enumerate("ab"):
        val = {"predictions": table[table["split"] == "val"], "facts": True}
        make_run(tmp_path / "s" / name, 1.5, i, **val, **QUICK)
    page = Page(build_report(tmp_path / "s"))
    start = page.prose.index("What the audit found", page.prose.index("Provenance"))
    text = page.prose[start : page.prose.index("What this does not show", start)]
    assert "by class and run, validation split" in text and "test split" not in text
    assert "Of the validation split. Rows are" in text


def test_leaks_are_on_top_of_every_page_they_touch(folder, index):
    shared = "2 pairs of images of one lesion in different parts of the split (near duplicate: 2)"
    said = f"the audit found {shared}. Its figures flatter."
    assert f"Test images leak. d : {said}" in index.prose
    page = Page(folder / "d" / "report.html")
    assert f"Test images leak. T{said[1:]}" in page.prose
    assert page.prose.index("Test images leak") < page.prose.index("Contents")
    assert "Test images leak" not in Page(folder / "a" / "report.html").prose
    # Found, but with no leave to leak (as by an audit afterwards): said, and not crowned out.
    record = read_json(folder / "c" / "run.json")
    write_json(folder / "c" / "run.json", record | {"audit": AUDIT | {"afterwards": True}})
    run = load_run(folder / "c")
    assert run.found_leaks and not run.leaks
    text = Page(build_run_page(folder / "c")).prose
    write_json(folder / "c" / "run.json", record)
    assert f"It found {shared}." in text and "was made before that was known" in text
    late = f"An audit after training found {shared}, so figures may flatter a little."
    assert late in text and text.index(late) < text.index("Contents")


def test_the_audit_is_told(folder, index):
    text = section(index, "What the audit found", "By class")
    assert "a and b" in text and "12 pairs show the same, 4 of them without a lesion id" in text
    assert "7 images in 3 groups are held to be one lesion each, so that a split keeps" in text
    assert "No pair lies in different parts of the split" in text
    assert "The second pass was not made: no weights of MobileNetV2 are here." in text
    assert "This run was made before runs were audited" in text  # c
    text = section(Page(folder / "d" / "report.html"), "What the audit found", "Cost")
    assert "near duplicate 9 4 2 0" in text and "1 pair shows one thing under two labels" in text
    assert "DEMO_3 DEMO_4 train test" in text and "DEMO_1 DEMO_2 near duplicate" in text


@pytest.mark.parametrize("audit", [{"method": "hashes"}, {"method": 3, "images": "x"}, ["x"], "x"])
def test_an_audit_that_cannot_be_read_is_said(tmp_path, audit):
    run = make_run(tmp_path / "s" / "a", lesions=60, record={"audit": audit}, **QUICK)
    build_report(tmp_path / "s")
    assert "record of the audit cannot be read" in Page(run / "report.html").prose


def test_subgroups_have_figures_or_reasons(folder, index):
    run = load_run(folder / "c")
    found = subgroups(run.predictions, run.split_table, list(ISIC8))
    text = section(Page(folder / "c" / "report.html"), "Subgroups", "Worst errors")
    assert found["summary"] in text and found["caution"] in text
    for row in found["rows"]:
        start = f"{row['title']}: {row['value']}"
        assert start in text
        if row["metrics"]:
            assert f"{row['metrics']['balanced_accuracy']['value']:.3f}" in text
        else:
            assert f"no figure: {row['reason']}" in text
    assert any(row["metrics"] is None for row in found["rows"])
    for silent in found["silent"]:
        assert silent in text and silent in index.prose
    assert "skin tone" in text and 'id="subgroups-plot"' in (folder / "c/report.html").read_text()
    told = section(index, "Subgroups", "Worst errors")
    assert re.search(rf"\bc[^:]*: {re.escape(found['summary'])}", told)
    text = section(Page(folder / "d" / "report.html"), "Subgroups", "Worst errors")
    assert "Nothing is known of these images that would part them" in text


def test_errors_and_doubts_have_ids(folder, index):
    run = load_run(folder / "c")
    table = run.predictions[run.predictions["split"] == "test"]
    p = table[[f"p_{c}" for c in ISIC8]]
    wrong = p.idxmax(axis=1) != "p_" + table["y_true"]
    worst = table.loc[p[wrong].max(axis=1).idxmax()]
    for page in (Page(folder / "c" / "report.html"), index):
        text = section(page, "Worst errors and doubtful labels", "Where")
        assert f"Of the label {worst['image_id']} {worst['lesion_id']} {worst['y_true']}" in text
        assert "contradicted with confidence" in text and "a bound and no estimate" in text and "Labels worth another look" in text
        assert "confident learning" in text
    text = section(Page(folder / "d" / "report.html"), "Worst errors", "What the audit")
    assert "leaks, so its doubts about labels say nothing" in text


def test_the_checklist_says_what_is_not_known(folder, index):
    for page in (index, Page(folder / "a" / "report.html")):
        text = section(page, "Reporting checklist", "Provenance")
        assert re.search(r"Of \d+ items of CLAIM .* and TRIPOD\+AI .*: \d+ reported", text)
        assert "not known" in text and "TRIPOD+AI 1" in text


def test_costs_are_told_with_their_limits(folder, index):
    text = section(index, "Cost", "Settings")
    assert "FLOPs of an image" in text and "2.25 M" in text and "1.8 kJ" in text
    assert "GPUs not counted" in text and "FLOPs are of one image" in text
    assert "Balanced accuracy against energy of training" in text
    text = section(Page(folder / "c" / "report.html"), "Cost", "Settings")
    assert "No energy was read" in text and "4.0 s" in text


def test_calibration_is_shown_before_and_after(folder, index):
    page = Page(folder / "c" / "report.html")
    text = section(page, "How sure it is", "Subgroups")
    assert "Reliability diagram of c" in text and "Calibration error after" in text
    said = load_run(folder / "c").certainty.summary["splits"]["test"]
    for stage in ("before", "after"):
        assert f"{said['calibration_error'][stage]['value']:.3f}" in text
        for row in said["reliability"][stage]:
            assert f"{row['confidence']:.3f} {row['lowest']:.3f}–{row['highest']:.3f}" in text
    assert "Calibration error before" in section(index, "How sure the runs are", "Subgroups")


def test_metrics_of_an_older_run_are_computed_anew(tmp_path):
    run = make_run(tmp_path / "s" / "a", 1.5, lesions=80, **QUICK)
    today = read_json(run / "metrics.json")
    old = read_json(run / "metrics.json") | {"schema": 1}
    for scored in old["splits"].values():
        scored["metrics"] = {k: scored["metrics"][k] for k in ("accuracy", "macro_f1")}
    write_json(run / "metrics.json", old)
    assert load_run(run).metrics == today == read_json(run / "metrics.json")
    assert load_run(run).score("log_loss")["value"] > 0
    # A page built from the old records is not built again for it.
    write_json(run / "metrics.json", old)
    page = build_run_page(run)
    before = page.stat().st_mtime_ns
    assert build_run_page(run).stat().st_mtime_ns == before
    # Metrics of other predictions are not passed off as those of these.
    write_json(run / "metrics.json", old)
    make_predictions(list(ISIC8), 70, 0.2, 5).to_parquet(run / "predictions.parquet")
    with pytest.raises(ConfigError, match="was not computed from predictions.parquet"):
        load_run(run)
    (run / "predictions.parquet").unlink()
    with pytest.raises(ConfigError, match="older dermnb"):
        load_run(run)


def test_what_takes_long_is_kept_until_its_tables_change(tmp_path, monkeypatch):
    from dermnb.runs import results

    run = make_run(tmp_path / "s" / "a", 1.5, facts=True, **QUICK)
    first = load_run(run)
    said, decision = first.subgroups, first.certainty.decision
    assert {"sex", "age"} < {row["kind"] for row in said["rows"]} and decision.n
    with monkeypatch.context() as m:  # read back, not computed
        m.setattr(results, "subgroups", None)
        m.setattr(results, "calibration_summary", None)
        again = load_run(run)
        assert again.subgroups == said and again.certainty.decision == decision
        assert again.certainty.summary == first.certainty.summary

    kept = run / results.MEASURED
    for broken in (kept.read_text()[:200], "[]", "{}"):
        kept.write_text(broken)
        assert load_run(run).subgroups == said

    table = pd.read_parquet(run / "split.parquet")
    table.drop(columns=[c for c in table if c in ("sex", "age", "site")]).to_parquet(
        run / "split.parquet"
    )
    kinds = {row["kind"] for row in load_run(run).subgroups["rows"]}
    assert kinds < {row["kind"] for row in said["rows"]}
