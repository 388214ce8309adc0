"""The image store under faults, odd image files, and batches that repeat."""

import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage
from tolerances import FLOAT32

from dermnb.data import images
from dermnb.core import ConfigError


def noise(seed: int, size=(40, 30)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def make_manifest(folder: Path, count: int) -> pd.DataFrame:
    folder.mkdir(parents=True, exist_ok=True)
    ids = [f"I{i:03}" for i in range(count)]
    for i, name in enumerate(ids):
        noise(i).save(folder / f"{name}.png")
        os.utime(folder / f"{name}.png", (1e9, 1e9))  # old enough to be remembered
    return pd.DataFrame(
        {"image_id": ids, "path": [str(folder / f"{name}.png") for name in ids]}
    )


def refuse_reading(path):
    raise AssertionError(f"{path} was read again")


BUILD = """
import sys, time
import pandas as pd
from dermnb.data import images
manifest, stores, delay, commit = sys.argv[1:5]
images._COMMIT = int(commit)
plain = images.read_image_bytes
def slow(path):
    time.sleep(float(delay))
    return plain(path)
images.read_image_bytes = slow
print("ready", flush=True)
store = images.build_store(pd.read_csv(manifest), 16, "crop", stores, workers=2)
print(store.decoded, flush=True)
"""


def start_build(manifest: Path, stores: Path, delay: float, commit: int = 4):
    arguments = [str(manifest), str(stores), str(delay), str(commit)]
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, *arguments], stdout=subprocess.PIPE, text=True
    )


def check_pixels(store, manifest):
    for name, path in zip(manifest["image_id"], manifest["path"], strict=True):
        expected = images.read_pixels(path, store.size, store.method)
        np.testing.assert_array_equal(store.images[store.index[name]], expected)


def test_killed_build_resumes(tmp_path, monkeypatch):
    manifest = make_manifest(tmp_path / "in", 60)
    manifest.to_csv(tmp_path / "m.csv", index=False)
    stores = tmp_path / "stores"
    journal = stores / "crop-16px-v3" / "rows.txt"
    process = start_build(tmp_path / "m.csv", stores, delay=0.1)
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.stat().st_size < 8 * 74:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = images._Rows(journal.parent, 16)
    kept = rows.count
    assert 8 <= kept < 60
    # What is there is an ordinary array; add the torn tails of a worse moment.
    assert np.load(rows.images, mmap_mode="r").shape[1:] == (16, 16, 3)
    with open(rows.images, "ab") as f:
        f.write(b"\x07" * 100)
    with open(rows.journal, "ab") as f:
        f.write(b"0" * 30)
    with open(stores / "digests.tsv", "ab") as f:
        f.write(b"abc")

    store = images.build_store(manifest, 16, "crop", stores)
    assert store.decoded == 60 - kept
    check_pixels(store, manifest)
    assert np.load(store.path).shape == (60, 16, 16, 3)
    monkeypatch.setattr(images, "read_image_bytes", refuse_reading)
    assert images.build_store(manifest, 16, "crop", stores).decoded == 0


def test_rows_without_digest_or_pixels_do_not_count(tmp_path):
    manifest = make_manifest(tmp_path / "in", 5)
    store = images.build_store(manifest, 16, "crop", tmp_path / "stores")
    journal = store.path.parent / "rows.txt"
    journal.write_bytes(
        journal.read_bytes()[:-75]
    )  # the last digest, and one byte more
    with open(store.path, "r+b") as f:
        f.truncate(store.path.stat().st_size - 16 * 16 * 3 * 2 - 5)
    again = images.build_store(manifest, 16, "crop", tmp_path / "stores")
    assert again.decoded == 3
    check_pixels(again, manifest)


def test_two_builders_at_once(tmp_path):
    manifest = make_manifest(tmp_path / "in", 40)
    manifest.to_csv(tmp_path / "m.csv", index=False)
    stores = tmp_path / "stores"
    both = [start_build(tmp_path / "m.csv", stores, delay=0.02) for _ in range(2)]
    decoded = [int(p.communicate(timeout=200)[0].split()[-1]) for p in both]
    assert sorted(decoded) == [0, 40]
    store = images.build_store(manifest, 16, "crop", stores)
    assert (store.decoded, len(store.images)) == (0, 40)
    check_pixels(store, manifest)


def test_key_is_the_content(tmp_path):
    manifest = make_manifest(tmp_path / "in", 6)
    stores = tmp_path / "stores"
    first = images.build_store(manifest, 16, "crop", stores)
    before = first.read(first.rows(["I002"]))[0]

    # A subset, a copy elsewhere and a touched file are there already.
    assert images.build_store(manifest[2:4], 16, "crop", stores).decoded == 0
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(manifest["path"][2]).read_bytes())
    os.utime(manifest["path"][3])
    moved = manifest.assign(
        path=manifest["path"].replace({manifest["path"][2]: str(copy)})
    )
    store = images.build_store(moved, 16, "crop", stores)
    assert store.decoded == 0 and store.index == first.index

    # A changed file is a new row, though its size and its age might be the same.
    noise(77).save(manifest["path"][2])
    changed = images.build_store(manifest, 16, "crop", stores)
    assert changed.decoded == 1
    assert changed.index["I002"] != first.index["I002"]
    np.testing.assert_array_equal(first.read(first.rows(["I002"]))[0], before)
    check_pixels(changed, manifest)

    # Sizes and methods are stores of their own; two names of one content share a row.
    assert images.build_store(manifest, 16, "pad", stores).decoded == 6
    twins = pd.DataFrame({"image_id": ["a", "b"], "path": [str(copy)] * 2})
    assert len(set(images.build_store(twins, 20, "crop", stores).index.values())) == 1


def test_zip_members(tmp_path, monkeypatch):
    manifest = make_manifest(tmp_path / "in", 5)
    archive = tmp_path / "part.zip"
    with zipfile.ZipFile(archive, "w") as z:
        for path in manifest["path"]:
            z.write(path, Path(path).name)
    os.utime(archive, (1e9, 1e9))
    members = manifest.assign(
        path=[f"{archive}::{Path(path).name}" for path in manifest["path"]]
    )
    stores = tmp_path / "stores"
    store = images.build_store(members, 16, "crop", stores)
    assert store.decoded == 5
    check_pixels(store, members)
    assert images.build_store(manifest, 16, "crop", stores).decoded == 0  # same content
    monkeypatch.setattr(images, "read_image_bytes", refuse_reading)
    assert images.build_store(members, 16, "crop", stores).decoded == 0
    os.utime(archive, (1e9 + 5, 1e9 + 5))
    with pytest.raises(ConfigError, match="was read again"):
        images.build_store(members, 16, "crop", stores)


def test_unreadable_images_are_named_and_can_be_excluded(tmp_path):
    manifest = make_manifest(tmp_path / "in", 6)
    Path(manifest["path"][1]).write_bytes(b"GIF89a no image")
    Path(manifest["path"][4]).unlink()
    stores = tmp_path / "stores"
    with pytest.raises(ConfigError, match=r"'I001' .*and 1 more: I004.*exclude"):
        images.build_store(manifest, 16, "crop", stores)
    store = images.build_store(manifest, 16, "crop", stores, on_problem="exclude")
    assert store.decoded == 0 and set(store.unreadable) == {"I001", "I004"}
    assert list(store.index) == ["I000", "I002", "I003", "I005"]
    with pytest.raises(ConfigError, match="'I001' is not among the 4"):
        store.rows(["I001"])


def test_full_disk_and_read_only_folder_are_sentences(tmp_path, monkeypatch):
    manifest = make_manifest(tmp_path / "in", 3)

    def full(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images._Rows, "append", full)
    with pytest.raises(ConfigError, match="disk is full.*choose another folder"):
        images.build_store(manifest, 16, "crop", tmp_path / "stores")
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose a folder"):
        images.build_store(manifest, 16, "crop", tmp_path / "file")
    assert images.build_store(manifest, 16, "crop", tmp_path / "stores").decoded == 3


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("method", images.RESIZE_METHODS)
def test_pixel_formats(method):
    red = Image.new("RGB", (64, 48), (200, 30, 30))
    ramp = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    files = {
        "gray": encoded(red.convert("L"), "PNG"),
        "palette": encoded(red.convert("P"), "PNG"),
        "cmyk": encoded(red.convert("CMYK"), "JPEG", quality=95),
        "rgba": encoded(Image.new("RGBA", (64, 48), (200, 30, 30, 255)), "PNG"),
        "bilevel": encoded(Image.new("1", (64, 48), 1), "PNG"),
        "png16": encoded(Image.fromarray(ramp), "PNG"),
        "tiff16": encoded(Image.fromarray(ramp), "TIFF"),
    }
    made = {name: images.resize_image(data, 32, method) for name, data in files.items()}
    for pixels in made.values():
        assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
    center = {name: pixels[16, 16].astype(int) for name, pixels in made.items()}
    for name in ("palette", "cmyk", "rgba"):
        assert np.abs(center[name] - (200, 30, 30)).max() <= 6, name
    assert len(set(center["gray"])) == 1
    assert list(center["bilevel"]) == [255] * 3
    assert abs(center["png16"][0] - 130) < 5
    np.testing.assert_array_equal(made["png16"], made["tiff16"])


def test_exif_orientation():
    upright = Image.new("RGB", (60, 60), "blue")
    upright.paste("red", (0, 0, 60, 30))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned; to be turned clockwise for display
    data = encoded(upright.rotate(90), "JPEG", exif=exif, quality=95)
    pixels = images.resize_image(data, 20, "crop")
    assert pixels[3, 10, 0] > 200 and pixels[16, 10, 2] > 200


def test_geometry_of_methods():
    wide = Image.new("RGB", (90, 30), "white")
    wide.paste("red", (30, 0, 60, 30))  # the center square
    crop = images.resize_image(wide, 30, "crop")
    assert (crop == (255, 0, 0)).all()
    pad = images.resize_image(wide, 30, "pad")
    assert (pad[:10] == 0).all() and (pad[20:] == 0).all() and pad[15, 2].min() > 200
    stretch = images.resize_image(wide, 30, "stretch")
    assert stretch.min(axis=2)[:, :8].min() > 250
    assert list(stretch[0, 15]) == list(stretch[29, 15])


def test_draft_mode_changes_little():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    large = coarse.resize((1600, 1200), Image.Resampling.BICUBIC)
    quick = images.resize_image(encoded(large, "JPEG", quality=95), 96)
    slow = images.resize_image(large, 96)
    assert np.abs(quick.astype(int) - slow).mean() < 2


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    manifest = make_manifest(folder / "in", 21)
    return images.build_store(manifest, 24, "crop", folder / "stores")


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("augment", images.AUGMENTATIONS)
@pytest.mark.parametrize("mix", images.MIXES)
def test_batches_repeat(store, augment, mix):
    from concurrent.futures import ThreadPoolExecutor

    def build():
        labels = np.arange(21) % 3
        return images.make_batches(
            store, np.arange(21), labels, 3, 4, True, augment=augment, mix=mix, seed=5
        )

    one, two = build(), build()
    assert len(one) == 5  # 4, 4, 4, 4 and 5: none of one image
    plain = [one[i] for i in range(5)]
    one.on_epoch_end()
    two.on_epoch_end()
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(two.__getitem__, reversed(range(5))))[::-1]
    for i in range(5):
        assert same(one[i], threaded[i])
        x, y = threaded[i]
        assert x.dtype == y.dtype == np.float32
        assert x.min() >= 0 and x.max() <= 255 and np.isfinite(x).all()
        np.testing.assert_allclose(y.sum(axis=1), 1, atol=FLOAT32)
    assert not same(plain[0], one[0])
    one.set_epoch(0)
    assert same(plain[3], one[3])
    seen = np.concatenate([one.positions(i) for i in range(5)])
    assert sorted(seen) == list(range(21))


def test_dermoscopy_under_mixed_precision_and_determinism():
    code = (
        "import keras, numpy as np, tensorflow as tf\n"
        "from dermnb.data.images import augment_images, batch_generator\n"
        "keras.utils.set_random_seed(1)\n"
        "tf.config.experimental.enable_op_determinism()\n"
        "keras.mixed_precision.set_global_policy('mixed_bfloat16')\n"
        "x = np.random.default_rng(0).integers(0, 256, (9, 40, 40, 3), 'uint8')\n"
        "y = augment_images(x, 'dermoscopy', batch_generator(1, 2, 3))\n"
        "print(y.dtype, repr(float(y.astype('float64').sum())))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    x = np.random.default_rng(0).integers(0, 256, (9, 40, 40, 3), "uint8")
    y = images.augment_images(x, "dermoscopy", images.batch_generator(1, 2, 3))
    kind, total = output.split()
    assert kind == "float32"
    # Whether TensorFlow optimizes its graphs, as other tests here decide, changes last bits.
    assert float(total) == pytest.approx(y.astype("float64").sum(), rel=FLOAT32)


def test_dermoscopy_on_jax_is_that_of_keras_cv():
    "Each step by value; JPEG, which TensorFlow opens with a rougher transform, by distribution."
    import tensorflow as tf

    rng = np.random.default_rng(3)
    smooth = ndimage.gaussian_filter(rng.normal(0, 60, (256, 48, 48, 3)), (0, 4, 4, 1)) * 8 + 150
    pixels = np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)
    pixels[0], pixels[1], pixels[2, :, :, 1:] = 0, 255, 0  # gray, and of one color
    drawn = images._dermoscopy_settings(256, 48, np.random.default_rng(4))
    neutral = {"brightness": np.zeros_like(drawn["brightness"]), "contrast": np.ones_like(drawn["contrast"])}
    none = {step: drawn[step][:0] for step in images._SHARES}

    def both(settings):
        spread = images.spread_settings(settings, 256)
        twin = np.array(images.dermoscopy_steps(pixels.astype("float32"), spread))
        return twin, images._dermoscopy_function(48)(pixels, settings)

    empty = {n: drawn[n][:0] for names in images._SETTINGS_OF.values() for n in names}
    still = drawn | none | empty | neutral | {"quality": drawn["quality"][:0]}
    for step in images._STEPS:
        names = images._SETTINGS_OF.get(step, ()) or (step,)
        twin, theirs = both(still | {n: drawn[n] for n in {step, *names}})
        changed = np.abs(theirs - pixels).reshape(256, -1).max(axis=1) > 0.5
        assert 50 < changed.sum(), step
        # Eight bits of a byte and six roundings of float32; angles are computed by each.
        assert np.abs(twin - theirs).max() < 0.02, step

    for quality in (40, 75, 95):
        saved = tf.image.encode_jpeg(pixels[5], quality=quality)
        exact = tf.image.decode_jpeg(saved, dct_method="INTEGER_ACCURATE").numpy()
        np.testing.assert_array_equal(images._as_jpeg(pixels[5].astype("float32"), quality), exact)
    compress = {n: drawn[n] for n in ("compress", "quality")}
    _, theirs = both(still | compress)
    which = drawn["compress"]
    ours = np.stack([images._as_jpeg(pixels[i], q) for i, q in zip(which, drawn["quality"], strict=True)])
    apart = ours - theirs[which]
    assert np.abs(apart.mean()) < 1.5 and apart.std() < 3
    bins = np.linspace(0, 256, 33)
    shares = [np.histogram(x, bins)[0] / x.size for x in (ours, theirs[which])]
    assert np.abs(shares[0] - shares[1]).sum() / 2 < 0.05
    assert np.abs(ours.std() - theirs[which].std()) < 1


def test_fit_takes_batches(store):
    import keras

    train = images.make_batches(
        store, np.arange(21), np.arange(21) % 3, 3, 4, True, "dermoscopy", "mixup"
    )
    model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    model.fit(train, epochs=2, shuffle=False, verbose=0)
    assert train.epoch >= 2
    final = images.make_batches(store, np.arange(21), np.arange(21) % 3, 3, 4)
    assert model.predict(final, verbose=0).shape == (21, 3)


def test_import_loads_no_framework():
    code = (
        "import sys, dermnb.data.images\n"
        "found = {'keras', 'tensorflow', 'keras_cv', 'jax'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_keras_cv_is_a_sentence(monkeypatch):
    images._dermoscopy_function.cache_clear()
    monkeypatch.setitem(sys.modules, "keras_cv", None)
    with pytest.raises(ConfigError, match="keras-cv.*use 'light'"):
        images.augment_images(
            np.zeros((2, 16, 16, 3), np.uint8), "dermoscopy", np.random.default_rng(0)
        )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"augment": "ligth"}, "did you mean 'light'"),
        ({"mix": "mixp"}, "did you mean 'mixup'"),
        ({"labels": np.array([0, 1, 3])}, "they are 0 to 2"),
        ({"labels": np.array([0, 1])}, "3 rows but 2 labels"),
        ({"batch_size": 1, "shuffle": True}, "batch_size 1 is too small"),
        (
            {"rows": [0], "labels": [0], "shuffle": True},
            r"too few images \(1\) to train",
        ),
    ],
)
def test_wrong_arguments_are_sentences(store, options, sentence):
    arguments = {"rows": np.arange(3), "labels": np.arange(3), "num_classes": 3}
    with pytest.raises(ConfigError, match=sentence):
        images.make_batches(store, **{**arguments, **options})
