"""A pack: made, executed in a network namespace without a route, and brought back; damaged, too large, of another Python."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pandas as pd
import pytest

from dermnb.core import ConfigError, read_json, table_hash, write_json
from dermnb.runs import pack as packs
from dermnb.runs.folders import is_done, validate_run
from dermnb.runs.pack import pack_suite, unpack_results
from dermnb.runs.suites import load_suite, resolve_suite

PYTHON = "{}.{}".format(*sys.version_info)
SUITE = """
title: Small
question: Does it come back?
defaults: {dataset: demo, image_size: 32, bootstrap: 100, epochs: 1, split_seed: 3}
profiles: {cpu: {}, gpu: {epochs: 9}}
runs:
  first: {backbone: cnn}
"""
# A namespace of its own has no network at all; kernels are spoken to through its loopback.
LOOPBACK = (
    "import fcntl, os, socket, struct, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); "
    "fcntl.ioctl(s, 0x8914, struct.pack('16sh', b'lo', 65)); os.execvp(sys.argv[1], sys.argv[1:])"
)
OFFLINE = ["unshare", "-rn", sys.executable, "-c", LOOPBACK]


def _offline() -> bool:
    if not shutil.which("unshare") or not shutil.which("sha256sum"):
        return False
    return subprocess.run([*OFFLINE, "true"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory, demo_dir):
    "A suite file, and a list of packages as if all were there."
    folder = tmp_path_factory.mktemp("pack")
    (folder / "small.yaml").write_text(SUITE)
    names = {d.name for d in importlib.metadata.distributions()} | {*packs._ROOTS}
    (folder / "have.txt").write_text("\n".join(sorted(names)))
    return folder


@pytest.fixture(scope="module")
def packed(home, demo_dir):
    "The pack of it, and what was said."
    said, out = [], home / "small.tar"
    more = {"profile": "cpu", "python": PYTHON, "have": home / "have.txt", "say": said.append}
    pack_suite(home / "small.yaml", out, str(demo_dir), **more)
    return out, said


def _config(home, demo_dir):
    return resolve_suite(load_suite(home / "small.yaml"), "cpu", {}, str(demo_dir))[0].config


def _untar(archive, folder):
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


def _script(folder, *arguments, offline=True, **env):
    left = {k: v for k, v in os.environ.items() if not k.startswith(("DERMNB_", "PYTHONPATH"))}
    command = [*(OFFLINE if offline else []), "sh", str(folder / "run.sh"), *arguments]
    env = left | {"PYTHON": sys.executable, "KERAS_BACKEND": "tensorflow"} | env
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def results(packed, home):
    "What the pack left after it ran without a network."
    if not _offline():
        pytest.skip("no network namespace can be made here")
    done = _script(_untar(packed[0], home / "there"))
    assert done.returncode == 0, done.stderr
    return home / "there" / "results.tar.xz"


def test_what_ran_without_a_network_counts_as_done_at_home(results, home, demo_dir, tmp_path):
    config, said = _config(home, demo_dir), []
    suite_dir = unpack_results(results, tmp_path, say=said.append)
    run = suite_dir / "first"
    record = validate_run(run)
    assert is_done(run, config) and not is_done(run, config.model_copy(update={"seed": 1}))
    assert record["dataset"]["recompressed"] == {"format": "WebP", "quality": 85, "method": 6, "size": 32}
    assert not list(suite_dir.rglob("*.keras"))
    # The split, and all that is said of the data, are those of the originals.
    from dermnb.runs.prepare import prepare_data
    from dermnb.runs.prepare import dataset_record
    from dermnb.runs.train import _split_record

    here = prepare_data(config.data)
    split = pd.read_parquet(run / "split.parquet")
    columns = ["image_id", "lesion_id", "label", "split"]
    assert table_hash(split[columns]) == table_hash(here.manifest[columns])
    audit = json.loads(json.dumps(here.audit)) | {"seconds": record["audit"]["seconds"]}
    assert record["audit"] == audit
    assert record["split"] == _split_record(here)
    own = dataset_record(here)
    assert {k: record["dataset"][k] for k in own if k != "found"} == {k: own[k] for k in own if k != "found"}
    prints = pd.read_parquet(run / "fingerprints.parquet")
    assert len(prints) == (split["split"] == "train").sum() and prints["bytes"].notna().all()
    # A second time nothing is taken; other results stay unless told.
    unpack_results(results, tmp_path, say=said.append)
    assert said[-1] == "first: already here"
    write_json(run / "run.json", read_json(run / "run.json") | {"pack": {"id": "another"}})
    with pytest.raises(ConfigError, match=r"other results of first .*nothing was taken; with --replace"):
        unpack_results(results, tmp_path, say=said.append)
    unpack_results(results, tmp_path, replace=True, say=said.append)
    assert "in the place of balanced accuracy" in said[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == [suite_dir.name]


def test_given_again_it_goes_on_where_it_was(results, home):
    before = (home / "there" / "reports" / "small" / "first" / "run.json").stat().st_mtime_ns
    done = _script(home / "there", "--networks", "--results", str(home / "with.tar.xz"))
    assert done.returncode == 0 and "first: already done" in done.stdout
    assert (home / "there" / "reports" / "small" / "first" / "run.json").stat().st_mtime_ns == before
    with tarfile.open(home / "with.tar.xz") as tar:
        assert "runs/first/model/model.keras" in tar.getnames()


def test_damaged_results_are_not_taken(results, tmp_path):
    content = results.read_bytes()
    cut = tmp_path / "cut.tar.xz"
    cut.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="is damaged"):
        unpack_results(cut, tmp_path / "reports")
    folder = _untar(results, tmp_path / "open")
    table = pd.read_csv(folder / "runs" / "first" / "history.csv")
    table.assign(loss=0.0).to_csv(folder / "runs" / "first" / "history.csv", index=False)
    packs._tar_xz(folder, tmp_path / "changed.tar.xz")
    with pytest.raises(ConfigError, match=r"is damaged \(runs/first/history.csv\)"):
        unpack_results(tmp_path / "changed.tar.xz", tmp_path / "reports")
    (tmp_path / "text.tar.xz").write_text("no archive")
    with pytest.raises(ConfigError, match="is damaged, or no archive"):
        unpack_results(tmp_path / "text.tar.xz", tmp_path / "reports")
    assert not [p for p in (tmp_path / "reports").iterdir()]


def test_the_script_refuses_a_damaged_pack_another_python_and_missing_packages(packed, tmp_path):
    folder = _untar(packed[0], tmp_path / "pack")
    about = read_json(folder / "pack.json")

    def refused(**changed):
        write_json(folder / "pack.json", about | changed)
        packs.write_sums(folder)
        done = _script(folder, offline=False)
        assert done.returncode == 2 and not (folder / ".installed").exists()
        return done.stderr

    assert f"made for Python 3.4 and this is {PYTHON}" in refused(python="3.4")
    shutil.copytree(folder, tmp_path / "bad")
    (tmp_path / "bad" / "pack.json").write_text("{}")
    done = _script(tmp_path / "bad", offline=False)
    assert done.returncode == 2 and "the pack is damaged: copy it again." in done.stderr


def test_what_is_wrong_is_said_before_anything_is_made(home, demo_dir, tmp_path, monkeypatch):
    def refused(text=SUITE, **more):
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(ConfigError) as error:
            pack_suite(tmp_path / "s.yaml", tmp_path / "out" / "s.tar", str(demo_dir), **more)
        assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").is_dir() else True
        return str(error.value)

    assert "unknown profile of suite s 'scratch'" in refused(profile="scratch")
    assert "--python 'three'" in refused(python="three")
    monkeypatch.setenv("DERMNB_WEIGHTS", str(tmp_path / "none"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("DERMNB_WEIGHTS_URL", "http://127.0.0.1:9")
    pretrained = SUITE + "  other: {backbone: mobilenetv2, weights: imagenet, schedule: head}\n"
    assert "weights of mobilenetv2 are not here and cannot be fetched" in refused(pretrained, profile="cpu")
    (tmp_path / "away").mkdir()
    write_json(tmp_path / "away" / "run.json", {})
    based = SUITE + f"  other: {{backbone: cnn, base: {tmp_path / 'away'}, schedule: head}}\n"
    assert "a pack holds no finished runs" in refused(based, profile="cpu")


def test_a_budget_lowers_the_quality_to_a_floor(home, demo_dir, tmp_path):
    plan = resolve_suite(load_suite(home / "small.yaml"), "cpu", {"image_size": 96}, str(demo_dir))
    said = []
    pack = packs._Pack(plan, tmp_path, said.append)
    packs._prepare_all(pack)
    squares = packs._squares_of(pack)
    most, least = (packs._estimate(squares, q) for q in (85, 60))
    assert least < most
    pack.sizes["the rest"] = 2**20 - (most + least) // 2
    chosen = packs._choose_quality(pack, squares, 85, 1)
    assert chosen in packs.QUALITIES[1:] and f"quality {chosen} instead of 85" in said[-1]
    pack.sizes["the rest"] = 2**20 - least // 2
    with pytest.raises(ConfigError, match=r"does not fit into 1 MiB.* at the lowest quality, 60"):
        packs._choose_quality(pack, squares, 85, 1)


def test_masks_and_metadata_come_along_and_what_was_not_prepared_is_refused(
    home, demo_dir, tmp_path, monkeypatch
):
    from dermnb.data.images import read_pixels
    from dermnb.runs.prepare import images_of, prepare_data

    asked = {"explain": 4, "metadata": "concat", "shuffle_metadata": True, "balance": 5}
    plan = resolve_suite(load_suite(home / "small.yaml"), "cpu", asked, str(demo_dir))
    pack, config = packs._Pack(plan, tmp_path, lambda line: None), plan[0].config
    packs._prepare_all(pack)
    packs._write_images(pack, packs._squares_of(pack), 85)
    here = prepare_data(config.data)
    monkeypatch.setenv("DERMNB_PACK", str(tmp_path))
    there = prepare_data(config.data.model_copy(update={"data_dir": ""}))
    np.testing.assert_array_equal(there.metadata, here.metadata)
    np.testing.assert_array_equal(there.train_positions, here.train_positions)
    test = here.positions("test")
    found = images_of({"config": config.model_dump(exclude={"data_dir"})})
    for old, new in zip(here.manifest["mask"].iloc[test], found["mask"].iloc[test], strict=True):
        masks = [read_pixels(path, 32)[..., 0] > 127 for path in (old, new)]
        np.testing.assert_array_equal(*masks)
    ids = here.manifest["image_id"].iloc[test]
    squares = [x.store.read(x.store.rows(ids)).astype(float) for x in (here, there)]
    assert 0 < np.abs(squares[0] - squares[1]).mean() < 6  # of 255: it is another file of the same image
    with pytest.raises(ConfigError, match=r"split lesion, seed 4\) were not prepared for the pack"):
        prepare_data(config.data.model_copy(update={"split_seed": 4}))
