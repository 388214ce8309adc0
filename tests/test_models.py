"""Every row of the backbone table, weights from every source, and the losses."""

import inspect
import math
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import h5py
import keras
import numpy as np
import pandas as pd
import pytest
from keras.src.applications import (
    densenet,
    efficientnet,
    inception_v3,
    mobilenet_v2,
    resnet,
    xception,
)
from keras.src.utils import file_utils
from tolerances import FLOAT32

from dermnb.nets.backbones import (
    BACKBONES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_backbone,
)
from dermnb.core import ConfigError
from dermnb.nets.cost import count_flops
from dermnb.nets.gradcam import CamNetwork, class_maps
from dermnb.nets.losses import FocalLoss, WeightedCrossEntropy, focal_cross_entropy
from dermnb.nets.models import (
    build_classifier,
    fit_metadata,
    load_classifier,
    metablock,
    probabilities,
    save_classifier,
    set_batch_norm_momentum,
    softmax,
)
from dermnb.nets.weights import find_weights, load_backbone

REPO = Path(__file__).parents[1]
REAL_WEIGHTS = Path(
    os.environ.get("DERMNB_REAL_WEIGHTS", REPO.parent / "shared/weights")
)
# One of each way of preprocessing.
LIGHT = ["cnn", "alexnet", "mobilenetv2", "resnet50", "efficientnetb0"]


def images(size: int, n: int = 2) -> np.ndarray:
    return (
        np.random.default_rng(0).uniform(0, 255, (n, size, size, 3)).astype("float32")
    )


def size_for(spec) -> int:
    return max(32, spec.min_size)


def edges(model) -> list[tuple[str, set[str]]]:
    "Operations in topological order, each with the names of those it reads."

    def parents(node):
        if isinstance(node, dict):
            if node.get("class_name") == "__keras_tensor__":
                return {node["config"]["keras_history"][0]}
            node = list(node.values())
        if isinstance(node, list | tuple):
            return set().union(*(parents(x) for x in node))
        return set()

    return [
        (x["name"], parents(x["inbound_nodes"])) for x in model.get_config()["layers"]
    ]


def cuts(model) -> list[str]:
    "Names of the operations that everything flows through, bottom to top."
    graph = edges(model)
    at = {name: i for i, (name, _) in enumerate(graph)}
    reach = dict.fromkeys(at, -1)
    for i, (_, read) in enumerate(graph):
        for name in read:
            assert at[name] < i
            reach[name] = i
    found, furthest = [], -1
    for i, (name, _) in enumerate(graph):
        if furthest <= i:
            found.append(name)
        furthest = max(furthest, reach[name])
    return found


@pytest.fixture
def eagerly():
    "One pass through a large network takes a fifth of the time that compiling it does."
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.mark.parametrize("name", BACKBONES)
def test_row(name, eagerly):
    spec = BACKBONES[name]
    size = max(64, spec.min_size)
    model = build_classifier(name, 3, size)
    network = CamNetwork(model)
    assert network.layer == spec.last_conv
    # What Grad-CAM is made of, so that one pass serves all that is asked here.
    p, features, given = network.see(images(size))
    slope = network._slope(given, np.full(2, 2, "int32"))
    features, maps, slope = map(keras.ops.convert_to_numpy, (features, given[0], slope))
    assert model.output.shape[1:] == (3,) and model.output.dtype == "float32"
    assert p.shape == (2, 3) and np.all(np.isfinite(p))
    assert features.shape == (2, spec.features)
    assert maps.shape == slope.shape == (2, *model.get_layer(spec.last_conv).output.shape[1:])
    assert slope.dtype == "float32" and np.all(np.isfinite(slope)) and slope.any()
    if spec.last_conv == spec.blocks[-1]:  # pooling and one dense layer: Grad-CAM is CAM
        np.testing.assert_allclose(features, maps.mean((1, 2)), rtol=10 * FLOAT32, atol=1e-12)
        kernel = keras.ops.convert_to_numpy(model.get_layer("logits").kernel)[:, 2]
        places = maps.shape[1] * maps.shape[2]
        expected = np.broadcast_to(kernel / places, slope.shape)
        np.testing.assert_allclose(slope, expected, rtol=FLOAT32)
    assert {float(x) for x in class_maps(maps, slope).max((1, 2))} <= {0, 1}
    assert not any(isinstance(x, keras.Model) for x in model.layers)
    assert len(model.get_layer(spec.last_conv).output.shape) == 4
    passed = [x for x in cuts(model) if x in spec.blocks]
    assert passed == list(spec.blocks)
    trunk_end = model.get_layer(spec.blocks[-1]).output
    assert trunk_end is model.get_layer("head_pool").input
    assert trunk_end.shape[-1] == spec.features
    if name != "alexnet":  # its first dense layer depends on the image size
        head = 3 * (spec.features + 1)
        assert model.count_params() == spec.parameters + head


def test_alexnet_has_the_published_maps():
    trunk = build_backbone("alexnet", keras.Input((224, 224, 3)))
    maps = [trunk.get_layer(f"conv{i}_relu").output.shape[1] for i in (1, 2, 5)]
    assert maps == [55, 27, 13]
    assert trunk.get_layer("conv5_pool").output.shape[1:] == (6, 6, 256)
    assert trunk.count_params() == BACKBONES["alexnet"].parameters


@pytest.mark.parametrize(
    "name", ["cnn", "alexnet", "mobilenetv2", "xception", "inceptionv3"]
)
def test_smallest_image(name):
    spec = BACKBONES[name]
    trunk = build_backbone(name, keras.Input((spec.min_size, spec.min_size, 3)))
    assert trunk(images(spec.min_size)).shape[-1] == spec.features
    if spec.min_size > 1:
        with pytest.raises(ConfigError, match=f"at least {spec.min_size}"):
            build_backbone(name, keras.Input((spec.min_size - 1, spec.min_size - 1, 3)))


def test_names_do_not_depend_on_what_was_built_before():
    names = [
        [
            x.name
            for x in build_backbone("xception", keras.Input((32, 32, 3))).layers[1:]
        ]
        for _ in range(2)
    ]
    assert names[0] == names[1]
    assert {"add", "add_11", "conv2d", "conv2d_3", "batch_normalization"} <= set(
        names[0]
    )


def test_table_loads_no_framework():
    code = (
        "import sys, dermnb.nets.weights as w; w.find_weights('resnet50', 'imagenet');"
        "assert not {'keras', 'tensorflow', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)


@pytest.mark.parametrize("name", LIGHT)
def test_saved_model_predicts_the_same(name, tmp_path):
    size = size_for(BACKBONES[name])
    model = build_classifier(name, 3, size, head=[8], dropout=0.3, batch_norm=True)
    randomize(model)
    before = softmax(model(images(size)))
    save_classifier(model, tmp_path, ["a", "ö", "c"], {"resize": "pad"})
    loaded = load_classifier(tmp_path)
    after = keras.ops.convert_to_numpy(loaded.model(images(size)))
    np.testing.assert_allclose(after, before, atol=FLOAT32)
    assert (loaded.classes, loaded.resize) == (("a", "ö", "c"), "pad")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        config = archive.read("config.json").decode()
    assert "dermnb" not in config and "Lambda" not in config


PATIENTS = pd.DataFrame(
    {
        "age": [35.0, 70.0, np.nan, 50.0],
        "sex": ["female", None, "male", "male"],
        "site": ["back", "scalp", "back", None],
    }
)


@pytest.mark.parametrize("fusion", ["concat", "metablock", "only"])
def test_metadata_survive_saving(fusion, tmp_path):
    encoder = fit_metadata(PATIENTS)
    pixels = images(32, 4)
    made = {"fusion": fusion, "metadata_columns": len(encoder.columns)}
    model = build_classifier("cnn", 3, 32, **made)
    randomize(model)
    whole = {"image": pixels, "metadata": encoder.encode(PATIENTS)}
    before = softmax(model({x.name: whole[x.name] for x in model.inputs}))
    meta = {"metadata": asdict(encoder), "image_size": 32}
    save_classifier(model, tmp_path, "abc", meta)
    loaded = load_classifier(tmp_path)
    assert loaded.encoder == encoder and loaded.image_size == 32
    after = loaded.predict(pixels, metadata=PATIENTS)
    np.testing.assert_allclose(after, before, atol=FLOAT32)
    blind = loaded.predict(pixels)
    nothing = PATIENTS.assign(age=np.nan, sex=None, site=None)
    np.testing.assert_array_equal(blind, loaded.predict(pixels, metadata=nothing))
    assert not np.allclose(blind, after)
    with pytest.raises(ConfigError, match="3 rows of metadata for 4 images"):
        loaded.predict(pixels, metadata=PATIENTS[:3])


def test_missing_is_not_average():
    encoder = fit_metadata(PATIENTS)
    rows = encoder.encode(PATIENTS.assign(age=[PATIENTS["age"].mean(), None, 0, 120]))
    table = pd.DataFrame(rows, columns=encoder.columns)
    assert table["age"][:2].tolist() == [0, 0]
    assert table["age=missing"].tolist() == [0, 1, 0, 0]
    for kind in ("sex", "site"):
        one_hot = table.filter(like=f"{kind}=")
        assert (one_hot.sum(axis=1) == 1).all()
        missing = PATIENTS[kind].isna().astype(float)
        assert one_hot[f"{kind}=missing"].tolist() == missing.tolist()
    assert np.isfinite(rows).all()


def test_metablock_is_the_published_equation():
    "sigmoid(tanh(f * x) + g), one number of f and g a map."
    x = keras.Input((3, 3, 5))
    m = keras.Input((4,))
    model = keras.Model([x, m], metablock(x, m))
    randomize(model)
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(2, 3, 3, 5)).astype("float32")
    metadata = rng.normal(size=(2, 4)).astype("float32")

    def affine(name):
        kernel, bias = model.get_layer(f"metablock_{name}").get_weights()
        norm = model.get_layer(f"metablock_{name}_bn")
        gamma, beta, mean, variance = norm.get_weights()
        v = (metadata @ kernel + bias - mean) / np.sqrt(variance + norm.epsilon)
        return (gamma * v + beta)[:, None, None]

    expected = 1 / (1 + np.exp(-(np.tanh(affine("f") * maps) + affine("g"))))
    np.testing.assert_allclose(model([maps, metadata]), expected, atol=FLOAT32)


def test_saved_in_half_precision(tmp_path):
    exact = build_classifier("cnn", 3, 32)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = build_classifier("cnn", 3, 32)
        assert model.get_layer("preprocess").compute_dtype == "float32"
        assert model.output.dtype == "float32"
        save_classifier(model, tmp_path, "abc")
    finally:
        keras.config.set_dtype_policy("float32")
    before, full = (probabilities(m, [images(32)]) for m in (model, exact))
    after = load_classifier(tmp_path).predict(images(32))
    # Still rounded as before: nearer to that than to the same weights in full precision.
    assert np.abs(after - before).max() < np.abs(full - before).max() / 2


def test_seed_and_momentum():
    model = build_classifier("mobilenetv2", 3, 32, seed=1, batch_norm_momentum=0.9)
    same = build_classifier("mobilenetv2", 3, 32, seed=1)
    for a, b in zip(model.get_weights(), same.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.get_layer("bn_Conv1").momentum == 0.9
    assert same.get_layer("bn_Conv1").momentum == 0.999
    assert set_batch_norm_momentum(same, 0.5) == 52
    with pytest.raises(ConfigError, match="momentum 1"):
        set_batch_norm_momentum(same, 1)


# Weights


def randomize(model) -> None:
    "Values that no initializer gives, positive where a variance is meant."
    rng = np.random.default_rng(1)
    for layer in model.layers:
        layer.set_weights(
            [
                (
                    rng.uniform(0.5, 1.5, w.shape).astype(w.dtype)
                    if w.ndim == 1
                    else w + rng.normal(0, 0.01, w.shape).astype(w.dtype)
                )
                for w in layer.get_weights()
            ]
        )
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()


def save_as_published(model, path) -> None:
    "The older format of the files that Keras publishes."
    with h5py.File(path, "w") as f:
        held = [x for x in model.layers if x.get_weights()]
        f.attrs["layer_names"] = [x.name.encode() for x in held]
        for layer in held:
            group = f.create_group(layer.name)
            # Trainable first, as the older format has it.
            order = layer.trainable_weights + layer.non_trainable_weights
            names = [f"{i}:0" for i in range(len(order))]
            group.attrs["weight_names"] = [n.encode() for n in names]
            for n, w in zip(names, order, strict=True):
                group[n] = keras.ops.convert_to_numpy(w)


@pytest.fixture
def keras_cache(tmp_path, monkeypatch):
    "An empty Keras cache that takes any file for the right one."
    (tmp_path / "keras/models").mkdir(parents=True)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr(  # Keras has read the variable already
        file_utils.config, "keras_home", lambda: str(tmp_path / "keras")
    )
    monkeypatch.setattr(file_utils, "validate_file", lambda *args, **kwargs: True)
    monkeypatch.setenv("DERMNB_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    return tmp_path


def test_every_source_gives_the_network_of_a_download(keras_cache):
    spec = BACKBONES["efficientnetb0"]
    source = build_backbone(spec, keras.Input((32, 32, 3)))
    randomize(source)
    published = keras_cache / "keras/models" / spec.weights_file
    save_as_published(source, published)
    theirs = keras.applications.EfficientNetB0(
        include_top=False, weights="imagenet", input_shape=(32, 32, 3)
    )
    expected = np.array(theirs(images(32)))
    assert np.std(expected) > 0

    def check(weights):
        trunk = load_backbone(spec, keras.Input((32, 32, 3)), weights)
        output = np.array(trunk(images(32)))
        # Two ways to normalize an image, and 237 layers: ten times FLOAT32.
        np.testing.assert_allclose(output, expected, rtol=10 * FLOAT32, atol=FLOAT32)

    check("imagenet")  # what Keras would have downloaded
    check(str(published))
    local = keras_cache / "weights/efficientnetb0.weights.h5"
    source.save_weights(local)
    assert find_weights(spec, "imagenet") == local
    check("imagenet")
    # The trap: the same file by its path, in plain Keras.
    naive = keras.applications.EfficientNetB0(
        include_top=False, weights=local, input_shape=(32, 32, 3)
    )
    assert not np.allclose(np.array(naive(images(32))), expected, rtol=1e-2)
    local.unlink()
    assert find_weights(spec, "imagenet") == published
    published.rename(keras_cache / "weights" / published.name)
    assert find_weights(spec, "imagenet").name == "efficientnetb0_notop.h5"


def test_the_name_of_a_file_tells_no_format(tmp_path):
    source = build_backbone("cnn", keras.Input((16, 16, 3)))
    source.save_weights(tmp_path / "a.weights.h5")
    (tmp_path / "a.weights.h5").rename(tmp_path / "new.h5")
    save_as_published(source, tmp_path / "old.weights.h5")
    for file in ("new.h5", "old.weights.h5"):
        trunk = load_backbone("cnn", keras.Input((16, 16, 3)), str(tmp_path / file))
        for a, b in zip(trunk.get_weights(), source.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_efficientnet_from_scratch_sees_normalized_images():
    trunk = build_backbone("efficientnetb0", keras.Input((32, 32, 3)))
    seen = keras.Model(trunk.input, trunk.get_layer("rescaling_1").output)(images(32))
    expected = (images(32) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(np.array(seen), expected, atol=FLOAT32)


def test_addresses_and_checksums_are_those_of_keras():
    tail = "weights_tf_dim_ordering_tf_kernels"
    expected = {
        "mobilenetv2": mobilenet_v2.BASE_WEIGHT_PATH
        + f"mobilenet_v2_{tail}_1.0_224_no_top.h5",
        "resnet50": f"{resnet.BASE_WEIGHTS_PATH}resnet50_{tail}_notop.h5",
        "densenet121": densenet.DENSENET121_WEIGHT_PATH_NO_TOP,
        "inceptionv3": inception_v3.WEIGHTS_PATH_NO_TOP,
        "xception": xception.WEIGHTS_PATH_NO_TOP,
    } | {
        f"efficientnet{v}": f"{efficientnet.BASE_WEIGHTS_PATH}efficientnet{v}_notop.h5"
        for v in ("b0", "b1", "b4", "b5", "b7")
    }
    published = {n: s for n, s in BACKBONES.items() if s.weights_url}
    assert {n: s.weights_url for n, s in published.items()} == expected
    hashes = {f"efficientnet{v}": h for v, h in efficientnet.WEIGHTS_HASHES.items()}
    for name, (_, md5) in (hashes | resnet.WEIGHTS_HASHES).items():
        assert name not in published or published.pop(name).weights_md5 == md5
    assert published.pop("mobilenetv2").weights_md5 == ""  # Keras has none
    for name, spec in published.items():  # Keras has it within a function
        module = sys.modules[getattr(keras.applications, spec.builder).__module__]
        assert f'file_hash="{spec.weights_md5}"' in inspect.getsource(module), name


def test_wrong_weights(tmp_path):
    def message(name, path):
        with pytest.raises(ConfigError) as error:
            load_backbone(name, keras.Input((32, 32, 3)), str(path))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "is no file" in message("cnn", tmp_path / "absent.h5")
    (tmp_path / "text.h5").write_text("not weights")
    assert "not a readable HDF5 file" in message("cnn", tmp_path / "text.h5")
    other = build_backbone("mobilenetv2", keras.Input((32, 32, 3)))
    other.save_weights(tmp_path / "other.weights.h5")
    assert "holds 2,257,984" in message("cnn", tmp_path / "other.weights.h5")
    save_as_published(other, tmp_path / "other.h5")
    assert "does not fit cnn" in message("cnn", tmp_path / "other.h5")


@pytest.mark.skipif(not REAL_WEIGHTS.is_dir(), reason=f"no weights in {REAL_WEIGHTS}")
def test_real_weights(tmp_path, monkeypatch):
    file = REAL_WEIGHTS / "mobilenetv2_1.0_224_notop.weights.h5"
    shutil.copy(file, tmp_path / "mobilenetv2.weights.h5")
    monkeypatch.setenv("DERMNB_WEIGHTS", str(tmp_path))
    theirs = keras.applications.MobileNetV2(
        include_top=False, weights=None, input_shape=(96, 96, 3)
    )
    theirs.load_weights(file)
    expected = np.array(theirs(mobilenet_v2.preprocess_input(images(96))))
    for weights in (str(file), "imagenet"):
        trunk = load_backbone("mobilenetv2", keras.Input((96, 96, 3)), weights)
        # Values up to 6, of images normalized in another way 52 convolutions before: 5e-5 are
        # seen. Without the normalization they differ by more than 1.
        np.testing.assert_allclose(np.array(trunk(images(96))), expected, atol=100 * FLOAT32)


# Losses


def gradient(loss, y_true, y_pred):
    y_pred = np.asarray(y_pred, "float32")
    if keras.backend.backend() == "jax":
        import jax

        return np.array(jax.grad(lambda p: loss(y_true, p))(y_pred))
    import tensorflow as tf

    y_pred = tf.constant(y_pred)
    with tf.GradientTape() as tape:
        tape.watch(y_pred)
        value = loss(y_true, y_pred)
    return tape.gradient(value, y_pred).numpy()


EXTREME = [[1e4, -1e4, 0], [-1e4, 1e4, 0], [1e4, 1e4, 1e4]]
CERTAIN = [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 5])
@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_gradients_are_finite(gamma, smoothing):
    alpha = [0.5, 1, 2]
    for y_pred, from_logits in ((EXTREME, True), (CERTAIN, False)):
        loss = FocalLoss(gamma, alpha, from_logits, smoothing)
        for y_true in ([0, 0, 0], np.eye(3)[[0, 0, 0]], [[0.4, 0.6, 0]] * 3):
            assert math.isfinite(float(loss(np.asarray(y_true), y_pred)))
            assert np.all(np.isfinite(gradient(loss, np.asarray(y_true), y_pred)))
    # A network that is wrong with certainty still learns.
    assert np.any(gradient(FocalLoss(gamma), np.array([0, 0, 0]), EXTREME)[1])


def test_mixup_costs_the_mixture():
    rng = np.random.default_rng(0)
    logits, a, b = (
        rng.normal(0, 2, (5, 4)),
        rng.integers(0, 4, 5),
        rng.integers(0, 4, 5),
    )
    one_hot = np.eye(4)
    loss = FocalLoss(2, [1, 2, 3, 4], label_smoothing=0.1)
    mixed = loss(0.3 * one_hot[a] + 0.7 * one_hot[b], logits)
    apart = 0.3 * loss(a, logits) + 0.7 * loss(b, logits)
    assert float(mixed) == pytest.approx(float(apart), rel=FLOAT32)


def test_half_precision_logits():
    logits = np.array([[3.0, -2.0, 0.5]], "float16")
    value = FocalLoss()(np.array([0]), logits)
    assert keras.backend.standardize_dtype(value.dtype) == "float32"
    exact = focal_cross_entropy([0], logits.astype("float32"))
    assert float(value) == pytest.approx(float(exact[0]), rel=FLOAT32)


@pytest.mark.parametrize("sparse", [True, False])
def test_class_weights_are_those_of_keras(sparse):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 5)).astype("float32"), rng.integers(0, 3, 8)
    labels = y if sparse else np.eye(3, dtype="float32")[y]
    weights = [0.5, 1.0, 4.0]
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    start = model.get_weights()
    cls = "SparseCategoricalCrossentropy" if sparse else "CategoricalCrossentropy"

    def step(loss, **kwargs):
        model.set_weights(start)
        model.compile(keras.optimizers.SGD(0.1), loss)
        value = model.train_on_batch(x, labels, **kwargs)
        return float(np.ravel(value)[0]), model.get_weights()[0]

    theirs, after_theirs = step(
        getattr(keras.losses, cls)(from_logits=True),
        class_weight=dict(enumerate(weights)),
    )
    ours, after_ours = step(WeightedCrossEntropy(weights))
    assert ours == pytest.approx(theirs, rel=FLOAT32)
    np.testing.assert_allclose(after_ours, after_theirs, atol=FLOAT32)


def test_model_with_loss_can_be_saved(tmp_path):
    model = build_classifier("cnn", 3, 16)
    model.compile("adam", FocalLoss(1.5, [1, 2, 3], label_smoothing=0.1))
    model.train_on_batch(images(16), np.array([0, 2]))
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert loaded.loss.get_config() == model.loss.get_config()


# Multiply-accumulates of one image as the networks' papers and their successors print them.
PUBLISHED = {
    "mobilenetv2": (224, 300e6),  # Sandler et al., CVPR 2018
    "xception": (299, 8.4e9),  # Keras applications and timm: 8.4 G
    "efficientnetb0": (224, 0.39e9),  # Tan and Le, ICML 2019
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_are_twice_the_published_multiply_accumulates(name):
    size, known = PUBLISHED[name]
    found = count_flops(build_classifier(name, 1000, size))
    assert found["flops_not_counted"] == []
    assert found["flops"] / 2 == pytest.approx(known, rel=0.05)


def test_flops_agree_with_the_profiler_of_the_framework():
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    model = build_classifier("cnn", 8, 32, head=[16])
    call = tf.function(lambda x: model(x, training=False))
    frozen = convert_variables_to_constants_v2(
        call.get_concrete_function(tf.TensorSpec((1, 32, 32, 3), tf.float32))
    )
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    options["output"] = "none"
    profile = tf.compat.v1.profiler.profile(frozen.graph, cmd="op", options=options)
    found = count_flops(model)
    assert found["flops_not_counted"] == []
    assert found["flops"] == pytest.approx(profile.total_float_ops, rel=0.01)


def test_other_layers_and_fusion_are_counted_whole():
    metadata = {"metadata_columns": 5}
    for name, more in (("alexnet", {}), ("resnet50", {}), ("cnn", {"fusion": "metablock"} | metadata)):
        found = count_flops(build_classifier(name, 8, size_for(BACKBONES[name]), **more))
        assert found["flops"] > 0 and found["flops_not_counted"] == [], name


def test_flops_of_layers_by_hand():
    row, image = keras.Input((6, 10)), keras.Input((8, 8, 4))

    def flops(layer, given):
        return count_flops(keras.Model(given, layer(given)))["flops"]

    layers = keras.layers
    assert flops(layers.EinsumDense("abc,cd->abd", (6, 3), "relu", "d"), row) == 6 * 3 * 22
    assert flops(layers.Dense(3, use_bias=False), row) == 2 * 6 * 10 * 3
    assert flops(layers.Conv2D(6, 3, groups=2, use_bias=False), image) == 2 * 36 * 9 * 2 * 6
    assert flops(layers.MaxPooling2D(2), image) == 8 * 8 * 4
    assert flops(layers.GlobalAveragePooling2D(), image) == 8 * 8 * 4
    nested = keras.Sequential([keras.Input((10,)), layers.Dense(2, name="within")])
    assert count_flops(nested) == {"flops": 42, "flops_not_counted": []}
    unknown = keras.Input((None, None, 3))
    sized = keras.Model(unknown, layers.Conv2D(2, 3, name="somewhere")(unknown))
    assert count_flops(sized)["flops_not_counted"] == ["somewhere (Conv2D)"]


@pytest.mark.parametrize("field", ["loss", "class_weights", "augment", "mix", "resize"])
def test_every_row_of_a_table_can_be_asked_for(field):
    "`core` lists the names, so that a wrong one stops before Keras is loaded."
    from typing import get_args

    from dermnb.core import ExperimentConfig
    from dermnb.data.images import AUGMENTATIONS, MIXES, RESIZE_METHODS
    from dermnb.nets.losses import CLASS_WEIGHTS, LOSSES

    tables = {"loss": LOSSES, "class_weights": CLASS_WEIGHTS, "augment": AUGMENTATIONS}
    tables |= {"mix": MIXES, "resize": RESIZE_METHODS}
    known = get_args(ExperimentConfig.model_fields[field].annotation)
    assert set(known) == {"none"} & set(known) | set(tables[field])
