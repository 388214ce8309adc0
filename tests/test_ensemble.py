"""Ensembles: identities, what they refuse, and the notebook that makes one."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dermnb.runs.bundle import COMBINE
from dermnb.core import ENSEMBLE_FIELDS, ConfigError, ExperimentConfig, make_config, read_json, write_json
from dermnb.runs.ensemble import (
    agreement,
    combine,
    find_members,
    _learn_weights,
    load_members,
    mix_probabilities,
    _rank_probabilities,
    run_ensemble,
    score_table,
)
from dermnb.metrics.scores import evaluate, probability_columns, recorded_positive
from dermnb.runs.results import load_run, name_positive
from dermnb.runs.folders import file_hash, is_done, validate_run
from fabricate import make_predictions, make_run

ROOT = Path(__file__).resolve().parent.parent
CLASSES = {"bkl": "Benign keratosis", "mel": "Melanoma", "nv": "Nevus"}


def log_loss(weights, right):
    return -np.log(np.clip(right, 1e-15, None) @ weights).mean()


def finished(folder, predictions=None, **more):
    "A run that is whole: with a model, and with what runs of today record."
    more = {"classes": CLASSES, "resamples": 100, "notebook": False, **more}
    make_run(folder, predictions=predictions, **more)
    model = folder / "model"
    model.mkdir()
    with zipfile.ZipFile(model / "model.keras", "w") as archive:
        archive.writestr("model.weights.h5", "")
    write_json(model / "labels.json", {"classes": list(more["classes"])})
    record = read_json(folder / "run.json")
    record["leak"] = {"lesions": 0, "val_images": 0, "test_images": 0}
    record["dataset"]["positive"] = ""
    write_json(folder / "run.json", record)
    return folder


def change(folder, **keys):
    record = read_json(folder / "run.json")
    write_json(folder / "run.json", record | keys)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Three finished runs of different strength."
    suite = tmp_path_factory.mktemp("suite")
    for i, (name, skill) in enumerate({"a": 1.0, "b": 1.6, "c": 2.2}.items()):
        finished(suite / name, skill=skill, seed=i, lesions=200, parameters=1000 * (i + 1))
    return suite


@pytest.fixture
def suite(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "suite"))


def names(suite):
    return [suite / name for name in "abc"]


def p_of(table):
    return table[probability_columns(CLASSES)].to_numpy()


# Identities


def test_all_weight_on_one_member_is_that_member(made):
    members = load_members(names(made))
    for i, member in enumerate(members):
        weights = np.eye(3)[i] * 5
        table, used = combine(members, "mean", weights)
        assert used.tolist() == np.eye(3)[i].tolist()
        pd.testing.assert_frame_equal(table, member.predictions)


def test_equal_weights_are_the_default_and_only_their_ratio_counts(made):
    members = load_members(names(made))
    equal = combine(members, "mean")[0]
    pd.testing.assert_frame_equal(equal, combine(members, "mean", [2, 2, 2])[0])
    mean = np.mean([m.probabilities() for m in members], axis=0)
    np.testing.assert_allclose(p_of(equal), mean)
    one, two = (combine(members, "mean", w) for w in ([0.3, 0.3, 0.4], [3, 3, 4]))
    np.testing.assert_allclose(p_of(one[0]), p_of(two[0]))
    np.testing.assert_allclose(one[1], [0.3, 0.3, 0.4])


@pytest.mark.parametrize("how", COMBINE)
def test_order_of_members_and_of_their_rows_does_not_matter(suite, how):
    forth, weights = combine(load_members(names(suite)), how)
    table = pd.read_parquet(suite / "b" / "predictions.parquet")
    table.sample(frac=1, random_state=0).to_parquet(suite / "b" / "predictions.parquet")
    back, reverse = combine(load_members(names(suite)[::-1]), how)
    back = back.set_index("image_id").loc[forth["image_id"]].reset_index()
    np.testing.assert_allclose(p_of(back), p_of(forth), atol=1e-4)
    np.testing.assert_allclose(weights, reverse[::-1], atol=1e-4)
    np.testing.assert_allclose(p_of(forth).sum(axis=1), 1)
    assert (p_of(forth) >= 0).all() and weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("how", COMBINE)
def test_members_that_agree_call_what_each_calls(made, how):
    member = load_members(names(made))[2]
    table, _ = combine([member, member, member], how)
    if how == "rank":
        assert evaluate(table, list(CLASSES), resamples=2)["splits"]["test"]["metrics"][
            "macro_auc"
        ]["value"] == pytest.approx(
            member.metrics["splits"]["test"]["metrics"]["macro_auc"]["value"], abs=0.06
        )
    else:
        np.testing.assert_allclose(p_of(table), p_of(member.predictions), atol=1e-9)


@pytest.mark.parametrize("how", COMBINE)
def test_a_class_of_which_all_are_sure_stays_the_class(made, how):
    members = load_members(names(made))
    sure = members[0].predictions["image_id"].iloc[:10]
    for member in members:
        rows = member.predictions["image_id"].isin(sure)
        member.predictions.loc[rows, probability_columns(CLASSES)] = [0.0, 1.0, 0.0]
    table, _ = combine(members, how)
    assert (p_of(table)[:10].argmax(axis=1) == 1).all()


def calibrated(n, seed):
    "Probabilities (n, 3) and a truth drawn from them."
    rng = np.random.default_rng(seed)
    p = rng.dirichlet([0.4, 0.4, 0.4], n)
    y = np.array([rng.choice(3, p=row) for row in p])
    return p, y


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("place", range(3))
def test_learning_finds_the_only_informative_member(seed, place):
    p, y = calibrated(4000, seed)
    rng = np.random.default_rng(seed + 100)
    right = rng.dirichlet([0.4, 0.4, 0.4], len(y))[:, :2]  # of two that guess
    right = np.insert(right, place, p[np.arange(len(y)), y], axis=1)
    weights = _learn_weights(right)
    assert weights[place] > 0.97 and weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(20))
def test_learned_weights_are_the_minimum_on_validation(seed):
    rng = np.random.default_rng(seed)
    m = int(rng.integers(2, 7))
    right = rng.beta(*rng.uniform(0.3, 3, 2), (60, m)) ** rng.uniform(0.2, 4, m)
    right[rng.random(right.shape) < 0.02] = 0
    weights = _learn_weights(right)
    assert (weights >= 0).all() and weights.sum() == pytest.approx(1)
    best = log_loss(weights, right)
    assert best <= log_loss(np.full(m, 1 / m), right)
    for other in [*np.eye(m), *rng.dirichlet(np.full(m, 0.5), 2000)]:
        assert best <= log_loss(other, right) + 1e-6


def test_learning_survives_members_that_are_sure_and_wrong():
    right = np.zeros((10, 3))
    weights = _learn_weights(right)
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    right[:, 1] = 0.1
    assert _learn_weights(right)[1] == pytest.approx(1, abs=0.05)


def test_test_images_have_no_say(suite):
    def shuffled(table):
        rows = (table["split"] == "test").to_numpy()
        p = np.random.default_rng(0).permutation(p_of(table)[rows])
        table.loc[rows, probability_columns(CLASSES)] = p
        table.loc[rows, "y_true"] = "mel"
        return table

    before = {how: combine(load_members(names(suite)), how) for how in COMBINE}
    for folder in names(suite):
        table = shuffled(pd.read_parquet(folder / "predictions.parquet"))
        table.to_parquet(folder / "predictions.parquet")
    for how, (table, weights) in before.items():
        now_table, now_weights = combine(load_members(names(suite)), how)
        assert (now_weights == weights).all()
        val = (table["split"] == "val").to_numpy()
        assert (p_of(now_table)[val] == p_of(table)[val]).all()


def test_one_image_is_ranked_as_among_many(made):
    members = load_members(names(made))
    table, weights = combine(members, "rank")
    test = (table["split"] == "test").to_numpy()
    references = [m.probabilities("val") for m in members]
    for row in np.flatnonzero(test)[:20]:
        one = [m.probabilities()[row : row + 1] for m in members]
        mixed = mix_probabilities(one, weights, references)
        np.testing.assert_allclose(mixed[0], p_of(table)[row])


def test_ranks_by_hand_and_without_a_scale():
    reference = np.array([[0.1], [0.2], [0.2], [0.9]])
    values = np.array([[0.0], [0.1], [0.2], [0.3], [1.0]])
    ranks = _rank_probabilities(values, reference)
    assert ranks[:, 0].tolist() == [0, 0.125, 0.5, 0.75, 1]
    rng = np.random.default_rng(0)
    p, seen = rng.random((50, 4)), rng.random((30, 4))
    np.testing.assert_array_equal(
        _rank_probabilities(p, seen), _rank_probabilities(p**3, seen**3)
    )
    lowest = mix_probabilities([np.zeros((1, 4))], [1.0], [seen])
    assert lowest.tolist() == [[0.25] * 4]


def test_agreement_and_scores(made):
    members = load_members(names(made))
    table = agreement(members)
    assert (np.diag(table) == 1).all() and (table.to_numpy() == table.T.to_numpy()).all()
    called = [m.probabilities("test").argmax(axis=1) for m in members]
    assert table.loc["a", "c"] == (called[0] == called[2]).mean()
    scores = score_table({m.name: m.metrics for m in members})
    saved = members[1].metrics["splits"]["val"]["metrics"]["balanced_accuracy"]
    assert scores.loc["b", "val"].to_dict() == saved
    only_val = {"splits": {"val": members[0].metrics["splits"]["val"]}}
    assert score_table({"x": only_val})["test"].isna().all(axis=None)


# What is refused


def sentence(function, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and text.endswith("."), text
    return text


def test_members_that_differ_are_named_with_the_difference(suite):
    own = pd.read_parquet(suite / "b" / "predictions.parquet")

    def refused(table, **keys):
        folder = suite / "other"
        shutil.rmtree(folder, ignore_errors=True)
        finished(folder, predictions=table, **keys)
        return sentence(load_members, [suite / "a", folder])

    fewer = refused(own.iloc[:-2])
    assert "'a' and 'other'" in fewer and "2 images are predicted by one" in fewer
    moved = own.assign(split=own["split"].mask(own.index == 0, "val"))
    if own["split"][0] == "val":
        moved = own.assign(split=own["split"].mask(own.index == 0, "test"))
    assert "in the split of 1 images" in refused(moved)
    other = "mel" if own["y_true"][5] != "mel" else "nv"
    wrong = own.assign(y_true=own["y_true"].mask(own.index == 5, other))
    text = refused(wrong)
    assert "true class of 1 images" in text and own["image_id"][5] in text
    classes = ["nv", "bkl", "mel"]
    text = refused(own, classes={c: CLASSES[c] for c in classes})
    assert "classes of the first are bkl, mel, nv" in text and "nv, bkl, mel" in text


def test_unfinished_and_too_few_members(suite):
    assert "two runs or more" in sentence(load_members, [suite / "a"])
    assert "two runs or more" in sentence(load_members, [suite / "a", suite / "a"])
    (suite / "b" / "predictions.parquet").unlink()
    assert "predictions.parquet is absent" in sentence(load_members, names(suite))
    config = make_config({"members": ["a", "z"]})
    assert "no finished run 'z'" in sentence(find_members, config, suite)
    assert "members is empty" in sentence(find_members, make_config({}), suite)


@pytest.mark.parametrize(
    ("how", "weights", "said"),
    [
        ("median", [], "Known: mean, rank, learned"),
        ("mean", [1, 2], "2 weights for 3 members"),
        ("mean", [1, -1, 1], "from 0 up"),
        ("mean", [0, 0, 0], "not all 0"),
        ("mean", [1, np.nan, 1], "from 0 up"),
        ("learned", [1, 1, 1], "belong to combine 'mean'"),
        ("rank", [1, 1, 1], "belong to combine 'mean'"),
    ],
)
def test_bad_ways_and_weights(made, how, weights, said):
    assert said in sentence(combine, load_members(names(made)), how, weights)


def test_without_validation_there_is_only_the_mean(suite):
    for folder in names(suite):
        table = pd.read_parquet(folder / "predictions.parquet")
        table = table[table["split"] == "test"].reset_index(drop=True)
        shutil.rmtree(folder)
        finished(folder, predictions=table)
    members = load_members(names(suite))
    assert len(combine(members, "mean")[0]) == len(table)
    for how in ("rank", "learned"):
        assert "needs validation images" in sentence(combine, members, how)


# The run folder


@pytest.mark.parametrize("how", COMBINE)
def test_a_run_folder_that_counts_as_done_until_a_member_changes(suite, how):
    change(suite / "b", leak={"lesions": 3, "val_images": 1, "test_images": 4})
    change(suite / "c", metadata={"fusion": "concat", "shuffled": False})
    values = {"suite": "suite", "run": "all", "members": ["a", "b", "c"]}
    config = make_config({**values, "combine": how, "bootstrap": 100})
    folder = run_ensemble(config, suite / "all")
    assert sorted(p.name for p in suite.iterdir()) == ["a", "all", "b", "c"]
    record = validate_run(folder)
    assert is_done(folder, config)

    first = read_json(suite / "a" / "run.json")
    for key in ("classes", "class_titles", "dataset", "split"):
        assert record[key] == first[key]
    assert record["notebook"] == "ensemble" and record["suite"] == "suite"
    assert record["leak"] == {"lesions": 3, "val_images": 1, "test_images": 4}
    assert record["metadata"]["fusion"] == "concat" and record["train_draw"] is None
    assert record["parents"] == {
        name: file_hash(suite / name / "predictions.parquet") for name in "abc"
    }
    assert record["model"] == {
        "backbone": "ensemble",
        "title": "Ensemble of 3",
        "parameters": 6000,
        "flops": 540000,  # of all three together
        "trainable_parameters": 0,
        "size_mb": pytest.approx(0.0, abs=0.1),
        "weights": "",
    }
    saved = read_json(folder / "model" / "ensemble.json")
    assert [m.pop("folder") for m in saved["members"]] == ["0_a", "1_b", "2_c"]
    assert saved == record["ensemble"] and saved["schema"] == 1
    assert saved["combine"] == how and saved["classes"] == list(CLASSES)
    assert [m["run"] for m in saved["members"]] == ["a", "b", "c"]
    assert sum(m["weight"] for m in saved["members"]) == pytest.approx(1)
    assert record["timing"]["train_s"] == 3 * first["timing"]["train_s"]
    assert record["provenance"]["started"] <= record["provenance"]["finished"]

    metrics = read_json(folder / "metrics.json")
    table = pd.read_parquet(folder / "predictions.parquet")
    assert metrics == evaluate(table, list(CLASSES), resamples=100)
    split = (suite / "a" / "split.parquet").read_bytes()
    assert (folder / "split.parquet").read_bytes() == split
    assert not (folder / "history.csv").exists()

    table = pd.read_parquet(suite / "b" / "predictions.parquet")
    table.iloc[::-1].to_parquet(suite / "b" / "predictions.parquet")
    assert not is_done(folder, config)


def test_settings_are_those_that_the_members_share(suite, tmp_path):
    "What the members differ in is not filled with defaults."
    for i, name in enumerate("ab"):
        config = read_json(suite / name / "run.json")["config"]
        own = {"dataset": "ham10000", "split": "image", "image_size": 64 + i}
        change(suite / name, config=config | own)
    config = make_config({"members": ["a", "b"], "run": "both"})
    told = read_json(run_ensemble(config, suite / "both") / "run.json")["config"]
    assert (told["dataset"], told["split"]) == ("ham10000", "image")
    assert "image_size" not in told
    assert told["members"] == ["a", "b"] and told["run"] == "both"
    assert is_done(suite / "both", config)
    assert not is_done(suite / "both", config.model_copy(update={"combine": "rank"}))


def test_an_ensemble_is_audited_as_its_members_are(suite):
    audit = {"method": "hashes", "note": "", "images": 9, "seconds": 1.0, "leaks": {}}
    config = make_config({"members": ["a", "b"], "run": "both", "bootstrap": 100})

    def made():
        folder = run_ensemble(config, suite / "both")
        assert is_done(folder, config)
        return load_run(folder)

    assert made().record["audit"] is None
    for i, name in enumerate("ab"):
        change(suite / name, audit=audit | {"seconds": 1.0 + i})
    clean = made()
    assert clean.record["audit"] == audit and not clean.leaks
    of_b = read_json(suite / "b" / "run.json")["config"]
    change(suite / "b", config=of_b | {"allow_leakage": True}, audit=audit | {"leaks": {"image id": 3}})
    assert load_run(suite / "b").leaks and not load_run(suite / "a").leaks
    leaky = made()
    assert leaky.leaks and leaky.found_leaks == {"image id": 3}
    assert leaky.record["config"]["allow_leakage"]


def test_a_failed_ensemble_leaves_nothing_and_an_older_one_is_kept(suite):
    config = make_config({"run": "all", "members": ["a", "b"], "bootstrap": 100})
    run_ensemble(config, suite / "all")
    bad = make_config({"members": ["a", "gone"]})
    sentence(run_ensemble, bad, suite / "other")
    assert not (suite / "other").exists()
    run_ensemble(config.model_copy(update={"member_weights": [3.0, 1.0]}), suite / "all")
    record = validate_run(suite / "all")
    assert [m["weight"] for m in record["ensemble"]["members"]] == [0.75, 0.25]


def test_members_by_path_and_ensembles_of_ensembles(suite, tmp_path):
    config = make_config({"run": "two", "members": ["a", "b"], "bootstrap": 100})
    run_ensemble(config, suite / "two")
    elsewhere = [str(suite / "two"), str(suite / "c")]
    config = make_config({"run": "all", "members": elsewhere, "bootstrap": 100})
    folder = run_ensemble(config, tmp_path / "another" / "all")
    assert validate_run(folder)["model"]["parameters"] == 6000
    assert is_done(folder, config)


def test_two_classes_with_a_positive_one(tmp_path):
    two = {"benign": "Benign", "malignant": "Malignant"}
    for i, name in enumerate("ab"):
        predictions = make_predictions(list(two), 150, 1.0 + i, seed=i)
        folder = finished(tmp_path / name, predictions=predictions, classes=two)
        record = read_json(folder / "run.json")
        change(folder, dataset=record["dataset"] | {"positive": "benign"})
    config = make_config({"run": "both", "members": ["a", "b"], "bootstrap": 100})
    folder = run_ensemble(config, tmp_path / "both")
    table = pd.read_parquet(folder / "predictions.parquet")
    expected = evaluate(table, list(two), resamples=100, positive="benign")
    assert read_json(folder / "metrics.json") == json.loads(json.dumps(expected))
    assert recorded_positive(read_json(folder / "run.json")) == "benign"
    # What is named for the ensemble comes first, and a finished one takes it without its members.
    named = config.model_copy(update={"positive": "malignant"})
    assert is_done(folder, named) and name_positive(folder, named)
    assert recorded_positive(validate_run(folder)) == "malignant"
    assert read_json(folder / "model" / "decision.json")["positive"] == "malignant"
    assert name_positive(folder, config) and not name_positive(folder, config)
    assert recorded_positive(read_json(folder / "run.json")) == "benign"
    change(tmp_path / "b", config={"positive": "malignant"})
    assert "different positive classes" in sentence(run_ensemble, config, tmp_path / "other")
    assert run_ensemble(named, tmp_path / "other").is_dir()


def test_import_loads_no_framework():
    code = (
        "import sys, dermnb.runs.ensemble;"
        "sys.exit(any(m in sys.modules for m in ('keras', 'tensorflow', 'jax')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The notebook

NOTEBOOK = ROOT / "nbs" / "experiments" / "ensemble.ipynb"


def test_parameters_cell_has_the_defaults_of_the_config():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert 8 <= len(cells) <= 18
    assert not any("def " in "".join(c["source"]) for c in cells if c["cell_type"] == "code")
    (tagged,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    values = {}
    exec("".join(tagged["source"]), {}, values)
    fields = [*ENSEMBLE_FIELDS, "data_dir"]
    assert values.pop("folder") == "" and list(values) == fields
    assert values == {f: ExperimentConfig.model_fields[f].default for f in fields}


@pytest.mark.parametrize(
    "values",
    [{"member_weights": [0.3, 0.3, 0.4]}, {"combine": "learned"}],
    ids=lambda v: v.get("combine", "mean"),
)
def test_notebook_writes_the_run_that_the_library_writes(suite, values):
    papermill = pytest.importorskip("papermill")
    values = {"suite": "suite", "run": "all", "members": [*"abc"], "bootstrap": 100, **values}
    part = suite / ".part-all"
    part.mkdir()
    done = papermill.execute_notebook(
        str(NOTEBOOK),
        str(part / "notebook.ipynb"),
        parameters={**values, "folder": str(part)},
        progress_bar=False,
        cwd=str(ROOT),
    )
    config = make_config(values)
    assert is_done(part, config)
    library = run_ensemble(config, suite / "all")
    for name in ("predictions.parquet", "metrics.json", "model/ensemble.json"):
        assert (part / name).read_bytes() == (library / name).read_bytes()
    said = "".join(o.get("text", "") for o in done.cells[-1]["outputs"])
    score = read_json(library / "metrics.json")["splits"]["test"]["metrics"]
    assert f"{score['balanced_accuracy']['value']:.3f}" in said
    assert "best member" in said and "same class" in said
