"""Where ImageNet weights are from, and that every suite gets as far as its data with them, or stops before it starts.

A server on this machine stands in for the internet. The weights are random ones of the right shapes: what is
looked at is where they are found, not how good they are.
"""

import functools
import http.server
import os
import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import h5py
import keras
import numpy as np
import pandas as pd
import pytest
from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group

from dermnb.audit.duplicates import audit_images
from dermnb import cli
from dermnb.nets.backbones import BACKBONES, build_backbone
from dermnb.nets.weights import fetch_weights, find_weights, load_backbone
from dermnb.runs import runner
from dermnb.core import ConfigError, write_json
from dermnb.runs.runner import gather_weights
from dermnb.runs.suites import load_suite, parse_overrides, resolve_suite
from dermnb.runs.prepare import prepare_data

ROOT = Path(__file__).resolve().parent.parent
FROM_SCRATCH = ("demo", "search")  # suites that start from no weights
SUITES = sorted((ROOT / "nbs/suites").glob("*.yaml"))
NAME = BACKBONES["mobilenetv2"].weights_file
CLOSED = "http://127.0.0.1:9"  # nobody listens at this port
DX = {"MEL": "mel", "NV": "nv", "BCC": "bcc", "AK": "akiec"}
DX |= {"BKL": "bkl", "DF": "df", "VASC": "vasc", "SCC": "akiec"}
FORMATS = {"derm_categories": "folders", "isic2019": "isic2019", "demo": "isic2019"}
FORMATS |= {"search": "isic2019", "isic2018": "isic2018"}


@pytest.fixture(scope="module")
def network():
    keras.utils.set_random_seed(0)
    return build_backbone("mobilenetv2", keras.Input((32, 32, 3)))


@pytest.fixture(scope="module")
def published(network, tmp_path_factory):
    "A folder that holds MobileNetV2's weights as Keras publishes them."
    folder = tmp_path_factory.mktemp("published")
    with h5py.File(folder / NAME, "w") as file:
        save_weights_to_hdf5_group(file, network)
    return folder


@pytest.fixture
def nothing(tmp_path, monkeypatch):
    "A machine without weights and without internet; its folder, with `keras` for the cache."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DERMNB_WEIGHTS", raising=False)
    monkeypatch.setenv("DERMNB_WEIGHTS_URL", CLOSED)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    return tmp_path


@pytest.fixture
def keras_cache(nothing, published):
    "Keras' cache, which alone has weights; those of Xception are an empty file."
    models = nothing / "keras/models"
    models.mkdir(parents=True)
    os.symlink(published / NAME, models / NAME)
    h5py.File(models / BACKBONES["xception"].weights_file, "w").close()
    return models


class Server(http.server.SimpleHTTPRequestHandler):
    "Serves files, or as `answer` says: half of each, none ever, or another file."

    def do_GET(self):
        self.server.asked.append(self.path)
        answer, path = self.server.answer, self.translate_path(self.path)
        if answer == "silent":
            time.sleep(3)
        elif answer == "half":
            content = Path(path).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(nothing, published, monkeypatch):
    handler = functools.partial(Server, directory=str(published))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked, server.answer = [], ""
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv(
            "DERMNB_WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}"
        )
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def collections(demo_dir, tmp_path_factory):
    "A few of the same pictures as people have them: ISIC 2019, HAM10000, class folders."
    folder = tmp_path_factory.mktemp("collections")
    truth, facts = (
        pd.read_csv(demo_dir / f"ISIC_2019_Training_{name}.csv")
        for name in ("GroundTruth", "Metadata")
    )
    truth["label"] = truth.drop(columns="image").idxmax(axis=1)
    table = truth.merge(facts, on="image")
    lesions = table.drop_duplicates("lesion_id").groupby("label")["lesion_id"].head(5)
    table = (
        table[table["lesion_id"].isin(lesions)]
        .drop_duplicates("lesion_id")
        .reset_index()
    )
    pictures = [
        demo_dir / "ISIC_2019_Training_Input" / f"{image}.jpg"
        for image in table["image"]
    ]

    def put(*parts):
        target = folder.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(picture, target)

    classes = [
        "Acne",
        "Rosacea",
        "Perioral dermatitis",
        "Pemphigus",
        "Bullous pemphigoid",
    ]
    classes += ["Dermatitis herpetiformis", "Atopic dermatitis", "Nummular eczema"]
    classes += ["Dyshidrotic eczema", "Seborrheic dermatitis", "Melanoma"]
    classes += ["Actinic keratosis", "Basal cell carcinoma", "Squamous cell carcinoma"]
    for i, picture in enumerate(pictures):
        put("isic2019", "ISIC_2019_Training_Input", picture.name)
        put("ham10000", "HAM10000_images_part_1", picture.name)
        put("folders", classes[i % len(classes)], picture.name)
    for name, part in ("GroundTruth", truth), ("Metadata", facts):
        part = part[part["image"].isin(table["image"])].drop(
            columns="label", errors="ignore"
        )
        part.to_csv(folder / "isic2019" / f"ISIC_2019_Training_{name}.csv", index=False)
    ham = pd.DataFrame(
        {
            "lesion_id": table["lesion_id"],
            "image_id": table["image"],
            "dx": table["label"].map(DX),
            "dx_type": "histo",
            "age": table["age_approx"],
            "sex": table["sex"],
            "localization": table["anatom_site_general"],
        }
    )
    ham.to_csv(folder / "ham10000" / "HAM10000_metadata.csv", index=False)
    part = ham.groupby("dx").cumcount().map({0: "Validation", 1: "Test"}).fillna("Training")
    for split, rows in ham.groupby(part):
        name = f"ISIC2018_Task3_{split}"
        pictures = [demo_dir / "ISIC_2019_Training_Input" / f"{image}.jpg" for image in rows["image_id"]]
        for picture in pictures:
            put("isic2018", "HAM10000_images_part_1" if split == "Training" else f"{name}_Input", picture.name)
        truth = pd.get_dummies(rows["dx"].str.upper(), dtype=float).reindex(columns=map(str.upper, sorted(set(DX.values()))), fill_value=0.0)
        truth.insert(0, "image", rows["image_id"])
        if split == "Training":
            rows.to_csv(folder / "isic2018" / "HAM10000_metadata.csv", index=False)
        else:
            truth.to_csv(folder / "isic2018" / f"{name}_GroundTruth.csv", index=False)
    return folder


def planned(path: Path, folder: Path, overrides: dict | None = None):
    data_dir = folder / FORMATS.get(path.stem, "ham10000")
    return resolve_suite(load_suite(path), "cpu", overrides, str(data_dir))


@pytest.mark.parametrize("path", SUITES, ids=lambda p: p.stem)
def test_every_suite_reads_its_data_with_keras_cache_alone(
    path, collections, keras_cache, tmp_path
):
    "The plan and the data step of each run but ensembles, which have none."
    plan = planned(
        path, collections, {"image_size": 75}
    )  # the least that InceptionV3 takes
    said = []
    gather_weights([p.config for p in plan], say=said.append)
    assert all("Keras' cache" in line for line in said)
    assert bool(said) == (path.stem not in FROM_SCRATCH)
    for config in [p.config for p in plan if not p.config.members]:
        base = tmp_path / config.base if config.base else None
        data = prepare_data(config, base)
        assert data.audit["method"] == config.audit, config.run
        assert set(data.manifest["split"]) == {"train", "val", "test"}
        folder = tmp_path / config.run  # as far as runs that start from it look at it
        write_json(folder / "run.json", {"config": config.model_dump()})
        data.manifest.to_parquet(folder / "split.parquet")


@pytest.mark.parametrize("path", SUITES, ids=lambda p: p.stem)
def test_every_suite_without_weights_stops_and_says_how_to_go_on(
    path, collections, nothing
):
    plan = planned(path, collections)
    if path.stem in FROM_SCRATCH:
        return gather_weights([p.config for p in plan])
    with pytest.raises(ConfigError) as stopped:
        gather_weights([p.config for p in plan], "suite a", print)
    sentence = str(stopped.value)
    spec = BACKBONES["xception" if path.stem == "derm_categories" else "mobilenetv2"]
    assert sentence.startswith(
        f"suite a: the ImageNet weights of {spec.name} are not here"
    )
    assert f"{CLOSED}/{spec.weights_file} as {spec.weights_file}" in sentence
    assert (
        f"into {nothing / 'data/weights'}, or use -p " in sentence
        and "\n" not in sentence
    )
    assert ("audit=hashes" in sentence) == (plan[0].config.audit == "network")
    overrides = parse_overrides(re.findall(r"-p (\w+=\w+)", sentence))
    gather_weights([p.config for p in planned(path, collections, overrides)])


def test_a_suite_without_weights_leaves_all_as_it_was(
    collections, nothing, monkeypatch, capsys
):
    monkeypatch.setattr(
        runner, "_execute_all", lambda *_: pytest.fail("a run was started")
    )
    data_dir = str(collections / "ham10000")
    command = ["dermnb", "run", str(ROOT / "nbs/suites/folds.yaml"), "--profile", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "--data-dir", data_dir])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and not (nothing / "reports").exists()
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        f"fetching the ImageNet weights of MobileNetV2 from {CLOSED}/{NAME}"
    ]
    assert (
        len(shown.err.splitlines()) == 1 and "the server cannot be reached" in shown.err
    )


def test_workers_of_a_scheduler_look_for_weights_themselves(collections, nothing):
    from distributed import LocalCluster

    with (
        LocalCluster(1, processes=False, dashboard_address=None) as cluster,
        pytest.raises(ConfigError, match="-p audit=hashes"),
    ):
        address, data_dir = cluster.scheduler_address, str(collections / "ham10000")
        runner.run_suite("folds", data_dir, "cpu", scheduler=address)
    assert not list((nothing / "reports/folds").glob(".part-*"))


def test_an_audit_that_cannot_be_made_is_an_error(
    collections, nothing, monkeypatch, capsys
):
    target = f"ham10000={collections / 'ham10000'}"
    monkeypatch.setattr(sys, "argv", ["dermnb", "audit", target, "--network"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("data/weights, or leave out --network.\n")
    manifest = pd.DataFrame({"image_id": ["a"], "path": ["a.jpg"]})
    with pytest.raises(
        ConfigError, match=r"or use audit 'hashes' \(-p audit=hashes\)\.$"
    ):
        audit_images(manifest, nothing, "network")


def test_weights_are_fetched_once_into_keras_cache(server, nothing, network, published):
    said = []
    (file,) = fetch_weights("mobilenetv2", say=said.append)
    assert file == nothing / "keras/models" / NAME
    assert file.read_bytes() == (published / NAME).read_bytes()
    assert said == [
        f"fetching the ImageNet weights of MobileNetV2 from {os.environ['DERMNB_WEIGHTS_URL']}/{NAME}"
    ]
    assert fetch_weights("mobilenetv2") == [file] and server.asked == [f"/{NAME}"]
    trunk = load_backbone("mobilenetv2", keras.Input((32, 32, 3)), "imagenet")
    for mine, theirs in zip(trunk.get_weights(), network.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_all_suites_fetch_a_file_once_and_use_it(
    server, nothing, published, collections, monkeypatch
):
    xception = replace(BACKBONES["xception"], weights_md5="")
    monkeypatch.setitem(BACKBONES, "xception", xception)
    h5py.File(published / xception.weights_file, "w").close()
    plans = [planned(path, collections) for path in SUITES]
    for plan in plans:
        gather_weights([p.config for p in plan])
    assert sorted(server.asked) == [f"/{NAME}", f"/{xception.weights_file}"]
    config = plans[0][0].config
    assert config.audit == prepare_data(config).audit["method"] == "network"


def test_places_are_tried_in_order(keras_cache, nothing, published, monkeypatch):
    assert find_weights("mobilenetv2", "imagenet") == keras_cache / NAME
    own = nothing / "data/weights/mobilenetv2.weights.h5"
    (nothing / "settings.ini").touch()  # so this is the project
    own.parent.mkdir(parents=True)
    h5py.File(own, "w").close()
    (nothing / "nbs").mkdir()
    monkeypatch.chdir(nothing / "nbs")
    assert find_weights("mobilenetv2", "imagenet") == own
    monkeypatch.setenv("DERMNB_WEIGHTS", str(published))
    assert find_weights("mobilenetv2", "imagenet") == published / NAME
    assert find_weights("mobilenetv2", str(own)) == own


def test_half_a_file_in_keras_cache_is_fetched_again(server, nothing, published):
    whole = (published / NAME).read_bytes()
    models = nothing / "keras/models"
    models.mkdir(parents=True)
    (models / NAME).write_bytes(whole[: len(whole) // 2])
    assert find_weights("mobilenetv2", "imagenet") is None
    (file,) = fetch_weights("mobilenetv2")
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "answer, name, reason",
    [
        ("half", "mobilenetv2", "broke off"),
        ("silent", "mobilenetv2", "no answer for 0.5 s|Timeout"),
        ("", "resnet50", "the server answers 404"),
        ("other", "xception", "what came is not the published file"),
    ],
)
def test_a_download_that_fails_leaves_no_file(
    answer, name, reason, server, nothing, published
):
    server.answer = answer
    if answer == "other":
        h5py.File(published / BACKBONES[name].weights_file, "w").close()
    start = time.monotonic()
    with pytest.raises(ConfigError, match=reason):
        fetch_weights(name, patience=0.5)
    assert time.monotonic() - start < 2.5
    assert find_weights(name, "imagenet") is None


def test_another_file_under_the_published_name_is_said(keras_cache):
    said = []
    configs = [p.config for p in resolve_suite(load_suite("derm_categories"), "cpu")]
    gather_weights(configs, say=said.append)
    assert said == [
        "weights of Xception: Keras' cache, other than published (by its checksum), "
        f"{keras_cache / BACKBONES['xception'].weights_file}"
    ]
