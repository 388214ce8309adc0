"""Splits: properties over many random manifests, and HAM10000's own table."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dermnb.core import ConfigError, ExperimentConfig
from dermnb.splits import (
    PARTS,
    balance_training,
    check_split,
    group_numbers,
    kfold,
    make_split,
    official_problems,
    share_out,
    split_notes,
    split_table,
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


def groups_in_parts(manifest, part):
    together = pd.Series(part).groupby(group_numbers(manifest)).nunique()
    return together.max()


@pytest.mark.parametrize("seed", range(60))
def test_any_manifest_splits_without_leak_and_whatever_the_row_order(seed):
    manifest = random_manifest(seed)
    shares = [0.7, 0.15, 0.15]
    part = share_out(group_numbers(manifest), manifest["label"], shares, seed)
    for column in ("lesion_id", "patient_id"):
        known = manifest[column].notna()
        spread = pd.Series(part)[known].groupby(manifest[column][known]).nunique()
        assert (spread == 1).all()
    assert groups_in_parts(manifest, part) == 1

    order = np.random.default_rng(seed).permutation(len(manifest))
    moved = manifest.iloc[order].reset_index(drop=True)
    again = share_out(group_numbers(moved), moved["label"], shares, seed)
    assert (again == part[order]).all()


@pytest.mark.parametrize("seed", range(30))
def test_classes_keep_their_shares_when_lesions_are_many(seed):
    rng = np.random.default_rng(seed)
    lesions = 600
    label = rng.choice(["a", "b", "c"], lesions, p=[0.8, 0.15, 0.05])
    lesion = np.repeat(np.arange(lesions), rng.choice([1, 2, 4], lesions))
    part = share_out(lesion, label[lesion], [0.7, 0.15, 0.15], seed)
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
    notes = split_notes(split)
    assert bool(notes) == (lesions < 3)


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


def test_import_loads_no_framework():
    code = (
        "import sys, dermnb.splits;"
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
    began = time.perf_counter()
    split = make_split(manifest, ExperimentConfig())
    folds = kfold(manifest, 10)
    assert time.perf_counter() - began < 2
    check_split(split)
    shares = pd.crosstab(split["label"], split["split"], normalize="index")
    assert (shares[["test", "val"]] - 0.15).abs().max(axis=None) < 0.005
    table = split_table(split).loc["all"]
    assert sum(table[part, "lesions"] for part in PARTS) == 7470
    assert np.ptp(np.bincount(folds)) <= 4
