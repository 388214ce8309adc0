"""The command line as a person uses it: in processes of its own."""

import io
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pandas as pd
import pytest
import yaml
from test_datasets import jpeg, put
from typer.testing import CliRunner

import dermnb
from dermnb.cli import app, main
from dermnb.core import GREETINGS, ConfigError, ExperimentConfig, make_config
from dermnb.runs.folders import RUN_FILES

ROOT = Path(__file__).resolve().parent.parent
DERMNB = Path(sys.executable).parent / "dermnb"


def call(*args, cwd=ROOT, **kwargs):
    return subprocess.run(
        [str(DERMNB), *map(str, args)], cwd=cwd, capture_output=True, text=True, check=False, **kwargs
    )


def called(monkeypatch, capsys, *args):
    "The same without a process of its own, where a command ends before anything is loaded."
    monkeypatch.setattr(sys, "argv", ["dermnb", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, capsys.readouterr()


FOUND = [m.name for m in pkgutil.walk_packages(dermnb.__path__, "dermnb.") if not m.ispkg]
# All but networks and training, which are what Keras is for.
WITH_KERAS = {
    f"dermnb.{name}"
    for name in (
        *("nets.cost", "nets.device", "nets.features", "nets.finetune", "nets.gradcam", "nets.losses", "nets.models"),
        *("runs.prepare", "runs.train"),
    )
} & set(FOUND)
MODULES = [name for name in FOUND if name not in WITH_KERAS]


def frameworks_after(*statements: str) -> list[list[str]]:
    "The frameworks that are loaded after each statement, one after the other in one process."
    code = (
        "import json, sys\n"
        "heavy = {'tensorflow', 'keras', 'jax', 'torch', 'keras_cv', 'streamlit'}\n"
        "found = []\n"
        f"for statement in {statements}:\n"
        "    exec(statement)\n"
        "    found.append(sorted(heavy & set(sys.modules)))\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def frameworks():
    """By module, the frameworks that are loaded after it.

    All without what only Linux has: Windows has none of these modules, and macOS not all.
    """
    absent = "sys.modules.update(dict.fromkeys('resource fcntl pwd grp termios pty syslog'.split()))"
    names = [*MODULES, *sorted(WITH_KERAS)]
    found = frameworks_after(absent, *(f"import {name}" for name in names))
    return dict(zip(names, found[1:], strict=True))


def test_every_module_loads_on_every_system(frameworks):
    assert set(frameworks) == set(FOUND) >= {"dermnb.core", "dermnb.serve.app", "dermnb.cli"}


@pytest.mark.parametrize("module", MODULES)
def test_module_loads_no_framework(module, frameworks):
    assert frameworks[module] == []


@pytest.mark.parametrize("name", ["con", "index.html", "Nul.csv", "com1", "a.", "a ", "a:b", "a/b", "a\tb", ".a"])
def test_a_name_that_no_folder_can_have_on_some_system(name):
    with pytest.raises(ConfigError, match="cannot be the name of a folder"):
        make_config({"run": name})


def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path):
    (tmp_path / "data").write_text("a file")
    done = call("data", "check", "demo", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("dermnb: ") and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_runs_that_differ_in_case_only(tmp_path):
    from dermnb.runs.suites import load_suite, parse_overrides

    (tmp_path / "s.yaml").write_text("title: t\nquestion: q\nruns: {Cnn: , cnn: }\n")
    with pytest.raises(ConfigError, match="'Cnn' and 'cnn' would share one folder"):
        load_suite(tmp_path / "s.yaml")
    given = parse_overrides(["positive=1", "run=no", "seed=1"])
    config = make_config(given)
    assert (config.positive, config.run, config.seed) == ("1", "no", 1)
    assert make_config({"positive": 1, "run": "console"}).positive == "1"


def test_a_console_that_cannot_show_a_name(monkeypatch):
    from dermnb import cli

    written = io.BytesIO()
    console = io.TextIOWrapper(written, encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(cli, "app", lambda: print("\u76ae\u80a4 \udcff ü"))
    cli.main()
    console.flush()
    assert written.getvalue().decode("cp1252") == "\\u76ae\\u80a4 \\udcff ü" + os.linesep


def test_help_is_quick():
    start = os.times()
    assert call("--help").returncode == 0
    spent = os.times()  # of processors, as a clock would count other work too
    user, system = (getattr(spent, x) - getattr(start, x) for x in ("children_user", "children_system"))
    assert user + system < 1


def _two_classes(folder: Path) -> Path:
    "Two classes of noise; one picture stands in both, and one of them twice."
    for k, name in enumerate(("mel", "nv")):
        for i in range(4):
            put(folder / name / f"{name}{i}.jpg", jpeg(10 * k + i, (64, 48)))
    put(folder / "nv" / "again.jpg", jpeg(0, (64, 48)))
    put(folder / "nv" / "twice.jpg", jpeg(11, (64, 48)))
    put(folder / "metadata.csv", "image_id,case_id,PatientID\nmel0,1,P1\n")
    put(folder / "notes.txt", "x")
    return folder


def test_data_check_shows_what_it_found_and_which_images_are_the_same(tmp_path):
    folder = _two_classes(tmp_path)
    args = ["data", "check", "folders", "--data-dir", str(folder)]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0 and done.stdout.endswith("no problems\n")
    text = " ".join(done.stdout.split())
    assert "classes mel 4 and nv 6" in text and "patient_id from PatientID" in text
    assert "case_id of metadata.csv (patient_id is read from PatientID)" in text
    assert "files 1 .txt" in text and str(tmp_path) not in text
    assert "4 of 10 images are the same file, or the same pixels, as another" in text
    assert "2 of them stand under two labels, such as mel0 and again" in text
    assert "Same image" not in CliRunner().invoke(app, [*args, "--quick"]).stdout
    (folder / "nv" / "nv0.jpg").write_bytes(b"")
    bad = CliRunner().invoke(app, args)
    assert bad.exit_code == 1
    assert "1 unreadable" in bad.stdout and "nv0: zero bytes" in bad.stdout


def test_data_check_shows_what_stops_no_run(tmp_path):
    for i, place in enumerate(("train/Mel", "train/nv", "test/Melano", "test/nv")):
        put(tmp_path / place / f"{i}.jpg", jpeg(i))
    args = ["data", "check", "folders", "--quick", "--data-dir", str(tmp_path)]
    done = CliRunner().invoke(app, args)
    detail = "class 'Melano' has 1 image, none for training; is it 'Mel'?"
    assert done.exit_code == 0
    assert done.stdout.endswith(f"Problems\n  1 not trained\n    {detail}\n")


def test_data_check_loads_no_framework(tmp_path):
    args = ["data", "check", "folders", "--data-dir", str(_two_classes(tmp_path))]
    runner = "from typer.testing import CliRunner; from dermnb.cli import app"
    assert frameworks_after(runner, f"CliRunner().invoke(app, {args})") == [[], []]


@pytest.mark.parametrize(
    "args, sentence",
    [
        (["run", "demos"], "did you mean 'demo'"),
        (["run", "demo", "-p", "epoch=3"], "did you mean 'epochs'"),
        (["run", "demo", "-p", "epochs"], "key=value"),
        (["run", "demo", "-p", "epochs=many"], "epochs = 'many'"),
        (["run", "demo", "-p", "backbone=xceptoin"], "did you mean 'xception'"),
        (["run", "demo", "-p", "loss=focall"], "did you mean 'focal'"),
        (["run", "demo", "-p", "positive=MEL"], "positive 'MEL' is for two classes; here are 8"),
        (["run", "demo", "--profile", "tiny"], "known: smoke, cpu, gpu"),
        (["run", "backbones", "--data-dir", "/nowhere"], "'/nowhere' does not exist"),
        (["run", "derm_categories", "-p", "base=nobody"], "builds on 'nobody'"),
        (["run", "demo", "--folds", "3", "--seeds", "2"], "seeds or folds"),
        (["run", "demo", "-p", "run=mine"], "has the name that the suite file gives it"),
        (["run", "demo", "-p", "learning_rate=inf"], "finite"),
        (["report", "/nowhere"], "/nowhere"),
        (["data", "check", "ham1000"], "did you mean 'ham10000'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(args, sentence, monkeypatch, capsys):
    code, said = called(monkeypatch, capsys, *args)
    assert code == 2 and sentence in said.err
    assert len(said.err.strip().splitlines()) == 1


def test_a_mistake_in_a_process_of_its_own():
    done = call("run", "demo", "-p", "epoch=3")
    assert done.returncode == 2 and done.stderr.startswith("dermnb: ")
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["train", "transfer"])
def test_parameters_cell_is_the_config(name):
    "The notebook's tagged cell lists every field, in order; those of train with their defaults."
    notebook = json.loads((ROOT / f"nbs/experiments/{name}.ipynb").read_text())
    tagged = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    values = {}
    exec("".join(tagged[0]["source"]), {}, values)
    assert values.pop("folder") == ""
    defaults = {k: f.default for k, f in ExperimentConfig.model_fields.items()}
    assert list(values) == list(defaults)
    assert values == defaults or name != "train"


@pytest.mark.parametrize("path", sorted((ROOT / "nbs/suites").glob("*.yaml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu"])
def test_every_suite_resolves(path, profile):
    from dermnb.runs.suites import load_suite, resolve_suite

    plan = resolve_suite(load_suite(path), profile)
    content = yaml.safe_load(path.read_text())
    special = content["profiles"][profile].get("runs", {})
    wanted = {name for name in content["runs"] if special.get(name) != "skip"}
    if repeats := content.get("repeats"):
        ((kind, number),) = repeats.items()
        name = {"folds": "fold", "seeds": "seed"}[kind]
        wanted = {f"{run}-{name}{k}" for run in wanted for k in range(number)}
    trials = [p for p in plan if p.trial]
    assert {p.config.run for p in plan if not p.trial} == wanted - {p.group for p in trials}
    skipped = content["profiles"][profile].get("search") == "skip"
    assert bool(trials) == ("search" in content and not skipped)


@pytest.fixture(scope="module")
def suite(tmp_path_factory, demo_dir):
    "A suite of a good run, one that fails and one that builds on it, executed outside of the project."
    folder = tmp_path_factory.mktemp("suite")
    bad = folder / "bad.weights.h5"
    h5py.File(bad, "w").close()
    content = {
        "title": "Two <b>runs</b>",
        "question": "Does one failure spare the other?",
        "defaults": {"image_size": 32, "epochs": 2, "bootstrap": 100, "batch_size": 16},
        "runs": {
            "child": {"base": "broken", "backbone": "mobilenetv2"},
            "cnn": {},
            "broken": {"backbone": "mobilenetv2", "weights": str(bad)},
        },
    }
    (folder / "two.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    args = ["run", folder / "two.yaml", "--data-dir", demo_dir, "--reports", folder / "r"]
    return folder, args, call(*args, cwd=folder, timeout=300)


def test_suite_end_to_end(suite):
    folder, _, done = suite
    lines = done.stdout.splitlines()
    said = [i for i, line in enumerate(lines) if (folder / "r/two/index.html").as_uri() in line]
    assert said and said[0] < min(i for i, line in enumerate(lines) if "cnn]" in line)
    assert done.returncode == 1, done.stderr
    assert "broken failed" in done.stderr and "bad.weights.h5" in done.stderr
    assert "child failed: It builds on broken, which failed." in done.stderr
    run = folder / "r/two/cnn"
    for name in (*RUN_FILES, "notebook.ipynb", "report.html"):
        assert (run / name).is_file(), name
    assert done.stdout.strip().splitlines()[-1].endswith("index.html")
    assert re.search(r"epoch \d/2", done.stdout), done.stdout
    history = pd.read_csv(run / "history.csv")
    assert list(history["epoch"]) == [1, 2]
    page = (folder / "r/two/index.html").read_text()
    assert "broken" in page and "failed" in page and "<b>runs</b>" not in page


def test_only_our_own_lines_are_shown(suite, demo_dir):
    "No greeting of TensorFlow's libraries, unless asked for."
    folder, _, done = suite
    assert all(line.startswith(("broken", "child")) for line in done.stderr.splitlines()), done.stderr
    image = next((demo_dir / "ISIC_2019_Training_Input").glob("*.jpg"))
    asked = ["predict", image, "--model", folder / "r/two/cnn"]
    assert call(*asked).stderr == ""
    assert GREETINGS.search(call("--verbose", *asked).stderr)


def test_errors_of_libraries_and_a_crash_get_through():
    said = (
        "I0000 00:00:1795716087.541635   12488 port.cc:153] custom operations are on.",
        "F0000 00:00:1795716087.541635   12488 tensor.cc:8] Check failed: 1 == 2",
    )
    code = (
        "import os, sys; from dermnb import cli; cli._load_keras();"
        f"[os.write(2, (line + chr(10)).encode()) for line in {said}];"
        "print('ours', file=sys.stderr); os.abort()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode < 0 and sorted(done.stderr.splitlines()) == [said[1], "ours"]


def test_run_folder_says_nothing_of_this_machine(suite):
    folder, _, _ = suite
    run = folder / "r/two/cnn"
    for name in ("run.json", "notebook.ipynb", "report.html", "metrics.json"):
        assert str(folder) not in (run / name).read_text(), name
        assert str(ROOT) not in (run / name).read_text(), name


def test_done_runs_are_not_repeated(suite, demo_dir, tmp_path):
    folder, _, _ = suite
    shutil.copytree(folder / "r", tmp_path / "r")
    content = yaml.safe_load((folder / "two.yaml").read_text())
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(content | {"runs": {"cnn": {}}}))
    before = (tmp_path / "r/two/cnn/run.json").stat().st_mtime_ns
    args = ["--data-dir", demo_dir, "--reports", tmp_path / "r"]
    done = call("run", tmp_path / "two.yaml", *args, timeout=300)
    assert done.returncode == 0 and "cnn: already done" in done.stdout
    assert (tmp_path / "r/two/cnn/run.json").stat().st_mtime_ns == before


def test_report_is_rebuilt_without_training(suite, monkeypatch, capsys):
    folder, _, _ = suite
    page = folder / "r/two/index.html"
    page.unlink()
    assert call("report", folder / "r/two").returncode == 0
    assert page.is_file()
    assert called(monkeypatch, capsys, "report", folder / "r/two", "--single-file")[0] == 0
    assert (folder / "r/two/two.html").is_file()


def test_audit_of_datasets_and_of_finished_runs(demo_dir, tmp_path, monkeypatch, capsys):
    code, said = called(monkeypatch, capsys, "audit", f"demo={demo_dir}")
    assert code == 0, said
    other = tmp_path / "other"
    for label in ("a", "b"):
        (other / label).mkdir(parents=True)
    images = sorted(Path(demo_dir).rglob("*.jpg"))[:4] or sorted(Path(demo_dir).rglob("*.png"))[:4]
    for i, path in enumerate(images):
        (other / "ab"[i % 2] / f"copy{i}{path.suffix}").write_bytes(path.read_bytes())
    found = call("audit", f"demo={demo_dir}", f"folders={other}", "--out", tmp_path / "found.csv")
    assert found.returncode == 1
    assert "same bytes" in found.stdout
    assert len(pd.read_csv(tmp_path / "found.csv")) >= 4
    for args, sentence in (
        (["demo", tmp_path], "not both"),
        (["dmeo"], "did you mean 'demo'"),
        ([tmp_path], "finished run"),
    ):
        code, said = called(monkeypatch, capsys, "audit", *args)
        assert code == 2 and sentence in said.err


def test_the_smallest_run_is_first_and_the_largest_next():
    from dermnb.runs.plan import execution_order
    from dermnb.runs.suites import load_suite, resolve_suite

    plan = resolve_suite(load_suite("demo"), "cpu")
    order = [p.config.run for p in execution_order({p.config.run: p for p in plan})]
    assert order == ["cnn", "efficientnetb7", "efficientnetb5", "xception"]
    plan = resolve_suite(load_suite("cnn_ensemble"), "smoke")
    order = [p.config.run for p in execution_order({p.config.run: p for p in plan})]
    assert all(order.index(q) < order.index(p.config.run) for p in plan for q in p.parents)


def test_a_plan_for_a_gpu_says_that_there_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dermnb.runs.plan._this_machine", lambda: ("CPU", 2, ()))
    monkeypatch.chdir(tmp_path)
    code, said = called(monkeypatch, capsys, "run", "folds", "--profile", "gpu", "--dry-run")
    assert code == 1 and "no GPU answers: take --profile cpu" in said.out


def test_an_interruption_before_the_first_run_says_so(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dermnb.runs.suites.load_suite", interrupted)
    code, said = called(monkeypatch, capsys, "run", "demo", "--dry-run")
    assert (code, said.err) == (130, "dermnb: interrupted before a run began.\n")
