"""A training that was stopped and gone on gives the network of one that was not, bit for bit."""

import numpy as np
import pandas as pd
import pytest

from dermnb.core import make_config
from dermnb.nets import choose
from dermnb.nets.checkpoints import Checkpoint, Stopped
from dermnb.runs import train
from dermnb.runs.prepare import prepare_data
from dermnb.runs.train import build_model, predict_splits, settle, train_model

SMALL = {"image_size": 32, "bootstrap": 100, "batch_size": 16, "split_seed": 1}
# What a recipe must carry over a stop, and epochs after which it is stopped.
RECIPES = {
    "plateau, early stopping, mixup, focal loss": (
        {"epochs": 5, "decay": "plateau", "early_stopping": 3, "learning_rate": 0.05}
        | {"loss": "focal", "class_weights": "balanced", "warmup_epochs": 1, "mix": "mixup"},
        [1, 2, 3],
    ),
    "cosine, bfloat16, cutmix, balanced draw": (
        {"epochs": 3, "decay": "cosine", "precision": "mixed_bfloat16"}
        | {"mix": "cutmix", "balance": 12},
        [1, 2],
    ),
    "float16 with its loss scale, SGD": (
        {"epochs": 2, "precision": "mixed_float16", "optimizer": "sgd", "learning_rate": 0.01},
        [1],
    ),
    "stages, AdamW, metadata, dermoscopy": (
        {"schedule": "head_then_top", "unfreeze": "blocks:1", "head_epochs": 1, "epochs": 3}
        | {"optimizer": "adamw", "metadata": "concat", "augment": "dermoscopy"},
        [1, 2],
    ),
    "features kept of the frozen layers, two views, metadata": (
        {"schedule": "gradual", "unfreeze": "layers:3", "head_epochs": 2, "epochs": 4}
        | {"views": 2, "metadata": "concat", "early_stopping": 3},
        [1, 2, 3],
    ),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A file of the small network's weights, as if it had been trained before."
    from dermnb.nets.weights import load_backbone

    path = tmp_path_factory.mktemp("weights") / "cnn.weights.h5"
    import keras

    load_backbone("cnn", keras.Input((32, 32, 3)), "none").save_weights(path)
    return str(path)


def stopped_after(epochs, config, data, folder, monkeypatch):
    "Train with a stop after each of `epochs`; what is left is trained by a network that knows nothing."
    monkeypatch.setenv("DERMNB_CHECKPOINT", str(folder))
    for k in [*epochs, None]:
        # The time is up at each epoch's end; it is not looked at after the last stop.
        monkeypatch.setenv("DERMNB_STOP_AT", "1" if k else "0")
        network = build_model(config, data)
        if k is None:
            return network, train_model(config, data, network)
        with pytest.raises(Stopped, match=f"after epoch {k} of"):
            train_model(config, data, network)
        about = read_about(folder / "checkpoint.npz")
        assert (about["epoch"], len(about["rows"])) == (k, k)


def read_about(path):
    import json

    with np.load(path, allow_pickle=False) as file:
        return json.loads(file["about"].item())


@pytest.mark.parametrize("name", RECIPES)
def test_stopped_and_gone_on(name, demo_dir, weights, tmp_path, monkeypatch):
    recipe, stops = RECIPES[name]
    if recipe.get("schedule"):
        recipe = recipe | {"weights": weights}
    monkeypatch.setattr("dermnb.nets.features._BYTES_A_SECOND", 1e15)  # so that they are kept
    config = make_config({**SMALL, **recipe, "data_dir": str(demo_dir)})
    data = prepare_data(config.data)
    undisturbed = build_model(config, data)
    history = train_model(config, data, undisturbed)
    assert bool(history.attrs["features"]) == bool(config.views)
    network, again = stopped_after(stops, config, data, tmp_path, monkeypatch)
    assert again.attrs["resumed"] == stops and history.attrs["resumed"] == []
    assert again.attrs["restored_epoch"] == history.attrs["restored_epoch"]
    pd.testing.assert_frame_equal(
        history.drop(columns="seconds"), again.drop(columns="seconds"), check_exact=True
    )
    for ours, theirs in zip(network.variables, undisturbed.variables, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs)), ours.path
    pd.testing.assert_frame_equal(
        predict_splits(config, data, network),
        predict_splits(config, data, undisturbed),
        check_exact=True,
    )


def test_settings_and_images_of_another_training_are_not_gone_on_from(
    demo_dir, tmp_path, monkeypatch, capsys
):
    config = make_config({**SMALL, "data_dir": str(demo_dir), "epochs": 1})
    data = prepare_data(config.data)
    monkeypatch.setenv("DERMNB_CHECKPOINT", str(tmp_path))
    train_model(config, data, build_model(config, data))
    before = read_about(tmp_path / "checkpoint.npz")["key"]
    other = config.model_copy(update={"split_seed": 2, "seed": 5})
    data = prepare_data(other.data)
    history = train_model(other, data, build_model(other, data))
    assert history.attrs["resumed"] == []
    said = capsys.readouterr().out
    assert "is not used: config (seed 0 -> 5, split_seed 1 -> 2), images, network changed" in said
    now = read_about(tmp_path / "checkpoint.npz")["key"]
    assert {k for k in now if now[k] != before[k]} == {"config", "images", "network"}


def test_measuring_otherwise_changes_no_training(demo_dir, tmp_path, monkeypatch):
    config = make_config({**SMALL, "data_dir": str(demo_dir), "epochs": 1})
    data = prepare_data(config.data)
    monkeypatch.setenv("DERMNB_CHECKPOINT", str(tmp_path))
    train_model(config, data, build_model(config, data))
    other = config.model_copy(update={"bootstrap": 500, "explain": 9, "run": "b"})
    assert train_model(other, data, build_model(other, data)).attrs["resumed"] == [1]


def test_what_was_auto_stays_as_the_training_began(demo_dir, tmp_path, monkeypatch, capsys):
    "Measured, remembered, resumed or written out: the same training, bit for bit."
    asked = {"epochs": 2, "batch_size": "auto", "precision": "auto", "data_dir": str(demo_dir)}
    config = make_config({**SMALL, **asked})
    data = prepare_data(config.data)
    measured = train.measure_steps

    def rigged(winner):  # real steps, so that what they leave behind would show
        def steps(*given):
            found = measured(*given)
            assert all(0 < s < 1 for row in found.values() for s in row.values())
            return {p: {n: 1 + ((p, n) != winner) for n in row} for p, row in found.items()}

        return steps

    monkeypatch.setattr(choose, "_LEAST_STEPS", 1)
    monkeypatch.setenv("DERMNB_CACHE", str(tmp_path))
    monkeypatch.setenv("DERMNB_CHECKPOINT", str(tmp_path))
    monkeypatch.setenv("DERMNB_STOP_AT", "1")
    monkeypatch.setattr(train, "measure_steps", rigged(("mixed_bfloat16", 64)))
    settled = settle(config, data)
    assert (settled.precision, settled.batch_size) == ("mixed_bfloat16", 64)
    assert settled.learning_rate == pytest.approx(1e-3 * 2**0.5, rel=1e-3)
    assert settle(config, data).chosen == settled.chosen  # remembered
    with pytest.raises(Stopped):
        train_model(settled, data, build_model(settled, data))
    for file in (tmp_path / "steps").glob("*.json"):
        file.unlink()
    monkeypatch.setattr(train, "measure_steps", rigged(("float32", 32)))
    again = settle(config, data)
    assert again.chosen == settled.chosen and again.asked == config
    assert "as the training began: precision mixed_bfloat16" in capsys.readouterr().out
    network = build_model(again, data)
    assert train_model(again, data, network).attrs["resumed"] == [1]
    monkeypatch.delenv("DERMNB_CHECKPOINT")
    assert settle(config, data).batch_size == 32  # a new training is measured
    values = {name: c["value"] for name, c in settled.chosen.items()}
    plain = make_config({**SMALL, **asked, **values})
    undisturbed = build_model(plain, data)
    monkeypatch.setenv("DERMNB_STOP_AT", "0")
    train_model(plain, data, undisturbed)
    for ours, theirs in zip(network.variables, undisturbed.variables, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs)), ours.path


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "one byte"])
def test_a_broken_checkpoint_is_said_and_not_used(damage, tmp_path):
    said = []
    checkpoint = Checkpoint(tmp_path / "checkpoint.npz", {"config": "a"}, said.append)
    checkpoint.save({"epoch": 1}, {"network/0": np.arange(1000.0)})
    whole = checkpoint.path.read_bytes()
    middle = len(whole) // 2
    checkpoint.path.write_bytes(
        {
            "cut": whole[:middle],
            "noise": np.random.default_rng(0).bytes(len(whole)),
            "empty": b"",
            "one byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        }[damage]
    )
    assert checkpoint.load() is None
    assert len(said) == 1 and "cannot be read" in said[0] and "starts anew" in said[0]


def test_a_checkpoint_that_cannot_be_written_costs_no_training(tmp_path, monkeypatch):
    said = []
    gone = Checkpoint(tmp_path / "no" / "checkpoint.npz", {}, said.append)
    assert [gone.save({"epoch": k}, {"a": np.zeros(9)}) for k in (1, 2)] == [False, False]
    assert len(said) == 1 and "No such file or directory" in said[0]  # once for each reason
    monkeypatch.setenv("DERMNB_CHECKPOINT_MB", "1")
    large = Checkpoint(tmp_path / "checkpoint.npz", {}, said.append)
    assert not large.save({"epoch": 1}, {"a": np.zeros(2**18)})
    assert "2 MiB are above DERMNB_CHECKPOINT_MB = 1" in said[1]
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writing_left_is_removed(tmp_path):
    (tmp_path / ".checkpoint-x.npz").write_bytes(b"half")
    checkpoint = Checkpoint(tmp_path / "checkpoint.npz", {})
    assert checkpoint.load() is None
    checkpoint.save({"epoch": 1}, {"a": np.zeros(2)})
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []
