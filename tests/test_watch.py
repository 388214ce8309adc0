"""What a person sees of runs: a table, plain lines, and their state from another shell."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import time

import pytest
from filelock import FileLock
from rich.cells import cell_len
from rich.console import Console

from dermnb.core import ConfigError, now, write_json
from dermnb.runs import watch
from dermnb.runs.watch import Watch, show_status, suite_status

LONG = "xception_focal_image_split_with_metadata_and_augmentat-seed3"
WIDE = "皮膚病変の分類器と転移学習の比較のための実験の名前-seed11"
TRAINING = {
    "step": "training",
    "stage": "scratch",
    "epoch": 117,
    "epochs": 120,
    "done": 116.5,
    "total": 120,
    "loss": 12.3456,
    "best": 123.4567,
    "seconds_left": 45240,
    "memory_mb": 12345,
}


def report(suite, run, **progress):
    return write_json(suite / f".part-{run}/progress.json", progress)


def drawn(view, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(view)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_table_never_wraps(width):
    assert len(LONG) == 60
    runs = [LONG, WIDE, "a", LONG[:-1] + "4"]
    rows = [watch._row(run, "under way", TRAINING) for run in runs]
    rows[2]["stage"] = "a stage with a name as long as that of no other"
    view = watch._View(rows, below=["4 under way"])
    lines = drawn(view, width)
    assert max(map(cell_len, lines)) <= min(width, 100)
    assert len(lines) == 1 + 2 + len(runs) + 1, lines  # one line a run
    first, wide, _, fourth = lines[3:-1]
    assert first != fourth and first.startswith("xcep") and "-seed3" in first and "皮膚" in wide
    for text in ("117/120", "12.346", "123", "12.6 h", "12.1 GB", "training"):
        assert text in first, text


class Screen:
    "Keeps what it was given, as one of 24 lines."

    space = 19

    def __init__(self):
        self.views, self.lines = [], []
        self.draw, self.say = self.views.append, self.lines.append

    def close(self):
        self.closed = True


def test_two_hundred_runs_fit_the_terminal(tmp_path, monkeypatch):
    runs = [f"cnn-seed{i}" for i in range(200)]
    seen = Watch(tmp_path, runs, done=12, total=212, say=print)
    seen.screen = screen = Screen()
    asked, stamp = [], watch._Runs._stamp
    monkeypatch.setattr(watch._Runs, "_stamp", lambda self, r: asked.append(r) or stamp(self, r))
    for run in runs[:4]:
        seen.started(run)
        report(tmp_path, run, **TRAINING | {"seconds_left": 600})
    seen.look()
    assert set(asked) == set(runs[:4]) and len(asked) == 4, "runs that wait are not asked"
    lines = drawn(screen.views[-1])
    assert len(lines) <= 24 and max(map(cell_len, lines)) <= 80
    # 4 at a time, of about 10 minutes each.
    assert lines[-1] == "4 under way, 196 waiting, 12 done; about 8 h 20 min left in all"
    for run in runs[:30]:
        seen.finished({"run": run, "status": "done", "seconds": 60})
    seen.finished({"run": runs[30], "status": "failed", "error": "MemoryError: no", "seconds": 1})
    lines = drawn(screen.views[-1])
    assert len(lines) == 9 and "cnn-seed30 failed" in " ".join(lines[-2].split())
    assert lines[-1] == "169 waiting, 42 done, 1 failed; about 42 min left in all"
    assert screen.lines == [screen.lines[0]] and screen.lines[0].endswith(": MemoryError: no")
    for run in runs[31:80]:
        seen.started(run)
    seen.look()
    lines = drawn(screen.views[-1])
    assert len(lines) == 3 + 18 + 2 <= 24, "more are under way than there is space for"
    assert lines[-2] == "and 31 more runs" and lines[-1].startswith("49 under way, 120 waiting,")


def test_plain_lines(tmp_path):
    lines = []
    with Watch(tmp_path, ["a", "b"], done=1, total=3, say=lines.append) as seen:
        seen.say("report: there")
        seen.started("a")
        seen.look()
        report(tmp_path, "a", step="building network", done=0, total=0)
        seen.look()
        seen.look()
        report(tmp_path, "a", **TRAINING)
        seen.look()
        report(tmp_path, "a", **TRAINING | {"loss": 1})
        seen.look()  # within ten seconds, and in the same epoch
        report(tmp_path, "a", **TRAINING | {"epoch": 118, "loss": 1})
        seen.look()
        seen.shown["a"] = (*seen.shown["a"][:2], time.monotonic() - 11)
        seen.look()
        seen.finished({"run": "a", "status": "stopped", "error": "", "seconds": 200})
        seen.finished({"run": "b", "status": "done", "error": "", "seconds": 5})
    assert lines[:3] == [
        "report: there",
        "[2/3 a] building network",
        "[2/3 a] training, scratch, epoch 117/120, loss 12.346, best val loss 123, "
        "about 12 h 34 min left, 12.1 GB",
    ]
    assert "epoch 118/120, loss 1.000" in lines[3] and lines[4] == lines[3]
    assert re.fullmatch(r"\[2/3 a\] stopped in 3 min \(\d\.\d s in all; 1 to go\)", lines[5])
    assert re.fullmatch(r"\[3/3 b\] done in 5\.0 s \(\d\.\d s in all\)", lines[6])


def test_which_runs_are_under_way(tmp_path):
    report(tmp_path, "left", **TRAINING)  # by a run that was interrupted
    runs = watch._Runs(tmp_path, ["left", "elsewhere", "waits"])
    report(tmp_path, "elsewhere", step="decoding")
    report(tmp_path, "of another suite", step="decoding")
    runs.look()
    assert list(runs.rows) == ["elsewhere"]
    runs.begin("left")
    runs.look()
    assert runs.rows["left"]["epoch"] is None, "what it was before says nothing of now"
    report(tmp_path, "left", **TRAINING)
    (tmp_path / ".part-elsewhere/progress.json").unlink()  # it ended, we were not told how
    runs.look()
    assert runs.rows["left"]["epoch"] == 117 and set(runs.waiting) == {"waits", "elsewhere"}
    report(tmp_path, "left", step="evaluating")
    runs.look()
    assert "117/120" in drawn(watch._View(list(runs.rows.values())))[3], "its epochs stay"


def test_a_run_that_is_busy_waits_again(tmp_path):
    lines = []
    seen = Watch(tmp_path, ["a"], done=0, total=1, say=lines.append)
    seen.started("a")
    seen.finished({"run": "a", "status": "busy", "error": "", "seconds": 0})
    assert list(seen.runs.waiting) == ["a"] and not seen.ended and not lines
    seen.started("a")
    seen.finished({"run": "a", "status": "done", "error": "", "seconds": 1})
    assert len(lines) == 1 and not seen.runs.waiting


@pytest.mark.parametrize("broken", ['{"step": "tra', "", "[1]", "\udcff", '{"step": 1, "epoch": "x"}'])
def test_a_broken_file_is_skipped(broken, tmp_path):
    lines = []
    seen = Watch(tmp_path, ["a"], done=0, total=1, say=lines.append)
    file = report(tmp_path, "a", **TRAINING)
    seen.started("a")
    seen.look()
    file.write_bytes(broken.encode("utf-8", "surrogateescape"))
    seen.look()
    assert seen.runs.rows["a"]["step"] == ("1" if "epoch" in broken else "training")
    write_json(tmp_path / "suite.json", {"runs": [{"run": "a", "status": "missing"}]})
    (tmp_path / ".part-a/state.json").write_bytes(broken.encode("utf-8", "surrogateescape"))
    assert list(suite_status(tmp_path)["status"]) == ["interrupted"]


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from dermnb.core import write_json
from dermnb.runs.watch import Watch
with Watch(sys.argv[1], ["a", "b"], 0, 2) as seen:
    seen.started("a")
    seen.look()
    seen.say("report: file:///" + "x" * 100)
    seen.finished({"run": "a", "status": "failed", "error": "no room", "seconds": 1})
    seen.started("b")
    print("a line of a library")
    seen.look()
    signal.raise_signal(signal.SIGINT)
"""


def in_terminal(folder, **environment):
    "What a script writes to a terminal of 80 columns."
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"} | environment
    if not environment.get("JPY_PARENT_PID"):
        env.pop("JPY_PARENT_PID", None)
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, env=env) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                said += (part := os.read(ours, 4096))
            except OSError:  # the end, on Linux
                break
            if not part:
                break
        assert b"KeyboardInterrupt" in process.stderr.read()
    os.close(ours)
    return said.decode()


def test_a_terminal_is_left_clean(tmp_path):
    said = in_terminal(tmp_path)
    assert said.rindex("\x1b[?25h") > said.rindex("\x1b[?25l"), "the cursor is shown again"
    assert "file:///" + "x" * 100 in said, "an address is in one piece"
    last = said[said.rindex("a line of a library") :]
    assert "interrupted" in last and "1 interrupted, 1 failed" in last
    assert "\x1b[31mfailed" in said and "\x1b[31minterrupted" not in said
    plain = in_terminal(tmp_path, NO_COLOR="1")
    assert not re.search(r"\x1b\[[\d;]*3\dm", plain) and "failed" in plain


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"JPY_PARENT_PID": "1"}])
def test_plain_lines_where_nothing_can_be_drawn(environment, tmp_path):
    said = in_terminal(tmp_path, **environment)
    assert "\x1b" not in said and "[1/2 a] FAILED after 1.0 s (" in said


def test_a_notebook_shows_one_output_that_changes(tmp_path, monkeypatch):
    shown = []

    class Handle:
        update = shown.append

    monkeypatch.setattr("IPython.display.display", lambda view, **_: shown.append(view) or Handle)
    seen = Watch(tmp_path, ["a"], done=0, total=1, live=True)
    seen.screen = watch._Notebook()
    seen.started("a")
    report(tmp_path, "a", **TRAINING)
    address = "report: file:///" + "x" * 150
    seen.say(address)
    seen.say("a sentence " * 20)
    seen.look()
    seen.__exit__(KeyboardInterrupt)
    html = shown[-1]._repr_mimebundle_([], [])["text/html"]
    assert len(shown) == 4 and max(map(len, re.findall(r'a sentence .*', html))) <= 100
    assert "interrupted" in html and "117/120" in html and address in html


STATES = ("under way", "done", "waiting", "failed", "stopped", "interrupted", "anew", "of a parent")


@pytest.fixture
def suite(tmp_path):
    "A suite with a run in each state that its files can be in."
    folder = tmp_path / "reports" / "demo"
    ended = {"done": ("done", ""), "of a parent": ("failed", "It builds on failed, which failed.")}
    listed = [(run, *ended.get(run, ("missing", ""))) for run in STATES]
    runs = [{"run": run, "status": status, "error": error} for run, status, error in listed]
    write_json(folder / "suite.json", {"schema": 1, "runs": runs})
    marks = {"failed": "failed", "stopped": "stopped"}
    for run in ("under way", "failed", "stopped", "interrupted", "anew"):
        status = marks.get(run, "running")
        error = "MemoryError: no room." if run == "failed" else ""
        state = {"run": run, "status": status, "error": error, "started": now(), "pid": 77}
        write_json(folder / f".part-{run}/state.json", state | {"host": "gpu1"})
        report(folder, run, **TRAINING | {"when": time.time() - 240})
    for run in ("stopped", "interrupted"):
        (folder / f".part-{run}/checkpoint.npz").touch()
    (folder / ".part-interrupted.lock").touch()  # nobody holds it
    with FileLock(folder / ".part-under way.lock"):
        yield folder


def test_status_of_each_state(suite):
    lines = []
    table = show_status(suite, lines.append).set_index("run")
    expected = dict(zip(STATES, STATES, strict=True)) | {"anew": "interrupted"}
    assert dict(table["status"]) == expected | {"of a parent": "failed"}
    row = table.loc["under way"]
    assert (row["stage"], row["epoch"], row["host"], row["pid"]) == ("scratch", 117, "gpu1", 77)
    assert re.fullmatch(r"\d\.\d s so far, process 77 on gpu1, silent for 4 min", row["note"])
    assert table["note"]["failed"] == "MemoryError: no room."
    assert table["note"]["stopped"] == "the next dermnb run goes on at epoch 118"
    assert table["note"]["interrupted"] == "the next dermnb run goes on at epoch 117"
    assert table["note"]["anew"] == "the next dermnb run starts it anew"
    assert max(map(cell_len, lines)) <= 80
    counts = "1 under way, 2 interrupted, 1 waiting, 1 done, 1 stopped, 2 failed"
    assert lines[0] == f"demo: {counts}"
    assert "of a parent: It builds on failed, which failed." in lines


def test_an_interruption_repeats_the_epoch_that_it_was_in(suite):
    state = {"run": "stopped", "status": "stopped", "error": "Interrupted.", "started": now()}
    write_json(suite / ".part-stopped/state.json", state)
    note = suite_status(suite).set_index("run")["note"]["stopped"]
    assert note == "the next dermnb run goes on at epoch 117"


def test_a_run_that_ended_after_the_record_was_written(suite):
    write_json(suite / "waiting/run.json", {})
    assert suite_status(suite).set_index("run")["status"]["waiting"] == "done"


def test_status_of_all_suites(suite):
    runs = [{"run": f"r{i}", "status": "done" if i else "missing", "error": ""} for i in range(200)]
    write_json(suite.parent / "more/suite.json", {"runs": runs})
    lines = []
    table = show_status(suite.parent, lines.append)
    assert list(table["suite"].unique()) == ["demo", "more"] and len(table) == 208
    assert lines[-1] == "more: 1 waiting, 199 done", "of many runs only the others are listed"


def test_status_writes_nothing(suite):
    def files():
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in suite.parent.rglob("*")}

    before = files()
    show_status(suite, lambda line: None)
    show_status(suite.parent, lambda line: None)
    assert files() == before
    with FileLock(suite / ".part-interrupted.lock", blocking=False):
        pass  # it is free again


def test_a_lock_that_may_not_be_opened_is_believed(suite, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError

    monkeypatch.setattr("filelock.FileLock", refuse)
    status = suite_status(suite).set_index("run")["status"]
    assert status["interrupted"] == "under way" and status["anew"] == "interrupted"


@pytest.mark.parametrize("name", ["", "absent", "demo/.part-failed"])
def test_a_folder_that_is_no_suite(name, suite):
    folder = suite.parent.parent / "none" if not name else suite.parent / name
    with pytest.raises(ConfigError, match=r"neither the folder of a suite nor one of several"):
        show_status(folder)


def test_a_broken_record_is_named(suite):
    (suite / "suite.json").write_text(json.dumps({"runs": []})[:-1])
    with pytest.raises(ConfigError, match=r"suite\.json is not JSON"):
        suite_status(suite)


def test_a_step_without_epochs_has_a_status(tmp_path):
    part = tmp_path / "s" / ".part-a"
    part.mkdir(parents=True)
    (tmp_path / "s" / "suite.json").write_text('{"runs": [{"run": "a", "status": "missing"}]}')
    (part / "progress.json").write_text('{"step": "decoding", "done": 5, "total": 20, "when": 1}')
    (part / "state.json").write_text('{"run": "a", "status": "running", "pid": 1, "host": "h"}')
    lines = []
    show_status(tmp_path / "s", lines.append)
    assert "interrupted" in "\n".join(lines)
    with FileLock(tmp_path / "s" / ".part-a.lock"):
        show_status(tmp_path / "s", lines.append)
    assert "decoding 25 %" in "\n".join(lines)
