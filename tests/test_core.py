"""The parts of a config, and what a machine says of itself."""

import os
import subprocess
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
from dermnb.runs import plan, suites

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


def test_the_framework_is_chosen_before_keras_is_imported():
    "Also by a module of which nothing else is imported, and for the processes started by it."
    code = (
        "import os, sys; from dermnb.nets import losses; "
        "print(os.environ['KERAS_BACKEND'], losses.keras.config.backend(), 'tensorflow' in sys.modules)"
    )
    for asked in ("", "jax"):
        env = os.environ | {"KERAS_BACKEND": asked}
        said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        if asked and "jax, which is not installed" in said.stderr:
            continue  # as its requirements are only those of TensorFlow
        chosen = asked or core.backend()
        assert said.stdout.split() == [chosen, chosen, str(chosen == "tensorflow")], said.stderr


def test_a_gpu_counts_if_the_framework_sees_it(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    asked = []
    monkeypatch.setattr(core, "_ASK", dict.fromkeys(core.FRAMEWORKS, "print('noise'); print('H100')"))
    command = core._command
    monkeypatch.setattr(core, "_command", lambda *args, **more: asked.append(args) or command(*args, **more))
    core.accelerator.cache_clear()
    try:
        assert core.accelerator() == "H100" and suites.default_profile() == "gpu"
        assert len(asked) == 1  # and remembered
        core.accelerator.cache_clear()
        monkeypatch.setattr(core, "_ASK", dict.fromkeys(core.FRAMEWORKS, "print('')"))
        assert core.accelerator() == "" and suites.default_profile() == "cpu"
        record = core.provenance()
        assert record["hardware"]["gpus"] == ["NVIDIA H100"] and record["accelerator"] == ""
        assert plan._machine(record)[2] == ()
    finally:
        core.accelerator.cache_clear()
