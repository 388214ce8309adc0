"""A command's plan: what is done, what is repeated and why, what goes on, how long, and what will go wrong."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from fabricate import make_run, predictions_hash
from filelock import FileLock

from dermnb.core import ConfigError, make_config, read_json, write_json
from dermnb.data import images
from dermnb.data.synthetic import draw_lesion
from dermnb.nets import choose
from dermnb.runs import folders, plan, runner
from dermnb.runs.folders import (
    RUN_FILES,
    changed_since,
    data_key,
    dataset_files,
    finish_run,
    is_done,
    made_of,
    notebook_hash,
    recover,
    recover_all,
    training_key,
    validate_run,
    why_stale,
)
from dermnb.runs.plan import plan_suite, print_plan
from dermnb.runs.suites import SuiteFile, load_suite, resolve_suite

ROOT = Path(__file__).resolve().parent.parent


def make_done(folder, **values):
    "A whole run folder of a config, made of what is here now."
    values = {"suite": folder.parent.name, "run": folder.name, "bootstrap": 100} | values
    config = make_config(values)
    make_run(folder, lesions=60, resamples=100, notebook=False)
    record = read_json(folder / "run.json")
    record |= {"config": config.model_dump(exclude={"data_dir"}), "made_of": made_of(config)}
    if config.base:
        parent = folder.parent / config.base
        record["parents"] = {config.base: predictions_hash(parent)}
    write_json(folder / "run.json", record)
    write_json(folder / "model" / "labels.json", {"classes": record["classes"]})
    with zipfile.ZipFile(folder / "model" / "model.keras", "w") as archive:
        archive.writestr("model.weights.h5", "x" * 1000)
    return config


def change(folder, **keys):
    write_json(folder / "run.json", read_json(folder / "run.json") | keys)


def listed(folder):
    "Every file and folder below, with its time and size."
    stats = {p: p.stat() for p in sorted(Path(folder).rglob("*"))}
    return {str(p): (s.st_mtime_ns, s.st_size) for p, s in stats.items()}


@pytest.fixture
def data(tmp_path):
    "A small dataset of files that are no images; nobody looks into them here."
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "labels.csv").write_text("image_id,label\na,nevus\nb,melanoma\n")
    for i in range(40):
        (folder / f"image{i}.jpg").write_bytes(bytes(i))
    folders._DATA_KEYS.clear()
    plan._images_in.cache_clear()
    return folder


@pytest.fixture
def suite(tmp_path, data, monkeypatch):
    "Two runs and one that builds on the first; a plan of them, and the folder of the suite."
    monkeypatch.setenv("DERMNB_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr(plan, "_this_machine", lambda: ("Example CPU @ 2.5 GHz", 2, ()))
    monkeypatch.setattr(plan, "_matrix_speed", lambda: 30e9)
    common = {"dataset": "csv", "taxonomy": "isic8", "bootstrap": 100}
    runs = {"cnn": {}, "other": {"seed": 1}, "tuned": {"base": "cnn", "metadata": "concat"}}

    def planned(changes=None, **options):
        given = {name: common | run | (changes or {}).get(name, {}) for name, run in runs.items()}
        named = SuiteFile(name="s", title="S", question="?", runs=given)
        return plan_suite(
            resolve_suite(named, "cpu", data_dir=str(data)), tmp_path / "reports", **options
        )

    planned.folder = tmp_path / "reports" / "s"
    planned.make = lambda: [
        make_done(planned.folder / name, **common, **run, data_dir=str(data))
        for name, run in runs.items()
    ]
    return planned


def states(found):
    return dict(zip(found.runs["run"], found.runs["state"], strict=True))


def why(found):
    return dict(zip(found.runs["run"], found.runs["why"], strict=True))


def test_nothing_is_repeated_and_nothing_is_written(suite, tmp_path):
    suite.make()
    before = listed(tmp_path)
    found = suite()
    assert listed(tmp_path) == before
    assert set(states(found).values()) == {"done"} and found.todo == []
    assert (found.seconds, found.disk_mb, found.problems) == (0, 0, [])


def test_a_plan_of_new_runs_writes_nothing(suite, tmp_path):
    before = listed(tmp_path)
    found = suite(workers=2)
    assert listed(tmp_path) == before
    assert found.todo == ["cnn", "other", "tuned"]
    assert found.runs["after"].tolist() == ["", "", "cnn"]
    assert set(found.runs["state"]) == {"to do"} and found.problems == []
    assert (found.runs["seconds"] > 5).all() and found.disk_mb > 0


def test_each_changed_key_is_named(suite, data):
    suite.make()
    found = suite({"other": {"epochs": 20, "batch_size": 64}})
    assert states(found) == {"cnn": "done", "tuned": "done", "other": "repeated"}
    assert why(found)["other"] == "config: epochs 10 -> 20; config: batch_size 32 -> 64"
    # New results of a base: its child is repeated, whether they are here or to come.
    change(suite.folder / "cnn", config=read_json(suite.folder / "cnn/run.json")["config"] | {"seed": 7})
    found = suite()
    assert states(found) == {"other": "done", "cnn": "repeated", "tuned": "repeated"}
    assert why(found)["cnn"] == "config: seed 7 -> 0"
    assert why(found)["tuned"] == "cnn will have new results"
    shutil.rmtree(suite.folder)
    configs = suite.make()
    change(suite.folder / "tuned", parents={"cnn": "0" * 64})
    assert why_stale(suite.folder / "tuned", configs[2]) == ["base cnn has new results"]
    # Data: a table with other bytes, and a picture more.
    for file, content in (("labels.csv", "image_id,label\na,nevus\nb,melanomb\n"), ("new.jpg", "x")):
        (data / file).write_text(content)
        folders._DATA_KEYS.clear()
        assert why_stale(suite.folder / "other", configs[1]) == ["data changed"]
        assert not is_done(suite.folder / "other", configs[1])
        change(suite.folder / "other", made_of=made_of(configs[1]))
        assert is_done(suite.folder / "other", configs[1])


def test_a_second_plan_of_a_process_looks_again(suite, data):
    suite.make()
    assert suite().todo == []
    (data / "new.jpg").touch()
    assert why(suite())["other"] == "data changed"
    shutil.rmtree(suite.folder)
    images = [data.rename(data.with_name("away")), data.mkdir()][0]
    assert any("as its images are not here" in note for note in suite().notes)
    data.rmdir()
    images.rename(data)
    assert suite().problems == [] and (suite().runs["seconds"] > 5).all()


def test_changed_weights_are_named(tmp_path, data):
    import h5py

    weights = tmp_path / "own.weights.h5"
    with h5py.File(weights, "w") as file:
        file["a"] = [1, 2]
    folder = tmp_path / "reports" / "s" / "cnn"
    config = make_done(folder, dataset="csv", data_dir=str(data), weights=str(weights))
    assert len(made_of(config)["weights"]) == 64 and is_done(folder, config)
    with h5py.File(weights, "w") as file:
        file["a"] = [1, 3, 4]
    assert why_stale(folder, config) == ["weights changed"]
    weights.unlink()  # what is not here any more counts as unchanged
    assert is_done(folder, config)


def test_library_and_notebook_are_only_noted(suite):
    configs = suite.make()
    record = read_json(suite.folder / "other" / "run.json")["made_of"]
    older = record | {"library": "a" * 64, "notebook": "b" * 64}
    change(suite.folder / "other", made_of=older)
    assert is_done(suite.folder / "other", configs[1])
    assert changed_since(suite.folder / "other", configs[1]) == [
        "library changed since",
        "notebook changed since",
    ]
    found = suite()
    assert states(found)["other"] == "done"
    assert why(found)["other"] == "library changed since; notebook changed since"
    found = suite(force=True)
    assert set(states(found).values()) == {"repeated"} and why(found)["cnn"] == "--force"


def test_records_of_before_count_as_unchanged(suite, data):
    configs = suite.make()
    record = read_json(suite.folder / "other" / "run.json")
    del record["made_of"]
    write_json(suite.folder / "other" / "run.json", record)
    (data / "labels.csv").write_text("")
    folders._DATA_KEYS.clear()
    assert is_done(suite.folder / "other", configs[1])
    assert changed_since(suite.folder / "other", configs[1]) == []


def test_a_notebook_is_known_by_its_code(tmp_path):
    def write(name, *sources):
        cells = [{"cell_type": kind, "source": [text]} for kind, text in sources]
        return write_json(tmp_path / name, {"cells": cells})

    a = notebook_hash(write("a", ("markdown", "text"), ("code", "x = 1")))
    assert a == notebook_hash(write("b", ("markdown", "other text"), ("code", "x = 1")))
    assert a != notebook_hash(write("c", ("markdown", "text"), ("code", "x = 2")))


def test_results_within_the_data_folder_are_no_data(data, monkeypatch):
    key = data_key("csv", str(data))
    (data / ".hidden").write_text("x")
    write_json(data / "reports" / "s" / "suite.json", {})
    write_json(data / "reports" / "s" / "a" / "run.json", {})
    (data / "decoded").mkdir()
    (data / "decoded" / "images.npy").write_text("x")
    monkeypatch.setenv("DERMNB_CACHE", str(data / "decoded"))
    with suppress(OSError):  # a link that leads up
        (data / "loop").symlink_to(data)
    folders._DATA_KEYS.clear()
    assert data_key("csv", str(data)) == key


def test_numbers_are_one_text_wherever_a_config_is_from():
    a, b = ({"warmup_epochs": n, "learning_rate": 1} for n in (0, 0.0))
    assert training_key(make_config(a)) == training_key(make_config(b))
    assert training_key(make_config({})) == training_key(make_config(make_config({}).model_dump()))


def test_a_data_key_of_many_files_takes_a_moment(tmp_path):
    import time

    (tmp_path / "many").mkdir()
    for i in range(10_000):
        (tmp_path / "many" / f"{i}.jpg").touch()
    start = time.process_time()
    assert len(data_key("folders", str(tmp_path / "many"))) == 64
    assert time.process_time() - start < 0.5  # of a slow core; 0.1 as a rule
    assert len(dataset_files(tmp_path / "many")) == 10_000


# Unfinished runs


def unfinished(folder, config, epoch=4, **state):
    part = folder / f".part-{config.run}"
    part.mkdir(parents=True)
    about = json.dumps({"key": training_key(config), "epoch": epoch})
    np.savez(part / "checkpoint.npz", about=np.array(about), w=np.zeros((64, 64)))
    write_json(part / "state.json", {"run": config.run, "status": "stopped"} | state)
    return part


def config_of(suite, data, run="cnn", **values):
    common = {"suite": "s", "run": run, "dataset": "csv", "taxonomy": "isic8", "bootstrap": 100}
    return make_config(common | {"data_dir": str(data)} | values)


def test_a_run_goes_on_from_its_checkpoint(suite, data):
    fresh = suite().runs.set_index("run")["seconds"]
    part = unfinished(suite.folder, config_of(suite, data))
    before = listed(suite.folder)
    found = suite()
    assert listed(suite.folder) == before
    assert states(found)["cnn"] == "goes on at epoch 5" and "cnn" in found.todo
    assert why(found)["cnn"] == "stopped before"
    assert found.runs.set_index("run")["seconds"]["cnn"] < fresh["cnn"]
    found = suite(force=True)
    assert states(found)["cnn"] == "to do" and why(found)["cnn"] == "--force; stopped before"
    assert found.runs.set_index("run")["seconds"]["cnn"] == fresh["cnn"]
    found = suite({"cnn": {"epochs": 30}})
    assert states(found)["cnn"] == "to do"
    assert "its checkpoint is not used: config changed since" in why(found)["cnn"]
    whole = (part / "checkpoint.npz").read_bytes()
    for broken in (whole[: len(whole) // 2], b"", os.urandom(3000)):
        (part / "checkpoint.npz").write_bytes(broken)
        assert why(suite())["cnn"] == "stopped before; its checkpoint cannot be read"


@pytest.mark.parametrize(
    "state, said",
    [
        ({"status": "failed", "error": "MemoryError: no room"}, "failed before: MemoryError: no room"),
        ({"status": "running"}, "interrupted before"),
    ],
)
def test_how_the_last_attempt_ended(suite, data, state, said):
    unfinished(suite.folder, config_of(suite, data), **state)
    assert why(suite())["cnn"] == said


def test_a_run_that_somebody_works_on(suite, data):
    unfinished(suite.folder, config_of(suite, data), status="running", host="far", pid=4711)
    lock = suite.folder / ".part-cnn.lock"
    lock.touch()
    assert states(suite())["cnn"] == "goes on at epoch 5"  # it is free
    with FileLock(lock):
        before = listed(suite.folder)
        found = suite()
        assert listed(suite.folder) == before
    assert states(found)["cnn"] == "worked on by 4711 on far"
    assert found.todo == ["other", "tuned"]


# Times


def test_times_are_those_of_earlier_runs(suite, tmp_path):
    other = tmp_path / "reports" / "earlier" / "a"
    make_run(other, train_s=100, epochs=10, lesions=60, resamples=100, notebook=False, image_size=96)
    record = read_json(other / "run.json")
    train = record["split"]["train"]["images"]
    found = suite().runs.set_index("run")
    expected = 100 / 10 / train * round(40 * 0.7) * 10  # 40 images, 10 epochs
    assert expected < found.loc["cnn", "seconds"] < expected + 15
    assert found.loc["cnn", "basis"] == ""
    half = suite({"cnn": {"image_size": 48}}).runs.set_index("run")
    assert half.loc["cnn", "basis"] == "rough"
    hardware = record["provenance"]["hardware"] | {"gpus": ["NVIDIA H100"]}
    change(other, provenance=record["provenance"] | {"hardware": hardware})
    assert suite().runs.set_index("run").loc["cnn", "basis"] == "as on NVIDIA H100"
    (other / "run.json").write_text("{")  # one that is broken tells nothing
    assert suite().runs.set_index("run").loc["cnn", "basis"].startswith("rough, by a matrix product")


def test_a_gpu_that_has_run_nothing_is_not_guessed(suite, monkeypatch):
    monkeypatch.setattr(plan, "_this_machine", lambda: ("CPU", 8, ("NVIDIA H100",)))
    found = suite()
    assert found.runs["seconds"].isna().all()
    assert any("never run on a GPU" in note for note in found.notes)
    out = io.StringIO()
    print_plan(found, out)
    assert "in a time that is not known" in out.getvalue()


def test_cores_are_shared_by_runs_at_a_time(suite):
    one, two = suite(), suite(workers=2)
    assert two.seconds >= one.seconds * 0.99
    assert any("2 runs at a time share this machine" in note for note in two.notes)
    assert one.seconds == pytest.approx(one.runs["seconds"].sum(), abs=0.5)


def test_the_generated_set_has_as_many_images_as_is_said():
    assert sum(draw_lesion(0, i).images for i in range(900)) == plan._DEMO_IMAGES


# Problems known beforehand


def problems(suite, changes=None, **options):
    return " ".join(suite(changes, **options).problems)


def test_data_that_are_not_here(suite, data):
    shutil.rmtree(data)
    named = SuiteFile(
        name="s",
        title="S",
        question="?",
        runs={
            "ham": {"dataset": "ham10000", "data_dir": str(data.parent)},
            "own": {"dataset": "folders"},
        },
    )
    (data.parent / "reports").mkdir()
    runs = resolve_suite(named, "cpu")
    for planned in runs:
        object.__setattr__(planned.config, "data_dir", str(data / planned.config.run))
    found = plan_suite(runs, data.parent / "reports")
    assert len(found.problems) == 2
    assert "no folder" in found.problems[0] and "`dermnb data fetch ham10000`" in " ".join(found.problems)
    assert "put one folder of images a class" in " ".join(found.problems)
    assert found.runs["seconds"].isna().all()


def test_weights_to_fetch_are_a_note_and_those_that_are_nowhere_a_problem(suite, tmp_path):
    changes = {"cnn": {"backbone": "xception", "weights": "imagenet"}, "tuned": {"backbone": "xception"}}
    found = suite(changes)
    assert found.problems == []
    (note,) = (n for n in found.notes if "ImageNet" in n)
    assert "Xception, about 83 MB" in note and "https://" in note
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "mobilenetv2.weights.h5").write_text("torn")
    changes = {"other": {"audit": "network"}}  # these weights are the audit's
    assert "mobilenetv2.weights.h5 is not a readable HDF5 file" in problems(suite, changes)


def test_what_is_kept_of_frozen_layers_is_said_and_counted(suite):
    freezes = {"schedule": "head_then_top", "weights": "imagenet", "backbone": "mobilenetv2", "epochs": 10}
    keeps, renews = freezes | {"views": 3}, freezes | {"augment": "light"}
    text = " ".join(suite({"other": keeps}).notes)
    assert "Frozen layers of other are computed once for 3 views of an image, and kept." in text
    text = " ".join(suite({"other": renews}).notes)
    assert "Frozen layers of other are computed in each epoch" in text and "views: V" in text

    def seconds(**changes):
        found = suite({"other": freezes | changes})
        return found.runs.set_index("run")["seconds"]["other"]

    assert seconds(augment="none") < 0.9 * seconds()
    make_done(suite.folder / "earlier", dataset="csv", taxonomy="isic8", **keeps)
    kept = {"views": 1, "rows": 40, "megabytes": 5000.0, "seconds": 300.0}
    change(suite.folder / "earlier", features=kept)
    found = suite({"other": keeps})
    assert "about 15,000 MB, at most DERMNB_FEATURES_MB of the cache" in " ".join(found.notes)
    assert found.disk_mb > 15_000 and seconds(views=3) > 900


def test_disks_and_folders(suite, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage)
    assert "is too small: the runs need about" in problems(suite)
    monkeypatch.undo()


def test_reports_that_cannot_be_written_to(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(plan.os, "access", lambda path, mode: False)
    assert "is not writable for you" in problems(suite)
    (tmp_path / "reports").touch()
    assert f"{tmp_path / 'reports'} is a file" in problems(suite)


def test_a_profile_for_a_gpu_that_is_not_here(suite, monkeypatch):
    assert "no GPU answers" in problems(suite, profile="gpu")
    monkeypatch.setattr(plan, "_this_machine", lambda: ("CPU", 8, ("NVIDIA H100",)))
    assert problems(suite, profile="gpu") == ""


def test_the_table_fits_and_is_plain_where_it_is_no_terminal(suite):
    suite.make()
    found = suite({"other": {"epochs": 20, "loss": "focal", "decay": "cosine", "batch_size": 64}})
    out = io.StringIO()
    print_plan(found, out)
    table = out.getvalue().split("1 run to execute")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert "\x1b" not in table and not set("─│┃") & set(table)
    assert "epochs 10 -> 20" in " ".join(table.split()) and "repeated" in table
    out = io.StringIO()
    print_plan(suite(), out)
    assert "Nothing is to be done." in out.getvalue()


def test_what_auto_will_be_is_said_once_it_is_known(suite, monkeypatch, tmp_path):
    monkeypatch.setenv("DERMNB_CACHE", str(tmp_path / "cache"))
    auto = {"batch_size": "auto", "precision": "auto"}
    given = {"cnn": auto, "tuned": auto}
    assert [n for n in suite(given).notes if "auto" in n] == [
        "cnn and tuned: what is auto of precision and batch size is measured when they begin."
    ]
    assert not (tmp_path / "cache").exists()
    config = make_config({**auto, "dataset": "csv", "taxonomy": "isic8"})
    seconds = {"float32": {32: 0.002}, "mixed_bfloat16": {32: 0.001}}
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)
    choose.measured_choice(config, 28, lambda *options: seconds)
    said = suite(given).notes
    assert any(n.startswith("cnn: precision mixed_bfloat16 and batch_size 32 (ms") for n in said)
    assert any(n.startswith("tuned: what is auto") for n in said)  # it sees metadata too


def test_a_finished_run_that_was_asked_for_auto_is_done(suite, data):
    asked = make_done(suite.folder / "cnn", batch_size="auto", data_dir=str(data))
    record = read_json(suite.folder / "cnn" / "run.json")
    chosen = {"batch_size": {"asked": "auto", "value": 64}}
    assert record["config"] == asked.with_chosen(chosen).asked.model_dump(exclude={"data_dir"})
    assert not why_stale(suite.folder / "cnn", asked)


FRESH = """
import time
start = time.perf_counter()
import sys
from dermnb.runs.plan import plan_suite, print_plan
from dermnb.runs.suites import load_suite, resolve_suite
plan = plan_suite(resolve_suite(load_suite(sys.argv[1]), "cpu"), sys.argv[2], workers=2)
print_plan(plan)
print(len(plan.runs), time.process_time(), *({"keras", "tensorflow"} & set(sys.modules)))
"""


def in_a_fresh_process(tmp_path, suite):
    env = os.environ | {"DERMNB_DATA_DIR": str(tmp_path / "nodata")}
    command = [sys.executable, "-c", FRESH, str(suite), str(tmp_path / "reports")]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    number, seconds, *loaded = done.stdout.splitlines()[-1].split()
    assert loaded == []  # no framework
    return int(number), float(seconds)


def test_a_plan_of_the_demo_suite_takes_a_moment(tmp_path):
    # Time of the processor: others on the machine do not matter.
    number, seconds = in_a_fresh_process(tmp_path, "demo")
    assert number == 4 and seconds < 3


def test_a_plan_of_200_runs_takes_a_moment(tmp_path):
    runs = {f"r{i}": {"bootstrap": 100, "seed": i} for i in range(200)}
    content = {"title": "Many", "question": "?", "runs": runs}
    (tmp_path / "many.yaml").write_text(json.dumps(content))
    first = tmp_path / "reports" / "many" / "r0"
    make_done(first)
    for i in range(1, 150):
        shutil.copytree(first, first.with_name(f"r{i}"))
        config = read_json(first / "run.json")["config"] | {"run": f"r{i}", "seed": i}
        change(first.with_name(f"r{i}"), config=config)
    number, seconds = in_a_fresh_process(tmp_path, tmp_path / "many.yaml")
    assert number == 200 and seconds < 3


# Run folders


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_broken_file_is_one_sentence(tmp_path, name):
    config = make_done(tmp_path / "s" / "a")
    file = tmp_path / "s" / "a" / name
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for broken in (whole[: len(whole) // 2], b"", *(rng.bytes(len(whole)) for _ in range(5))):
        file.write_bytes(broken)
        with pytest.raises(ConfigError, match="is not a finished run"):
            validate_run(tmp_path / "s" / "a")
        assert not is_done(tmp_path / "s" / "a", config)
    file.write_bytes(b"[]")  # JSON, but not what belongs there
    if name in ("run.json", "metrics.json"):
        with pytest.raises(ConfigError, match="lacks what belongs there"):
            validate_run(tmp_path / "s" / "a")
    file.write_bytes(whole)
    assert is_done(tmp_path / "s" / "a", config)


@pytest.mark.parametrize("name", [n for n in RUN_FILES if not n.endswith("csv")])
def test_a_quick_look_sees_what_is_cut(tmp_path, name):
    make_done(tmp_path / "s" / "a")
    file = tmp_path / "s" / "a" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ConfigError, match="is not a finished run"):
        validate_run(tmp_path / "s" / "a", quick=True)


class Killed(BaseException):
    "Nothing catches it, as nothing catches a kill."


@pytest.mark.parametrize("step", range(12))
def test_a_kill_at_any_step_of_a_replacement_leaves_whole_results(tmp_path, monkeypatch, step):
    folder, part = tmp_path / "s" / "a", tmp_path / "s" / ".part-a"
    make_done(folder)
    make_done(part, run="a")
    change(folder, about="old")
    change(part, about="new")
    left = [step]

    def dying(function):
        "Before each call of what changes the disk."

        def call(*args, **more):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return function(*args, **more)

        return call

    with monkeypatch.context() as patch, suppress(Killed):
        patch.setattr(folders.os, "replace", dying(os.replace))
        patch.setattr(folders.os, "unlink", dying(os.unlink))  # within rmtree
        patch.setattr(folders.os, "rmdir", dying(os.rmdir))
        finish_run(part, folder)
    recover_all(folder.parent)
    record = validate_run(folder)
    assert record["about"] == ("old" if step < 2 else "new")
    assert not list(folder.parent.glob(".previous-*"))
    if record["about"] == "old":
        assert validate_run(part)["about"] == "new"
        assert validate_run(finish_run(part, folder))["about"] == "new"


def test_a_plan_knows_results_that_lie_aside(suite):
    suite.make()
    os.replace(suite.folder / "cnn", suite.folder / ".previous-cnn")
    assert states(suite())["cnn"] == "done"
    with FileLock(suite.folder / ".part-cnn.lock"):
        recover_all(suite.folder)  # somebody else works on it
        assert not (suite.folder / "cnn").exists()
        recover(suite.folder / "cnn")
    assert states(suite()) == {"cnn": "done", "other": "done", "tuned": "done"}


def test_a_disk_that_fails_between_the_renames_costs_no_results(tmp_path, monkeypatch):
    folder, part = tmp_path / "s" / "a", tmp_path / "s" / ".part-a"
    make_done(folder)
    make_done(part, run="a")
    real = os.replace

    def failing(old, new):
        if Path(old) == part:
            raise OSError(5, "Input/output error")
        real(old, new)

    monkeypatch.setattr(folders.os, "replace", failing)
    with pytest.raises(OSError, match="Input/output"):
        finish_run(part, folder)
    validate_run(folder)
    validate_run(part)
    assert not list(folder.parent.glob(".previous-*"))


def test_what_the_framework_lacks_is_a_problem_of_the_plan(tmp_path, monkeypatch):
    planned = resolve_suite(load_suite("demo"), "cpu", {"augment": "dermoscopy"})
    monkeypatch.setitem(sys.modules, "keras_cv", None)  # hidden, as if it were not installed
    found = plan_suite(planned, tmp_path).problems
    assert len(found) == 1 and "needs keras-cv" in found[0] and "use 'light'" in found[0]
    with pytest.raises(ConfigError, match="needs keras-cv"):  # also before a kernel is started
        runner.run_suite("demo", profile="cpu", overrides={"augment": "dermoscopy"}, reports=tmp_path)
    monkeypatch.setattr(images, "backend", lambda: "jax")
    assert plan_suite(planned, tmp_path).problems == []
