"""A suite as a notebook uses it: plan, run, stop, tables of results; 20 s, of which one run that trains takes most."""

import math
import sys

import pandas as pd
import pytest
from fabricate import make_run, make_search, make_study, make_suite
from IPython.core.interactiveshell import InteractiveShell
from warm_kernel import warm_kernels

from dermnb import suite as chapter
from dermnb.core import ConfigError, read_json
from dermnb.data.synthetic import generate_demo
from dermnb.report.build import build_report
from dermnb.runs import runner
from dermnb.suite import Suite

TWO = """
title: Two
question: Which?
defaults: {dataset: demo, image_size: 32, epochs: 3, batch_size: 16, bootstrap: 100}
profiles: {cpu: {}, smoke: {epochs: 1}}
runs:
  small: {}
  large: {dropout: 0.5}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(TWO)
    return path


def of_results(folder, make, **more):
    "A suite whose results are those that `make` fabricates."
    yaml = folder / "s.yaml"
    yaml.write_text(TWO)
    make(folder / "reports" / "s", **more)
    return Suite.load(yaml, "cpu", folder / "reports")


def test_mistakes_are_said_when_a_suite_is_loaded(file):
    with pytest.raises(ConfigError, match="unknown suite 'tow'"):
        Suite.load("tow")
    with pytest.raises(ConfigError, match="did you mean 'smoke'"):
        Suite.load(file, "smok")
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        Suite.load(file, "cpu", epoch=3)
    with pytest.raises(ConfigError, match="epochs"):
        Suite.load(file, "cpu", epochs="many")


def test_settings_reach_the_runs(file, tmp_path):
    suite = Suite.load(file, "smoke", tmp_path / "r", repeats={"seeds": 2}, gamma=1.5)
    configs = [planned.config for planned in suite.runs]
    assert [c.run for c in configs] == ["small-seed0", "small-seed1", "large-seed0", "large-seed1"]
    assert {(c.epochs, c.gamma) for c in configs} == {(1, 1.5)}
    assert suite.folder == tmp_path / "r" / "two-smoke"


def test_results_are_in_the_project_wherever_the_notebook_lies(file, tmp_path, monkeypatch):
    (tmp_path / "settings.ini").touch()
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")
    assert Suite.load("../two.yaml", "cpu").folder == tmp_path / "reports" / "two"


def test_a_plan_is_shown_and_follows_the_file(file, tmp_path):
    suite = Suite.load(file, "cpu", tmp_path / "reports", data_dir=tmp_path / "none")
    plan = suite.plan()
    assert sorted(plan.todo) == ["large", "small"]
    assert "<td>small</td>" in plan._repr_html_()
    assert "2 runs to execute" in plan._repr_html_()
    file.write_text(TWO + "  third: {seed: 1}\n")
    assert sorted(suite.plan().todo) == ["large", "small", "third"]
    assert not (tmp_path / "reports").exists()


def test_without_results_each_method_says_so(file, tmp_path):
    suite = Suite.load(file, "cpu", tmp_path / "reports")
    for method in (suite.results, suite.compare, suite.report, suite.status):
        with pytest.raises(ConfigError, match=r"suite two has no results in .* call run\(\) first"):
            method()


def test_results_hold_what_the_folders_say(tmp_path):
    suite = of_results(tmp_path, make_suite)
    table = suite.results().set_index("run")
    assert list(table.index) == ["cnn", "xception", "efficientnetb5", "efficientnetb7"]
    folder = suite.folder / "xception"
    known = read_json(folder / "metrics.json")["splits"]["test"]
    row, history = table.loc["xception"], pd.read_csv(folder / "history.csv")
    for metric in ("balanced_accuracy", "macro_auc"):
        found = known["metrics"][metric]
        said = [row[metric], row[f"{metric}_low"], row[f"{metric}_high"]]
        assert said == [found["value"], found["low"], found["high"]]
    assert (row["n"], row["lesions"]) == (known["n"], known["lesions"])
    assert row["best_epoch"] == history.loc[history["val_loss"].idxmin(), "epoch"]
    assert row["seconds"] == read_json(folder / "run.json")["timing"]["total_s"]
    assert suite.results("val").set_index("run").loc["cnn", "n"] != row["n"]
    with pytest.raises(ConfigError, match="unknown split 'train'"):
        suite.results("train")
    assert sorted(suite.status()["status"].unique()) == ["done", "failed", "waiting"]


def test_results_of_an_ensemble_and_of_repeats(tmp_path):
    suite = of_results(tmp_path, make_study, resamples=50)
    table = suite.results().set_index("run")
    assert pd.isna(table.loc["both", "best_epoch"])
    assert table.loc["xception-seed2", ["group", "repeat"]].tolist() == ["xception", "seed 2"]
    assert table.index[table["leaks"]].tolist() == ["cnn_image"]
    pairs = suite.compare()
    assert "cnn_image" not in {*pairs["a"], *pairs["b"]}  # it leaks
    repeats = pairs.set_index(["a", "b"])["repeats"]
    assert max(repeats) == 3
    apart = pairs[pairs["a"].eq("folded") | pairs["b"].eq("folded")]
    assert (
        apart["difference"].isna().all() and apart["reason"].str.contains("same test images").all()
    )


def test_results_of_a_search_name_what_was_varied(tmp_path):
    suite = of_results(tmp_path, make_search, resamples=50)
    table = suite.results().set_index("run")
    assert table.loc["cnn-t02", ["learning_rate", "dropout"]].tolist() == [1e-3, 0.2]
    assert math.isnan(table.loc["plain", "dropout"])
    assert set(suite.compare()[["a", "b"]].iloc[0]) == {"cnn", "plain"}  # the chosen trial alone


def test_comparison_is_that_of_the_report(tmp_path):
    suite = of_results(tmp_path, make_suite)
    pairs = suite.compare()
    assert len(pairs) == 6
    assert (pairs["low"] <= pairs["difference"]).all() and (
        pairs["difference"] <= pairs["high"]
    ).all()
    assert (pairs["p_holm"] >= pairs["p"]).all()
    apart = pairs["value_a"] - pairs["value_b"]
    assert apart.to_numpy() == pytest.approx(pairs["difference"].to_numpy())
    text = build_report(suite.folder).read_text()
    for row in pairs.itertuples():
        assert f"{row.a} minus {row.b}" in text
    recall = suite.compare("recall:MEL")
    assert set(recall["metric"]) == {"recall:MEL"}
    with pytest.raises(ConfigError, match="balanced_accuracy"):
        suite.compare("balanced_acuracy")


def test_a_comparison_needs_two(tmp_path):
    def one(folder):
        make_run(folder / "small", lesions=60, notebook=False)
        rows = '[{"run": "small", "status": "done"}, {"run": "large", "status": "missing"}]'
        (folder / "suite.json").write_text(f'{{"runs": {rows}}}')

    suite = of_results(tmp_path, one)
    with pytest.raises(ConfigError, match="needs two finished runs .* there is small"):
        suite.compare()
    assert suite.results()["run"].tolist() == ["small"]


def test_stopped_by_hand_it_says_one_line(file, tmp_path, monkeypatch, capsys):
    def stopped(*args, **more):
        raise runner.Interrupted("interrupted: 1 of 2 runs done and kept.")

    monkeypatch.setattr(chapter, "run_suite", stopped)
    suite = Suite.load(file, "cpu", tmp_path / "reports")
    shell = InteractiveShell()
    shell.user_ns["suite"] = suite
    result = shell.run_cell("suite.run()")
    assert isinstance(result.error_in_exec, KeyboardInterrupt)  # so the next cells are not executed
    assert capsys.readouterr().out.strip() == "interrupted: 1 of 2 runs done and kept."

    def stopped_early(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(chapter, "run_suite", stopped_early)
    shell.run_cell("suite.run()")
    said = capsys.readouterr().out.strip()
    assert said == "interrupted: what is done is kept, and calling run again goes on."


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked")
def test_stopped_by_time_and_gone_on_with(file, tmp_path, monkeypatch, capsys):
    "It trains one run."
    data = generate_demo(tmp_path / "demo", lesions=30, size=(32, 32))
    file.write_text(TWO.partition("  large")[0])
    suite = Suite.load(file, "smoke", tmp_path / "reports", data, taxonomy="binary", audit="none")
    first = suite.run(max_hours=1e-9)
    assert first[["run", "status"]].values.tolist() == [["small", "stopped"]]
    assert "calling run again goes on" in capsys.readouterr().out
    assert suite.status()["status"].tolist() == ["stopped"]
    (tmp_path / "warm").mkdir()
    with warm_kernels(tmp_path / "warm") as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        last = suite.run()
    assert last["status"].tolist() == ["done"]
    assert f"report: {(suite.folder / 'index.html').as_uri()}" in capsys.readouterr().out
    assert suite.plan().todo == []
    assert suite.results()["epochs"].tolist() == [1]
    assert suite.status()["status"].tolist() == ["done"]
