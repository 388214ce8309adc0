"""What a run makes of its config: metadata, balanced draws, and training on from another run."""

import shutil
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

from PIL import Image, ImageOps

from dermnb.runs import prepare
from dermnb.core import ConfigError, make_config, read_json, write_json
from dermnb.runs.folders import file_hash, is_done
from dermnb.runs.prepare import (
    FACTS,
    audit_run,
    prepare_data,
    split_batches,
    _trained_before,
)
from dermnb.runs.train import build_model, _copy_trunk, run_experiment

SMALL = {"image_size": 32, "epochs": 1, "batch_size": 16, "bootstrap": 100}


def config_of(demo_dir, **more):
    return make_config({**SMALL, "data_dir": str(demo_dir), **more})


def as_csv(folder, manifest, prefix=""):
    "A dataset of these pictures, and its table; other names where there is a prefix."
    folder.mkdir(exist_ok=True)
    for path in manifest["path"]:
        shutil.copy(path, folder)
    table = manifest[["image_id", "path", "label", "lesion_id"]].copy()
    table["path"] = [Path(path).name for path in table["path"]]
    for column in ("image_id", "lesion_id"):
        table[column] = prefix + table[column].astype(str)
    table.to_csv(folder / "table.csv", index=False)
    return table


def test_a_positive_class_is_looked_up_before_the_images_are_decoded(demo_dir, monkeypatch):
    monkeypatch.setattr("dermnb.runs.prepare.build_store", lambda *args, **more: pytest.fail("decoded"))
    for taxonomy, sentence in (("isic8", "is for two classes; here are 8"), ("dx7:mel,nv", "'mel'")):
        with pytest.raises(ConfigError, match=sentence):
            prepare_data(config_of(demo_dir, taxonomy=taxonomy, positive="melanom", on_problem="exclude"))


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
        _copy_trunk(base, model, "mobilenetv2")
    config = config_of(demo_dir, metadata="only")
    data = prepare_data(config)
    with pytest.raises(ConfigError, match="same backbone"):
        _copy_trunk(base, build_model(config, data), "cnn")
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
    table = as_csv(tmp_path, manifest)
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
    # What was kept is not called left out.
    assert "shared lesion" not in set(allowed.dataset.problems["kind"])
    without = prepare_data(looked.model_copy(update={"on_problem": "exclude"}))
    assert without.dataset.problems["kind"].tolist() == ["shared lesion"]
    assert len(without.manifest) == len(allowed.manifest) - 1


def test_a_base_that_was_trained_on_test_images_of_another_dataset(base, demo_dir):
    held = prepare_data(config_of(demo_dir)).manifest
    split = pd.read_parquet(base / "split.parquet")
    trained = set(split.query("split == 'train'")["image_id"])
    renamed = held.assign(image_id="other_" + held["image_id"], split="test")
    found, note = _trained_before(renamed, base)
    assert note == ""
    assert set(found["b"]) == trained & set(held["image_id"])
    assert (found["a"] == "other_" + found["b"]).all()
    assert set(found["finding"]) == {"across parts"}
    assert set(found["part_b"]) == {f"train of {base.name}"}
    own = held.assign(split=held["image_id"].map(split.set_index("image_id")["split"]))
    found, note = _trained_before(own, base, "network")
    assert found.empty and note == ""  # the same images in the same parts
    # Two datasets that number their images alike: each picture has its neighbor's id.
    shifted = own.assign(path=np.roll(own["path"], 1))
    pictures = np.roll(own["image_id"], 1)[(own["split"] != "train").to_numpy()]
    found, _ = _trained_before(shifted, base)
    assert set(found["b"]) == trained & set(pictures)
    assert set(found["kind"]) == {"same bytes"}


def test_what_was_not_compared_with_a_base_is_said(base, demo_dir, tmp_path, monkeypatch):
    manifest = prepare_data(config_of(demo_dir)).manifest.head(30)
    manifest = manifest.assign(image_id="other_" + manifest["image_id"], split="test")
    assert "of base base were compared by hashes only" in _trained_before(manifest, base, "network")[1]
    bare = tmp_path / "bare"
    bare.mkdir()
    write_json(bare / "run.json", {"config": {"base": str(base)}})
    found, note = _trained_before(manifest, bare)
    assert note == "the training images of base bare were not compared: it kept no fingerprints"
    assert set(found["part_b"]) == {"train of base"}  # those further up were
    write_json(bare / "run.json", {"config": {"base": "gone"}})
    found, note = _trained_before(manifest, bare)
    assert found.empty and note.endswith("images of gone were not compared: that run is not here")

    def hurried(*args, **more):
        pairs = find_pairs(*args, **more)
        pairs.attrs["unseen"] = 1234
        return pairs

    find_pairs = prepare.find_pairs
    monkeypatch.setattr(prepare, "find_pairs", hurried)
    assert _trained_before(manifest, base)[1].startswith("1,234 candidates with the training")


def test_a_base_that_knows_the_pictures_of_another_dataset_stops_the_run(
    base, demo_dir, tmp_path
):
    as_csv(tmp_path, prepare_data(config_of(demo_dir)).manifest.groupby("label").head(8), "x")
    config = config_of(tmp_path, dataset="csv", base=str(base))
    with pytest.raises(ConfigError, match=r"data leakage between splits: .*\(train of base\) by same bytes"):
        prepare_data(config, base)
    allowed = prepare_data(config.model_copy(update={"allow_leakage": True}), base)
    assert allowed.audit["leaks"]["same bytes"] > 0
    assert {f["part_b"] for f in allowed.audit["findings"]} == {"train of base"}


def recorded(folder, config, data, **more):
    "As much of a finished run as its audit reads."
    folder.mkdir(exist_ok=True)
    columns = ["image_id", "lesion_id", "patient_id", "label", "split"]
    data.manifest[columns].to_parquet(folder / "split.parquet", index=False)
    settings = config.model_dump(exclude={"data_dir"})
    write_json(folder / "run.json", {"config": settings, "audit": data.audit} | more)
    return folder


def test_a_finished_run_is_audited_as_it_was_before_its_split(demo_dir, tmp_path, monkeypatch):
    images, runs = tmp_path / "images", tmp_path / "runs"
    runs.mkdir()
    manifest = prepare_data(config_of(demo_dir)).manifest.drop_duplicates("lesion_id")
    table = as_csv(images, manifest.groupby("label").head(6))
    twins = table.head(3).assign(lesion_id=["T0", "T1", "T2"], image_id=["t0", "t1", "t2"])
    for i, path in enumerate(twins["path"]):
        ImageOps.mirror(Image.open(images / path)).save(images / f"t{i}.png")
    twins["path"] = ["t0.png", "t1.png", "t2.png"]
    pd.concat([table, twins]).to_csv(images / "table.csv", index=False)
    config = config_of(images, dataset="csv")
    data = prepare_data(config)
    assert data.audit["new_pairs"] == {"near duplicate": 3} and data.audit["leaks"] == {}
    run = recorded(runs / "run", config, data)

    def audited(run, method="hashes"):
        found = audit_run(run, str(images), method)
        assert read_json(run / "run.json")["audit"] == found
        return {k: v for k, v in found.items() if k != "seconds"}

    own = {k: v for k, v in data.audit.items() if k != "seconds"}
    assert audited(run) == audited(run) == own
    # A run that looked for nothing before its split, and divided a lesion by it.
    unaware = data.manifest.assign(
        lesion_id=pd.concat([table, twins]).set_index("image_id")["lesion_id"]
        .reindex(data.manifest["image_id"]).to_numpy()
    )  # fmt: skip
    unaware.loc[unaware["image_id"] == "t0", "split"] = "test"
    unaware.loc[unaware["image_id"] == table["image_id"].iloc[0], "split"] = "train"
    late = recorded(runs / "late", config, replace(data, manifest=unaware, audit={}))
    found = audited(late)
    assert found["afterwards"] and found["leaks"] == {"near duplicate": 1}
    assert audited(late) == found  # once afterwards, always afterwards

    by_hashes = prepare.audit_images
    monkeypatch.setattr(
        prepare,
        "audit_images",
        lambda manifest, cache, method: replace(by_hashes(manifest, cache), method=method),
    )
    stronger = audited(run, "network")  # than what the run knew before its split
    assert stronger["method"] == "network" and stronger["afterwards"]
    with pytest.raises(ConfigError, match="--network"):
        audit_run(run, str(images))
    assert read_json(run / "run.json")["audit"]["method"] == "network"


def test_a_finished_run_is_audited_with_what_its_bases_were_trained_on(base, demo_dir, tmp_path):
    images, runs = tmp_path / "images", tmp_path / "runs"
    runs.mkdir()
    as_csv(images, prepare_data(config_of(demo_dir)).manifest.groupby("label").head(8), "x")
    config = config_of(images, dataset="csv", base=str(base), audit="none")
    data = prepare_data(config, base)
    assert data.audit["leaks"] == {}  # nothing was looked for
    child = recorded(runs / "child", config, data)
    found = audit_run(child, str(images))
    assert found["leaks"]["same bytes"] > 0 and found["afterwards"] and found["note"] == ""
    assert {f["part_b"] for f in found["findings"]} == {"train of base"}
    # An ensemble knows what the bases of its members know.
    both = config.model_copy(update={"base": "", "members": ["child", "other"]})
    ensemble = audit_run(recorded(runs / "both", both, data), str(images))
    assert ensemble["leaks"] == found["leaks"]
    assert "other were not compared: that run is not here" in ensemble["note"]



def test_what_a_run_records_beside_its_results(base):
    record, split = read_json(base / "run.json"), pd.read_parquet(base / "split.parquet")
    assert set(FACTS) <= set(split)
    assert record["audit"]["method"] == "hashes" and record["audit"]["leaks"] == {}
    assert record["audit"]["images"] >= len(split)
