"""What a machine says of itself."""

import sys
from types import SimpleNamespace

import numpy as np

from dermnb import core
from dermnb.core import peak_memory_mb


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
