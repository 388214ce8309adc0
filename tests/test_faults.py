"""Processes killed, folders full, files broken: what is kept, and whether the same command goes on.

All with `dermnb run` in processes of its own, on runs of 20 short epochs. The quick tests take
about five minutes on two cores; with DERMNB_FAULTS=long, also signals at random moments and what
takes long: five minutes more. The table of faults in nbs/faults.md is what these tests found when they were last run as

    DERMNB_FAULTS=long DERMNB_FAULTS_TABLE=nbs/faults.md pytest tests/test_faults.py
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest
from faults_project import BIN, EPOCHS, Command, Project, World, until
from warm_kernel import warm_kernels

from dermnb.core import write_json


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, tmpfs and /proc are Linux's")
long = pytest.mark.skipif(os.environ.get("DERMNB_FAULTS") != "long", reason="DERMNB_FAULTS=long")

ROWS: list[tuple[str, str, str]] = []  # fault, what was seen, what was kept


def row(fault: str, seen: str, kept: str) -> None:
    "Add a line to the table; only after all of it was checked."
    ROWS.append((fault, seen, kept))


def table() -> str:
    "The table in Markdown."
    lines = ["| Fault | What happens | What is kept |", "| --- | --- | --- |"]
    return "\n".join([*lines, *("| " + " | ".join(r) + " |" for r in ROWS)])


@pytest.fixture(scope="module", autouse=True)
def show_table(request):
    "Print the table at the end, and write it where it is asked for."
    yield
    if ROWS:
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"\n\n{table()}\n")
        if target := os.environ.get("DERMNB_FAULTS_TABLE"):
            Path(target).write_text(f"{INTRODUCTION}\n\n{table()}\n")


INTRODUCTION = """# Faults

What happens to a batch of runs when something goes wrong while it trains, and what is kept. `tests/test_faults.py`
does all of this to real processes, and wrote this table. After each fault: no folder counts as done that is not whole,
no process is left after five seconds (more on busy processors), the same command completes the suite, its predictions equal those of an
undisturbed run bit for bit, and nothing hidden is left."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from dermnb.data.synthetic import generate_demo

    folder = tmp_path_factory.mktemp("world")
    data = generate_demo(folder / "demo", lesions=40, seed=7, size=(32, 32))
    (folder / "warm").mkdir()
    with warm_kernels(folder / "warm") as env:
        yield World(data, Path(os.environ["DERMNB_CACHE"]), env)


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    "Predictions of a run that nothing happened to; two of them are the same."
    project = Project(tmp_path_factory.mktemp("reference") / "p", world, {"calm": {}, "again": {}})
    project.run()
    found = pd.read_parquet(project.of("calm") / "predictions.parquet")
    project.same("again", reference=found)
    assert project.went_on("calm") == [1]
    return found


@pytest.fixture
def project(world, tmp_path):
    "Makes a project of these runs; ends what a failed test leaves behind."
    made = []

    def make(*runs, **more) -> Project:
        made.append(Project(tmp_path / f"p{len(made)}", world, {run: {} for run in runs} | more))
        return made[-1]

    yield make
    for one in made:
        for process in one.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()


def sentences(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


# Kernels


KILL_AT = """
import os, signal
def epoch(number):
    if number in {epochs}: os.kill(os.getpid(), signal.SIGKILL)
"""
IN_A_CELL = {
    "leaves": "import sys\ndef begin(): sys.exit()",
    "vanishes": "import os\ndef begin(): os._exit(3)",
    "starves": "import numpy as np\ndef begin(): np.ones(1 << 46)",
    "loud": "def begin():\n    for i in range(100_000): print('line', i, 'of a hundred thousand')",
}


def test_kernels_that_die_and_cells_that_fail(project, reference):
    """What befalls one run spares the others; only a kernel that died is tried again, once.

    Nine runs of one suite, each with its own fault.
    """
    p = project("killed", "twice", *IN_A_CELL, "calm", nan={"learning_rate": 1e30}, child={"base": "twice"})
    for run, source in IN_A_CELL.items():
        p.fault(run, source)
    p.fault("twice", KILL_AT.format(epochs=(5, 8)))
    p.hold("killed", 10)
    command = p.start()
    p.wait_until_held("killed", 10, command)
    p.hold("killed")
    os.kill(p.kernel("killed"), signal.SIGKILL)
    command.end(1)
    p.check()
    ended = p.statuses()
    done = {run for run, state in ended.items() if state["status"] == "done"}
    assert done == {"killed", "loud", "calm"}, command.said()
    p.same(*done, reference=reference)
    assert "Traceback" not in command.err

    assert p.went_on("killed") == [1, 11] and p.starts("killed") == 2
    row("A kernel is killed (`kill -9`)", "tried again at once", "all finished epochs")
    assert p.epochs("twice") == [*range(1, 6), 6, 7, 8] and p.starts("twice") == 2
    assert "ernel died" in ended["twice"]["error"] and p.part("twice").is_dir()
    assert "epoch 8" in p.said("twice") or "epoch  8" in p.said("twice"), p.said("twice")
    assert ended["child"]["error"] == "It builds on twice, which failed."
    assert p.starts("leaves") == p.starts("starves") == p.starts("nan") == 1
    assert p.starts("vanishes") == 2 and "ernel died" in ended["vanishes"]["error"]
    assert "the notebook ended before its results" in ended["leaves"]["error"]
    assert "Unable to allocate" in ended["starves"]["error"]
    assert "nan" in ended["nan"]["error"].lower() or "finite" in ended["nan"]["error"], ended["nan"]
    notebook = p.of("loud") / "notebook.ipynb"
    assert notebook.stat().st_size < 8e6

    for run in (*IN_A_CELL, "twice"):
        p.fault(run)
    p.write({run: {} for run in (*ended, "loud") if run != "child"})
    again = p.run()
    assert "already done" in again.out
    p.same("twice", "leaves", "vanishes", "starves", "nan", reference=reference)
    assert p.went_on("twice") == [1, 6, 9] and p.starts("calm") == 1
    row("A kernel is killed twice", "the run fails with the reason, the others go on, exit 1",
        "all finished epochs: the next command goes on")
    row("`os._exit(3)` in a cell", "tried again at once, then the run fails, exit 1", "the other runs")
    row("`sys.exit()` in a cell", "the run fails at once, exit 1", "the other runs")
    row("Too much memory asked for in a cell", "the run fails at once, with numpy's sentence", "the other runs")
    row("The loss is not a number (learning rate 1e30)", "the run fails at once, with the epoch",
        "the other runs; nothing of it, as its configuration has to change")
    row("The base of a run fails", "the run is marked with the reason", "the other runs")
    row("A notebook prints 100,000 lines", "all goes on", "everything")


# The command


def _started(p: Project, epoch: int, *more, **options) -> Command:
    "A command of a project whose runs all wait, each after its checkpoint of this epoch."
    for run in p.runs:
        p.hold(run, epoch)
    command = p.start(*more, **options)
    for run in p.runs:
        p.wait_until_held(run, epoch, command)
    return command


def _let_go(p: Project) -> None:
    for run in p.runs:
        p.hold(run)


def test_interrupted_terminated_and_switched_off(project, reference):
    "One suite that is interrupted, terminated and switched off, and goes on each time."
    p = project("first", "second")
    command = _started(p, 3)
    command.send(signal.SIGINT)
    command.end(130, 8)
    p.check()
    said = sentences(command.err)
    assert len(said) == 1 and "Traceback" not in command.out + command.err, command.said()
    assert p.part("first").is_dir() and "the same command goes on" in said[0]
    row("Ctrl-C", "ends within seconds, one line: what is kept and how to go on; exit 130",
        "all finished epochs")

    command = _started(p, 7)
    command.send(signal.SIGTERM)
    command.end(143, 8)
    p.check()
    assert "Traceback" not in command.out + command.err, command.said()
    row("SIGTERM", "ends within seconds; exit 143", "all finished epochs")

    command = _started(p, 12)
    p.power_off(command)
    p.check()
    for run in ("first", "second"):  # what a checkpoint is that was being written
        whole = (p.part(run) / "checkpoint.npz").read_bytes()
        (p.part(run) / ".checkpoint-x1y2.npz").write_bytes(whole[: len(whole) // 2])
    (p.part("second") / "state.json").write_text("")
    # After a restart the number of a run's kernel may be another kernel's.
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "ipykernel"])
    write_json(p.part("first") / "state.json", p.state("first") | {"kernel": other.pid})
    _let_go(p)
    try:
        p.run()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
    p.same("first", "second", reference=reference)
    assert p.went_on("first") == p.went_on("second") == [1, 4, 8, 13]
    row("The machine is switched off, in the middle of a checkpoint", "nothing is said; the next command goes on",
        "all epochs whose checkpoint was finished")


def test_the_command_is_killed_and_checkpoints_are_broken(project, reference):
    "Its kernels, which here are as any other, end by themselves; broken checkpoints are said and not used."
    p = project("whole", "short", "noise", "flipped")
    command = _started(p, 3, "--workers", "4", cold=True)
    command.send(signal.SIGKILL)
    command.process.wait(5)
    p.check()
    file = {run: p.part(run) / "checkpoint.npz" for run in ("short", "noise", "flipped")}
    content = bytearray(file["short"].read_bytes())
    file["short"].write_bytes(content[: len(content) // 2])
    file["noise"].write_bytes(random.Random(1).randbytes(len(content)))
    content[len(content) // 2] ^= 1
    file["flipped"].write_bytes(content)
    _let_go(p)
    p.run("--workers", "4")
    assert p.went_on("whole") == [1, 4]
    for run in file:
        assert p.epochs(run).count(1) == 2 and max(p.epochs(run)) == EPOCHS
        assert "checkpoint" in p.said(run) and "not used" in p.said(run), (run, p.said(run))
    predictions = [pd.read_parquet(p.of(run) / "predictions.parquet") for run in ("whole", *file)]
    assert all(found.equals(predictions[0]) for found in predictions)
    row("The command is killed (`kill -9`)", "its kernels end by themselves within seconds", "all finished epochs")
    row("A checkpoint is cut, noise, or has one wrong bit", "its log says so, trained from the start",
        "nothing of that run; its result is the same")


@long
def test_the_time_is_up_three_times(project, reference):
    p = project("one", "two")
    for _ in range(3):
        command = p.start("--max-hours", f"{9 / 3600:.6f}", pause=1.5).end(3, 30)
        p.check()
        assert "Traceback" not in command.err
    assert {s["status"] for s in p.statuses().values()} <= {"stopped", "done"}
    p.run()
    p.same("one", "two", reference=reference)
    for run in ("one", "two"):
        assert len(p.epochs(run)) == EPOCHS, p.epochs(run)
        p.went_on(run)
    row("`--max-hours` is over, three times in a row", "stops at an epoch's end; exit 3", "every epoch")


def test_two_commands_in_one_folder(project, reference):
    "The second takes what is left and waits for the first; when that is killed it goes on with its runs."
    p = project("a", "b", "c")
    p.hold("a", 2)
    p.hold("b", 2)
    first = p.start()
    p.wait_until_held("a", 2, first)
    p.wait_until_held("b", 2, first)
    second = p.start()
    until(lambda: str(first.pid) in second.out + second.err, "word of who works there", 60, second)
    until(lambda: p.of("c").is_dir(), "results of c", 60, second)
    _let_go(p)
    first.end(0)
    second.end(0)
    p.check(clean=True)
    assert [p.starts(run) for run in "abc"] == [1, 1, 1]
    p.same("a", "b", "c", reference=reference)
    row("Two commands work in one folder", "the second says who works there, takes other runs and waits; exit 0",
        "everything; nothing is trained twice")


# Files


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    "A file system of its own in memory; skips where that is not allowed."
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
    if made.returncode:
        pytest.skip(f"no tmpfs: {made.stderr.decode().strip()}")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def test_a_disk_that_is_full_or_cannot_be_written_to(project, reference):
    p = project("a", "b")
    p.reports = p.folder / "disk"
    with small_disk(p.reports, "2m") as remount:
        remount("ro")
        command = p.start().end(2)
        assert len(sentences(command.err)) == 1 and "Traceback" not in command.err, command.said()
        row("The folder of reports cannot be written to", "one sentence before anything starts; exit 2", "—")
        remount("rw,size=200k")
        command = p.start().end()
        assert command.process.returncode in (1, 2) and "Traceback" not in command.err, command.said()
        assert "space" in command.err, command.said()
        p.check()
        remount("size=64m")
        p.run()
        p.same("a", "b", reference=reference)
        row("The disk is full", "the runs fail with the reason; exit 1",
            "with space again, the next command completes the suite")


@long
def test_broken_images_and_tables(project, world, reference, tmp_path):
    "Decoded images that are cut are decoded again; a table that is cut stops its runs with a sentence."
    cache, data = tmp_path / "cache", tmp_path / "cut"
    shutil.copytree(world.cache, cache)
    for file in cache.rglob("images.npy"):
        os.truncate(file, file.stat().st_size // 2)
    for file in cache.glob("fingerprints*"):
        os.truncate(file, file.stat().st_size // 2)
    shutil.copytree(world.data, data)
    table = data / "ISIC_2019_Training_GroundTruth.csv"
    os.truncate(table, table.stat().st_size // 2 + 3)
    p, env = project("good", cut={"data_dir": str(data)}), {"DERMNB_CACHE": str(cache)}
    p.start(env=env).end(1)
    p.check()
    ended = p.statuses()
    assert ended["cut"]["status"] == "failed" and len(ended["cut"]["error"]) < 400, ended["cut"]
    row("A table of the data is cut", "the run fails at once with a sentence", "the other runs")
    assert ended["good"]["status"] == "done", ended["good"]
    p.write({"good": {}, "cut": {}})
    p.run(env=env)
    p.same("good", "cut", reference=reference)
    row("Decoded images in the cache are cut", "decoded again", "everything")
    row("The cache's database of fingerprints is cut", "the images are compared anew", "everything")


# A cluster of our own


@pytest.fixture
def cluster(project, world):
    "Makes a dask scheduler and two workers, in processes of their own, that run a project's suite."
    started = []

    def make(p: Project):
        file = p.folder / "scheduler.json"
        dask = [BIN / "dask"]
        quiet = ["--no-dashboard", "--scheduler-file", file]
        scheduler = Command(p, [*dask, "scheduler", "--port", "0", *quiet], {})
        started.append(scheduler)
        until(file.is_file, "scheduler", 30, scheduler)
        threads = {"TF_NUM_INTRAOP_THREADS": str(max(1, os.cpu_count() // 2))}  # as in the reference
        env = world.warm | threads
        more = ["--nthreads", "1", "--no-nanny", "--local-directory", p.folder / "dask"]
        started.extend(Command(p, [*dask, "worker", *quiet, *more], env) for _ in range(2))
        return file, started

    yield make
    for process in started:
        if process.poll() is None:
            process.send(signal.SIGKILL)
            process.process.wait(5)


@long
def test_a_worker_and_a_scheduler_are_killed(project, cluster, reference):
    p = project("a", "b")
    file, (scheduler, *workers) = cluster(p)
    command = _started(p, 5, "--scheduler", str(file))
    p.hold("a", 10)
    struck = next(w for w in workers if w.pid == p.state("a")["pid"])
    kernel = p.kernel("a")
    struck.send(signal.SIGKILL)
    struck.process.wait(5)
    until(lambda: not psutil.pid_exists(kernel), "end of the kernel of a killed worker", 5)
    p.hold("b")
    p.wait_until_held("a", 10, command)
    row("A dask worker is killed", "its kernel ends, another worker goes on", "all finished epochs")
    scheduler.send(signal.SIGKILL)
    command.end(3, 60)
    assert "Traceback" not in command.err and "is gone" in command.err, command.said()
    p.hold("a")
    for worker in workers:
        if worker.poll() is None:
            worker.send(signal.SIGTERM)
            worker.end(seconds=30)
    p.check()
    p.run()
    p.same("a", "b", reference=reference)
    assert len(p.went_on("a")) in (2, 3)  # a run may have ended on its worker
    row("The dask scheduler is killed", "one sentence; exit 3; a worker may still end its run",
        "all finished epochs: the next command goes on")


# Any moment


@long
def test_a_command_takes_over_from_one_that_is_killed(project, reference):
    "What waits for a run goes on with it as soon as nobody works on it."
    p = project("a", "b")
    first = _started(p, 4)
    second = p.start()
    until(lambda: str(first.pid) in second.out + second.err, "word of who works there", 60, second)
    _let_go(p)
    first.send(signal.SIGKILL)
    second.end(0)
    p.check(clean=True)
    p.same("a", "b", reference=reference)
    assert len(p.went_on("a")) == len(p.went_on("b")) == 2
    row("The first of two commands is killed", "the second goes on with its runs; exit 0", "all finished epochs")


@long
def test_a_kernel_is_killed_when_all_is_trained(project, reference):
    p = project("a", "b")
    p.fault("a", KILL_AT.format(epochs=(EPOCHS,)))
    p.run()
    p.same("a", "b", reference=reference)
    assert p.starts("a") == 2 and p.went_on("a")[0] == 1
    row("A kernel is killed after its last epoch", "tried again at once, exit 0", "all epochs")


@long
@pytest.mark.timeout(1800)
def test_signals_at_random_moments(project, reference):
    "Interrupted, terminated or killed whenever: at last the suite is done, and the same."
    p, chance = project("a", "b"), random.Random(20)
    ends = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
    for number in range(20):
        command = p.start(pause=0.3)
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.process.wait(chance.uniform(1, 11))
        kind = (signal.SIGINT, signal.SIGTERM)[number % 2]
        command.send(kind)
        command.end(seconds=10)
        assert command.process.returncode in (ends[kind], -kind, 0), command.said()
        assert "Traceback" not in command.err, command.said()
        p.check()
    p.run()
    p.same("a", "b", reference=reference)
    for run in ("a", "b"):
        p.went_on(run)
    row("Ctrl-C or SIGTERM at twenty random moments", "ends within seconds each time", "all finished epochs")
