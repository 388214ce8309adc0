"""What runs share is made once, however many start together, and survives what disks do to it."""

import functools
import http.server
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dermnb.audit import duplicates, hashes
from dermnb.core import ConfigError, only_one
from dermnb.data import images
from dermnb.data.datasets import load_dataset
from dermnb.data.synthetic import generate_demo

PROCESSES = 4

# Several processes that do the same at the same moment; what each computes is counted in a file.
TOGETHER = """
import os, sys, time, zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
import pandas as pd
from dermnb.audit import duplicates, features, hashes
from dermnb.data import datasets, images, synthetic
from dermnb.data.fetch import fetch_dataset
from dermnb.nets import backbones, weights
import numpy as np

home, url = Path(sys.argv[1]), sys.argv[2]
manifest = pd.read_csv(home / "m.csv")

def counted(owner, name, made):
    plain = getattr(owner, name)
    def call(*args, **more):
        with open(home / f"{made}.made", "a") as f:
            f.write("x")
        return plain(*args, **more)
    setattr(owner, name, call)

def together(stage):
    (home / f"{stage}.{os.getpid()}.ready").touch()
    while not (home / f"{stage}.go").exists():
        time.sleep(0.002)

def see(network, views):
    time.sleep(0.02)
    return np.ones((len(views), features.FEATURES), "<f4")

counted(images, "resize_image", "store")
counted(hashes, "_fingerprint_of", "prints")
counted(duplicates, "find_pairs", "pairs")
counted(synthetic, "_write_lesion", "demo")
synthetic.generate_demo = partial(synthetic.generate_demo, lesions=20, size=(32, 32))
features._feature_network = lambda: None
features.weights_digest = duplicates.weights_digest = lambda: "0" * 16
features._mean_features = see
counted(features, "_mean_features", "features")
spec = replace(backbones.BACKBONES["mobilenetv2"], weights_md5="")

together("store")
store = images.build_store(manifest, 16, "crop", home / "cache")
print(len(store), zlib.crc32(store.read(store.rows(manifest["image_id"])).tobytes()))
together("audit")
print(len(duplicates.audit_images(manifest, home / "cache", "hashes").pairs))
together("network")
duplicates.audit_images(manifest, home / "cache", "network")
together("demo")
demo = datasets.DATASETS["demo"]
datasets._prepare_folder(demo, home / "demo")
together("weights")
os.environ["DERMNB_WEIGHTS_URL"] = url
print(weights.fetch_weights(spec)[0].stat().st_size)
together("fetch")
print(fetch_dataset("isic2019", home / "isic", base_url=url, pause=0.1)["bytes"].sum())
"""


def noise(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))


def make_manifest(folder: Path, count: int) -> pd.DataFrame:
    folder.mkdir(parents=True)
    ids = [f"I{i:03}" for i in range(count)]
    for i, name in enumerate(ids):
        noise(i // 2).save(folder / f"{name}.png", compress_level=6 * (i % 2))  # pairs of the same pixels
        os.utime(folder / f"{name}.png", (1e9, 1e9))  # old enough to be remembered
    return pd.DataFrame({"image_id": ids, "path": [str(folder / f"{name}.png") for name in ids]})


class Server(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    "Serves `served`, and counts what is asked for."
    (tmp_path / "served").mkdir()
    handler = functools.partial(Server, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def start_together(home: Path, stage: str, processes: list) -> None:
    "Let all processes go on at the same moment."
    deadline = time.monotonic() + 120
    while len(list(home.glob(f"{stage}.*.ready"))) < len(processes):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), stage
        time.sleep(0.01)
    (home / f"{stage}.go").touch()


def test_processes_that_start_together_make_everything_once(tmp_path, server):
    "About 15 s: four processes, a cold cache, six things that all of them want."
    make_manifest(tmp_path / "in", 60).to_csv(tmp_path / "m.csv", index=False)
    served = tmp_path / "served"
    with h5py.File(served / "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5", "w") as f:
        f["w"] = np.zeros(200_000)
    for name in ("GroundTruth", "Metadata"):
        (served / f"ISIC_2019_Training_{name}.csv").write_text("image\n" * 5000)
    with zipfile.ZipFile(served / "ISIC_2019_Training_Input.zip", "w") as archive:
        archive.writestr("a.jpg", bytes(300_000))
    environment = os.environ | {"KERAS_HOME": str(tmp_path / "keras"), "DERMNB_WEIGHTS": str(tmp_path / "none")}
    command = [sys.executable, "-c", TOGETHER, str(tmp_path), f"http://127.0.0.1:{server.server_port}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(PROCESSES)]
    try:
        for stage in ("store", "audit", "network", "demo", "weights", "fetch"):
            start_together(tmp_path, stage, processes)
        said = [p.communicate(timeout=120) for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * PROCESSES, said[0][1] or said[1][1]
    assert len({out for out, _ in said}) == 1  # all got the same
    made = {p.stem: len(p.read_text()) for p in tmp_path.glob("*.made")}
    assert made == {"store": 60, "prints": 60, "pairs": 2, "features": 4, "demo": 20}
    assert sorted(server.asked) == sorted(f"/{p.name}" for p in served.iterdir())


def test_a_killed_holder_frees_its_lock_and_who_waits_says_so(tmp_path, monkeypatch):
    code = (
        "import sys, time; from dermnb.core import only_one\n"
        "with only_one(sys.argv[1], 'waits'): print('held', flush=True); time.sleep(100)"
    )
    lock = tmp_path / "new" / "lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    steps, done = [], []
    monkeypatch.setattr("dermnb.core.progress", lambda step, *_: steps.append(step))

    def wait():
        with only_one(lock, "decodes the images"):
            done.append(time.monotonic())

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(1.3)
    assert set(steps) == {"waiting for another run that decodes the images"} and not done
    killed = time.monotonic()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    for thread in threads:
        thread.join(timeout=10)
    assert len(done) == 3 and max(done) - killed < 2


@pytest.fixture
def stored(tmp_path):
    "Eight images, their store with two commits, and the pixels as they are to be."
    manifest = make_manifest(tmp_path / "in", 16)[::2]
    stores = tmp_path / "stores"
    images.build_store(manifest[:5], 16, "crop", stores)
    store = images.build_store(manifest, 16, "crop", stores)
    return manifest, stores, store.read(store.rows(manifest["image_id"])).copy()


def damaged(data: bytes, how: str, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    flipped = bytearray(data)
    flipped[at % len(data)] ^= 1 + rng.randrange(255)
    return {
        "cut": data[:at],
        "empty": b"",
        "flipped": bytes(flipped),
        "garbage": rng.randbytes(len(data)),
        "longer": data + rng.randbytes(3 * 16 * 16 * 3 + 5),
        "hole": data[:at] + data[at + 74 :],
        "no ASCII": data[: at // 2] + b"\xff\n" + data[at // 2 :],
    }[how]


@pytest.mark.parametrize("name", ["images.npy", "rows.txt", "digests.tsv"])
@pytest.mark.parametrize(
    "how", ["cut", "empty", "flipped", "garbage", "longer", "hole", "no ASCII"]
)
def test_a_damaged_store_gives_the_right_pixels_or_a_sentence_and_then_the_right_ones(
    stored, name, how
):
    "0.5 s each: twelve places of each kind of damage."
    manifest, stores, pixels = stored
    folder = stores / "crop-16px-v3"
    file = (stores if name == "digests.tsv" else folder) / name
    rng, whole = random.Random(f"{name} {how}"), file.read_bytes()
    for _ in range(12):
        file.write_bytes(damaged(whole, how, rng))
        for attempt in ("with the damage", "again"):
            try:
                store = images.build_store(manifest, 16, "crop", stores)
                found = store.read(store.rows(manifest["image_id"]))
                break
            except ConfigError as error:
                assert attempt == "with the damage" and " are damaged: run this again" in str(error)
        np.testing.assert_array_equal(found, pixels)
        assert images.build_store(manifest, 16, "crop", stores).decoded == 0
        whole = file.read_bytes()


def test_a_damaged_store_that_cannot_be_mended_says_what_to_do(stored, monkeypatch):
    manifest, stores, _ = stored
    store = images.build_store(manifest, 16, "crop", stores)
    with open(store.path, "r+b") as f:
        f.seek(200)
        f.write(b"\x01\x02\x03\x04")
    plain = open
    monkeypatch.setattr("builtins.open", lambda path, mode="r", *a, **k: refuse(path) if mode == "r+b" else plain(path, mode, *a, **k))
    with pytest.raises(ConfigError, match=r"^1 images in .*images.npy are damaged: delete it"):
        store.read(store.rows(manifest["image_id"]))


def refuse(path):
    raise OSError(30, "Read-only file system", str(path))


def audited(manifest, cache) -> pd.DataFrame:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pairs = duplicates.audit_images(manifest, cache).pairs
    pairs.attrs["said"] = [str(w.message) for w in said]
    return pairs


@pytest.mark.parametrize("what", ["pairs", "fingerprints"])
def test_a_damaged_audit_is_made_anew_and_said(tmp_path, what):
    "5 s: four places of each kind of damage."
    manifest, cache, rng = make_manifest(tmp_path / "in", 12), tmp_path / "cache", random.Random(0)
    right = audited(manifest, cache)
    assert len(right) == 6 and right.attrs["said"] == []
    (pairs_file,) = cache.glob("*.pairs")
    file = pairs_file if what == "pairs" else cache / hashes.STORE
    whole = file.read_bytes()
    said = set()
    for how in ("cut", "flipped", "garbage", "empty", "longer", "hole", "no ASCII"):
        for _ in range(4):
            file.write_bytes(damaged(whole, how, rng))
            if what == "fingerprints":
                pairs_file.unlink()
            found = audited(manifest, cache)
            pd.testing.assert_frame_equal(found, right)
            said.update(found.attrs["said"])
            assert audited(manifest, cache).attrs["said"] == []
    assert said == {f"{file} is damaged: the images are compared anew"}
    assert not list(cache.glob("*.part"))


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 2 MB of its own, and a function that makes it read-only or writable."
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not hasattr(os, "getuid") or os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("to mount a small disk takes the rights of root")

    def remount(how: str):
        subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)

    yield folder, remount
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, free: int) -> Path:
    "Leave so many bytes free."
    filler = folder / "filler"
    with open(filler, "wb") as f:
        f.write(bytes(os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize - free))
    return filler


@pytest.mark.parametrize("free", [0, 8192, 20_480, 40_960])
def test_a_full_disk_is_a_sentence_and_the_next_call_completes(small_disk, tmp_path, free, monkeypatch):
    "4 s each."
    disk, _ = small_disk
    manifest = make_manifest(tmp_path / "in", 40)
    right = duplicates.audit_images(manifest, tmp_path / "elsewhere").pairs
    plain = shutil.disk_usage
    # As if another program took the space after it was looked for.
    monkeypatch.setattr(images.shutil, "disk_usage", lambda path: plain("/tmp")._replace(free=1 << 40))
    monkeypatch.setattr(images, "_COMMIT", 4)
    full = "the disk is full|database or disk is full|No space left on device|unable to open"
    for work in (
        lambda: images.build_store(manifest, 40, "crop", disk / "cache"),
        lambda: duplicates.audit_images(manifest, disk / "cache"),
        lambda: generate_demo(disk / "demo", lesions=60, size=(64, 48)),
    ):
        filler = fill(disk, free)
        with pytest.raises(ConfigError, match=full):
            work()
        filler.unlink()
    store = images.build_store(manifest, 40, "crop", disk / "cache")
    found = store.read(store.rows(manifest["image_id"]))
    for pixels, path in zip(found, manifest["path"], strict=True):
        np.testing.assert_array_equal(pixels, images.read_pixels(path, 40))
    pd.testing.assert_frame_equal(duplicates.audit_images(manifest, disk / "cache").pairs, right)
    demo = generate_demo(disk / "demo", lesions=60, size=(64, 48))
    other = generate_demo(tmp_path / "demo", lesions=60, size=(64, 48))
    files = {p.relative_to(other): p.read_bytes() for p in other.rglob("*.*")}
    assert {p.relative_to(demo): p.read_bytes() for p in demo.rglob("*.*")} == files
    left = {p.name for p in disk.rglob("*") if p.suffix in (".part", ".partial") or "-journal" in p.name}
    assert not left


def test_a_cache_that_cannot_be_written_is_read_if_it_holds_everything(small_disk, tmp_path):
    disk, remount = small_disk
    manifest = make_manifest(tmp_path / "in", 12)
    some, cache = manifest[:6], disk / "cache"
    store = images.build_store(some, 16, "crop", cache)
    pairs = duplicates.audit_images(some, cache).pairs
    generate_demo(disk / "demo", lesions=3, size=(32, 32))
    remount("ro")
    again = images.build_store(some, 16, "crop", cache)
    rows = store.rows(some["image_id"])
    np.testing.assert_array_equal(again.read(rows), store.read(rows))
    pd.testing.assert_frame_equal(duplicates.audit_images(some, cache).pairs, pairs)
    assert generate_demo(disk / "demo", lesions=3, size=(32, 32)).is_dir()
    for work in (
        lambda: images.build_store(manifest, 16, "crop", cache),
        lambda: images.build_store(some, 24, "crop", cache),
        lambda: duplicates.audit_images(manifest, cache),
        lambda: duplicates.audit_images(some, disk / "new"),
        lambda: generate_demo(disk / "other", lesions=3, size=(32, 32)),
    ):
        with pytest.raises(ConfigError, match="Read-only file system|readonly database") as caught:
            work()
        assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("name", ["GroundTruth", "Metadata"])
def test_a_table_that_ends_within_a_row_is_a_sentence(tmp_path, name):
    demo = generate_demo(tmp_path / "demo", lesions=6, size=(32, 32))
    file = demo / f"ISIC_2019_Training_{name}.csv"
    whole = file.read_text()
    last = whole.rstrip("\n").rpartition("\n")[2]
    for cut in range(whole.rfind(last) + 1, whole.rfind(",") + 1):
        file.write_text(whole[:cut])
        with pytest.raises(ConfigError, match=r"ends within a row \(\d+ of \d+ cells\)"):
            load_dataset("demo", demo)
    file.write_text(whole.rstrip("\n"))  # the end of the last line alone is nothing
    assert len(load_dataset("demo", demo).problems) == 0


def test_a_table_cut_within_a_quoted_cell_and_a_cut_archive_are_sentences(tmp_path):
    folder = tmp_path / "csv"
    make_manifest(folder, 4)
    rows = [f'I{i:03},{("nevus", "melanoma")[i % 2]},"some, long\nnote"\n' for i in range(4)]
    text = "image,label,note\n" + "".join(rows)
    for cut in (len(text) - 3, len(text) - 12):
        (folder / "data.csv").write_text(text[:cut])
        with pytest.raises(ConfigError, match="EOF inside string"):
            load_dataset("csv", folder)
    archive, pictures = tmp_path / "zipped" / "images.zip", sorted(folder.glob("*.png"))
    archive.parent.mkdir()
    (archive.parent / "data.csv").write_text(text)
    with zipfile.ZipFile(archive, "w") as zipped:
        for picture in pictures:
            zipped.write(picture, picture.name)
    assert len(load_dataset("csv", archive.parent).manifest) == 4
    whole = archive.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        archive.write_bytes(whole[:cut])
        with pytest.raises(ConfigError) as caught:
            load_dataset("csv", archive.parent)
        assert "\n" not in str(caught.value) and "zip" in str(caught.value)


def test_a_file_system_without_locks_is_a_sentence(tmp_path, monkeypatch):
    if sys.platform == "win32":
        pytest.skip("Windows locks in another way")
    import fcntl

    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    manifest = make_manifest(tmp_path / "in", 2)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    for work in (images.build_store, lambda *a: duplicates.audit_images(a[0], a[3])):
        with pytest.raises(ConfigError, match="its file system has no locks"):
            work(manifest, 16, "crop", tmp_path / "cache")
