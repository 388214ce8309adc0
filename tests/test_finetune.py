"""Fine-tuning: what is frozen stays, what is counted is right, the best epoch comes back."""

import json
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from tolerances import FLOAT32

from dermnb.nets.backbones import BACKBONES, build_backbone
from dermnb.core import ConfigError, ExperimentConfig
from dermnb.nets.finetune import (
    HISTORY,
    Stage,
    TrainingError,
    backbone_layers,
    fit_stages,
    make_schedule,
    open_layers,
    set_trainable,
)

SPEC = SimpleNamespace(blocks=("stem", "add1", "add2"))


def network(classes=3, seed=0):
    "A stem and two residual blocks with batch norm and dropout, and a head with batch norm."
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    x = inputs = keras.Input((12, 12, 3), name="image")
    x = layers.Rescaling(1 / 127.5, -1, name="scale")(x)
    x = layers.Conv2D(6, 3, 2, padding="same", name="stem")(x)
    for block in (1, 2):
        y = layers.Conv2D(6, 3, padding="same", use_bias=False, name=f"conv{block}")(x)
        y = layers.BatchNormalization(name=f"bn{block}")(y)
        y = layers.ReLU(name=f"relu{block}")(y)
        y = layers.Dropout(0.3, name=f"drop{block}")(y)
        x = layers.Add(name=f"add{block}")([x, y])
    x = layers.GlobalAveragePooling2D(name="head_pool")(x)
    x = layers.BatchNormalization(name="head_bn")(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(x))


class Tints(keras.utils.PyDataset):
    "Noise with a tint; with `hopeless`, labels that say nothing."

    def __init__(self, n=48, seed=0, hopeless=False):
        super().__init__()
        rng = np.random.default_rng(seed)
        label = np.arange(n) % 3
        self.x = rng.uniform(0, 200, (n, 12, 12, 3)).astype("float32")
        self.x[np.arange(n), :, :, label] += 40
        self.y = np.eye(3, dtype="float32")[
            rng.permutation(label) if hopeless else label
        ]

    def __len__(self):
        return len(self.x) // 16

    def __getitem__(self, i):
        return self.x[i * 16 : i * 16 + 16], self.y[i * 16 : i * 16 + 16]


LOSS = keras.losses.CategoricalCrossentropy(from_logits=True)


def fit(model, *stages, train=None, val=None, on_epoch=None, **config):
    data = train or Tints(seed=1), val or Tints(seed=2)
    return fit_stages(
        model, SPEC, stages, *data, LOSS, ExperimentConfig(**config), on_epoch
    )


def loss_of(model, data):
    "The mean loss: `fit_stages` leaves a network compiled, or another that shares its layers."
    model.compile(loss=LOSS)
    return model.evaluate(data, verbose=0, return_dict=True)["loss"]


def weights(model):
    return {w.path: keras.ops.convert_to_numpy(w).copy() for w in model.weights}


def changed(before, after):
    return {path for path in before if not np.array_equal(before[path], after[path])}


def test_a_head_stage_changes_nothing_of_the_backbone_by_a_bit():
    model = network()
    before = weights(model)
    history = fit(model, Stage("head", 2, "head", 1e-2))
    moved = changed(before, weights(model))
    assert {path.split("/")[0] for path in moved} == {"head_bn", "logits"}
    assert list(history.columns) == HISTORY
    assert set(history["trainable_parameters"]) == {6 * 2 + 6 * 3 + 3}


@pytest.mark.parametrize("train_batch_norm", [False, True])
def test_batch_norm_statistics_move_only_when_asked(train_batch_norm):
    model = network()
    before = weights(model)
    fit(model, Stage("all", 1, "all", 1e-3, train_batch_norm=train_batch_norm))
    moved = changed(before, weights(model))
    for name in ("bn1", "bn2"):
        of_layer = {path.split("/")[1] for path in moved if path.split("/")[0] == name}
        asked = {"gamma", "beta", "moving_mean", "moving_variance"}
        assert of_layer == (asked if train_batch_norm else set())
    assert "conv1/kernel" in moved


def test_frozen_dropout_is_silent_in_training_and_back_afterwards():
    # With the trunk in inference mode and a zero rate step, the training loss of an
    # epoch is the loss that evaluation gives, but for the head's own batch norm.
    model = network()
    model.get_layer("head_bn").momentum = 1.0
    images = Tints(seed=1)
    one = SimpleNamespace(blocks=("stem", "add1", "head_bn"))
    stage = Stage("head", 1, "head", 1e-30)
    history = fit_stages(model, one, (stage,), images, images, LOSS, ExperimentConfig())
    assert history["loss"][0] == pytest.approx(history["val_loss"][0], rel=FLOAT32)
    assert model.get_layer("drop1").rate == model.get_layer("drop2").rate == 0.3


@pytest.mark.parametrize(
    ("what", "first"),
    [
        ("layers:1", "add2"),
        ("layers:3", "relu2"),
        ("weighted_layers:1", "bn2"),
        ("weighted_layers:2", "conv2"),
        ("weighted_layers:99", "image"),
        ("blocks:1", "conv2"),
        ("blocks:2", "conv1"),
        ("blocks:3", "image"),
        ("all", "image"),
    ],
)
def test_freeze_boundary(what, first):
    model = network()
    names = [layer.name for layer in backbone_layers(model, SPEC)]
    assert open_layers(model, SPEC, what) == names[names.index(first) :]
    assert set_trainable(model, SPEC, what, True)[-2:] == ["head_bn", "logits"]
    assert "bn2" not in set_trainable(model, SPEC, what)


def test_gradual_opens_five_more_layers_of_the_backbone_at_a_time():
    model = network()
    config = ExperimentConfig(
        schedule="gradual", weights="imagenet", epochs=17, unfreeze="layers:5"
    )
    stages = make_schedule(config)
    assert [s.epochs for s in stages] == [5, 5, 5, 2]
    assert [len(open_layers(model, SPEC, s.train)) for s in stages] == [0, 5, 10, 13]
    assert [s.learning_rate for s in stages] == [1e-3, 1e-4, 1e-4, 1e-4]


@pytest.mark.parametrize("weights_given", ["none", "imagenet"])
def test_batch_norm_trains_where_no_pretrained_statistics_are_at_stake(weights_given):
    for schedule in ("scratch", "all"):
        config = ExperimentConfig(schedule=schedule, weights=weights_given)
        trains = [stage.train_batch_norm for stage in make_schedule(config)]
        assert trains == [weights_given == "none"]


def test_history_marks_stages_and_says_the_rate():
    rows = []
    stages = (
        Stage("head", 2, "head", 1e-2),
        Stage("top", 3, "blocks:1", 1e-3, warmup_epochs=1, decay="cosine"),
    )
    history = fit(network(), *stages, on_epoch=rows.append)
    assert history["epoch"].tolist() == [1, 2, 3, 4, 5]
    assert history["stage"].tolist() == ["head"] * 2 + ["top"] * 3
    rate = history["learning_rate"].tolist()
    assert rate[:2] == pytest.approx([1e-2, 1e-2])
    # Last steps of three epochs of three: step 2 of the warm-up, 2 and 5 of 6 in the cosine.
    cosine = [0.5e-3 * (1 + np.cos(np.pi * t / 6)) for t in (2, 5)]
    assert rate[2:] == pytest.approx([0.75e-3, *cosine], rel=FLOAT32)
    assert rows == history.to_dict("records")
    assert history["trainable_parameters"].is_monotonic_increasing


def test_early_stopping_gives_the_best_epoch_of_all_stages_back():
    val = Tints(seed=2)
    stages = (
        Stage("head", 3, "head", 1e-2, early_stopping=2),
        Stage("wreck", 6, "all", 3.0, early_stopping=2, train_batch_norm=True),
    )
    model = network()
    history = fit(model, *stages, val=val, optimizer="sgd")
    best = history.loc[history["val_loss"].idxmin()]
    assert len(history) < 9
    assert history.attrs["restored_epoch"] == best["epoch"] <= 3
    assert loss_of(model, val) == pytest.approx(best["val_loss"], rel=FLOAT32)


def test_a_stage_cut_short_hands_its_best_weights_on():
    model = network()
    train = Tints(seed=1, hopeless=True)
    stages = (
        Stage("wreck", 9, "all", 1.0, early_stopping=1, train_batch_norm=True),
        Stage("still", 1, "head", 1e-30, early_stopping=1),
    )
    model.get_layer("head_bn").momentum = 1.0
    history = fit(model, *stages, train=train, optimizer="sgd")
    wreck = history[history["stage"] == "wreck"]
    assert len(wreck) < 9
    after = history.loc[history["stage"] == "still", "val_loss"].item()
    # A loss of wrecked weights is the difference of large logits.
    assert after == pytest.approx(wreck["val_loss"].min(), rel=10 * FLOAT32)


def test_without_early_stopping_the_last_epoch_stands():
    val = Tints(seed=2)
    model = network()
    history = fit(model, Stage("scratch", 2, learning_rate=0.01), val=val)
    assert history.attrs["restored_epoch"] is None
    last = history["val_loss"].iloc[-1]
    assert loss_of(model, val) == pytest.approx(last, rel=FLOAT32)


def test_plateau_lowers_the_rate_after_its_warm_up():
    stage = Stage(
        "scratch",
        7,
        "all",
        1e-30,
        warmup_epochs=1,
        decay="plateau",
        plateau_patience=2,
        plateau_factor=0.1,
    )
    model = network()
    model.get_layer("head_bn").momentum = 1.0
    rate = fit(model, stage)["learning_rate"].to_numpy() / 1e-30
    assert rate[:2] == pytest.approx([0.5, 1])
    assert rate[-1] < 0.2


def test_same_seed_same_history():
    def once():
        model = network(seed=3)
        return fit(model, Stage("scratch", 2, train_batch_norm=True), optimizer="sgd")

    columns = ["loss", "accuracy", "val_loss", "val_accuracy"]
    assert once()[columns].equals(once()[columns])


def test_a_loss_that_is_no_number_stops_with_advice():
    bad = Tints(seed=1)
    bad.x[:] = np.nan
    with pytest.raises(TrainingError, match="epoch 1 .*lower the learning rate"):
        fit(network(), Stage("head", 3, "head"), train=bad)


def test_progress_is_published(tmp_path, monkeypatch, capsys):
    file = tmp_path / "progress.json"
    monkeypatch.setenv("DERMNB_PROGRESS", str(file))
    fit(network(), Stage("head", 2, "head"), Stage("top", 1, "layers:3"))
    said = json.loads(file.read_text())
    assert said["step"] == "training" and said["total"] == 3 and 0 < said["done"] <= 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert "left" in lines[0] and lines[-1].endswith("done")


def test_nothing_to_train_on():
    with pytest.raises(ConfigError, match="needs a stage"):
        fit_stages(network(), SPEC, (), Tints(), Tints(), LOSS, ExperimentConfig())


@pytest.mark.parametrize("name", ["mobilenetv2", "xception", "efficientnetb0"])
def test_layers_are_counted_as_in_the_published_network(name):
    spec = BACKBONES[name]
    inputs = keras.Input((96, 96, 3), name="image")
    trunk = build_backbone(spec, inputs)
    x = keras.layers.GlobalAveragePooling2D()(trunk.output)
    model = keras.Model(inputs, keras.layers.Dense(2, name="logits")(x))
    published = getattr(keras.applications, spec.builder)(
        include_top=False, weights=None, input_shape=(96, 96, 3)
    )
    ours = backbone_layers(model, spec)
    for n in (5, 25):
        kinds = [type(layer) for layer in published.layers[-n:]]
        assert [type(layer) for layer in ours[-n:]] == kinds
        assert len(open_layers(model, spec, f"layers:{n}")) == n
    sizes = [len(open_layers(model, spec, f"blocks:{n}")) for n in range(4)]
    assert sizes == sorted(set(sizes)) and sizes[0] == 0
    opened = set_trainable(model, spec, "head")
    assert opened == ["logits"]
