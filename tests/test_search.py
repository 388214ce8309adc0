"""Searches: which trials there are, which end early, and what the page says of them."""

import importlib.util
import json
import subprocess
import sys

import pytest
import yaml
from fabricate import make_search
from pages import ReadPage

from dermnb.core import ConfigError, make_config, read_json
from dermnb.report.build import build_report
from dermnb.report.comparison import leaderboard, search
from dermnb.report.sections import Page, trials_apart
from dermnb.runs.results import load_suite_runs
from dermnb.runs.search import JOURNAL, halving_for, make_search as checked, trials_of
from dermnb.runs.suites import load_suite, resolve_suite

needs_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="Optuna (extra `search`) is not installed"
)
RUNS = {"cnn": {}, "other": {}}
DRAW = {
    "learning_rate": {"low": "1e-5", "high": "1e-2", "log": "true"},
    "optimizer": ["adam", "sgd"],
    "epochs": {"low": "5", "high": "20", "step": "5"},
}


def drawn(trials, draw=DRAW, **more):
    return trials_of(checked({"run": "cnn", "draw": draw, "trials": trials} | more, RUNS))


def test_draws_follow_from_seed_number_and_name():
    assert drawn(2) == [
        {"learning_rate": 0.001172, "optimizer": "sgd", "epochs": 5},
        {"learning_rate": 0.0002463, "optimizer": "adam", "epochs": 5},
    ]  # on any machine
    assert drawn(40)[:12] == drawn(12) != drawn(12, seed=1)
    more = drawn(12, DRAW | {"dropout": {"low": 0, "high": 0.5}})
    assert [{k: t[k] for k in DRAW} for t in more] == drawn(12)


def test_draws_lie_in_their_ranges_and_reach_all_of_them():
    found = drawn(200)
    assert {t["epochs"] for t in found} == {5, 10, 15, 20}
    rates = sorted(t["learning_rate"] for t in found)
    assert 1e-5 <= rates[0] < 2e-5 and 5e-3 < rates[-1] <= 1e-2
    assert 1e-4 < rates[100] < 1e-3  # half of them below the middle of the logarithm
    sizes = drawn(7, {"batch_size": {"low": 2, "high": 8}})
    assert sorted(t["batch_size"] for t in sizes) == [2, 3, 4, 5, 6, 7, 8]  # none twice
    with pytest.raises(ConfigError, match=r"8 trials are more than .* \(7 found\)"):
        drawn(8, {"batch_size": {"low": 2, "high": 8}})


def suite_of(folder, search, profiles=None, runs=None, **more):
    file = folder / "s.yaml"
    content = {"title": "t", "question": "q", "runs": runs or RUNS, "search": search}
    content |= {"profiles": profiles or {"cpu": {}}} | more
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_suite(file)


def test_trials_are_planned_runs(tmp_path):
    grid = {"learning_rate": [1e-3, 1e-4], "head": [[], [64, 32]]}
    suite = suite_of(tmp_path, {"run": ["cnn", "other"], "grid": grid})
    plan = resolve_suite(suite, "cpu")
    assert [p.config.run for p in plan] == [f"{r}-t0{i}" for r in RUNS for i in (1, 2, 3, 4)]
    assert {(p.group, p.repeat, p.reference) for p in plan} == {(r, "", False) for r in RUNS}
    assert plan[3].trial == plan[7].trial == {"learning_rate": 1e-4, "head": [64, 32]}
    assert plan[3].config.learning_rate == 1e-4 and plan[3].config.head == [64, 32]
    assert plan[3].config.searched == ["learning_rate", "head"] and plan[3].config.halving == []


def test_an_ensemble_may_be_searched_by_its_members(tmp_path):
    runs = {"a": {}, "b": {"seed": 1}, "c": {"seed": 2}, "all": {"members": ["a", "b"]}}
    grid = {"members": [["a", "b"], ["a", "b", "c"]], "combine": ["mean", "rank"]}
    plan = resolve_suite(suite_of(tmp_path, {"run": "all", "grid": grid}, runs=runs), "cpu")
    assert [p.config.run for p in plan][3:] == ["all-t01", "all-t02", "all-t03", "all-t04"]
    assert plan[-1].config.members == ["a", "b", "c"] and plan[-1].config.combine == "rank"


def test_a_profile_changes_a_search_or_skips_it(tmp_path):
    profiles = {"smoke": {"search": {"trials": 2}}, "cpu": {}, "gpu": {"search": "skip"}}
    suite = suite_of(tmp_path, {"run": "cnn", "draw": DRAW, "trials": 5}, profiles)
    plans = {name: resolve_suite(suite, name) for name in profiles}
    assert [len(plan) for plan in plans.values()] == [3, 6, 2]
    assert [p.trial for p in plans["smoke"][:2]] == [p.trial for p in plans["cpu"][:2]]
    assert plans["gpu"][0].config.run == "cnn" and not plans["gpu"][0].trial


GRID = {"run": "cnn", "grid": {"dropout": [0.1, 0.2]}}


@pytest.mark.parametrize(
    "search, more, said",
    [
        ({"run": "cnn"}, {}, "give grid .* or draw"),
        (GRID | {"run": "cmn"}, {}, "unknown run 'cmn': did you mean 'cnn'"),
        (GRID | {"grids": {}}, {}, "unknown key 'grids'"),
        (GRID | {"seed": 1}, {}, "a grid has all combinations"),
        ({"run": "cnn", "grid": {"dropuot": [1]}}, {}, "unknown parameter 'dropuot'"),
        ({"run": "cnn", "grid": {"dropout": [0.1, 7]}}, {}, r"'cnn-t02': dropout = .* does not fit"),
        ({"run": "cnn", "grid": {"dropout": ["0.1", "0.10"]}}, {}, "same values as 'cnn-t01'"),
        ({"run": "cnn", "grid": {"dropout": []}}, {}, "dropout has no values"),
        ({"run": "cnn", "grid": {"fold": [0, 1]}}, {}, "fold cannot be searched: the best one would be luck"),
        ({"run": "cnn", "grid": {"subset": [9]}}, {}, "subset cannot be searched: .* same images"),
        ({"run": "cnn", "draw": {"loss": {"low": 0, "high": 1}}, "trials": 2}, {}, "loss is no number"),
        ({"run": "cnn", "draw": DRAW, "trials": 501}, {}, "would be 501 trials; at most 500"),
        (GRID, {"repeats": {"seeds": 2}}, "a search is not repeated"),
        (GRID, {"runs": {"cnn": {"reference": True}}}, "is a reference, which is not searched"),
        (GRID, {"runs": {"cnn": {}, "cnn-t01": {}}}, "the suite has a run of this name"),
        (GRID, {"runs": RUNS | {"both": {"members": ["cnn", "other"]}}}, "'both': .* such as 'cnn-t01'"),
        (GRID, {"runs": RUNS | {"next": {"base": "cnn"}}}, "'next': .* such as 'cnn-t01'"),
        (GRID | {"run": "both"}, {"runs": RUNS | {"both": {"members": ["cnn", "other"]}}}, "cannot vary its dropout"),
        (GRID, {"defaults": {"searched": ["dropout"]}}, "searched is no parameter to set"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_starts(search, more, said, tmp_path):
    with pytest.raises(ConfigError, match=said) as error:
        resolve_suite(suite_of(tmp_path, search, **more), "cpu")
    assert "\n" not in str(error.value)


def test_what_is_searched_is_not_overridden(tmp_path):
    suite = suite_of(tmp_path, GRID)
    with pytest.raises(ConfigError, match="-p dropout=...: the suite's search varies dropout"):
        resolve_suite(suite, "cpu", {"dropout": "0.3"})
    with pytest.raises(ConfigError, match="a search is not repeated"):
        resolve_suite(suite, "cpu", repeats={"folds": 2})
    assert resolve_suite(suite, "cpu", {"epochs": "3"})[0].config.epochs == 3


def test_halving_without_optuna_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert len(resolve_suite(suite_of(tmp_path, GRID), "cpu")) == 3
    with pytest.raises(ConfigError, match=r"pip install 'dermnb\[search\]'"):
        resolve_suite(suite_of(tmp_path, GRID | {"halving": {"first": 3}}), "cpu")
    with pytest.raises(ConfigError, match="loss cannot be searched: halving compares"):
        checked({"run": "cnn", "grid": {"loss": ["focal"]}, "halving": {"first": 3}}, RUNS)


def trial(dropout, **more):
    return make_config({"searched": ["dropout"], "halving": [1, 3], "epochs": 9, "dropout": dropout} | more)


def train(halving, losses):
    "The epoch at which halving ends a training of these validation losses; None if it does not."
    for epoch, loss in enumerate(losses, 1):
        if halving({"epoch": epoch, "stage": "scratch", "val_loss": loss}):
            return epoch
    return None


# Losses of nine epochs, in the order of training. Looked at after 1, 3 and 9 epochs; of n trials the best
# n // 3 go on, or the best one. A trial counts with its lowest loss so far.
TABLE = [
    ([1.0, 0.9, 0.60] + [0.6] * 6, None),  # 1: alone; 3: alone
    ([0.8, 0.7, 0.65] + [0.6] * 6, 3),  # 1: best of 2; 3: second of 2
    ([0.9, 0.1, 0.10] + [0.1] * 6, 1),  # 1: second of 3, of which one goes on
    ([0.7, 0.5, 0.90] + [0.9] * 6, None),  # 1: best of 4; 3: 0.5 is best of 3; 9: the end anyway
    ([0.75, 0.1, 0.1] + [0.1] * 6, 1),  # 1: second of 5, of which one goes on
    ([0.72, 0.6, 0.55] + [0.6] * 6, 3),  # 1: second of 6, of which two go on; 3: second of 4
    ([0.71, 0.6, 0.40] + [0.6] * 6, None),  # 1: second of 7; 3: best of 5
]


@needs_optuna
def test_halving_decides_as_a_table_made_by_hand(tmp_path):
    for _ in range(2):  # the same trials again: each decision stays as it was
        ends = []
        for number, (losses, _) in enumerate(TABLE):
            halving = halving_for(trial(number / 10), tmp_path / f".part-cnn-t{number}")
            ends.append(train(halving, losses))
            assert (halving.ended or {}).get("epoch") == ends[-1]
        assert ends == [end for _, end in TABLE]
        assert len(halving.study.trials) == len(TABLE)
    ended = halving_for(trial(0.1), tmp_path / "cnn").ended
    assert ended["of"] == 9 and "0.65, was number 2 of 2, and the best 1 in 3 went on" in ended["reason"]
    assert halving_for(make_config({}), tmp_path / "cnn") is None
    assert halving_for(trial(0.1), "") is None  # a notebook on its own


@needs_optuna
def test_a_resumed_trial_is_found_again(tmp_path):
    train(halving_for(trial(0.1), tmp_path / "a"), [0.5] * 9)
    train(halving_for(trial(0.2), tmp_path / "b"), [0.4, 0.4])  # killed in its third epoch
    again = halving_for(trial(0.2), tmp_path / "b")
    # From a checkpoint of its first epoch; what it lost comes out otherwise, as on another machine.
    assert train(again, [0.4, 0.9, 0.6, 0.6]) is None  # 0.4 was its lowest loss
    third = halving_for(trial(0.3), tmp_path / "c")
    assert train(third, [0.3, 0.3, 0.9, 0.9]) is None
    fourth = [halving_for(trial(0.4), tmp_path / "d") for _ in range(2)]
    assert train(fourth[0], [0.9]) == 1
    assert fourth[1]({"epoch": 1, "val_loss": 0.9}) and fourth[1]({"epoch": 2, "val_loss": 0.01})
    assert [len(t.intermediate_values) for t in again.study.trials] == [9, 4, 4, 1]


@needs_optuna
def test_trials_compete_with_their_like_only(tmp_path, monkeypatch):
    assert train(halving_for(trial(0.1), tmp_path / "a"), [0.1] * 9) is None
    assert train(halving_for(trial(0.2, image_size=64), tmp_path / "b"), [0.9] * 9) is None
    assert train(halving_for(trial(0.2, explain=5), tmp_path / "c"), [0.9] * 9) == 1
    monkeypatch.setattr("dermnb.runs.search.made_of", lambda config: {"data": "others", "weights": ""})
    assert train(halving_for(trial(0.2), tmp_path / "d"), [0.9] * 9) is None


@needs_optuna
def test_a_torn_journal_is_mended_and_a_broken_one_is_said(tmp_path):
    train(halving_for(trial(0.1), tmp_path / "a"), [0.1] * 9)
    journal = tmp_path / JOURNAL
    journal.write_bytes(journal.read_bytes() + b'{"op_code": 7, "tri')
    assert train(halving_for(trial(0.2), tmp_path / "b"), [0.9] * 9) == 1
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    journal.write_text("not json\n" + journal.read_text())
    with pytest.raises(ConfigError, match="search.journal cannot be read: delete it"):
        halving_for(trial(0.3), tmp_path / "c")


WORKER = """
import sys
from dermnb.core import make_config
from dermnb.runs.search import halving_for
first = int(sys.argv[2])
for number in range(first, first + 6):
    config = make_config({"searched": ["dropout"], "halving": [1, 2], "epochs": 5, "dropout": number / 20})
    halving = halving_for(config, sys.argv[1] + f"/t{number}")
    for epoch in range(1, 6):
        if halving({"epoch": epoch, "val_loss": (number * 7 % 12 + 1) / epoch}):
            break
"""


@needs_optuna
def test_two_processes_share_a_journal(tmp_path):
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    both = [subprocess.Popen([*command, str(first)]) for first in (0, 6)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    trials = halving_for(trial(0.0, halving=[1, 2], epochs=5), tmp_path / "t0").study.trials
    assert len({t.user_attrs["config"] for t in trials}) == len(trials) == 12
    for t in trials:
        number, ended = int(t.number), t.user_attrs.get("ended")
        reached = max(t.intermediate_values)
        assert sorted(t.intermediate_values) == list(range(1, reached + 1)), number
        assert reached == (ended["epoch"] if ended else 5)
    # Whoever was best of all at an epoch that halving looks at went on.
    for look in (1, 2, 4):
        best = min((t for t in trials if look in t.intermediate_values), key=lambda t: t.intermediate_values[look])
        assert max(best.intermediate_values) > look
    assert any(t.user_attrs.get("ended") for t in trials)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = make_search(tmp_path_factory.mktemp("reports") / "search")
    return folder, build_report(folder)


def test_the_section_has_the_numbers_of_the_runs(searched):
    folder, _ = searched
    suite, runs = load_suite_runs(folder)
    kept, trials = trials_apart(runs)
    assert [r.name for r in kept] == ["plain", "cnn-t02"] and len(trials) == 6
    page = Page(kept, suite, trials=trials)
    (one,) = search(page)
    scores = {}
    for run in one["done"]:
        metrics = read_json(folder / run.name / "metrics.json")["splits"]
        scores[run.name] = [metrics[s]["metrics"]["balanced_accuracy"] for s in ("val", "test")]
    rows = {row["run"].text: row for row in one["rows"]}
    assert {name: [row["val"], row["test"]] for name, row in rows.items()} == scores
    assert list(rows) == sorted(rows, key=lambda name: -scores[name][0]["value"])
    assert [name for name, row in rows.items() if row["run"].badge] == ["cnn-t02"]
    best = rows["cnn-t02"]
    assert best["loss"] == runs[2].history["val_loss"].min() and best["learning_rate"].v == 1e-3
    assert (rows["cnn-t05"]["epochs"].text, rows["cnn-t05"]["epochs"].sub) == ("3", "ended early")
    assert one["failed"][0]["reason"] == "failed: TrainingError: no loss (learning_rate 1, dropout 0.5)"
    board = leaderboard(page)["rows"]["test"]
    assert {row["run"].text for row in board} == {"plain", "cnn-t02"}


def test_the_page_says_how_the_trial_was_chosen(searched):
    folder, page = searched
    said = ReadPage(page).prose
    assert "cnn is cnn-t02, chosen among 6 trials on validation images" in said
    assert "Of 5 finished trials of cnn, which differ in learning_rate and dropout, cnn-t02 is chosen" in said
    assert "chosen on validation images, so its validation figures are optimistic" in said
    assert "they were not used to choose" in said and "1 of 5 did. So the order of trials matters." in said
    assert "Validation images guided the training and chose among 6 trials" in said
    assert "1 trial without results could still change the choice" in said
    assert "A trial that ended early, after epoch 3 of 10" in ReadPage(folder / "cnn-t05" / "report.html").prose


def test_a_choice_is_by_validation_images_whatever_the_test_images_say(searched):
    _, runs = load_suite_runs(searched[0])
    swapped = []
    for run in runs[1:6]:
        splits = run.metrics["splits"]
        metrics = run.metrics | {"splits": {"val": splits["val"], "test": runs[6 - int(run.name[-1])].splits["test"]}}
        swapped.append(type(run)(run.name, run.folder, "done", "", run.record, metrics, run.history, "cnn"))
    assert max(swapped, key=lambda r: r.score()["value"]).name != "cnn-t02"
    assert [r.name for r in trials_apart(swapped)[0]] == ["cnn-t02"]


def test_without_any_result_all_trials_are_shown(searched):
    _, runs = load_suite_runs(searched[0])
    assert trials_apart(runs[6:]) == (runs[6:], [])
