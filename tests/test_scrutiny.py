"""What a sceptical reader asks of the pages: ranks, audit, subgroups, errors, costs, old records."""

import re
from dataclasses import replace

import pytest
from fabricate import AUDIT, COUNTED, ISIC8, make_predictions, make_run
from test_report import Page, section

from dermnb.compare import compare_all
from dermnb.core import ConfigError, read_json, write_json
from dermnb.report import build_report, build_run_page, summary_sentences
from dermnb.results import load_run, load_suite_runs
from dermnb.review import subgroups

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
    assert f"found {found} pairs of images of one lesion" in summary_sentences(late)[1]


def test_leaks_are_on_top_of_every_page_they_touch(folder, index):
    said = "the audit found pairs across its splits (near duplicate: 2). Its figures flatter."
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
    assert "2 pairs lie in different parts of the split" in text
    assert "was made before that was known" in text


def test_the_audit_is_told(folder, index):
    text = section(index, "What the audit found", "By class")
    assert "a and b" in text and "12 pairs show the same, 4 of them without a lesion id" in text
    assert "7 images in 3 groups are held to be one lesion each, so that a split keeps" in text
    assert "No pair lies in different parts of the split" in text
    assert "The second pass was not made: no weights of MobileNetV2 are here." in text
    assert "This run was made before runs were audited" in text  # c
    text = section(Page(folder / "d" / "report.html"), "What the audit found", "Cost")
    assert "near duplicate 9 4 2 0" in text and "1 pairs show one thing under two labels" in text
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
