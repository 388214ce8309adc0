"""Grad-CAM against differences of the logit, on every kind of network and both backends."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from tolerances import BFLOAT16, FLOAT32

from dermnb.core import ConfigError
from dermnb.core import CAM_METHODS
from dermnb.nets.gradcam import (
    CamNetwork,
    _as_taken,
    cam_network,
    class_maps,
    combine_maps,
    resize_maps,
)
from dermnb.nets.models import (
    build_classifier,
    load_classifier,
    probabilities,
    save_classifier,
)

REPO = Path(__file__).parents[1]
BACKEND = keras.backend.backend()


def inputs(size: int, n: int = 3, fused: bool = False):
    rng = np.random.default_rng(0)
    pixels = rng.uniform(0, 255, (n, size, size, 3)).astype("float32")
    if not fused:
        return pixels
    return {"image": pixels, "metadata": rng.normal(size=(n, 4)).astype("float32")}


def raw(network: CamNetwork, given, target: int) -> list[np.ndarray]:
    "Logits, features, and the layer's maps and gradients before they become one map."
    given = _as_taken(network.inputs, given)
    wanted = np.full(len(given["image"]), target, "int32")
    logits, features, *_ = network._see(given)
    seen = network.see(given)
    found = logits, features, seen.given[0], network._slope(seen.given, wanted)
    return [keras.ops.convert_to_numpy(x) for x in found]


def check_gradient(model, layer, given, target=1) -> None:
    "Raised where the gradient is, each image's logit grows by as much as the gradient says."
    network = CamNetwork(model, layer=layer)
    logits, _, maps, gradients = raw(network, given, target)
    beside = [x for x in model.inputs if x.name == "metadata"]
    tensors = [model.get_layer(network.layer).output, *beside]
    upper = keras.Model(tensors, model.get_layer("logits").output)

    def logit(maps):
        found = upper([maps, *(given[x.name] for x in beside)], training=False)
        return keras.ops.convert_to_numpy(found)[:, target].astype("float64")

    np.testing.assert_allclose(logit(maps), logits[:, target], rtol=100 * FLOAT32, atol=FLOAT32)
    # Half of the places by chance, so that a gradient at wrong places is found out, and
    # none at 0, where the largest of several zeros has no slope.
    chosen = (np.random.default_rng(1).random(maps.shape) < 0.5) & (maps != 0)
    slope = np.abs(gradients).max((1, 2, 3), keepdims=True)
    along = 0.005 * np.abs(maps).mean() * chosen * gradients / slope
    change = (logit(maps + along) - logit(maps - along)) / 2
    expected = (gradients.astype("float64") * along).sum((1, 2, 3))
    assert expected.min() > 0
    # A step of 0.5 % is linear but where a largest value or a ReLU changes sides.
    np.testing.assert_allclose(change, expected, rtol=0.02)


@pytest.mark.parametrize(
    "backbone, layer",
    [("cnn", ""), ("cnn", "conv1_pool"), ("alexnet", ""), ("mobilenetv2", "block_15_add")],
)
def test_gradient(backbone, layer):
    "Through pooling, dense layers of the backbone, convolutions, dropout and batch norm."
    model = build_classifier(backbone, 3, 64, [8], 0.5, batch_norm=True, seed=2)
    if backbone == "mobilenetv2":  # fresh weights let the signal die away over 50 layers
        for layer_ in model.layers:
            if isinstance(layer_, keras.layers.BatchNormalization):
                gamma, *rest = layer_.get_weights()
                layer_.set_weights([gamma * 2, *rest])
    check_gradient(model, layer, inputs(64))


@pytest.mark.parametrize("fusion", ["concat", "metablock"])
def test_gradient_with_metadata(fusion):
    made = {"fusion": fusion, "metadata_columns": 4, "seed": 1}
    model = build_classifier("cnn", 3, 32, [8], **made)
    given = inputs(32, fused=True)
    check_gradient(model, "", given)
    network = CamNetwork(model)
    p, features, _ = network.explain(given, 1)
    np.testing.assert_allclose(p, probabilities(model, [given]), atol=FLOAT32)
    assert features.shape == (3, 64)
    other = network.explain(given | {"metadata": given["metadata"][::-1]}, 1)
    assert not np.allclose(other[0], p)
    # What is joined behind the pooling changes the answer, but not the features.
    assert np.allclose(other[1], features, atol=FLOAT32) == (fusion == "concat")
    with pytest.raises(ConfigError, match="metadata is not there"):
        network.explain(given["image"])


@pytest.mark.parametrize("method", CAM_METHODS)
def test_maps(method):
    "High is important, at each image's own class, whatever else is in the batch."
    model = build_classifier("cnn", 3, 32, seed=3)
    network, given = CamNetwork(model), inputs(32, 5)
    p, _, maps = network.explain(given, method=method)
    np.testing.assert_allclose(p, probabilities(model, [given]), atol=FLOAT32)
    assert maps.shape == (5, 16, 16) and maps.dtype == "float32"
    assert maps.min() >= 0 and set(maps.max((1, 2))) <= {0, 1} and maps.max() == 1
    # Exact, as one graph is asked twice for the same.
    named = network.explain(given, p.argmax(axis=1), method)[2]
    np.testing.assert_array_equal(named, maps)
    for c in range(3):
        single = network.explain(given[2:3], c, method)[2]
        together = network.explain(given, [0, 1, c, 2, 0], method)[2]
        np.testing.assert_allclose(together[2], single[0], atol=FLOAT32)
    whole_numbers = network.explain(given.round().astype("uint8"), 1, method)[2]
    same = network.explain(given.round(), 1, method)[2]
    np.testing.assert_array_equal(whole_numbers, same)
    if BACKEND == "tensorflow":
        network.predict(given), network.predict(given[:2])
        traces = [network._see, network._slope]
        assert [x.experimental_get_tracing_count() for x in traces] == [1, 1]


def test_published_equations():
    "Grad-CAM++ as the paper writes it, with the derivatives of exp(y)."
    rng = np.random.default_rng(0)
    maps = rng.uniform(0, 1, (2, 4, 4, 5))
    g = rng.normal(size=maps.shape)
    total = maps.sum((1, 2), keepdims=True)
    alpha = g**2 / (2 * g**2 + total * g**3)
    found = np.einsum("nijk,nk->nij", maps, (alpha * np.maximum(g, 0)).sum((1, 2)))
    expected = found / found.max((1, 2), keepdims=True)
    np.testing.assert_allclose(class_maps(maps, g, "gradcam++"), expected, atol=FLOAT32)
    # Scale is lost, even that of gradients which are hardly numbers any more.
    for method in CAM_METHODS:
        tiny = class_maps(maps * 1e-20, g * 1e-30, method)
        assert tiny.max() == 1
    np.testing.assert_array_equal(class_maps(maps, -np.abs(g)), 0)
    assert np.isfinite(class_maps(-maps, 50 * g, "gradcam++")).all()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float16"])
def test_half_precision(policy, tmp_path):
    full = build_classifier("cnn", 3, 32, [8], seed=1)
    keras.config.set_dtype_policy(policy)
    try:
        model = build_classifier("cnn", 3, 32, [8], seed=1)
    finally:
        keras.config.set_dtype_policy("float32")
    model.set_weights(full.get_weights())
    save_classifier(model, tmp_path, "abc")
    network = CamNetwork(load_classifier(tmp_path).model, "cnn")
    given = inputs(32)
    p, features, maps = network.explain(given, 1)
    assert maps.dtype == features.dtype == raw(network, given, 1)[3].dtype == "float32"
    # The answer is that of the network in use, not of a more exact one: what the two graphs
    # round otherwise is less than half of what half precision does.
    used, exact = probabilities(model, [given]), probabilities(full, [given])
    assert np.abs(p - used).max() < np.abs(exact - used).max() / 2
    np.testing.assert_allclose(maps, CamNetwork(full).explain(given, 1)[2], atol=BFLOAT16)


def test_network_is_left_as_it_was(tmp_path):
    model = build_classifier("cnn", 3, 32)
    before = model.to_json()
    sides = [CamNetwork(model, layer=x).explain(inputs(32))[2].shape[1] for x in ("", "conv1_pool")]
    assert sides == [16, 16]
    assert model.to_json() == before
    save_classifier(model, tmp_path, "abc")
    loaded = load_classifier(tmp_path).model
    p = CamNetwork(loaded).predict(inputs(32))[0]
    np.testing.assert_allclose(p, probabilities(model, [inputs(32)]), atol=FLOAT32)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_new_weights_are_seen(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model, other = (build_classifier("cnn", 3, 32, seed=s) for s in (1, 2))
    finally:
        keras.config.set_dtype_policy("float32")
    network = cam_network(model)
    before = network.explain(inputs(32), 1)[2]
    model.set_weights(other.get_weights())
    after = network.explain(inputs(32), 1)[2]
    assert cam_network(model) is network and not np.allclose(before, after)
    # The same computation on the same processor, whichever its half precision is.
    np.testing.assert_allclose(after, CamNetwork(other).explain(inputs(32), 1)[2], atol=FLOAT32)


def test_layer_that_something_flows_past():
    model = build_classifier("mobilenetv2", 3, 32)
    with pytest.raises(ConfigError, match="flows past layer 'block_2_project_BN'"):
        CamNetwork(model, layer="block_2_project_BN")
    with pytest.raises(ConfigError, match="did you mean 'block_2_add'"):
        CamNetwork(model, layer="block_2_ad")


def test_combined_and_resized():
    rng = np.random.default_rng(0)
    maps = [rng.random((2, n, n)).astype("float32") for n in (4, 7, 1)]
    np.testing.assert_array_equal(combine_maps(maps[:1], [1], 20), resize_maps(maps[0], 20))
    np.testing.assert_array_equal(combine_maps(maps, [0, 2, 0], 20), resize_maps(maps[1], 20))
    mean = combine_maps(maps, [1, 1, 2], 20)
    parts = [resize_maps(x, 20) for x in maps]
    np.testing.assert_allclose(mean, (parts[0] + parts[1] + 2 * parts[2]) / 4, atol=FLOAT32)
    assert mean.dtype == "float32" and 0 <= mean.min() and mean.max() <= 1
    for weights in ([1], [0, 0, 0], [1, 1, -1], [1, 1, np.nan]):
        with pytest.raises(ConfigError, match="for the maps of 3 networks"):
            combine_maps(maps, weights, 20)


OTHER = "jax" if BACKEND == "tensorflow" else "tensorflow"
CODE = """
import sys, numpy as np
from dermnb.core import CAM_METHODS
from dermnb.nets.gradcam import CamNetwork
from dermnb.nets.models import load_classifier
folder = sys.argv[1]
given = dict(np.load(f"{folder}/given.npz"))
network = CamNetwork(load_classifier(folder).model, "cnn")
out = [network.explain(given, [0, 1, 2], m) for m in ("gradcam", "gradcam++")]
np.savez(f"{folder}/found.npz", *out[0], *out[1], *network.predict(given))
"""


@pytest.mark.skipif(
    importlib.util.find_spec(OTHER) is None, reason=f"{OTHER} is not installed"
)
def test_backends_agree(tmp_path):
    made = {"fusion": "metablock", "metadata_columns": 4, "seed": 1}
    model = build_classifier("cnn", 3, 32, [8], **made)
    save_classifier(model, tmp_path, "abc")
    given = inputs(32, fused=True)
    np.savez(tmp_path / "given.npz", **given)
    subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        env=os.environ | {"KERAS_BACKEND": OTHER},
        cwd=REPO,
        check=True,
    )
    network = CamNetwork(model)
    here = [y for m in CAM_METHODS for y in network.explain(given, [0, 1, 2], m)]
    here += network.predict(given)
    there = np.load(tmp_path / "found.npz")
    for a, b in zip(here, there.values(), strict=True):
        np.testing.assert_allclose(a, b, atol=10 * FLOAT32)  # logits are larger than 1
