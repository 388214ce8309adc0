"""Counters of energy: made-up ones, ones that run over, and ones that cannot be read."""

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from dermnb import core
from dermnb.core import EnergyMeter, peak_memory_mb


@pytest.fixture
def machine(tmp_path):
    "Two processor packages; a function that sets what one has counted, in joules."

    def count(package: int, joules: float):
        (tmp_path / f"intel-rapl:{package}/energy_uj").write_text(f"{joules * 1e6:.0f}\n")

    for package in (0, 1):
        zone = tmp_path / f"intel-rapl:{package}"
        zone.mkdir()
        (zone / "name").write_text(f"package-{package}\n")
        (zone / "max_energy_range_uj").write_text("262143328850\n")
        count(package, 100)
    return tmp_path, count


def test_packages_are_summed_and_may_run_over_more_than_once(machine):
    root, count = machine
    with EnergyMeter(root, every=3600) as meter:
        for joules in (262_000, 100, 262_000, 200):
            count(0, joules)
            meter.result()  # looks, as its thread does every few seconds
        count(1, 150)
    found = meter.result()
    assert found["cpu_joules"] == pytest.approx(2 * 262_143.32885 + 100 + 50, abs=1e-3)
    assert found["joules"] == found["cpu_joules"]
    assert "processor packages" in found["note"] and "GPUs not counted" in found["note"]
    count(1, 9_000)
    assert meter.result() == found, "what comes after the block is not its own"


def test_a_counter_that_goes_away_leaves_a_reason_and_no_figure(machine):
    root, _ = machine
    with EnergyMeter(root) as meter:
        (root / "intel-rapl:1/energy_uj").unlink()
    assert meter.result()["cpu_joules"] is None and meter.result()["joules"] is None


def test_counters_for_root_only_say_so(machine, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(core.Path, "read_text", refuse)
    with EnergyMeter(machine[0]) as meter:
        pass
    assert "only root may read" in meter.result()["note"]


def test_text_in_place_of_a_count_stops_nothing(machine):
    root, _ = machine
    (root / "intel-rapl:0/energy_uj").write_text("a lot")
    with EnergyMeter(root) as meter:
        pass
    assert meter.result()["cpu_joules"] is None


def test_gpus_are_counted_through_the_driver(monkeypatch, tmp_path):
    millijoules = [5_000_000, 7_000_000]

    def energy(device, used):
        used._obj.value = millijoules[device.value or 0]
        return 0

    def handle(i, device):
        device._obj.value = i
        return 0

    def count(found):
        found._obj.value = len(millijoules)
        return 0

    driver = SimpleNamespace(
        nvmlInit_v2=lambda: 0,
        nvmlShutdown=lambda: 0,
        nvmlDeviceGetCount_v2=count,
        nvmlDeviceGetHandleByIndex_v2=handle,
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    with EnergyMeter(tmp_path) as meter:
        millijoules[:] = 5_250_000, 7_000_500
    assert meter.result()["gpu_joules"] == pytest.approx(250.5)
    driver.nvmlDeviceGetTotalEnergyConsumption = lambda *_: 3  # not supported
    with EnergyMeter(tmp_path) as meter:
        pass
    assert meter.result()["gpu_joules"] is None
    assert "answered 3" in meter.result()["note"]


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
