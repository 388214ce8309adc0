"""What a run makes of its config: metadata, balanced draws, and training on from another run."""

import shutil
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

from dermnb.core import ConfigError, make_config, read_json
from dermnb.runs import file_hash, is_done
from dermnb.train import (
    FACTS,
    build_model,
    copy_trunk,
    prepare_data,
    run_experiment,
    split_batches,
    trained_before,
)

SMALL = {"image_size": 32, "epochs": 1, "batch_size": 16, "bootstrap": 100}


def config_of(demo_dir, **more):
    return make_config({**SMALL, "data_dir": str(demo_dir), **more})


def test_metadata_are_fitted_on_training_images(demo_dir):
    config = config_of(demo_dir, metadata="concat")
    data = prepare_data(config)
    trained = data.manifest[data.manifest["split"] == "train"]
    assert data.encoder.age_mean == pytest.approx(trained["age"].mean())
    batch, _ = split_batches(config, data, "val")[0]
    rows = data.manifest.iloc[data.positions("val")[: len(batch["image"])]]
    np.testing.assert_array_equal(batch["metadata"], data.encoder.encode(rows))


def test_shuffled_metadata_are_another_patients(demo_dir):
    plain = prepare_data(config_of(demo_dir, metadata="concat"))
    mixed = prepare_data(config_of(demo_dir, metadata="concat", shuffle_metadata=True))
    assert mixed.encoder == plain.encoder
    assert mixed.manifest["image_id"].equals(plain.manifest["image_id"])
    assert not np.allclose(mixed.metadata, plain.metadata)
    for part in ("train", "val", "test"):
        rows = (plain.manifest["split"] == part).to_numpy()
        # Values move between lesions of the same part, and all images of a lesion agree.
        known = set(map(tuple, plain.metadata[rows]))
        assert set(map(tuple, mixed.metadata[rows])) <= known
    table = pd.DataFrame(mixed.metadata).groupby(mixed.manifest["lesion_id"].to_numpy())
    assert (table.nunique() <= 1).all(axis=None)


def test_draws(demo_dir):
    data = prepare_data(config_of(demo_dir, balance=9, balance_val=True))
    assert set(data.class_counts()) == {9}
    val = data.manifest.query("split == 'val'")["label"].value_counts()
    assert val.nunique() == 1
    again = prepare_data(config_of(demo_dir, balance=9, balance_val=True, seed=5))
    np.testing.assert_array_equal(again.train_positions, data.train_positions)


@pytest.fixture(scope="module")
def base(demo_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite") / "base"
    return run_experiment(config_of(demo_dir, run="base", metadata="concat"), folder)


def test_training_on(base, demo_dir):
    more = {"base": "base", "run": "child", "schedule": "head", "taxonomy": "isic8:MEL,NV"}
    config = config_of(demo_dir, metadata="concat", **more)
    data = prepare_data(config, base)
    assert data.classes == ("MEL", "NV")
    parts = pd.read_parquet(base / "split.parquet").set_index("image_id")["split"]
    assert (parts[data.manifest["image_id"]].to_numpy() == data.manifest["split"]).all()

    model = build_model(config, data, base)
    trained = keras.saving.load_model(base / "model" / "model.keras", compile=False)
    for name in ("conv1", "conv2"):
        for a, b in zip(
            model.get_layer(name).get_weights(),
            trained.get_layer(name).get_weights(),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)

    folder = run_experiment(config, base.parent / "child")
    record = read_json(folder / "run.json")
    assert record["parents"] == {"base": file_hash(base / "predictions.parquet")}
    assert record["notebook"] == "transfer"
    assert is_done(folder, config)
    # Another result of the base is another experiment.
    table = pd.read_parquet(base / "predictions.parquet")
    table.iloc[::-1].to_parquet(base / "predictions.parquet")
    assert not is_done(folder, config)
    table.to_parquet(base / "predictions.parquet", index=False)


def test_a_grandchild_tests_on_nothing_its_line_has_trained_on(base, demo_dir):
    "Also where its classes are not those of the run between."
    more = {"metadata": "concat", "schedule": "head"}
    child = config_of(demo_dir, base="base", run="mid", taxonomy="isic8:MEL,NV", **more)
    run_experiment(child, base.parent / "mid")
    config = config_of(demo_dir, base="mid", run="end", taxonomy="isic8:BCC,BKL", **more)
    data = prepare_data(config, base.parent / "mid")
    parts = pd.read_parquet(base / "split.parquet").set_index("image_id")["split"]
    assert (parts[data.manifest["image_id"]].to_numpy() == data.manifest["split"]).all()


def test_bases_that_do_not_fit(base, demo_dir, tmp_path):
    config = config_of(demo_dir, backbone="mobilenetv2")
    model = build_model(config, prepare_data(config))
    with pytest.raises(ConfigError, match="is a cnn"):
        copy_trunk(base, model, "mobilenetv2")
    config = config_of(demo_dir, metadata="only")
    data = prepare_data(config)
    with pytest.raises(ConfigError, match="same backbone"):
        copy_trunk(base, build_model(config, data), "cnn")
    with pytest.raises(ConfigError, match="no finished run 'nothing'"):
        run_experiment(config_of(demo_dir, base="nothing"), tmp_path / "child")


def test_a_listed_test_set(demo_dir, tmp_path):
    manifest = prepare_data(config_of(demo_dir)).manifest
    listed = manifest.groupby("label").head(3)["image_id"].tolist()
    table = pd.DataFrame({"image_id": [*listed, "ISIC_elsewhere"], "melanoma": 0})
    table.to_csv(tmp_path / "test.csv", index=False)
    data = prepare_data(config_of(demo_dir, test_list=str(tmp_path / "test.csv")))
    tested = data.manifest.query("split == 'test'")
    assert set(tested["image_id"]) == set(listed)
    others = data.manifest.query("split != 'test'")
    assert not set(tested["lesion_id"]) & set(others["lesion_id"])
    kinds = data.dataset.problems["kind"].value_counts()
    assert kinds["listed but absent"] == 1
    assert kinds.get("shared lesion", 0) + len(data.manifest) == len(manifest)


def test_run_without_images(demo_dir, tmp_path):
    config = config_of(demo_dir, metadata="only", schedule="scratch", epochs=2)
    folder = run_experiment(config, tmp_path / "only")
    record = read_json(folder / "run.json")
    assert record["model"]["title"] == "Age, sex and site alone"
    assert record["metadata"]["columns"][0] == "age"


def test_a_leaking_split_stops_the_run_unless_allowed(demo_dir, tmp_path):
    manifest = prepare_data(config_of(demo_dir)).manifest.groupby("label").head(12)
    table = manifest[["image_id", "path", "label", "lesion_id"]].copy()
    for path in table["path"]:
        shutil.copy(path, tmp_path)
    table["path"] = [Path(path).name for path in table["path"]]
    table["split"] = ["test" if i % 3 == 0 else "train" for i in range(len(table))]
    # One lesion id for each image, as of a source that does not know its lesions.
    table["lesion_id"] = [f"L{i}" for i in range(len(table))]
    twin = table.iloc[[1]].assign(image_id="twin", lesion_id="another", split="test")
    pd.concat([table, twin]).to_csv(tmp_path / "table.csv", index=False)
    values = {"dataset": "csv", "split": "official", "audit": "none"}
    config = config_of(tmp_path, **values)
    assert prepare_data(config).audit["method"] == "none"  # nothing was looked for
    looked = config.model_copy(update={"audit": "hashes"})
    with pytest.raises(ConfigError, match="allow_leakage"):
        prepare_data(looked)
    allowed = prepare_data(looked.model_copy(update={"allow_leakage": True}))
    assert allowed.audit["leaks"]["same bytes"] == 1
    assert {"twin", str(table["image_id"].iloc[1])} == {
        allowed.audit["findings"][0][side] for side in "ab"
    }


def test_a_base_that_was_trained_on_test_images_of_another_dataset(base, demo_dir):
    held = prepare_data(config_of(demo_dir)).manifest
    split = pd.read_parquet(base / "split.parquet")
    trained = set(split.query("split == 'train'")["image_id"])
    renamed = held.assign(image_id="other_" + held["image_id"], split="test")
    found = trained_before(renamed, base)
    assert set(found["b"]) == trained & set(held["image_id"])
    assert (found["a"] == "other_" + found["b"]).all()
    assert set(found["finding"]) == {"across parts"}
    assert set(found["part_b"]) == {f"train of {base.name}"}


def test_what_a_run_records_beside_its_results(base):
    record, split = read_json(base / "run.json"), pd.read_parquet(base / "split.parquet")
    assert set(FACTS) <= set(split)
    assert record["audit"]["method"] == "hashes" and record["audit"]["leaks"] == {}
    assert record["audit"]["images"] >= len(split)
