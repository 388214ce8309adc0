"""Suite and run pages: complete, escaped, offline, quick, and honest about what is not there."""

import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import PureWindowsPath

import pandas as pd
import pytest
from fabricate import (
    ISIC8,
    make_ensemble,
    make_explanation,
    make_predictions,
    make_run,
    make_study,
    make_suite,
)
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from dermnb.metrics.calibration import calibration_summary, fit_decision
from dermnb.core import ConfigError, make_config, read_json, write_json
from dermnb.metrics.scores import evaluate
from dermnb.report.pages import clean_html, notebook_html
from dermnb.report.build import build_report, build_run_page, build_suite_page
from dermnb.runs.results import forget_paths, load_run, load_suite_runs, name_positive
from dermnb.report.saliency import may_be_shown

VOID = {"meta", "link", "br", "img", "hr", "input", "col"}


class Page(HTMLParser):
    "Tags that open and close in order, ids, links, and whatever a browser would fetch."

    def __init__(self, path):
        super().__init__()
        self.open, self.ids, self.links, self.fetched, self.scripts = [], [], [], [], 0
        self.headings, self.words, self.tags = [], [], {}
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        for name in ("src", "href"):
            if name in attributes:
                (self.links if tag == "a" else self.fetched).append(attributes[name])
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        assert not [a for a in attributes if a.startswith("on")], attributes

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID, tag
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def prose(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = make_suite(tmp_path_factory.mktemp("reports") / "demo")
    build_report(folder)
    return folder


def test_suite_page_is_complete(suite):
    page = Page(suite / "index.html")
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        else:
            assert (suite / link).is_file(), link
    for section in (
        "Summary", "Leaderboard", "Every pair", "What the audit found", "Confusion matrices",
        "Subgroups", "Worst errors and doubtful labels", "Learning curves", "Cost",
        "Settings", "Data", "What this does not show", "Provenance",
    ):  # fmt: skip
        assert section in page.prose
    assert "These figures come from generated images" in page.prose
    assert "4 of 6 runs finished" in page.prose
    assert "densenet121 failed: ConfigError: densenet121.weights.h5 is no" in page.prose
    assert "resnet50 missing: It has no results yet" in page.prose
    for name in ("cnn", "xception", "efficientnetb5", "efficientnetb7"):
        assert f"{name}/report.html" in page.links
    best = read_json(suite / "efficientnetb5" / "metrics.json")["splits"]["test"][
        "metrics"
    ]
    assert f"{best['balanced_accuracy']['value']:.3f}" in page.prose
    assert "Unknown cells sex 57 'unknown'" in page.prose
    assert "Not used columns: dx_type of t.csv; files: 2 .heic" in page.prose
    assert "736125f9d0c1a2b3" in page.prose and "5f0c3a9d2b7e4c61" in page.prose
    assert page.tags["caption"] == page.tags["table"]
    # Every chart has a name, and a table of its own or with its pair.
    charts = page.text.count('role="img" aria-label="')
    assert charts == page.text.count("data-figure=") >= 14
    assert page.text.count(">Table behind th") >= charts
    assert page.headings.count(1) == 1


def test_pages_ask_the_network_for_nothing_and_are_small(suite):
    pages = [suite / "index.html", *suite.glob("*/report.html")]
    assert len(pages) == 5
    for path in pages:
        page = Page(path)
        scripts = {f for f in page.fetched if not f.startswith("data:")}
        assert scripts == {
            "plotly.min.js" if path.name == "index.html" else "../plotly.min.js"
        }
        assert path.stat().st_size < 1_000_000
        for url in re.findall(
            r"url\(|@import|mathjax|mermaid|require\.js|jquery", page.text, re.I
        ):
            pytest.fail(f"{path}: {url}")
    assert len(list(suite.rglob("plotly*.js"))) == 1


def test_single_file_needs_no_other(suite):
    page = build_suite_page(suite, single_file=True)
    assert page.parent == suite and page.name == "demo.html"
    text = page.read_text(encoding="utf-8")
    head = text[: text.index("<script>")] + text[text.index("</script>") :]
    assert not re.search(r'<script src|href="[^#d]', head)
    assert "single-file edition" in text
    assert page.stat().st_size < 6_000_000


def test_run_page_shows_the_notebook(suite):
    page = Page(suite / "cnn" / "report.html")
    assert len(page.ids) == len(set(page.ids))
    assert "../index.html" in page.links
    assert '<details class="code">' in page.text and "train_model" in page.text
    assert 'class="out">epoch 299' in page.text and "epoch 298" not in page.text
    assert "division &lt;by&gt; zero" in page.text
    assert "cdn.plot.ly" not in page.text
    assert 'src="data:image/png' in page.text  # generated images may be shown
    assert page.prose.count("These figures come from generated images") == 1


def test_pages_about_photographs_show_none(tmp_path):
    folder = make_suite(tmp_path / "real", synthetic=False)
    build_report(folder)
    for path in [folder / "index.html", *folder.glob("*/report.html")]:
        page = Page(path)
        assert "data:image" not in page.text
        assert "generated images" not in page.prose
    run = Page(folder / "cnn" / "report.html")
    assert "A picture is left out here" in run.prose
    assert "data-figure" in run.text  # charts are no pictures
    # A record that does not say so is not taken for generated.
    record = read_json(folder / "cnn" / "run.json")
    del record["dataset"]["synthetic"]
    write_json(folder / "cnn" / "run.json", record)
    assert "data:image" not in build_run_page(folder / "cnn").read_text()


@pytest.mark.parametrize(
    "data",
    [
        {"image/jpeg": "AAAA"},
        {"image/svg+xml": "<svg></svg>", "text/plain": "x"},
        {"text/html": "<p>a<IMG src='data:image/png;base64,AAAA'></p>"},
        {
            "application/vnd.plotly.v1+json": {
                "data": [{"type": "image", "source": "data:x"}]
            }
        },
        {
            "application/vnd.plotly.v1+json": {
                "data": [{"type": "heatmap", "z": [[1] * 99] * 99}]
            }
        },
        {
            "application/vnd.plotly.v1+json": {
                "data": [
                    {
                        "type": "heatmap",
                        "z": {"dtype": "u1", "shape": "99, 99", "bdata": "A"},
                    }
                ]
            }
        },
        {
            "application/vnd.plotly.v1+json": {
                "data": [],
                "layout": {"images": [{"source": "data:image/png;base64,AAAA"}]},
            }
        },
    ],
)
def test_pictures_in_disguise(tmp_path, data):
    import nbformat

    cell = new_code_cell("show()", outputs=[new_output("display_data", data)])
    text = new_markdown_cell(
        "![x](data:image/png;base64,AAAA) <img src='data:image/png,A'>"
    )
    path = tmp_path / "notebook.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, text]), path)
    page = notebook_html(path, pictures=False)
    assert "A picture is left out" in page
    assert (
        "<img" not in page.lower()
        and "data:image" not in page
        and "data-figure" not in page
    )


def test_notebook_html_is_cleaned():
    hostile = (
        "<script>x()</script><style>p{}</style><table onclick='x()' id='main'><tr><td>1</td></tr>"
        "</table><a href='javascript:x()'>a</a><img src='https://x/y.png'><iframe src='//x'></iframe>"
    )
    text = clean_html(hostile, pictures=True)
    for bad in ("script", "style>", "onclick", "id=", "<img", "iframe", "https"):
        assert bad not in text, (bad, text)
    assert "<td>1</td>" in text


HOSTILE = {
    "<script>alert(1)</script>": "<img src=x onerror=alert(1)>",
    "</script><b>": "a & b",
    "x" * 300: "y" * 300,
    "\u202eNV \u0645\u0631\u0636": "\u05d0\u05d1",
    "{{ 7*7 }}": "{% raw %}",
    "__proto__": "<br>",
}


def test_hostile_names_are_text(tmp_path):
    folder = tmp_path / "s"
    names = ["<img src=x onerror=alert(1)>", "a'b\"c&d", "r" * 200]
    for i, name in enumerate(names):
        make_run(folder / name, seed=i, classes=HOSTILE, notebook=not i)
    states = [{"run": n, "status": "done"} for n in names]
    states += [
        {"run": "../etc", "status": "done"},
        {"run": "<b>", "status": "failed", "error": "<script>alert(2)</script>"},
    ]
    title = "</title><script>alert(3)</script>"
    write_json(
        folder / "suite.json",
        {
            "title": title,
            "question": title,
            "caveats": [title],
            "runs": states,
            "compare": [names[:2], ["<b>", names[0]]],
            "claims": [
                {"run": names[0], "metric": "recall:<br>", "value": 0.5, "source": title},
                {"run": names[0], "metric": "accuracy", "better_than": "<b>"},
            ],
        },
    )
    build_report(folder)
    for path in [folder / "index.html", *folder.glob("*/report.html")]:
        page = Page(path)
        assert not re.search(r"<script>alert|<img src=x|<b>", page.text)
        assert "{{ 7*7 }}" in page.text
    page = Page(folder / "index.html")
    assert len(re.findall("data-figure=", page.text)) == len(
        re.findall(r'type="application/json" id="(?!figure-looks)', page.text)
    )
    assert "../etc missing" in page.prose and not [x for x in page.links if ".." in x]
    assert "<script>alert(2)</script>" in page.prose  # shown as it was written


def test_the_page_grows_as_runs_end(tmp_path, monkeypatch):
    "It is there after the first run, says what is to come, and a fault in it stops no run."
    from dermnb.report import build as report
    from dermnb.runs import runner

    page, said, seen = tmp_path / "r/two/index.html", [], []

    def execute(todo, total, reports, *others):
        for i, run in enumerate(todo):
            make_run(tmp_path / "r/two" / run, seed=i, resamples=20)
            yield {"run": run, "status": "done", "error": "", "seconds": 1}
            seen.append(page.read_text() if page.is_file() else "")

    monkeypatch.setattr(runner, "_execute_all", execute)
    content = {"title": "t", "question": "q", "runs": {"a": {}, "b": {}, "c": {}}}
    write_json(tmp_path / "two.yaml", content)
    runner.run_suite(
        tmp_path / "two.yaml", reports=tmp_path / "r", say=said.append, build=report.build_report
    )
    assert page.as_uri() in said[0]
    assert "1 of 3 runs finished (b and c have no results yet)" in seen[0]
    assert "2 of 3 runs finished (c has no results yet)" in seen[1]
    assert 'href="a/report.html"' in seen[0] and 'href="b/report.html"' not in seen[0]
    assert "no results yet" not in page.read_text()
    for run in "abc":
        shutil.rmtree(tmp_path / "r/two" / run)
    page.unlink()
    faults = iter([ValueError("no page"), ValueError("no page"), None])

    def faulty(folder):
        if fault := next(faults):
            raise fault
        return report.build_report(folder)

    again = runner.run_suite(
        tmp_path / "two.yaml", reports=tmp_path / "r", say=said.append, build=faulty
    )
    assert again[0] == page
    assert said.count("the report waits for the other runs: ValueError: no page") == 2


def test_odd_suites(tmp_path):
    with pytest.raises(ConfigError, match="not a folder"):
        build_report(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="neither suite.json nor"):
        build_report(tmp_path)
    # Nothing finished: a page all the same.
    (tmp_path / "a").mkdir()
    state = {"run": "x", "status": "missing", "error": ""}
    write_json(
        tmp_path / "a" / "suite.json", {"title": "A", "question": "?", "runs": [state]}
    )
    page = Page(build_report(tmp_path / "a"))
    assert "The one run has no results yet" in page.prose
    assert "Confusion" not in page.prose
    # One run, without suite.json, history, notebook and test split.
    table = make_predictions(list(ISIC8), 80)
    run = make_run(
        tmp_path / "b" / "only",
        predictions=table[table["split"] == "val"],
        notebook=False,
    )
    (run / "history.csv").unlink()
    page = Page(build_report(tmp_path / "b"))
    assert "on the validation split" in page.prose
    assert "holds no notebook" in Page(run / "report.html").prose
    # Records that cannot be read count as failed.
    (run / "metrics.json").write_text("{}")
    _, runs = load_suite_runs(tmp_path / "b")
    assert [r.status for r in runs] == ["failed"] and "do not fit" in runs[0].error
    with pytest.raises(ConfigError, match="do not fit"):
        load_run(run)


def test_absent_classes_and_different_test_sets_are_said(tmp_path):
    folder = tmp_path / "s"
    table = make_predictions(list(ISIC8), 200)
    make_run(folder / "a", predictions=table[table["y_true"] != "DF"])
    make_run(folder / "b", seed=1)
    page = Page(build_report(folder))
    assert "No image of DF is in the validation split" in page.prose
    assert "not all measured on the same images" in page.prose
    assert "Used by a" in page.prose and "Used by b" in page.prose


def test_summary_does_not_name_a_winner_the_data_cannot_tell(tmp_path):
    folder = tmp_path / "s"
    make_run(folder / "a", skill=1.5, seed=0)
    make_run(folder / "b", skill=1.5, seed=1)
    assert "their order may be chance" in Page(build_report(folder)).prose
    make_run(folder / "c", skill=4.0, seed=2)
    assert "paired tests find it better than all others" in Page(build_report(folder)).prose


def test_loads_no_deep_learning_framework():
    code = (
        "import sys, dermnb.report.build;"
        "heavy = {'tensorflow', 'keras', 'keras_cv', 'jax', 'torch'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_twenty_runs_in_seconds(tmp_path):
    folder = tmp_path / "big"
    first = make_run(folder / "run00", lesions=300, resamples=20, epochs=60)
    for i in range(1, 20):
        shutil.copytree(first, folder / f"run{i:02d}")
    start = time.process_time()
    build_report(folder)
    assert time.process_time() - start < 30  # about 8 s
    assert (folder / "index.html").stat().st_size < 1_000_000
    before = (first / "report.html").stat().st_mtime_ns
    start = time.process_time()
    build_report(folder)
    assert time.process_time() - start < 10
    assert (first / "report.html").stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = make_study(tmp_path_factory.mktemp("reports") / "study", resamples=100)
    build_report(folder)
    return folder


def section(page, title, until):
    "The prose between two headings, after the contents."
    start = page.prose.index(title, page.prose.index("Provenance"))
    return page.prose[start : page.prose.index(until, start)]


def test_every_section_is_listed_and_sound(study, suite):
    page = Page(study / "index.html")
    assert len(page.ids) == len(set(page.ids))
    new = ("claims", "leakage", "repeats", "paired", "ensembles")
    for id in new:
        assert id in page.ids and f"#{id}" in page.links
    assert "binary" not in page.ids  # eight classes
    assert not set(new) & set(Page(suite / "index.html").ids)  # nothing to show there
    charts = page.text.count("data-figure=")
    assert page.text.count(">Table behind th") >= charts
    assert page.tags["caption"] == page.tags["table"]
    assert (study / "index.html").stat().st_size < 1_000_000
    assert Page(build_suite_page(study, single_file=True)).ids


def test_claims(study):
    text = section(Page(study / "index.html"), "Claimed and measured", "Leaderboard")
    assert "10 published claims. 1 cannot be true whatever the data. 1 follows" in text
    assert "cannot be true: Macro F1 is at most the mean of precision and recall" in text
    assert "here 0.63835, but 0.6718 is claimed" in text
    assert "follows from the published confusion matrix" in text
    assert "measured below the claim" in text and "in all 3 repeats" in text
    assert "mean of 3: seed 1" in text
    assert "run failed: MemoryError: too large" in text
    assert "cnn does not tell two classes apart" in text
    assert "supported: the interval lies above 0" in text
    assert "not measured on the same test images" in text
    assert "35,000 images in all there" in text and "6 classes there, 8 classes here" in text
    assert "224 px there, 96 px here" in text
    assert "measured on 600 images there, 483 here" in text
    assert "source: README of the system" in text
    assert "from cnn; 10 epochs" in text and "2 members" in text
    value = read_json(study / "tuned" / "metrics.json")["splits"]["val"]["metrics"]
    assert f"{value['macro_f1']['value']:.3f}" in text  # the split of the claim


def test_claims_that_do_not_fit_are_one_sentence(tmp_path):
    make_run(tmp_path / "s" / "a", resamples=20, notebook=False)
    states = [{"run": "a", "status": "done"}]
    claims = [{"run": "a", "metric": "acuracy", "value": 0.5}]
    suite = {"title": "S", "runs": states, "claims": claims}
    write_json(tmp_path / "s" / "suite.json", suite)
    page = Page(build_report(tmp_path / "s"))
    assert "did you mean 'accuracy'" in page.prose


def test_leaks_are_marked_and_not_crowned(study):
    page = Page(study / "index.html")
    summary = section(page, "Summary", "Claimed and measured")
    assert "cnn_image leaks: lesions of test images (240 of 483) are in training" in summary
    assert "highest mean balanced accuracy of the runs without a leak" in summary
    assert "cnn_image had" not in summary
    best = read_json(study / "cnn_image" / "metrics.json")["splits"]["test"]["metrics"]
    for name in ("xception-seed1", "tuned", "both"):
        other = read_json(study / name / "metrics.json")["splits"]["test"]["metrics"]
        assert other["balanced_accuracy"]["value"] < best["balanced_accuracy"]["value"]
    text = section(page, "Leakage", "Repeats")
    assert "Split by image, cnn_image has an accuracy of" in text
    assert "the same recipe split by lesion, cnn, has" in text
    assert "more, on other test images; the intervals do not overlap" in text
    assert "is right on 1.000 of the 240 test images whose lesion it was trained on" in text
    assert "lesion in training" in text and "lesion new" in text
    assert section(page, "Leaderboard", "Leakage").count("cnn_image leaks") >= 2
    assert section(page, "By class", "Confusion matrices").count("cnn_image leaks") == 4
    assert "but for runs marked as leaking" in page.prose
    assert "by image at random" in page.prose
    assert "Test images leak. Lesions of 240 of" in Page(study / "cnn_image" / "report.html").prose


def test_a_suite_of_leaking_runs_says_so(tmp_path):
    for i, name in enumerate("ab"):
        run = {"resamples": 20, "notebook": False, "leaky": True}
        make_run(tmp_path / "s" / name, seed=i, **run)
    page = Page(build_report(tmp_path / "s"))
    assert "Every run leaks" in page.prose and "without a leak" not in page.prose
    assert "No run differs from a and b in the split alone" in page.prose


def test_repeats(study):
    page = Page(study / "index.html")
    text = section(page, "Repeats", "Paired differences")
    assert "The test images of xception are the same in each repeat" in text
    assert "The test sets of folded differ from fold to fold and are disjoint" in text
    values = [
        read_json(study / f"xception-seed{i}" / "metrics.json")["splits"]["test"]["metrics"][
            "balanced_accuracy"
        ]["value"]
        for i in (1, 2, 3)
    ]
    mean = sum(values) / 3
    sd = (sum((v - mean) ** 2 for v in values) / 2) ** 0.5
    assert f"xception 3 {mean:.3f} SD {sd:.3f}" in text
    for value in values:
        assert f"{value:.3f}" in text
    assert f"{mean:.3f} over 3 repeats" in section(page, "Summary", "Claimed")
    assert "xception (3)" in page.text


def test_paired_differences(study):
    text = section(Page(study / "index.html"), "Paired differences", "Ensembles")
    assert "both minus cnn" in text and "Recall of DF" in text
    assert "Balanced accuracy differs by +" in text and "both is ahead" in text
    assert "mean of 3 repeats" in text
    assert "No results of b7." in text
    assert "The runs were not measured on the same test images" in text


def test_ensembles_bases_metadata_and_draws(study):
    page = Page(study / "index.html")
    text = section(page, "Ensembles", "By class")
    assert "both weighted mean of probabilities cnn 0.300" in text
    assert "tuned 0.700" in text
    runs = section(page, "Runs of the suite", "Provenance")
    assert "tuned done Cnn \N{LEFTWARDS ARROW} cnn" in runs
    assert (
        "both done Ensemble of 2 \N{LEFTWARDS ARROW} cnn and tuned" in runs
        and "changed since" not in runs
    )
    assert "age, sex, site; missing: age 57, sex 50; used by tuned (concat)" in page.prose
    assert "300 images a class, hash d41d8cd98f00b204; of cnn" in page.prose
    run = load_run(study / "both")
    assert run.history.empty and not run.leaks
    page = Page(study / "both" / "report.html")
    assert "#members" in page.links and "Combined by weighted mean" in page.prose
    assert "Made from: \N{LEFTWARDS ARROW} cnn and tuned" in page.prose
    assert "#members" not in Page(study / "cnn" / "report.html").links


def test_a_base_that_has_changed_is_named(tmp_path):
    parents = {"base": "0" * 64}
    make_run(tmp_path / "s" / "base", resamples=20, notebook=False)
    make_run(tmp_path / "s" / "top", resamples=20, notebook=False, record={"parents": parents})
    assert "base (changed since)" in Page(build_report(tmp_path / "s")).prose


def test_two_classes(tmp_path):
    folder, common = tmp_path / "s", {"resamples": 50, "notebook": False}
    two = {"benign": "Benign", "malignant": "Malignant"}
    draw = {"train_draw": {"per_class": 50, "hash": "abc"}}
    for i, name in enumerate(("alexnet", "resnet50")):
        make_run(
            folder / name, 1.5, i, two, positive="malignant", record=draw, **common
        )
    make_ensemble(folder / "all", ["alexnet", "resnet50"], [1, 1], notebook=True)
    claims = [
        {"run": "all", "metric": "sensitivity", "value": 0.9},
        {"run": "all", "metric": "partial_auc", "better_than": "resnet50"},
        {"run": "all", "metric": "sensitivity_at_threshold", "better_than": "resnet50"},
    ]
    states = [{"run": n, "status": "done"} for n in ("alexnet", "resnet50", "all")]
    write_json(
        folder / "suite.json",
        {"title": "Two", "runs": states, "claims": claims, "compare": [["all", "resnet50"]]},
    )
    page = Page(build_report(folder))
    text = section(page, "Two classes", "Ensembles")
    assert "Positive class: malignant (" in text and "Specificity at 95 % sensitivity" in text
    assert "The threshold was chosen here" in text
    assert "ISIC 2024 challenge" in text
    binary = read_json(folder / "all" / "metrics.json")["splits"]["test"]["binary"]
    assert f"{binary['metrics']['partial_auc']['value']:.3f}" in text
    assert "has no paired difference" in section(page, "Claimed and measured", "Leaderboard")
    assert "50 images a class, hash abc; shared by all runs" in page.prose
    run = Page(folder / "all" / "report.html")
    assert "Positive class: malignant" in run.prose and "train_model" in run.text


def test_pages_forget_paths_of_every_system(monkeypatch):
    from dermnb.report import pages

    for text, left in (
        ("OSError: /home/me/x/w.h5 is gone", "OSError: w.h5 is gone"),
        (r"OSError: C:\Users\Me\x\w.h5 is gone", "OSError: w.h5 is gone"),
        (r"'D:\\data\\im.jpg' and D:/data/b.jpg", "'im.jpg' and b.jpg"),
        ("fetch https://a.org/b/c.h5 into E:\\", "fetch https://a.org/b/c.h5 into "),
    ):
        assert forget_paths(text) == left
    monkeypatch.setattr(pages, "Path", PureWindowsPath)
    for name, place in (("cwd", r"C:\Work\clone"), ("home", "C:\\")):
        monkeypatch.setattr(PureWindowsPath, name, lambda p=place: PureWindowsPath(p), raising=False)
    text = r'C:\Work\clone\a "C:\\Work\\clone\\b" C:/Work/clone/c C:\d'
    assert pages._forget_paths_in_text(text) == r'\a "\\b" /c C:\d'

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(PureWindowsPath, "home", no_home, raising=False)
    assert pages._forget_paths_in_text(r"C:\Work\clone\a") == r"\a"


def test_two_classes_without_a_named_positive_one(tmp_path):
    folder, two = tmp_path / "s", {"melanoma": "Melanoma", "nevus": "Nevus"}
    run = make_run(folder / "cnn", 1.5, 0, two, resamples=50, notebook=False)
    claims = [{"run": "cnn", "metric": "sensitivity", "value": 0.9}]
    states = [{"run": "cnn", "status": "done"}]
    write_json(folder / "suite.json", {"title": "Two", "runs": states, "claims": claims})
    # As an earlier version had it: the second of the alphabet.
    table, plain = load_run(run).predictions, read_json(run / "metrics.json")
    write_json(run / "metrics.json", evaluate(table, list(two), resamples=50, positive="nevus"))
    page = Page(build_report(folder))
    assert read_json(run / "metrics.json") == plain
    for text in (page.prose, Page(run / "report.html").prose):
        assert "Of melanoma and nevus none is named as the positive class" in text
        assert "melanoma is a malignant diagnosis: -p positive=melanoma names it." in text
        assert "Positive class:" not in text and "Specificity at that threshold" not in text
    assert "of cnn no positive class is named" in section(page, "Claimed and measured", "Leaderboard")
    # Named afterwards, nothing is trained; and taken back again.
    (run / "model").mkdir()
    write_json(run / "model" / "decision.json", {"positive": "nevus"})
    config = make_config(read_json(run / "run.json")["config"])
    named = config.model_copy(update={"positive": "melanoma"})
    assert not name_positive(run, config) and name_positive(run, named)
    assert not name_positive(run, named)
    decision = read_json(run / "model" / "decision.json")
    assert decision["positive"] == "melanoma" and 0 < decision["positive_threshold"] < 1
    assert "Positive class: melanoma (" in Page(build_report(folder)).prose
    assert "AUC of melanoma" in (run / "model" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'melanoma'"):
        name_positive(run, config.model_copy(update={"positive": "melanom"}))
    assert name_positive(run, config) and read_json(run / "metrics.json") == plain
    assert "No positive class is named" in (run / "model" / "README.md").read_text(encoding="utf-8")


def test_how_sure_a_run_is(suite):
    run = load_run(suite / "xception")
    classes = list(run.record["classes"])
    decision = fit_decision(run.predictions, classes)
    found = calibration_summary(run.predictions, classes, decision)["splits"]["test"]
    page = Page(suite / "xception" / "report.html")
    text = section(page, "How sure it is", "Where it looks")
    assert "#certainty" in page.links and "certainty" in page.ids
    assert f"validation images best is {decision.temperature:.2f}: below 1" in text
    for part in ("before", "after"):
        assert f"{found['log_loss'][part]['value']:.3f}" in text
    cell = found["coverage"]
    assert f"{cell['value']:.3f} ({cell['low']:.3f} to {cell['high']:.3f})" in text
    for row in found["per_class"]:
        assert f"{row['class']} {row['n']} {row['lesions']} {row['coverage']['value']:.3f}" in text
    for row in found["risk"]:
        assert f"{row['risk']['value']:.3f}" in text
    assert f"at least {decision.min_confidence:.3f}" in text
    assert "about and not exactly" in text and "not for each class" in text
    # And beside the others on the page of the suite.
    page = Page(suite / "index.html")
    text = section(page, "How sure the runs are", "Where the runs look")
    assert "1 of 4 runs (cnn)" in text and f"xception {decision.temperature:.2f}" in text
    assert f"{cell['value']:.3f}" in text and f"{found['aurc']['value']:.3f}" in text
    figure = page.text[page.text.index('id="risk-coverage"') :]
    assert all(f'"name":"{r}"' in figure for r in ("cnn", "xception", "efficientnetb5"))


def test_nothing_to_be_sure_of(tmp_path):
    folder = tmp_path / "s"
    common = {"resamples": 20, "notebook": False}
    table = make_predictions(list(ISIC8), 200)
    make_run(folder / "no_val", predictions=table[table["split"] == "test"], **common)
    few = pd.concat([table[table["split"] == "val"][:5], table[table["split"] == "test"]])
    make_run(folder / "few", predictions=few, **common)
    make_run(folder / "lost", **common)
    (folder / "lost" / "predictions.parquet").unlink()
    page = Page(build_report(folder))
    assert "no predictions that can be read: lost" in page.prose.lower()
    text = Page(folder / "no_val" / "report.html").prose
    assert "There are no validation images to fit anything on" in text
    assert "allow no sets" in Page(folder / "few" / "report.html").prose
    assert "no predictions table" in Page(folder / "lost" / "report.html").prose


def test_validation_images_that_are_unlike_the_test_images_are_said(tmp_path):
    two = {"benign": "Benign", "malignant": "Malignant"}
    table = make_predictions(list(two), 900, 0.8, 0, [0.8, 0.2])
    val, benign = table["split"] == "val", table["y_true"] == "benign"
    even = table[~val | ~benign | (table["lesion_id"].str[-2:] > "75")]
    folder = tmp_path / "s"
    make_run(folder / "even", predictions=even, classes=two, resamples=50, notebook=False)
    text = Page(build_report(folder)).prose
    assert "In even classes are not as common among validation images" in text
    text = Page(folder / "even" / "report.html").prose
    assert "need not fit the other" in text
    assert "benign: 0.50 of validation images, 0.81 of test images" in text


def test_where_a_run_looks(suite):
    page = Page(suite / "xception" / "report.html")
    text = section(page, "Where it looks", "Settings")
    assert "looks" in page.ids and "Grad-CAM at layer conv_2 of xception" in text
    assert "of other images by 0.220 (0.160 to 0.280): they depend on what was" in text
    assert "lowers the probability sooner than doing so at random" in text
    assert "within the lesion masks, which take up 0.310" in text
    # Covered, it is right far more often than naming the commonest class would be.
    assert "an accuracy of 0.800 (0.740 to 0.860), clearly above the 0.670" in text
    assert "something other than the lesion gives the answer away" in text
    assert "no proof" in text and "120 images of 100 lesions" in text
    for id in ("shortcuts", "removal", "mean-map"):
        assert f'data-figure="{id}"' in page.text
    assert "uniform noise 20 18 0.900" in text and "a false alarm" in text
    assert "DEMO_0000002 : true BCC , predicted AK , confidence 0.93" in text
    assert page.text.count('src="data:image/jpeg') == 16
    assert page.text.count(' alt="') >= 16
    page = Page(suite / "index.html")
    text = section(page, "Where the runs look", "Learning curves")
    assert "no shortcut is shown, which is not to say that there is none" in text  # cnn
    assert "something other than the lesion" in text  # xception
    assert "Not explained: efficientnetb5 and efficientnetb7" in text
    assert "data:image" not in page.text.replace('href="data:,"', "")
    text = Page(suite / "efficientnetb5" / "report.html").prose
    assert "has not been explained. dermnb explain RUN_FOLDER --data-dir DIR" in text


def test_a_network_without_images_looks_nowhere(tmp_path):
    common = {"lesions": 60, "resamples": 10, "notebook": False}
    run = make_run(tmp_path / "s" / "a", metadata="only", **common)
    text = Page(build_run_page(run)).prose
    assert "sees no image" in text and "dermnb explain" not in text


def alike(same, chance):
    "How maps before and after weights are drawn anew resemble each other."
    found = {"head": same, "all": same, "head_chance": chance, "all_chance": chance}
    return {k: {"value": v, "low": v - 0.1, "high": v + 0.1, "n": 9} for k, v in found.items()}


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"covered": 0.8, "border": 0.75}, "The border of the image alone gives an accuracy"),
        ({"covered": 0.5, "border": 0.85}, "alone gives an accuracy of 0.850"),
        ({"covered": 0.65, "majority": 0.9, "plain": 0.5}, "Neither is clearly above"),
        ({"covered": 0.72, "majority": 0.9}, "a balanced accuracy of 0.220"),
        ({"masks": "central"}, "no lesion masks: an ellipse in the middle"),
        ({"shortcuts": {}, "gallery": [], "deletion": None, "foreign": []}, "Showing first"),
        ({"randomization": alike(0.9, 0.2)}, "hardly depend on what was learned"),
        ({"randomization": alike(0.4, 0.2)}, "in part they show the picture"),
        ({"randomization": alike(0.3, 0.25)}, "they depend on what was learned"),
    ],
)  # fmt: skip
def test_what_a_map_is_said_to_show(tmp_path, numbers, said):
    run = make_run(tmp_path / "s" / "a", lesions=100, resamples=10, notebook=False)
    make_explanation(run, **numbers)
    assert said in Page(build_run_page(run)).prose
    assert Page(build_suite_page(tmp_path / "s")).ids


@pytest.mark.parametrize(
    "record",
    [
        {"lesions": "many"},
        {"deletion": {"area": 0.3}},
        {"mean_map": [[0.1, 0.2], [0.3]]},
        {"gallery": [{"image_id": "x"}]},
        {"shortcuts": {"plain": {}}},
        {"layers": 3},
    ],
)
def test_an_explanation_that_cannot_be_read_is_said(tmp_path, record):
    run = make_run(tmp_path / "s" / "a", lesions=60, resamples=10, notebook=False)
    make_explanation(run, **record)
    build_report(tmp_path / "s")
    assert "explain.json is there but cannot be read" in Page(run / "report.html").prose
    (run / "explain.json").write_text("{")
    assert "cannot be read" in Page(build_run_page(run)).prose


def test_photographs_are_shown_only_where_asked_and_allowed(tmp_path):
    folder = tmp_path / "s"
    make_run(folder / "a", synthetic=False, lesions=60, resamples=10, notebook=False)
    run = folder / "a"
    make_explanation(run, synthetic=False, license="CC BY-NC 4.0")

    def pictures():
        return Page(run / "report.html").text.count("data:image/")

    build_report(folder)
    text = Page(run / "report.html").prose
    assert not pictures() and "dermnb report DIR --photographs" in text
    build_report(folder, photographs=True)
    text = Page(run / "report.html").prose
    assert pictures() == 16 and "Photographs: HAM10000. Tschandl et al." in text
    assert "data:image/" not in (folder / "index.html").read_text()
    build_report(folder)
    assert not pictures()  # and gone again
    with pytest.raises(ConfigError, match="single file"):
        build_report(folder, single_file=True, photographs=True)
    # Both records must allow it, and both must say that images are generated.
    for license, synthetic in (("all rights reserved", False), ("unknown", True)):
        make_explanation(run, synthetic=synthetic, license=license)
        with pytest.raises(ConfigError, match="a: photographs under the license"):
            build_report(folder, photographs=True)
        build_report(folder)
        assert not pictures()


@pytest.mark.parametrize(
    ("license", "allowed"),
    [
        ("CC0 1.0", True),
        ("CC-0", True),
        ("CC BY 4.0", True),
        ("CC BY-NC 4.0", True),
        ("Creative Commons Attribution-NonCommercial 4.0 International", True),
        ("CC BY-NC-ND 4.0", False),
        ("CC BY 4.0 for non-members only", False),
        ("not CC0", False),
        ("stated for each image", False),
        ("", False),
    ],
)
def test_licenses(license, allowed):
    assert may_be_shown(license) is allowed


def test_a_gallery_cannot_reach_beyond_its_run_or_write_html(tmp_path):
    run = make_run(tmp_path / "s" / "a", lesions=60, resamples=10, notebook=False)
    make_explanation(run)
    other = make_run(tmp_path / "s" / "b", lesions=60, resamples=10, notebook=False)
    make_explanation(other)
    bad = "<img src=x onerror=alert(1)>"
    row = {
        "image_id": bad, "y_true": bad, "predicted": '"><script>alert(1)</script>',
        "confidence": 0.5, "group": bad, "file": "gallery/0_image.jpg", "map": "gallery/0_map.jpg",
    }  # fmt: skip
    rows = [
        row,
        row | {"file": "../b/gallery/0_image.jpg"},
        row | {"file": str(other / "gallery" / "0_image.jpg")},
        row | {"file": "run.json"},
        row | {"file": "gallery/absent.jpg"},
    ]
    hostile = {"kind": bad, "n": 0, "refused": 0}
    make_explanation(
        run, gallery=rows, foreign=[hostile], layers={bad: bad}, method=bad, split=bad
    )
    build_report(tmp_path / "s")
    page = Page(run / "report.html")
    assert page.text.count("data:image/") == 2
    for path in (run / "report.html", tmp_path / "s" / "index.html"):
        assert not re.search(r"<img src=x|<script>alert", path.read_text())
        assert bad in Page(path).prose
    for file in (run / "gallery").iterdir():
        file.unlink()
    assert "not in the folder of this run" in Page(build_run_page(run)).prose


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(not BROWSER, reason="needs Chromium, which is not installed")
@pytest.mark.parametrize("name", ["index.html", "cnn/report.html", "demo.html", "study"])
def test_opens_in_a_browser_without_network(suite, study, tmp_path, name):
    if name == "study":
        suite, name = study, "index.html"
    if name == "demo.html":
        build_suite_page(suite, single_file=True)
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}", "--window-size=1400,9000",
        "--virtual-time-budget=20000", "--dump-dom", (suite / name).as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert "CONSOLE" not in done.stderr, done.stderr
    drawn = done.stdout.count('data-drawn="1"')
    assert drawn >= 4
    assert done.stdout.count('class="main-svg"') >= drawn
