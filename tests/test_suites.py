"""Suites around their runs: where notebooks are found, which Python runs them, what is kept when a run fails."""

import html
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from fabricate import make_run
from nbformat.v4 import new_code_cell, new_notebook

from dermnb import cli
from dermnb.core import ConfigError, make_config, read_json
from dermnb.report.build import build_report
from dermnb.runs import kernels, runner, suites
from dermnb.runs.kernels import execute_run, experiment_notebook
from dermnb.runs.runner import run_suite


def text_of(page: Path) -> str:
    text = re.sub(r"<(script|style).*?</\1>", "", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text)))


@pytest.fixture
def suite(tmp_path, monkeypatch):
    "A suite of two runs and an executor that fabricates results, or fails the runs it is told to."
    file = tmp_path / "two.yaml"
    content = {
        "title": "Two",
        "question": "Which?",
        "runs": {"small": {}, "large": {"seed": 1}},
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    failing = {}

    def execute(runs, watch):
        for planned in runs.order:
            run = planned.config.run
            if run in failing:
                yield {
                    "run": run,
                    "status": "failed",
                    "error": failing[run],
                    "seconds": 1,
                }
                continue
            folder = Path(runs.reports) / planned.config.suite / run
            shutil.rmtree(folder, ignore_errors=True)
            make_run(folder, lesions=60, notebook=False)
            record = read_json(folder / "run.json") | {
                "config": planned.config.model_dump()
            }
            (folder / "run.json").write_text(json.dumps(record))
            yield {"run": run, "status": "done", "error": "", "seconds": 1}

    monkeypatch.setattr(runner, "_execute_all", execute)
    monkeypatch.setattr(
        runner, "validate_run", lambda folder, quick=False: read_json(folder / "run.json")
    )
    monkeypatch.setattr(
        "dermnb.runs.folders.validate_run", lambda folder, quick=False: read_json(folder / "run.json")
    )

    def run(**options):
        return run_suite(
            file, reports=tmp_path / "reports", profile="cpu", say=str, build=build_report, **options
        )

    return run, failing


def test_good_results_stay_where_a_repetition_fails(suite):
    run, failing = suite
    page, _ = run()
    assert "2 of 2 runs finished" in text_of(page) and "Earlier results" not in text_of(
        page
    )
    failing.update(small="MemoryError: no room", large="MemoryError: no room")
    _, states = run(overrides={"epochs": 3})
    assert [state["status"] for state in states] == ["failed", "failed"]
    told = text_of(page)
    assert "2 of 2 runs finished" in told
    assert re.search(
        r"Earlier results: a repetition with other settings failed on \d{4}-\d\d-\d\d "
        r"\(MemoryError: no room\)\.",
        told,
    )
    del failing["small"]
    run(overrides={"epochs": 3})  # one of the two succeeds
    notes = {
        r["run"]: r["note"] for r in read_json(page.with_name("suite.json"))["runs"]
    }
    assert notes["small"] == "" and "with other settings failed" in notes["large"]
    assert "large : Earlier results" in text_of(page)
    run(force=True)  # as at first, and one of the two fails again
    notes = {
        r["run"]: r["note"] for r in read_json(page.with_name("suite.json"))["runs"]
    }
    assert notes["small"] == "" and notes["large"].startswith(
        "Earlier results: a repetition failed"
    )
    failing.clear()
    run(force=True)
    assert "Earlier results" not in text_of(page)


def test_failures_are_shown_where_nothing_was_before(suite):
    run, failing = suite
    failing.update(small="MemoryError: no room", large="MemoryError: no room")
    page, _ = run()
    assert "None of the 2 runs has results yet" in text_of(page)
    assert "failed: MemoryError: no room" in text_of(page)
    assert {r["status"] for r in read_json(page.with_name("suite.json"))["runs"]} == {
        "failed"
    }


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    "Makes `execute_run` execute a notebook of the one given cell, in a folder with a foreign kernel."
    monkeypatch.chdir(tmp_path)
    foreign = tmp_path / "jupyter/kernels/python3"
    foreign.mkdir(parents=True)
    spec = {
        "argv": ["/no/python", "-f", "{connection_file}"],
        "display_name": "Another",
        "language": "python",
    }
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    for name in ("DERMNB_PROGRESS", "DERMNB_DATA_DIR"):
        monkeypatch.setenv(name, "")  # taken back after the test
    file = tmp_path / "cell.ipynb"
    monkeypatch.setattr(kernels, "experiment_notebook", lambda config: file)

    def execute(cell):
        kernel = {
            "kernelspec": {
                "name": "python3",
                "display_name": "Python 3",
                "language": "python",
            }
        }
        nbformat.write(new_notebook(cells=[new_code_cell(cell)], metadata=kernel), file)
        return execute_run(make_config({"suite": "s", "run": "a"}), "reports", {})[
            "error"
        ]

    return execute


def test_runs_are_executed_by_this_python(notebook):
    assert (
        notebook("import sys; raise ValueError(sys.executable)")
        == f"ValueError: {sys.executable}"
    )


def test_a_dead_kernel_is_told_with_its_last_words(notebook):
    error = notebook(
        "import os; os.write(2, b'W0000 greeting\\nno room left\\n\\n'); os._exit(1)"
    )
    said = "The kernel died; its last words: no room left (see reports/s/.part-a/log.txt)."
    assert error == said
    log = Path("reports/s/.part-a/log.txt").read_text()
    assert "no room left" in log and "attempt 2" in log  # it was started once more
    state = read_json("reports/s/.part-a/state.json")
    assert (state["status"], state["error"], state["attempt"]) == ("failed", said, 2)
    assert not Path("reports/s/.part-a.lock").exists()


def test_notebooks_are_found_outside_of_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for parent, name in (
        ({}, "train"),
        ({"base": "b"}, "transfer"),
        ({"members": ["b", "c"]}, "ensemble"),
    ):
        path = experiment_notebook(make_config(parent))
        assert path.is_file() and path.name == f"{name}.ipynb"
    assert suites.load_suite("demo").title
    monkeypatch.setattr("dermnb.__file__", str(tmp_path / "dermnb/__init__.py"))
    with pytest.raises(ConfigError, match="there are no experiment notebooks in "):
        suites.notebooks_dir()


@pytest.mark.parametrize("reports", ["reports", "reports/two"])
def test_a_file_in_the_place_of_the_reports_is_one_sentence(
    reports, suite, tmp_path, monkeypatch, capsys
):
    path = tmp_path / reports
    path.parent.mkdir(exist_ok=True)
    path.touch()
    command = ["dermnb", "run", str(tmp_path / "two.yaml"), "--profile", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "--reports", str(tmp_path / "reports")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(said.splitlines()) == 1
    assert f"{tmp_path / 'reports/two'} cannot be written to" in said


def test_a_run_that_cannot_write_fails_in_a_sentence(notebook, tmp_path):
    Path("reports").mkdir()
    Path("reports/s").touch()
    assert notebook("") == f"reports{os.sep}s: File exists"


def test_an_ensemble_knows_where_its_images_are(tmp_path):
    plan = suites.resolve_suite(suites.load_suite("cnn_ensemble"), "cpu", data_dir=str(tmp_path))
    assert any(p.config.members and p.config.explain for p in plan)
    assert {p.config.data_dir for p in plan} == {str(tmp_path)}


def test_a_run_compared_with_itself(tmp_path):
    (tmp_path / "s.yaml").write_text("{title: t, question: q, runs: {a: }, compare: [[a, a]]}")
    with pytest.raises(ConfigError, match="'a' with itself"):
        suites.load_suite(tmp_path / "s.yaml")


@pytest.mark.parametrize("path", sorted((suites.notebooks_dir() / "suites").glob("*.yaml")), ids=lambda p: p.stem)
def test_published_suites_say_what_their_files_say_of_answer_and_references(path):
    suite = suites.load_suite(path)
    assert suite.answer in suites.ANSWERS
    published = suites.notebooks_dir().parent / "reports" / path.stem / "suite.json"
    if not published.is_file():
        pytest.skip("this suite has not been published")
    record = read_json(published)
    assert record["answer"] == suite.answer
    plan = suites.resolve_suite(suite, record["profile"])
    references = {p.config.run for p in plan if p.reference}
    assert {run["run"] for run in record["runs"] if run["reference"]} == references


def test_a_reference_is_said_once_and_repeated_with_its_run(tmp_path):
    file = tmp_path / "s.yaml"
    text = "{title: t, question: q, runs: {a: {reference: true}, b: }, profiles: {cpu: {}}}"
    file.write_text(text)
    plan = suites.resolve_suite(suites.load_suite(file), "cpu", repeats={"seeds": 2})
    assert [(p.config.run, p.reference) for p in plan] == [
        ("a-seed0", True),
        ("a-seed1", True),
        ("b-seed0", False),
        ("b-seed1", False),
    ]
    file.write_text(text.replace("cpu: {}", "cpu: {runs: {a: {reference: false}}}"))
    with pytest.raises(ConfigError, match="run 'a': say reference once"):
        suites.resolve_suite(suites.load_suite(file), "cpu")
    file.write_text(text.replace("reference: true", "reference: 1"))
    with pytest.raises(ConfigError, match="'1' is neither true nor false"):
        suites.resolve_suite(suites.load_suite(file), "cpu")
    file.write_text(text.replace("{title", "{answer: ensembel, title"))
    with pytest.raises(ConfigError, match="did you mean 'ensemble'"):
        suites.load_suite(file)


def test_each_worker_has_a_gpu_and_its_share_of_the_cores(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho 'GPU 1: A (UUID: y)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runner._gpus() == ["0", "1"]
    plan = suites.resolve_suite(suites.load_suite("demo"), "cpu")
    for workers, cards in ((0, ["0", "1"]), (1, ["0"]), (3, ["0", "1", "0"])):
        runs = runner._Runs(plan, len(plan), str(tmp_path), workers)
        with runner._cluster(runs, "x") as (client, slots):
            assert len(client.nthreads()) == len(slots)
        assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == cards
        threads = str(max(1, os.cpu_count() // len(slots)))
        assert {slot["TF_NUM_INTRAOP_THREADS"] for slot in slots} == {threads}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # one of another's machine
    assert runner._gpus() == ["3"]


def test_without_dask_and_nbconvert_runs_are_executed_and_pages_left_for_later(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "is_installed", lambda name: name not in ("distributed", "nbconvert"))
    ran, said = [], []

    def execute(config, *args):
        ran.append(config.run)
        if config.run == "cnn":
            raise MemoryError("no more")
        return {"run": config.run, "status": "done", "error": "", "seconds": 0}

    monkeypatch.setattr(runner, "execute_run", execute)
    folder, states = runner.run_suite(
        "demo", profile="cpu", reports=tmp_path, workers=2, say=said.append, build=lambda folder: 1 / 0
    )
    assert sorted(ran) == sorted(s["run"] for s in states) and len(ran) == 4
    errors = {s["run"]: s["error"] for s in states if s["status"] != "done"}
    assert errors == {"cnn": "MemoryError: no more"}
    assert any("nbconvert is not installed" in line and str(folder) in line for line in said)


@pytest.mark.parametrize("given", ["data", ""])
def test_workers_in_other_folders_are_told_where_the_data_lie(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DERMNB_DATA_DIR", raising=False)
    sent = []
    client = SimpleNamespace(submit=lambda run, config, *args, **options: sent.append(config))
    planned = suites.PlannedRun(make_config({"dataset": "ham10000", "data_dir": given}), "a")
    for scheduler in ("tcp://far:8786", ""):
        runs = runner._Runs([planned], 1, str(tmp_path), scheduler=scheduler)
        runner._submit(client, planned, runs, "", {})
    place = tmp_path / (given or "data/ham10000")
    assert [config.data_dir for config in sent] == [str(place), given]
