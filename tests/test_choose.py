"""What is chosen for `auto`: within the memory, by the fastest steps, and for the same results."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from dermnb.core import ConfigError, make_config
from dermnb.metrics.comparison import paired_differences
from dermnb.nets import choose
from dermnb.runs.prepare import prepare_data
from dermnb.runs.train import build_model, predict_splits, train_model

SECONDS = {"float32": {32: 4.0, 64: 3.0, 128: 2.5}, "mixed_bfloat16": {32: 9.0, 64: 9.0, 128: 9.0}}


@pytest.fixture
def asked(monkeypatch):
    "Every call for steps, as (precision, sizes); an image takes `SECONDS`, and a first step more."
    calls = []

    def steps(model, images, labels, sizes):
        calls.append((model.precision, tuple(sizes)))
        if model.most and max(sizes) > model.most:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        slow = 10 if len(calls) <= 2 else 1
        return [slow * n * SECONDS[model.precision][n] for n in sizes]

    monkeypatch.setattr(choose, "_steps", steps)
    return calls


def networks(floats=1, most=0):
    "Stand-ins that keep so many numbers for an image, and run out of memory above a batch size."
    layer = SimpleNamespace(output=SimpleNamespace(shape=(None, floats)))
    return {p: SimpleNamespace(layers=[layer], precision=p, most=most) for p in SECONDS}


def test_first_steps_do_not_count_and_what_is_far_behind_is_asked_once(asked):
    found = choose.measure_steps(networks(), None, None, choose.BATCH_SIZES)
    assert found == SECONDS
    assert choose.pick(found) == ("float32", 128)
    assert [p for p, _ in asked].count("mixed_bfloat16") == 2  # the first step, and one that counts
    assert asked[-1] == ("float32", (64, 64, 128))  # 32 is 1.6 times as slow


def test_what_the_memory_does_not_hold_is_not_chosen(asked, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * 2**20))
    # 50 MiB may be used; 100,000 numbers with their gradients are 0.76 MiB an image.
    found = choose.measure_steps(networks(100_000), None, None, choose.BATCH_SIZES)
    assert found["float32"] == {32: 4.0, 64: 3.0, 128: math.inf}
    assert choose.pick(found) == ("float32", 64)
    found = choose.measure_steps(networks(most=64), None, None, choose.BATCH_SIZES)
    assert choose.pick(found) == ("float32", 64) and found["float32"][128] == math.inf
    with pytest.raises(ConfigError, match="holds no training step of 32 images"):
        choose.measure_steps(networks(most=16), None, None, choose.BATCH_SIZES)


def test_an_error_that_is_not_of_memory_is_not_swallowed(monkeypatch):
    def fail(*_):
        raise RuntimeError("loss is broken")

    monkeypatch.setattr(choose, "_steps", fail)
    with pytest.raises(RuntimeError, match="loss is broken"):
        choose.measure_steps(networks(), None, None, (32,))


def test_bfloat16_and_float32_agree_within_the_interval(demo_dir):
    small = {"image_size": 32, "epochs": 10, "batch_size": 16, "learning_rate": 3e-3}
    tables = []
    for precision in choose.PRECISIONS:
        config = make_config({**small, "data_dir": str(demo_dir), "precision": precision})
        data = prepare_data(config.data)
        model = build_model(config, data)
        train_model(config, data, model)
        tables.append(predict_splits(config, data, model))
    (row,) = paired_differences(*tables, data.classes, ["brier"], resamples=500)
    assert row["low"] <= 0 <= row["high"], row
    difference = np.abs(tables[0].filter(like="p_") - tables[1].filter(like="p_")).to_numpy()
    assert 0 < difference.mean() < 0.05  # other numbers, and the same answer
