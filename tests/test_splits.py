"""Splits: properties over many random manifests, and HAM10000's own table."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dermnb.data import splits
from dermnb.core import SPLITS, ConfigError, ExperimentConfig
from dermnb.data.splits import (
    balance_training,
    balance_validation,
    check_split,
    group_numbers,
    inherit_split,
    kfold,
    leak_counts,
    make_split,
    official_problems,
    stratified_group_split,
    take_subset,
)


def random_manifest(seed):
    "Images with gaps in both ids, patients with lesions of several classes."
    rng = np.random.default_rng(seed)
    n = int(rng.integers(40, 400))
    lesion = rng.integers(0, max(8, int(n * rng.uniform(0.3, 1))), n)
    patient = (lesion * rng.uniform(0.5, 1)).astype(int)
    classes = int(rng.integers(2, 8))
    label_of = rng.choice(classes, lesion.max() + 1, p=rng.dirichlet(np.ones(classes)))
    frame = pd.DataFrame(
        {
            "image_id": [f"I{i}" for i in rng.permutation(n)],
            "path": "",
            "label": [f"c{c}" for c in label_of[lesion]],
            "lesion_id": [f"L{i}" for i in lesion],
            "patient_id": [f"P{i}" for i in patient],
        }
    )
    frame.loc[rng.random(n) < rng.choice([0, 0.3, 1]), "lesion_id"] = pd.NA
    frame.loc[rng.random(n) < rng.choice([0, 0.3, 1]), "patient_id"] = pd.NA
    return frame


def splits_of_groups(manifest, split):
    together = pd.Series(split).groupby(group_numbers(manifest)).nunique()
    return together.max()


@pytest.mark.parametrize("seed", range(60))
def test_any_manifest_splits_without_leak_and_whatever_the_row_order(seed):
    manifest = random_manifest(seed)
    shares = [0.7, 0.15, 0.15]
    part = stratified_group_split(group_numbers(manifest), manifest["label"], shares, seed)
    for column in ("lesion_id", "patient_id"):
        known = manifest[column].notna()
        spread = pd.Series(part)[known].groupby(manifest[column][known]).nunique()
        assert (spread == 1).all()
    assert splits_of_groups(manifest, part) == 1

    order = np.random.default_rng(seed).permutation(len(manifest))
    moved = manifest.iloc[order].reset_index(drop=True)
    again = stratified_group_split(group_numbers(moved), moved["label"], shares, seed)
    assert (again == part[order]).all()


@pytest.mark.parametrize("seed", range(30))
def test_classes_keep_their_shares_when_lesions_are_many(seed):
    rng = np.random.default_rng(seed)
    lesions = 600
    label = rng.choice(["a", "b", "c"], lesions, p=[0.8, 0.15, 0.05])
    lesion = np.repeat(np.arange(lesions), rng.choice([1, 2, 4], lesions))
    part = stratified_group_split(lesion, label[lesion], [0.7, 0.15, 0.15], seed)
    for name, inside in pd.Series(part).groupby(label[lesion]):
        got = np.bincount(inside, minlength=3)
        wanted = np.array([0.7, 0.15, 0.15]) * len(inside)
        assert (np.abs(got - wanted) <= 2.5).all(), (name, got, wanted)


@pytest.mark.parametrize(
    ("lesions", "present"), [(1, 1), (2, 2), (3, 3), (4, 3), (9, 3)]
)
def test_tiny_class_serves_training_then_test_then_validation(lesions, present):
    ids = [f"{i:03d}" for i in range(100 + lesions)]
    manifest = pd.DataFrame(
        {"image_id": ids, "lesion_id": ids, "label": ["nv"] * 100 + ["rare"] * lesions}
    )
    for seed in range(5):
        split = make_split(manifest, ExperimentConfig(split_seed=seed))
        held = split.loc[split["label"] == "rare", "split"].value_counts()
        assert set(held.index) == set(["train", "test", "val"][:present])


def test_seed_changes_the_split_and_repeats_it():
    manifest = random_manifest(3).dropna(subset=["lesion_id"])
    one, same, other = (
        make_split(manifest, ExperimentConfig(split_seed=s)) for s in (1, 1, 2)
    )
    assert one["split"].equals(same["split"])
    assert not one["split"].equals(other["split"])
    assert one["image_id"].tolist() == manifest["image_id"].tolist()


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_test_each_image_once_and_validation_comes_from_the_rest(folds):
    rng = np.random.default_rng(folds)
    lesion = np.repeat(np.arange(300), rng.choice([1, 2], 300))
    manifest = pd.DataFrame(
        {
            "image_id": [f"{i:04d}" for i in range(len(lesion))],
            "lesion_id": [f"L{i}" for i in lesion],
            "label": rng.choice(["a", "b"], 300)[lesion],
        }
    )
    tested = []
    for fold in range(folds):
        config = ExperimentConfig(
            split="kfold", folds=folds, fold=fold, val_fraction=0.2
        )
        split = make_split(manifest, config)
        check_split(split)
        tested += split.loc[split["split"] == "test", "image_id"].tolist()
        assert abs((split["split"] == "val").mean() - 0.2) < 0.02
    assert sorted(tested) == manifest["image_id"].tolist()
    assert np.ptp(np.bincount(kfold(manifest, folds))) <= 6


def test_official_split_is_kept_and_validation_carved_by_lesion():
    manifest = random_manifest(11)
    ours = make_split(manifest, ExperimentConfig())
    official = ours.assign(split=ours["split"].replace({"val": "train"}))
    split = make_split(official, ExperimentConfig(split="official", val_fraction=0.2))
    assert ((split["split"] == "test") == (ours["split"] == "test")).all()
    check_split(split)

    with_val = make_split(ours, ExperimentConfig(split="official"))
    assert with_val["split"].tolist() == ours["split"].tolist()


def test_official_test_that_knows_a_training_lesion():
    ids = [f"i{k}" for k in range(40)]
    manifest = pd.DataFrame({"image_id": ids, "label": ["a", "b"] * 20})
    manifest["lesion_id"] = [f"L{k // 2}" for k in range(40)]
    manifest["split"] = ["train"] * 29 + ["test"] * 11
    config = ExperimentConfig(split="official")
    with pytest.raises(ConfigError, match="image 'i28'.*on_problem 'exclude'"):
        make_split(manifest, config)
    assert official_problems(manifest)["image_id"].tolist() == ["i28"]
    split = make_split(manifest, config.model_copy(update={"on_problem": "exclude"}))
    assert len(split) == 39 and "i28" not in set(split["image_id"])
    assert (split["split"] == "test").sum() == 11


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pd.NA, "split column is empty"),
        (["train"] * 20 + ["tset"] * 20, "'tset' for 20 images"),
        (["train"] * 40, "no test images"),
    ],
)
def test_official_errors(column, says):
    manifest = pd.DataFrame(
        {"image_id": [f"i{k}" for k in range(40)], "label": "a", "split": column}
    )
    with pytest.raises(ConfigError, match=says):
        make_split(manifest, ExperimentConfig(split="official"))


def test_no_images_is_an_error_of_one_sentence():
    empty = pd.DataFrame({"image_id": [], "label": [], "lesion_id": []}, dtype=str)
    with pytest.raises(ConfigError, match="0 images"):
        make_split(empty, ExperimentConfig())


@pytest.mark.parametrize("seed", range(20))
def test_subset_takes_whole_lesions_and_every_class(seed):
    manifest = random_manifest(seed)
    n = len(manifest) // 2
    part = take_subset(manifest, n, seed)
    assert set(part["label"]) == set(manifest["label"])
    groups = pd.Series(group_numbers(manifest), manifest["image_id"])
    taken = groups[part["image_id"]].unique()
    assert sorted(groups.index[groups.isin(taken)]) == sorted(part["image_id"])
    moved = manifest.sample(frac=1, random_state=seed)
    assert set(take_subset(moved, n, seed)["image_id"]) == set(part["image_id"])
    assert (
        len(take_subset(manifest, 0))
        == len(take_subset(manifest, 10**9))
        == len(manifest)
    )


def test_balanced_draw_is_exact_from_training_and_free_of_row_order():
    manifest = make_split(random_manifest(5), ExperimentConfig())
    counts = manifest[manifest["split"] == "train"]["label"].value_counts()
    per_class = int(counts.median())
    drawn = manifest.iloc[balance_training(manifest, per_class, seed=2)]
    assert set(drawn["split"]) == {"train"}
    assert (drawn["label"].value_counts() == per_class).all()
    for name, held in counts.items():
        times = drawn[drawn["label"] == name]["image_id"].value_counts()
        assert times.max() <= -(-per_class // held)
        assert held > per_class or times.min() >= per_class // held
    moved = manifest.sample(frac=1, random_state=0)
    again = moved.iloc[balance_training(moved, per_class, seed=2)]
    assert sorted(again["image_id"]) == sorted(drawn["image_id"])
    assert (
        balance_training(manifest, 0) == np.flatnonzero(manifest.split == "train")
    ).all()


CLEAN = {"lesions": 0, "val_images": 0, "test_images": 0}


@pytest.mark.parametrize("seed", range(10))
def test_image_split_leaks_and_keeps_every_class_in_proportion(seed):
    rng = np.random.default_rng(seed)
    lesion = np.repeat(np.arange(300), rng.choice([1, 2, 3], 300))
    manifest = pd.DataFrame(
        {
            "image_id": [f"{i:04d}" for i in rng.permutation(len(lesion))],
            "lesion_id": [f"L{i}" for i in lesion],
            "label": rng.choice(["a", "b", "c"], 300, p=[0.7, 0.2, 0.1])[lesion],
        }
    )
    config = ExperimentConfig(
        split="image", allow_leakage=True, split_seed=seed
    )
    split = make_split(manifest, config)
    shares = pd.crosstab(split["label"], split["split"])
    expected = shares.sum(axis=1)
    assert ((shares["test"] - 0.15 * expected).abs() <= 1).all()
    assert ((shares["val"] - 0.15 * expected).abs() <= 1).all()
    with pytest.raises(ConfigError, match="more than one split"):
        check_split(split)

    trained = set(split.loc[split["split"] == "train", "lesion_id"])
    counts = leak_counts(split)
    for part in ("val", "test"):
        of_part = split.loc[split["split"] == part, "lesion_id"]
        assert counts[f"{part}_images"] == of_part.isin(trained).sum() > 0
    held_out = split.loc[split["split"] != "train", "lesion_id"]
    assert counts["lesions"] == held_out[held_out.isin(trained)].nunique()
    by_lesion = config.model_copy(update={"split": "lesion"})
    assert leak_counts(make_split(manifest, by_lesion)) == CLEAN

    moved = make_split(manifest.sample(frac=1, random_state=seed), config)
    of = [t.set_index("image_id")["split"].sort_index() for t in (split, moved)]
    assert of[0].equals(of[1])


def test_image_split_still_refuses_a_split_without_images():
    manifest = pd.DataFrame({"image_id": ["a", "b"], "label": ["x", "x"]})
    with pytest.raises(ConfigError, match="leaves no"):
        make_split(manifest, ExperimentConfig(split="image", allow_leakage=True))


def test_leak_between_validation_and_test_is_none_to_training():
    manifest = pd.DataFrame(
        {
            "image_id": list("abcd"),
            "lesion_id": ["1", "2", "2", None],
            "split": ["train", "val", "test", "train"],
        }
    )
    assert leak_counts(manifest) == CLEAN
    by_patient = manifest.assign(patient_id=["p", "p", None, None])
    assert leak_counts(by_patient) == {"lesions": 1, "val_images": 1, "test_images": 1}


@pytest.mark.parametrize("column", ["image_id", "image", "isic_id"])
def test_listed_images_are_the_test_and_their_siblings_are_left_out(tmp_path, column):
    manifest = random_manifest(4)
    groups = pd.Series(group_numbers(manifest))
    chosen = manifest["image_id"].sample(12, random_state=1).tolist()
    path = tmp_path / "part3.csv"
    pd.DataFrame({column: [*chosen, "X1", "X2"], "melanoma": "0.0"}).to_csv(path)
    config = ExperimentConfig(test_list=str(path), val_fraction=0.2)
    split = make_split(manifest, config)
    check_split(split)
    tests = split.loc[split["split"] == "test", "image_id"]
    assert sorted(tests) == sorted(chosen)

    siblings = groups.isin(groups[manifest["image_id"].isin(chosen)])
    siblings &= ~manifest["image_id"].isin(chosen)
    problems = splits.test_list_problems(manifest, path)
    assert list(problems) == list(official_problems(split))
    beside = problems.loc[problems["kind"] == "shared lesion", "image_id"]
    assert set(beside) == set(manifest["image_id"][siblings])
    assert set(beside).isdisjoint(split["image_id"])
    assert len(split) + len(beside) == len(manifest)
    absent = problems.loc[problems["kind"] == "listed but absent", "image_id"]
    assert absent.tolist() == ["X1", "X2"]
    rest = split[split["split"] != "test"]
    assert abs((rest["split"] == "val").mean() - 0.2) < 0.05


def test_list_that_leaves_nothing_in_the_way_has_an_empty_table(tmp_path):
    manifest = random_manifest(4)
    path = tmp_path / "all.csv"
    manifest[["image_id"]].to_csv(path, index=False)
    problems = splits.test_list_problems(manifest, path)
    assert problems.empty and list(problems) == ["kind", "image_id", "path", "detail"]
    with pytest.raises(ConfigError, match="leaves no train images"):
        make_split(manifest, ExperimentConfig(test_list=str(path)))


@pytest.mark.parametrize(
    ("text", "values", "says"),
    [
        ("image\nX1\nX2\n", {}, "none of the 2 images"),
        ("foto\nX1\n", {}, "must have a column image_id, image or isic_id"),
        ("image\nI1\n", {"split": "kfold"}, "needs split 'lesion'"),
        ("image\nI1\n", {"split": "image", "allow_leakage": True}, "needs split 'lesion'"),
        ("image\n", {}, "no rows"),
        (None, {}, "there is no file"),
    ],
)
def test_list_errors(tmp_path, text, values, says):
    path = tmp_path / "t.csv"
    if text is not None:
        path.write_text(text)
    config = ExperimentConfig(test_list=str(path), **values)
    with pytest.raises(ConfigError, match=says):
        make_split(random_manifest(1), config)


@pytest.mark.parametrize("seed", range(10))
def test_balanced_validation_draws_images_once_and_touches_nothing_else(seed):
    manifest = make_split(random_manifest(seed), ExperimentConfig())
    even = balance_validation(manifest, seed)
    before = manifest.loc[manifest["split"] == "val", "label"].value_counts()
    after = even.loc[even["split"] == "val", "label"].value_counts()
    assert (after == before.min()).all() and set(after.index) == set(before.index)
    assert not even["image_id"].duplicated().any()
    kept = manifest[manifest["image_id"].isin(even["image_id"])]
    assert kept.reset_index(drop=True).equals(even)
    assert (manifest["split"] != "val").sum() == (even["split"] != "val").sum()
    moved = balance_validation(manifest.sample(frac=1, random_state=seed), seed)
    assert set(moved["image_id"]) == set(even["image_id"])
    if before.max() > before.min() + 5:
        other = balance_validation(manifest, seed + 1)
        assert set(other["image_id"]) != set(even["image_id"])


def inheritance(seed):
    "A base's split, and a specialist's images: some classes, some of them new."
    rng = np.random.default_rng(seed)
    lesion = np.repeat(np.arange(400), rng.choice([1, 2, 3], 400))
    manifest = pd.DataFrame(
        {
            "image_id": [f"{i:04d}" for i in range(len(lesion))],
            "path": "",
            "label": np.array(["a", "b", "c"])[lesion % 3],
            "lesion_id": [f"L{i}" for i in lesion],
            "patient_id": [f"P{i // 2}" if i % 3 else pd.NA for i in lesion],
        }
    )
    known = rng.random(len(manifest)) < 0.7
    base = make_split(manifest[known], ExperimentConfig(split_seed=seed))
    some = manifest[manifest["label"].isin(["a", "b"])]
    return base, some.reset_index(drop=True)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("split", ["lesion", "kfold"])
def test_a_specialist_tests_on_nothing_that_its_base_trained_on(tmp_path, seed, split):
    base, manifest = inheritance(seed)
    columns = ["image_id", "lesion_id", "patient_id", "label", "split"]
    base[columns].to_parquet(tmp_path / "split.parquet", index=False)
    base = pd.read_parquet(tmp_path / "split.parquet")  # as a run keeps it
    config = ExperimentConfig(split=split, split_seed=seed + 1)
    result = inherit_split(manifest, base, config)
    assert result["image_id"].tolist() == manifest["image_id"].tolist()
    check_split(result)
    kept = result.merge(base, on="image_id", suffixes=("", "_base"))
    assert len(kept) < len(result)
    assert (kept["split"] == kept["split_base"]).all()
    for column in ("lesion_id", "patient_id"):
        trained = set(base.loc[base["split"] == "train", column].dropna())
        assert not result.loc[result["split"] != "train", column].isin(trained).any()
    fresh = result[~result["lesion_id"].isin(base["lesion_id"])]
    assert set(fresh["split"]) == set(SPLITS)
    moved = inherit_split(manifest.sample(frac=1, random_state=seed), base, config)
    again = moved.set_index("image_id")["split"].sort_index()
    assert again.equals(result.set_index("image_id")["split"].sort_index())


def test_an_image_level_base_hands_on_images_only():
    base, manifest = inheritance(1)
    config = ExperimentConfig(split="image", allow_leakage=True)
    base = make_split(base.drop(columns="split"), config)
    result = inherit_split(manifest, base, ExperimentConfig(split="lesion"))
    kept = result.merge(base, on="image_id", suffixes=("", "_base"))
    assert (kept["split"] == kept["split_base"]).all()
    assert leak_counts(result)["test_images"] > 0
    assert len(result) == len(manifest)


def test_inheritance_without_patients_or_without_anything_in_common():
    base, manifest = inheritance(2)
    bare = inherit_split(manifest, base.drop(columns="patient_id"), ExperimentConfig())
    kept = bare.merge(base, on="image_id", suffixes=("", "_base"))
    assert (kept["split"] == kept["split_base"]).all()
    strangers = base.assign(image_id="X" + base["image_id"], lesion_id=None)
    strangers["patient_id"] = None
    own = make_split(manifest, ExperimentConfig())
    assert inherit_split(manifest, strangers, ExperimentConfig()).equals(own)


def test_inheriting_a_split_that_has_no_test_images_is_an_error():
    base, manifest = inheritance(3)
    tests = base.loc[base["split"] == "test", "image_id"]
    known = manifest[manifest["image_id"].isin(base["image_id"])]
    known = known[~known["image_id"].isin(tests)]
    with pytest.raises(ConfigError, match="no test images"):
        inherit_split(known, base, ExperimentConfig())


def test_import_loads_no_framework():
    code = (
        "import sys, dermnb.data.splits;"
        "sys.exit(any(m in sys.modules for m in ('keras', 'tensorflow', 'jax')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ham10000_as_published():
    root = Path(__file__).parents[1]
    real = Path(os.environ.get("DERMNB_REAL_DATA", root / ".." / "shared" / "data"))
    file = real / "ham10000" / "HAM10000_metadata.csv"
    if not file.exists():
        pytest.skip(f"{file} is absent")
    manifest = pd.read_csv(file).rename(columns={"dx": "label"})
    began = time.process_time()
    split = make_split(manifest, ExperimentConfig())
    folds = kfold(manifest, 10)
    assert time.process_time() - began < 2
    check_split(split)
    shares = pd.crosstab(split["label"], split["split"], normalize="index")
    assert (shares[["test", "val"]] - 0.15).abs().max(axis=None) < 0.005
    assert split.groupby("split")["lesion_id"].nunique().sum() == 7470
    assert np.ptp(np.bincount(folds)) <= 4
