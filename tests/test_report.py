"""Pages of suites and runs: complete, escaped, offline, quick, and whole where much is absent."""

import re
import shutil
import subprocess
import sys
import time

import pytest
from fabricate import ISIC8, make_predictions, make_run, make_suite
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from pages import ReadPage

from dermnb.core import ConfigError, read_json, write_json
from dermnb.report import build
from dermnb.report.blocks import COUNT, Column, Text, table
from dermnb.report.build import SECTIONS, build_report, build_run_page, build_suite_page
from dermnb.report.pages import clean_html, notebook_html
from dermnb.report.sections import Section
from dermnb.runs.results import load_run, load_suite_runs


def test_a_suites_page_is_complete(demo_suite):
    page = ReadPage(demo_suite / "index.html")
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        else:
            assert (demo_suite / link).is_file(), link
    without = {"claims", "paired", "search", "leakage", "repeats", "ensembles", "readers", "official", "binary", "external"}  # the demo has none
    shown = [s.id for s in SECTIONS if "suite" in s.on and s.id not in without]
    assert [*page.parts] == shown
    assert all(f"#{part}" in page.links for part in shown)
    # What answers the question is open; whatever follows the classes is folded.
    assert page.folded == {s.id for s in SECTIONS if s.folded} & set(shown)
    assert not page.folded & {"answer", "leaderboard", "pairs", "classes"}
    assert "These figures come from generated images" in page.head
    assert "4 of 6 runs finished" in page.said("answer")
    board, runs = page.said("leaderboard"), page.said("runs")
    assert "densenet121 failed: ConfigError: densenet121.weights.h5 is no" in board
    assert "resnet50 missing: It has no results yet" in board
    assert "densenet121 failed" in runs and "resnet50 missing" in runs
    for name in ("cnn", "xception", "efficientnetb5", "efficientnetb7"):
        assert f"{name}/report.html" in page.links
    best = read_json(demo_suite / "efficientnetb5" / "metrics.json")["splits"]["test"]["metrics"]
    for part in ("answer", "leaderboard"):
        assert f"{best['balanced_accuracy']['value']:.3f}" in page.said(part)
    text = page.said("data")
    assert "Unknown cells sex 57 'unknown'" in text
    assert "Not used columns: dx_type of t.csv; files: 2 .heic" in text
    assert "5f0c3a9d2b7e4c61" in text and "736125f9d0c1a2b3" in page.said("provenance")
    assert page.headings.count(1) == 1
    check_figures_and_tables(page, 10)


def check_figures_and_tables(page, charts):
    "Each chart has a name, a style, and its numbers in a table; each table has a caption."
    notebook = page.parts.get("notebook", "")
    assert page.tags["caption"] + notebook.count("<table") == page.tags["table"]
    found = page.text.count("data-figure=")
    assert page.text.count('role="img" aria-label="') == found >= charts
    ids = re.findall(r'data-figure="([^"]+)"', page.text)
    assert len(ids) == len(set(ids))
    assert all(f'type="application/json" id="{id}"' in page.text for id in ids)
    # A number stands under the title of a column of numbers, and sorts as one.
    for text in re.findall("(?s)<table.*?</table>", page.text.replace(notebook, "")):
        heads = [' class="n"' in h for h in re.findall("<th scope=\"col\"[^>]*>", text)][1:]
        for row in re.findall("(?s)<tr><th scope=\"row\".*?</tr>", text):
            if "colspan" not in row:
                cells = [' class="n"' in c for c in re.findall("<td[^>]*>", row)]
                assert cells == heads, (text[:300], row)
    # A table of its own, or one in its section.
    for figure in re.findall(r"(?s)<figure>(.*?)</figure>", page.text):
        own = "<summary>Table behind this figure</summary>" in figure
        part = next(text for text in page.parts.values() if figure in text)
        assert own or "<table" in part.replace(figure, "") or "gallery" in part


def test_a_runs_page_is_complete(demo_suite):
    page = ReadPage(demo_suite / "xception" / "report.html")
    shown = [s.id for s in SECTIONS if "run" in s.on and s.id not in {"ensembles", "readers", "official", "binary", "external"}]
    assert [*page.parts] == [*shown, "notebook"] and not page.folded
    text = page.said("metrics")
    for split in load_run(demo_suite / "xception").splits.values():
        for metric in split["metrics"].values():
            assert f"{metric['value']:.3f}" in text
    assert "483 images, 300 lesions" in text and "200 bootstrap resamples of lesions" in text
    check_figures_and_tables(page, 8)


def test_pages_of_a_study_are_complete(study, demo_suite):
    page = ReadPage(study / "index.html")
    new = {"claims", "leakage", "repeats", "paired", "ensembles"}
    assert new <= set(page.parts) and {f"#{part}" for part in new} <= set(page.links)
    assert not new & page.folded
    assert "binary" not in page.parts  # eight classes
    assert not new & set(ReadPage(demo_suite / "index.html").parts)  # nothing to show there
    check_figures_and_tables(page, 12)
    assert (study / "index.html").stat().st_size < 1_000_000
    assert "ensembles" in ReadPage(study / "both" / "report.html").parts
    assert "ensembles" not in ReadPage(study / "cnn" / "report.html").parts


def test_a_new_section_is_one_row(tmp_path, monkeypatch):
    "Its title and what it computes and tells; both pages, their contents and folds follow."

    def sizes(page):
        return {r.name: r.reported["n"] for r in page.done} if len(page.done) != 1 or page.one else None

    def told(page, found):
        rows = [{"run": name, "n": n} for name, n in found.items()]
        return [Text("How many."), table(rows, {"run": "Run", "n": Column("n", COUNT)}, "Sizes.")]

    common = {"lesions": 60, "resamples": 10, "notebook": False}
    runs = [make_run(tmp_path / "s" / name, seed=i, **common) for i, name in enumerate("ab")]
    row = Section("sizes", "Sizes of the test split", sizes, told)
    only_run = Section("one", "Of a run", sizes, told, "run")
    first, *rest = build.SECTIONS
    monkeypatch.setattr(build, "SECTIONS", (first, row, only_run, *rest))
    page = ReadPage(build_report(tmp_path / "s"))
    n = [load_run(r).reported["n"] for r in runs]
    end = f"How many. Sizes. Run n a {n[0]} b {n[1]}"
    assert page.said("sizes") == f"Sizes of the test split {end}"
    assert [*page.parts][:2] == ["answer", "sizes"] and "sizes" in page.folded
    assert "#sizes" in page.links and "one" not in page.parts
    page = ReadPage(runs[0] / "report.html")
    assert page.said("sizes").endswith(f"How many. Sizes. Run n a {n[0]}")
    assert "sizes" not in page.folded and {"#sizes", "#one"} <= set(page.links)
    # What computes nothing is not there, nor in the contents.
    shutil.rmtree(runs[1])
    page = ReadPage(build_report(tmp_path / "s"))
    assert "sizes" not in page.parts and "#sizes" not in page.links


def test_pages_ask_the_network_for_nothing_and_are_small(demo_suite):
    pages = [demo_suite / "index.html", *demo_suite.glob("*/report.html")]
    assert len(pages) == 5
    for path in pages:
        page = ReadPage(path)
        scripts = {f for f in page.fetched if not f.startswith("data:")}
        above = "../" if path.name == "index.html" else "../../"
        assert scripts == {f"{above}plotly.min.js"}
        assert (path.parent / above / "plotly.min.js").is_file()
        assert path.stat().st_size < 1_000_000
        for url in re.findall(
            r"url\(|@import|mathjax|mermaid|require\.js|jquery", page.text, re.I
        ):
            pytest.fail(f"{path}: {url}")
    # All suites of a folder share one copy.
    assert not list(demo_suite.rglob("plotly*.js"))


def test_single_file_needs_no_other(demo_suite, study):
    page = build_suite_page(demo_suite, single_file=True)
    assert page.parent == demo_suite and page.name == "demo.html"
    text = page.read_text(encoding="utf-8")
    head = text[: text.index("<script>")] + text[text.index("</script>") :]
    assert not re.search(r'<script src|href="[^#d]', head)
    assert "single-file edition" in text
    assert page.stat().st_size < 6_000_000
    # It shows what the pages of runs would: all matrices, and the errors of the best run.
    page = ReadPage(page)
    assert page.parts["confusion"].count("data-figure=") == 4
    assert "most confident errors of efficientnetb5" in page.said("errors")
    assert "claims" in ReadPage(build_suite_page(study, single_file=True)).parts


def test_run_page_shows_the_notebook(demo_suite):
    page = ReadPage(demo_suite / "cnn" / "report.html")
    assert "../index.html" in page.links and "#notebook" not in page.links
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
        page = ReadPage(path)
        assert "data:image" not in page.text
        assert "generated images" not in page.prose
    run = ReadPage(folder / "cnn" / "report.html")
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
        page = ReadPage(path)
        assert not re.search(r"<script>alert|<img src=x|<b>", page.text)
        assert "{{ 7*7 }}" in page.text
    page = ReadPage(folder / "index.html")
    ids = re.findall(r'type="application/json" id="([^"]+)"', page.text)
    assert sorted(ids) == sorted(["figure-style", *re.findall('data-figure="([^"]+)"', page.text)])
    assert "../etc missing" in page.said("leaderboard") and not [x for x in page.links if ".." in x]
    assert "<script>alert(2)</script>" in page.prose  # shown as it was written


def test_the_page_grows_as_runs_end(tmp_path, monkeypatch):
    "It is there after the first run, says what is to come, and a fault in it stops no run."
    from dermnb.runs import runner

    page, said, seen = tmp_path / "r/two/index.html", [], []

    def execute(runs, watch):
        for i, run in enumerate(p.config.run for p in runs.order):
            make_run(tmp_path / "r/two" / run, seed=i, resamples=20)
            yield {"run": run, "status": "done", "error": "", "seconds": 1}
            seen.append(page.read_text() if page.is_file() else "")

    monkeypatch.setattr(runner, "_execute_all", execute)
    content = {"title": "t", "question": "q", "runs": {"a": {}, "b": {}, "c": {}}}
    write_json(tmp_path / "two.yaml", content)
    more = {"reports": tmp_path / "r", "say": said.append}
    runner.run_suite(tmp_path / "two.yaml", build=build_report, **more)
    assert any(page.as_uri() in line for line in said)
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
        return build_report(folder)

    assert runner.run_suite(tmp_path / "two.yaml", build=faulty, **more)[0] == page
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
    page = ReadPage(build_report(tmp_path / "a"))
    assert "The one run has no results yet" in page.said("answer")
    assert [*page.parts] == ["answer", "leaderboard", "limits", "runs"]
    assert "confusion" not in page.parts
    # One run, without suite.json, history, notebook and test split.
    table = make_predictions(list(ISIC8), 80)
    run = make_run(
        tmp_path / "b" / "only",
        predictions=table[table["split"] == "val"],
        notebook=False,
    )
    (run / "history.csv").unlink()
    page = ReadPage(build_report(tmp_path / "b"))
    assert "on the validation split" in page.said("answer")
    assert "holds no notebook" in ReadPage(run / "report.html").prose
    # Records that cannot be read count as failed.
    (run / "metrics.json").write_text("{}")
    _, runs = load_suite_runs(tmp_path / "b")
    assert [r.status for r in runs] == ["failed"] and "do not fit" in runs[0].error
    with pytest.raises(ConfigError, match="do not fit"):
        load_run(run)


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


def test_pages_are_built_again_when_what_they_are_made_of_changes(tmp_path):
    run = make_run(tmp_path / "s" / "a", lesions=60, resamples=10, notebook=False)
    page = build_run_page(run)
    first = page.stat().st_mtime_ns
    assert build_run_page(run).stat().st_mtime_ns == first
    assert build_run_page(run, force=True).stat().st_mtime_ns > first
    assert "Run of a suite" not in page.read_text() and "../index.html" not in ReadPage(page).links
    write_json(tmp_path / "s" / "suite.json", {"title": "S", "runs": [{"run": "a", "status": "done"}]})
    assert "../index.html" in ReadPage(build_run_page(run)).links
    record = read_json(run / "run.json")
    write_json(run / "run.json", record | {"model": {"backbone": "resnet50", "title": "ResNet50"}})
    assert "ResNet50 on" in ReadPage(build_run_page(run)).head


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(not BROWSER, reason="needs Chromium, which is not installed")
@pytest.mark.parametrize("name", ["index.html", "cnn/report.html", "demo.html", "study"])
def test_opens_in_a_browser_without_network(demo_suite, study, tmp_path, name):
    folder, name = (study, "index.html") if name == "study" else (demo_suite, name)
    if name == "demo.html":
        build_suite_page(demo_suite, single_file=True)
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}", "--window-size=1400,9000",
        "--virtual-time-budget=20000", "--dump-dom", (folder / name).as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert "CONSOLE" not in done.stderr, done.stderr
    page, drawn = ReadPage(folder / name), done.stdout.count('data-drawn="1"')
    # All that is not folded and near the screen; the rest when it comes near.
    shown = [text for part, text in page.parts.items() if part not in page.folded]
    assert 3 <= drawn <= sum(text.count("data-figure=") for text in shown)
    assert drawn >= 7 or page.folded
    assert done.stdout.count('class="main-svg"') >= drawn
