"""A project of its own for `test_faults.py`: its notebooks note what they do, its runs can be struck."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import yaml

from dermnb.core import ConfigError, read_json
from dermnb.runs.folders import validate_run

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
EPOCHS = 20
SMALL = {"image_size": 16, "epochs": EPOCHS, "bootstrap": 100, "batch_size": 16}
MARK = "FAULTS_PROJECT"  # in the environment of all processes that a command starts


def until(condition: Callable, what: str, seconds: float = 60, process=None):
    "What `condition` returns as soon as it is true; an error if it does not become so."
    end = time.monotonic() + patience(seconds)
    while not (found := condition()):
        ended = process is not None and process.poll() is not None
        if ended and not (found := condition()):
            raise AssertionError(f"it ended before {what}: {process.said()}")
        if found:
            return found
        if time.monotonic() > end:
            said = f": {process.said()}" if process is not None else ""
            raise AssertionError(f"no {what} within {seconds} s{said}")
        time.sleep(0.02)
    return found


def patience(seconds: float) -> float:
    "So many seconds, or more where other work fills the processors."
    return seconds * max(1, os.getloadavg()[0] / os.cpu_count())


class Command:
    "A process with what it says in two files; it can be struck, and waited for."

    def __init__(self, project: "Project", args: list, env: dict):
        project.commands += 1
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background jobs
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.files = [project.folder / f"{k}{project.commands}.txt" for k in ("out", "err")]
        with self.files[0].open("wb") as out, self.files[1].open("wb") as err:
            self.process = subprocess.Popen(
                list(map(str, args)),
                cwd=project.folder,
                env=os.environ | env | {MARK: str(project.folder)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.pid, self.poll, self.send = self.process.pid, self.process.poll, self.process.send_signal

    @property
    def out(self) -> str:
        return self.files[0].read_text(errors="replace")

    @property
    def err(self) -> str:
        return self.files[1].read_text(errors="replace")

    def said(self) -> str:
        return f"exit {self.poll()}\n{self.out[-3000:]}\n{self.err[-3000:]}"

    def end(self, code: int | None = None, seconds: float = 180) -> "Command":
        "Wait for it, and check how it ends."
        try:
            self.process.wait(patience(seconds))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds} s: {self.said()}") from None
        assert code is None or self.process.returncode == code, self.said()
        return self


@dataclass
class World:
    "What all projects share: data, decoded images, and the environment of kernels that start at once."

    data: Path
    cache: Path
    warm: dict[str, str]


class Project:
    "A folder with settings.ini, changed notebooks, one suite, and a command to run it."

    def __init__(self, folder: Path, world: World, runs: dict, **defaults):
        self.folder, self.world, self.commands = folder, world, 0
        self.faults = folder / "faults"
        self.faults.mkdir(parents=True)
        (folder / "settings.ini").write_text("[DEFAULT]\n")
        shutil.copytree(ROOT / "nbs" / "experiments", folder / "nbs" / "experiments")
        for name in ("train", "transfer"):
            _add_hook(folder / "nbs" / "experiments" / f"{name}.ipynb")
        self.reports = folder / "reports"
        self.write(runs, **defaults)

    def write(self, runs: dict, **defaults) -> None:
        "Write the suite file, anew."
        self.runs = list(runs)
        content = {"title": "Faults", "question": "What is kept?", "runs": runs}
        content["defaults"] = SMALL | {"data_dir": str(self.world.data)} | defaults
        (self.folder / "s.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def fault(self, run: str, source: str = "") -> None:
        "What a run does to itself, as Python with begin() or epoch(number); nothing: no fault."
        file = self.faults / f"{run}.py"
        file.write_text(source) if source else file.unlink(missing_ok=True)

    def hold(self, run: str, *epochs: int) -> None:
        "Have a run wait after these epochs, whose checkpoints are written; none: let it go on."
        new = self.faults / f"{run}.new"
        new.write_text(" ".join(map(str, epochs)))
        new.replace(self.faults / f"{run}.hold")

    def start(self, *more, cold: bool = False, pause: float = 0, env=None) -> Command:
        "Begin `dermnb run`, with kernels that are forks of a warm one unless `cold`."
        args = [BIN / "dermnb", "run", "s.yaml", "--reports", self.reports, *more]
        # What a run computes depends on its threads, in the last bits: always two at a time.
        args += [] if "--workers" in more else ["--workers", "2"]
        warm = {} if cold else self.world.warm
        return Command(self, args, warm | {"FAULTS_PAUSE": str(pause)} | (env or {}))

    def run(self, *more, code: int | None = 0, **options) -> Command:
        "Do `dermnb run` from beginning to end; then nothing of it may be left."
        command = self.start(*more, **options).end(code)
        self.check(clean=code == 0)
        return command

    # What is seen of it

    def part(self, run: str) -> Path:
        return self.reports / "s" / f".part-{run}"

    def of(self, run: str) -> Path:
        return self.reports / "s" / run

    def seen(self, run: str = "") -> list[tuple[str, int, str]]:
        "Lines of all kernels so far: run, process, what it did."
        try:
            lines = (self.faults / "seen.txt").read_text().splitlines()
        except FileNotFoundError:
            return []
        found = [line.split(" ", 2) for line in lines]
        return [(r, int(p), text) for r, p, text in found if run in ("", r)]

    def starts(self, run: str) -> int:
        "How many kernels have executed a run's notebook."
        return sum(text == "begins" for *_, text in self.seen(run))

    def epochs(self, run: str) -> list[int]:
        "Epochs that a run has been trained, in the order in which that was done."
        return [int(t.split()[1]) for *_, t in self.seen(run) if t.startswith("epoch")]

    def wait_until_held(self, run: str, epoch: int, command: Command) -> None:
        "Return when a run waits after an epoch; then its checkpoint is written."
        last = f"waits after {epoch}"
        until(lambda: any(text == last for *_, text in self.seen(run)), f"{run} that {last}", 90, command)

    def state(self, run: str) -> dict:
        try:
            return read_json(self.part(run) / "state.json")
        except (ConfigError, OSError):
            return {}

    def kernel(self, run: str) -> int:
        "The process to strike for a run's kernel: what Jupyter started, as state.json has it."
        return self.state(run).get("kernel") or self.seen(run)[-1][1]

    def said(self, run: str) -> str:
        "All that a run's log has."
        logs = [f / "log.txt" for f in (self.of(run), self.part(run))]
        return "\n".join(f.read_text(errors="replace") for f in logs if f.is_file())

    def statuses(self) -> dict[str, dict]:
        return {r["run"]: r for r in read_json(self.reports / "s" / "suite.json")["runs"]}

    # What must always hold

    def processes(self) -> list[psutil.Process]:
        "All that this project's commands have started and that is still there."
        kernels = {pid for _, pid, _ in self.seen()}
        return [p for p in psutil.process_iter() if self._is_ours(p, kernels)]

    def _is_ours(self, process: psutil.Process, kernels: set[int]) -> bool:
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                return False
            if process.pid in kernels and "warm_kernel.py" in " ".join(process.cmdline()):
                return True  # a fork has its server's environment
            return process.environ().get(MARK) == str(self.folder)
        return False

    def check(self, clean: bool = False, seconds: float = 5) -> None:
        "No process is left, nothing counts as done that is not, and after a clean end nothing is hidden."
        until(lambda: not self.processes(), f"end of {self.processes()}", seconds)
        folder = self.reports / "s"
        for run in folder.glob("[!.]*/"):
            validate_run(run)
        if (folder / "suite.json").is_file():
            for name, run in self.statuses().items():
                assert run["status"] != "done" or validate_run(folder / name), name
        kept = ".measured.json"  # what the report has computed of a run
        hidden = [p for p in folder.rglob(".*") if clean and p.name != kept]
        assert not hidden, hidden

    def same(self, *runs: str, reference: pd.DataFrame) -> None:
        "The predictions are those of an undisturbed run, bit for bit."
        for run in runs:
            found = pd.read_parquet(self.of(run) / "predictions.parquet")
            assert found.equals(reference), f"{run} differs from an undisturbed run"

    def went_on(self, run: str) -> list[int]:
        """The first epoch of each kernel that trained a run: all go on where the one before ended.

        An epoch may be repeated if its kernel was struck between its end and its checkpoint's.
        """
        kernels: dict[int, list[int]] = {}
        for _, pid, text in self.seen(run):
            if text.startswith("epoch"):
                kernels.setdefault(pid, []).append(int(text.split()[1]))
        last = 0
        for epochs in kernels.values():
            assert epochs[0] in (max(last, 1), last + 1), (run, kernels)
            assert epochs == list(range(epochs[0], epochs[-1] + 1)), (run, kernels)
            last = epochs[-1]
        assert last == EPOCHS, (run, kernels)
        return [epochs[0] for epochs in kernels.values()]

    def power_off(self, command: Command) -> None:
        "End all processes at once, with no chance to say or tidy anything."
        command.send(signal.SIGSTOP)  # or it would see its kernels end
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        command.process.wait(10)


def _add_hook(file: Path) -> None:
    "Have a notebook do what faults_hook.py says, between its configuration and its data."
    notebook = json.loads(file.read_text())
    place = next(
        i for i, c in enumerate(notebook["cells"]) if "clock = Stopwatch()" in "".join(c["source"])
    )
    hook = f"import runpy\n\nrunpy.run_path({str(ROOT / 'tests/faults_hook.py')!r})['begin'](run)"
    cell = notebook["cells"][place] | {"id": "0fa17500", "source": hook, "metadata": {}}
    notebook["cells"].insert(place + 1, cell)
    file.write_text(json.dumps(notebook))
