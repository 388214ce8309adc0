"""Runs recorded in MLflow and TensorBoard, read back by their own readers; trackers that fail."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from fabricate import make_ensemble, make_run

from dermnb.core import ConfigError, read_json, write_json
from dermnb.runs import trackers
from dermnb.runs.folders import runs_of
from dermnb.runs.results import load_run, load_suite_runs
from dermnb.runs.trackers import MLFLOW_FILES, check_trackers, figures_of, track_runs

RUNS = ["a", "b", "both"]


def needs(name):
    there = all(map(find_spec, trackers.TRACKERS[name].packages))
    return pytest.mark.skipif(not there, reason=f"pip install 'dermnb[{name}]'")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")  # of the reader in this process


def make_runs(folder):
    "Two networks, of which one leaks, and an ensemble of both."
    small = {"lesions": 80, "resamples": 20}
    make_run(folder / "a", 1.0, 0, **small)
    make_run(folder / "b", 2.0, 1, leaky=True, synthetic=False, classes={"x": "X", "y": "Y"},
             positive="y", notebook=False, **small)  # fmt: skip
    make_run(folder / "c", 1.2, 2, **small)
    make_ensemble(folder / "both", ["a", "c"], [1, 2], resamples=20)
    states = [{"run": name, "status": "done", "error": ""} for name in [*RUNS, "c"]]
    suite = {"suite": folder.name, "title": "T", "question": "Q?", "runs": states}
    write_json(folder / "suite.json", suite)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("made") / "my suite")


@pytest.fixture
def suite(made, tmp_path):
    "A suite of its own for each test that records."
    return shutil.copytree(made, tmp_path / "reports" / made.name)


@pytest.fixture(scope="module")
def recorded(made, tmp_path_factory):
    "A suite that both trackers have recorded, as far as they are here, and what they said."
    suite = tmp_path_factory.mktemp("recorded") / "reports" / made.name
    shutil.copytree(made, suite)
    names = [n for n, t in trackers.TRACKERS.items() if all(map(find_spec, t.packages))]
    heard = []
    assert track_runs(suite, RUNS, names, heard.append) == names
    return suite, dict(zip(names, heard, strict=True))


def track(suite, name, runs=RUNS):
    heard = []
    left = track_runs(suite, runs, [name], heard.append)
    return left, heard


def repeat(folder):
    "As a run is repeated: the same config at another time."
    record = read_json(folder / "run.json")
    record["provenance"]["finished"] = "2026-11-22T02:00:00+00:00"
    write_json(folder / "run.json", record)


def client_of(suite):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{suite.parent / 'mlflow.db'}")
    return client, client.get_experiment_by_name(suite.name).experiment_id


def children(client, experiment):
    found = client.search_runs([experiment], "tags.`dermnb.kind` = 'run'")
    return sorted(found, key=lambda r: (r.info.run_name, r.info.end_time))


def test_figures_are_those_of_the_files(made):
    figures = {(f.name, f.epoch): f.value for f in figures_of(load_run(made / "b"))}
    history = pd.read_csv(made / "b" / "history.csv").set_index("epoch").drop(columns="stage")
    for name, column in history.items():
        for epoch, value in column.items():
            assert figures.pop((name, epoch)) == value
    for split, scored in read_json(made / "b" / "metrics.json")["splits"].items():
        for name, part in {**scored["metrics"], **scored["binary"]["metrics"]}.items():
            for key, ending in (("value", ""), ("low", "_low"), ("high", "_high")):
                value = figures.pop((f"{split}/{name}{ending}", 10), None)
                assert value == part[key], (name, key)
    assert figures == {}


@needs("mlflow")
def test_mlflow_holds_the_runs_nested_in_their_suite(recorded):
    suite, said = recorded
    place = f"sqlite:///{suite.parent / 'mlflow.db'}"
    assert said["mlflow"] == f"mlflow: a, b and both recorded in {place}"
    client, experiment = client_of(suite)
    [parent] = client.search_runs([experiment], "tags.`dermnb.kind` = 'suite'")
    assert [f.path for f in client.list_artifacts(parent.info.run_id)] == ["suite.json"]
    found = children(client, experiment)
    assert [r.info.run_name for r in found] == RUNS
    for run in found:
        folder = suite / run.info.run_name
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"
        there = {name for name in MLFLOW_FILES if (folder / name).is_file()}
        assert {f.path for f in client.list_artifacts(run.info.run_id)} == there
        config = read_json(folder / "run.json")["config"]
        assert run.data.params["backbone"] == config["backbone"]
        assert set(run.data.params) == set(config)
        kept = client.download_artifacts(run.info.run_id, "metrics.json")
        assert read_json(kept) == read_json(folder / "metrics.json")
    told = [(r.data.tags["dermnb.synthetic"], r.data.tags["dermnb.leakage"]) for r in found]
    assert told == [("true", "false"), ("false", "true"), ("true", "false")]
    assert found[0].data.tags["mlflow.source.git.commit"] == "736125f9d0c1a2b3"
    score = read_json(suite / "b" / "metrics.json")["splits"]["test"]["metrics"]["accuracy"]
    for key, ending in (("value", ""), ("low", "_low"), ("high", "_high")):
        assert found[1].data.metrics[f"test/accuracy{ending}"] == score[key]


@needs("mlflow")
def test_mlflow_holds_each_epoch_at_its_time(recorded):
    suite, _ = recorded
    client, experiment = client_of(suite)
    run = children(client, experiment)[0]
    history = pd.read_csv(suite / "a" / "history.csv")
    for column in history.columns.drop(["epoch", "stage"]):
        points = client.get_metric_history(run.info.run_id, column)
        assert [p.step for p in points] == history["epoch"].tolist()
        assert [p.value for p in points] == history[column].tolist()
    spent = np.array([p.timestamp for p in points]) - run.info.start_time
    assert spent == pytest.approx(1000 * history["seconds"].cumsum(), abs=1)  # whole ms


@needs("mlflow")
def test_mlflow_holds_a_run_once_until_it_is_repeated(suite):
    def new():  # in this process, which has loaded MLflow already
        return trackers.TRACKERS["mlflow"].record(suite, ["a", "b"])[1]

    assert new() == ["a", "b"]
    client, experiment = client_of(suite)
    first = children(client, experiment)[0]
    client.update_run(first.info.run_id, status="RUNNING")  # as an interruption leaves it
    assert new() == ["a"]
    names = [(r.info.run_name, r.info.status) for r in children(client, experiment)]
    assert names == [("a", "FINISHED"), ("b", "FINISHED")]
    assert new() == []
    repeat(suite / "a")
    assert new() == ["a"]
    assert [r.info.run_name for r in children(client, experiment)] == ["a", "a", "b"]
    assert len(client.search_runs([experiment], "tags.`dermnb.kind` = 'suite'")) == 1


@needs("tensorboard")
def test_tensorboard_holds_epochs_metrics_and_config(recorded, monkeypatch):
    without = "tensorboard.compat.notf"  # its reader needs TensorFlow as little as its writer
    monkeypatch.setitem(sys.modules, without, ModuleType(without))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    suite, said = recorded
    place = suite.parent / ".tensorboard"
    assert said["tensorboard"] == f"tensorboard: a, b and both recorded in {place}"
    for name in RUNS:
        [file] = (place / suite.name / name).glob("*tfevents*")
        events = EventAccumulator(str(file)).Reload()
        kinds = {
            tag: events.SummaryMetadata(tag).plugin_data.plugin_name
            for tag in events.Tags()["tensors"]
        }
        figures = figures_of(load_run(suite / name))
        expected = {f.name: "scalars" for f in figures} | {"config": "text", "tags": "text"}
        assert kinds == expected
        for figure in figures:
            [found] = [e for e in events.Tensors(figure.name) if e.step == figure.epoch]
            assert make_ndarray(found.tensor_proto).item() == np.float32(figure.value)
            assert found.wall_time == pytest.approx(figure.when, abs=1e-3)
        text = make_ndarray(events.Tensors("config")[0].tensor_proto).item().decode()
        assert "| backbone | cnn |" in text


@needs("tensorboard")
def test_tensorboard_replaces_only_a_run_that_was_repeated(suite):
    def files():
        return {
            run: [p.name for p in (suite.parent / ".tensorboard" / suite.name / run).iterdir()]
            for run in ("a", "b")
        }

    track(suite, "tensorboard", ["a", "b"])
    before = files()
    assert track(suite, "tensorboard", ["a", "b"]) == (["tensorboard"], [])
    assert files() == before
    repeat(suite / "b")
    assert len(track(suite, "tensorboard", ["a", "b"])[1]) == 1
    after = files()
    assert after["a"] == before["a"] and after["b"] != before["b"]
    assert [len(after[run]) for run in after] == [2, 2]


def test_what_trackers_leave_is_no_run(recorded, made):
    def seen(folder):
        return [p.name for p in runs_of(folder)], [r.name for r in load_suite_runs(folder)[1]]

    suite, said = recorded
    assert sorted(p.name for p in suite.iterdir()) == sorted(p.name for p in made.iterdir())
    assert seen(suite) == seen(made)
    beside = {p.name for p in suite.parent.iterdir() if not p.name.startswith(".")}
    assert beside == {suite.name} | ({"mlflow.db"} if "mlflow" in said else set())


ALONE = """
import io, json, sys
asked, argv = [], sys.argv[1:]
sys.addaudithook(lambda event, args: asked.append(args[-1]) if event in (
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname") else None)
from dermnb.runs import trackers
early = {"mlflow", "tensorboard"} & set(sys.modules)
sys.stdin = io.StringIO(json.dumps(argv[:2] + [argv[2:]]))
trackers._record()
late = {"tensorflow", "keras"} & set(sys.modules)
print(json.dumps([sorted(early), asked, sorted(late)]))
"""


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs(n)) for n in trackers.TRACKERS])
def test_a_tracker_asks_nobody_and_loads_no_framework(recorded, suite, name):
    if name == "mlflow":  # an empty database takes seconds to make
        shutil.copy(recorded[0].parent / "mlflow.db", suite.parent)
    repeat(suite / "a")
    # Under pytest and on servers that test, MLflow tells nobody anything anyway.
    testing = {"CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST", "MLFLOW_DISABLE_TELEMETRY"}
    env = {k: v for k, v in os.environ.items() if k not in testing} | trackers._QUIET
    command = [sys.executable, "-c", ALONE, name, str(suite), "a"]
    ended = subprocess.run(command, capture_output=True, text=True, env=env)
    answer = ended.stdout.splitlines()
    assert answer[0].endswith('["a"]]'), ended
    assert answer[1] == "[[], [], []]"


@pytest.fixture
def silent_server():
    "Its address; it accepts and never answers."
    with socket.create_server(("127.0.0.1", 0)) as server:
        open_ones = []

        def accept():
            while True:
                try:
                    open_ones.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        for one in open_ones:
            one.close()


@needs("mlflow")
def test_a_server_that_does_not_answer_costs_one_line(suite, silent_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{silent_server}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    left, heard = track(suite, "mlflow", ["a"])
    assert left == [] and len(heard) == 1
    assert heard[0].startswith("mlflow: not recorded: ") and "\n" not in heard[0]
    assert "ReadTimeoutError" in heard[0] and "secret" not in heard[0]
    assert track_runs(suite, ["a", "b"], left, heard.append) == [] and len(heard) == 1


@needs("mlflow")
def test_a_tracker_that_hangs_is_ended(suite, silent_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{silent_server}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    monkeypatch.setattr(trackers, "PATIENCE", (3, 1))
    start = time.monotonic()
    assert track(suite, "mlflow", ["a"]) == (
        [],
        ["mlflow: not recorded: it did not end within 4 s."],
    )
    assert time.monotonic() - start < 30


@needs("tensorboard")
def test_a_run_without_results_costs_one_line(suite):
    left, heard = track(suite, "tensorboard", ["gone"])
    assert left == [] and len(heard) == 1
    assert heard[0].startswith("tensorboard: not recorded: ") and "run.json is absent" in heard[0]
    assert not (suite.parent / ".tensorboard").exists()


def test_a_process_that_dies_costs_one_line(suite, monkeypatch, tmp_path):
    dies = tmp_path / "python"
    dies.write_text("#!/bin/sh\necho loading >&2\necho no room left >&2\nexit 9\n")
    dies.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dies))
    said = "mlflow: not recorded: its process ended with 9: no room left"
    assert track(suite, "mlflow") == ([], [said])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    left, heard = track(suite, "mlflow")
    assert left == [] and len(heard) == 1


def test_nothing_done_starts_no_process(suite, monkeypatch):
    monkeypatch.setattr(sys, "executable", "absent")
    assert track(suite, "mlflow", []) == (["mlflow"], [])


def test_an_unknown_or_absent_tracker_is_said_before_anything_starts(monkeypatch):
    with pytest.raises(ConfigError, match="unknown tracker 'mlflw': did you mean 'mlflow'"):
        check_trackers(["mlflw"])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "alembic" else name)
    check_trackers(["tensorboard"])
    with pytest.raises(ConfigError) as error:
        check_trackers(["tensorboard", "mlflow"])
    assert str(error.value) == (
        "tracker mlflow: alembic not installed: pip install 'dermnb[mlflow]'."
    )
