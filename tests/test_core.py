"""The parts of a config, and what a machine says of itself."""

import sys
from types import SimpleNamespace

import numpy as np

from dermnb import core
from dermnb.core import (
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    NetworkConfig,
    TrainingConfig,
    make_config,
    peak_memory_mb,
)

PARTS = {
    "data": DataConfig,
    "network": NetworkConfig,
    "training": TrainingConfig,
    "evaluation": EvaluationConfig,
}


def test_the_parts_of_a_config_are_the_whole_and_share_nothing():
    config = make_config({"split": "kfold", "fold": 2, "head": [8], "epochs": 7, "explain": 3})
    values = {"suite": config.suite, "run": config.run}
    for name, kind in PARTS.items():
        part = getattr(config, name)
        assert type(part) is kind and isinstance(config, kind)
        assert part == kind(**part.model_dump())  # each passes its own checks alone
        assert not values.keys() & kind.model_fields.keys()
        values |= part.model_dump()
    assert values == config.model_dump() and list(values) == list(ExperimentConfig.model_fields)


def test_peak_memory_on_each_system(monkeypatch):
    "Linux counts in KiB, macOS in bytes, and Windows has psutil only."
    import psutil

    held = np.ones(2**23, "uint8")  # 8 MiB
    assert peak_memory_mb() > held.nbytes / 2**20
    used = SimpleNamespace(ru_maxrss=512 * 2**20)
    counter = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: used)
    monkeypatch.setitem(sys.modules, "resource", counter)
    assert peak_memory_mb() == 512 * 2**10
    monkeypatch.setattr(core.sys, "platform", "darwin")
    assert peak_memory_mb() == 512
    monkeypatch.setitem(sys.modules, "resource", None)
    memory = SimpleNamespace(rss=5 * 2**20, peak_wset=7 * 2**20)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: memory)
    assert peak_memory_mb() == 7
