"""What frozen layers make of an image is kept: where it is cut, what is found again, and that training cannot tell."""

import shutil

import keras
import numpy as np
import pytest
from tolerances import FLOAT32

from dermnb.core import cache_dir, make_config
from dermnb.data.images import make_batches
from dermnb.nets import device, features
from dermnb.nets.backbones import BACKBONES
from dermnb.nets.features import FeatureStore, find_cut, lower_part, plan_features, scaled_network, upper_part
from dermnb.nets.finetune import Stage, set_trainable
from dermnb.nets.models import build_classifier, set_batch_norm_momentum
from dermnb.runs.prepare import prepare_data
from dermnb.runs.train import build_model, train_model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A file of the small network's weights, as if it had been trained before."
    from dermnb.nets.weights import load_backbone

    path = tmp_path_factory.mktemp("weights") / "cnn.weights.h5"
    load_backbone("cnn", keras.Input((32, 32, 3)), "none").save_weights(path)
    return str(path)


@pytest.fixture
def train(demo_dir, weights, monkeypatch, tmp_path):
    "Trains a small run: the network, its history, and what was kept."
    monkeypatch.setattr(features, "_BYTES_A_SECOND", 1e15)  # so that keeping pays in seconds of training
    if (cache_dir() / "features").exists():
        shutil.rmtree(cache_dir() / "features")

    def run(**changes):
        small = {"image_size": 32, "batch_size": 16, "split_seed": 1, "weights": weights, "augment": "none"}
        recipe = {"schedule": "head_then_top", "unfreeze": "layers:3", "head_epochs": 2, "epochs": 4}
        config = make_config({**small, **recipe, "optimizer": "sgd", "data_dir": str(demo_dir), **changes})
        data = prepare_data(config.data)
        network = build_model(config, data)
        history = train_model(config, data, network)
        return network, history, history.attrs["features"]

    return run


@pytest.mark.parametrize("name", ["mobilenetv2", "efficientnetb0", "xception"])
def test_the_parts_are_the_network(name):
    network = build_classifier(name, 3, 48, dropout=0.0)
    images = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 3)).repeat(8, 1).repeat(8, 2)
    images = images.astype("float32")
    set_batch_norm_momentum(network, 0.0)
    network(images, training=True)  # or nothing would be left of an image after so many random layers
    whole, several = np.asarray(network(images)), 0
    assert whole.std(axis=0).min() > 1e-3
    for what in ("head", "layers:7", "layers:16", "weighted_layers:9", "blocks:3"):
        set_trainable(network, BACKBONES[name], what)
        cut = find_cut(network)
        several += len(cut) > 1
        below, above = lower_part(network, cut), upper_part(network, cut)
        assert not below.trainable_weights, what
        trains = {id(w) for w in network.trainable_weights}
        assert {id(w) for w in above.trainable_weights} == trains, what
        # The first layer above the cut trains, or is dropout: there is nothing more to keep.
        between = below(images)
        out = np.asarray(above(tuple(between) if len(cut) > 1 else between))
        # Sums in another order, and random layers that amplify the difference.
        assert np.abs(out - whole).max() < 1e4 * FLOAT32 * np.abs(whole).max(), what
    assert several, "no boundary through a block was tried"
    set_trainable(network, BACKBONES[name], "all")
    scaled, plain = scaled_network(network), network.get_weights()
    assert np.abs(np.asarray(scaled(images)) - whole).max() < 1e4 * FLOAT32 * np.abs(whole).max()
    assert sorted(map(id, scaled.trainable_weights)) == sorted(map(id, network.trainable_weights))
    if name != "mobilenetv2":  # the others take long to trace
        return
    steps = []
    for trained in (network, scaled):
        network.set_weights(plain)
        trained.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
        trained.fit(images, np.arange(8) % 3, verbose=0)
        steps.append(np.concatenate([(a - b).ravel() for a, b in zip(network.get_weights(), plain, strict=True)]))
    assert 0 < np.linalg.norm(steps[0] - steps[1]) < 1e4 * FLOAT32 * np.linalg.norm(steps[0])
    set_trainable(network, BACKBONES[name], "all", True)
    assert find_cut(network) == []


def test_dropout_and_batch_norm_that_train_are_above_the_cut():
    x = inputs = keras.Input((8, 8, 3), name="image")
    x = keras.layers.Conv2D(4, 3, name="conv")(x)
    x = keras.layers.Dropout(0.5, name="drop")(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    network = keras.Model(inputs, keras.layers.Dense(2, name="logits")(x))

    def cut():
        return [t._keras_history.operation.name for t in find_cut(network)]

    for name in ("conv", "norm"):
        network.get_layer(name).trainable = False
    assert cut() == ["conv"]
    network.get_layer("drop").rate = 0.0
    assert cut() == ["pool"]
    network.get_layer("norm").trainable = True
    assert cut() == ["drop"]


@pytest.mark.parametrize("changes", [{}, {"metadata": "concat", "batch_size": 20}])
def test_a_training_on_features_ends_as_one_on_images(train, monkeypatch, changes):
    kept, history, record = train(**changes)
    assert record["stages"] == [True, True] and record["made"] == record["rows"]
    monkeypatch.setenv("DERMNB_FEATURES_MB", "0")
    shutil.rmtree(cache_dir() / "features")
    plain, expected, nothing = train(**changes)
    assert nothing is None
    for ours, theirs in zip(kept.weights, plain.weights, strict=True):
        a, b = np.asarray(ours), np.asarray(theirs)
        assert np.allclose(a, b, rtol=100 * FLOAT32, atol=100 * FLOAT32), ours.path
    numbers = ["loss", "accuracy", "val_loss", "val_accuracy"]
    assert np.allclose(history[numbers], expected[numbers], rtol=100 * FLOAT32)
    assert history["trainable_parameters"].tolist() == expected["trainable_parameters"].tolist()


def test_layers_that_an_earlier_stage_trains_are_not_kept_below_a_later_cut(train, monkeypatch):
    backwards = (
        Stage("top", 1, "layers:3", 0.1),
        Stage("head", 1, "head", 0.1),
    )
    monkeypatch.setattr("dermnb.runs.train.make_schedule", lambda config: backwards)
    kept, _, record = train()
    assert record["stages"] == [True, True]
    monkeypatch.setenv("DERMNB_FEATURES_MB", "0")
    shutil.rmtree(cache_dir() / "features")
    plain, *_ = train()
    for a, b in zip(kept.weights, plain.weights, strict=True):
        assert np.allclose(a, b, rtol=100 * FLOAT32, atol=100 * FLOAT32), a.path


def test_runs_with_one_trunk_share_what_is_kept(train):
    *_, first = train()
    assert first["made"] == first["rows"]
    for changes in ({"seed": 1}, {"loss": "focal"}, {"head": [8]}, {"schedule": "head"}):
        *_, again = train(**changes)
        assert again["made"] == 0, changes
    *_, other = train(split_seed=2)
    assert 0 < other["made"] < other["rows"]
    *_, other = train(precision="mixed_bfloat16")
    assert other["made"] == other["rows"]


def test_what_is_nearer_to_the_output_is_made_of_what_is_kept_below(train, monkeypatch):
    *_, first = train(head_epochs=0, epochs=2)  # one stage, and its cut
    assert first["stages"] == [True]
    read = []
    monkeypatch.setattr(features._Images, "read", lambda *asked: read.append(asked))
    expected, _, record = train(schedule="head", epochs=2)
    assert record["made"] == record["rows"] and not read
    monkeypatch.undo()
    monkeypatch.setenv("DERMNB_FEATURES_MB", "0")
    shutil.rmtree(cache_dir() / "features")
    network, *_ = train(schedule="head", epochs=2)
    for a, b in zip(expected.weights, network.weights, strict=True):
        assert np.allclose(a, b, rtol=100 * FLOAT32, atol=100 * FLOAT32), a.path


def test_views_are_shared_by_seeds_and_differ(train):
    *_, one = train(augment="light", views=1)
    *_, seed = train(augment="light", views=1, seed=5)
    *_, two = train(augment="light", views=2)
    assert one["views"] == 1 and seed["made"] == 0
    assert one["rows"] + two["made"] == two["rows"]


def test_without_room_training_is_as_before(train, monkeypatch, capsys):
    monkeypatch.setenv("DERMNB_FEATURES_MB", "0.01")
    *_, record = train()
    assert record is None
    assert "more than" in capsys.readouterr().out


def test_what_is_dropped_meanwhile_is_made_again(train, monkeypatch):
    feed, dropped = features.Reuse.feed, []

    def drop(self, number):
        if number == 1:
            dropped.append(shutil.rmtree(self.store.folder))
        return feed(self, number)

    expected, *_ = train()
    monkeypatch.setattr(features.Reuse, "feed", drop)
    network, *_ = train(seed=0)
    assert dropped
    for a, b in zip(expected.weights, network.weights, strict=True):
        assert np.allclose(a, b, rtol=100 * FLOAT32, atol=100 * FLOAT32), a.path


def test_a_torn_part_is_not_there(tmp_path):
    store = FeatureStore(tmp_path, 10)
    ids = np.frombuffer(bytes(range(64)), "V16")
    rows = np.arange(8, dtype="float32").reshape(4, 2)

    def broken():
        yield ids[:2], [rows[:2]]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.keep(["t-float32"], [(2,)], 4, broken())
    assert not store.find("t-float32", ids)[1].any()
    store.keep(["t-float32"], [(2,)], 4, [(ids, [rows])])
    assert store.find("t-float32", ids)[1].all()
    assert [f.name for f in sorted((tmp_path / "t-float32").iterdir())] == ["0000.ids", "0000.npy"]
    part = tmp_path / "t-float32" / "0000.npy"
    part.write_bytes(part.read_bytes()[:-8])
    assert not store.find("t-float32", ids)[1].any()


def test_what_was_used_last_is_dropped_last(tmp_path):
    import os

    store = FeatureStore(tmp_path, 3)
    for age, name in enumerate(("new-float32", "old-float32")):
        ids = np.frombuffer(bytes(16), "V16")
        store.keep([name], [(1024, 256)], 1, [(ids, [np.zeros((1, 1024, 256), "float32")])])
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert store.room_for(1.5)
    assert {f.name for f in tmp_path.iterdir()} == {"new-float32"}


def test_what_makes_new_images_each_epoch_is_not_kept(capsys):
    class Pixels:
        def read(self, rows):
            return np.zeros((len(rows), 16, 16, 3), "uint8")

    def batches(**more):
        return make_batches(Pixels(), np.arange(8), np.arange(8) % 2, 2, 4, True, **more)

    network = build_classifier("cnn", 2, 16)
    set_trainable(network, BACKBONES["cnn"], "head")
    cuts = [find_cut(network)]
    for more, views, reason in (
        ({"augment": "light"}, 0, "views: V"),
        ({"mix": "mixup"}, 2, "mixup makes new images"),
    ):
        assert plan_features(network, [5], cuts, batches(**more), batches(), views) is None
        assert reason in capsys.readouterr().out


def test_convolutions_of_one_pixel_are_products(monkeypatch):
    tf = pytest.importorskip("tensorflow")
    from keras.src.backend.tensorflow import nn

    used, products = [], device.pixel_products
    monkeypatch.setattr(nn, "conv", nn.conv)  # put back at the end
    monkeypatch.setattr(device, "pixel_products", lambda *args: used.append(args[1].shape) or products(*args))
    device.convolve_by_products.__wrapped__()
    rng = np.random.default_rng(0)
    for k, stride in ((1, 1), (1, 2), (3, 1)):
        x, w = (tf.constant(rng.normal(size=s), tf.float32) for s in ((2, 5, 4, 3), (k, k, 3, 6)))
        with tf.GradientTape(persistent=True) as tape:
            tape.watch([x, w])
            ours, theirs = nn.conv(x, w, stride, "same"), tf.nn.conv2d(x, w, stride, "SAME")
            sums = tf.reduce_sum(ours**2), tf.reduce_sum(theirs**2)
        pairs = [(ours, theirs), *zip(*(tape.gradient(s, [x, w]) for s in sums), strict=True)]
        assert all(np.allclose(a, b, rtol=FLOAT32, atol=FLOAT32) for a, b in pairs), (k, stride)
    assert used == [(1, 1, 3, 6)]
