"""Duplicates: found, grouped, kept out of other splits; and what cannot be read."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageEnhance, ImageOps
from tolerances import FLOAT32

from dermnb.audit import duplicates, features, hashes, leakage, registration
from dermnb.core import ConfigError
from dermnb.data.synthetic import draw_lesion, render_view


def lesion(k, view=0):
    return Image.fromarray(render_view(draw_lesion(5, k), view, (160, 120))[0])


def written(folder, images):
    "A manifest of these images, by name."
    rows = []
    for n, (name, image) in enumerate(images.items()):
        path = folder / f"{n:03}.png"
        image.save(path)
        rows.append((name, str(path), "nv"))
    return pd.DataFrame(rows, columns=["image_id", "path", "label"])


def pairs_of(**columns):
    table = pd.DataFrame({"a": [], "b": []}) if not columns else pd.DataFrame(columns)
    return table.assign(
        kind=columns.get("kind", "near duplicate"), bits=20, agreement=0.9
    )


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    images = {f"lesion{k}": lesion(k) for k in range(30)}
    images["copy"] = lesion(0)
    images["half"] = lesion(1).resize((80, 60))
    images["mirrored"] = ImageOps.mirror(lesion(2))
    images["turned"] = lesion(3).transpose(Image.Transpose.ROTATE_90)
    images["dark"] = ImageEnhance.Brightness(lesion(4)).enhance(0.6)
    images["gray"] = lesion(5).convert("L").convert("RGB")
    manifest = written(folder, images)
    return manifest, hashes.fingerprints(manifest, folder / "cache"), folder / "cache"


def test_hashes_find_every_copy_that_keeps_the_frame_and_nothing_else(collection):
    manifest, prints, _ = collection
    pairs = duplicates.find_pairs(prints)
    found = dict(zip(pairs["b"], zip(pairs["a"], pairs["kind"], strict=True), strict=True))
    assert found.pop("copy") == ("lesion0", "same bytes")
    near = {"half": 1, "mirrored": 2, "turned": 3, "dark": 4, "gray": 5}
    assert found == {b: (f"lesion{k}", "near duplicate") for b, k in near.items()}
    again = duplicates.find_pairs(prints)
    pd.testing.assert_frame_equal(pairs, again)
    copies = prints["image_id"].isin([*near, "copy"])
    across = duplicates.find_pairs(prints[~copies], other=prints[copies])
    assert set(zip(across["a"], across["b"])) == set(zip(pairs["a"], pairs["b"]))
    grouped, _ = duplicates.group_duplicates(manifest, pairs)
    assert grouped["lesion_id"].nunique() == 6 and grouped["lesion_id"].isna().sum() == 24
    assert grouped["lesion_id"].iloc[-1] == grouped["lesion_id"].iloc[5] == "found:gray"


def test_key_points_know_crops_and_tilts_from_other_lesions():
    def prepared(images):
        return registration.prepare_images(
            np.stack([hashes.miniature(i) for i in images]),
            [i.width / i.height for i in images],
        )

    def score(images, others):
        points = [[registration.find_keypoints(i) for i in v] for v in (images, others)]
        found = [registration.match_keypoints(a, b) for a, b in zip(*points, strict=True)]
        maps = np.stack([np.eye(3)[:2] if m is None else m for _, m in found])
        agreement = registration.aligned_agreement(prepared(images), prepared(others), maps)
        return duplicates.pair_score(np.array([c for c, _ in found]), agreement)

    first = [lesion(k) for k in range(12)]
    cropped = [i.crop((14, 8, 150, 110)) for i in first]
    tilted = [i.rotate(15).crop((30, 22, 130, 97)) for i in first]
    for copies in (cropped, tilted):
        assert np.median(score(first, copies)) > duplicates.SAME_LESION
        assert np.median(score(copies, first)) > duplicates.SAME_LESION
    assert score(first, first[1:] + first[:1]).max() < duplicates.SAME_LESION


def test_near_hashes_are_those_of_a_comparison_of_all():
    rng = np.random.default_rng(1)
    some = rng.integers(0, 256, (300, 32), dtype=np.uint8)
    some[:, 0] &= 127
    some[150:] = some[:150]
    bits = np.unpackbits(some, axis=1)
    for n, row in enumerate(bits[150:]):
        row[1 + rng.choice(255, n % 18, replace=False)] ^= 1
    some = np.packbits(bits, axis=1)
    turned = np.stack(list(hashes.orientation_hashes(some)))
    apart = np.bitwise_count(turned[:, :, None] ^ some).sum(-1).min(0)
    expected = np.argwhere(np.triu(apart <= 17, 1))
    found = hashes.near_hashes(some, 17)
    assert found[["i", "j"]].to_numpy().tolist() == expected.tolist()
    assert found["bits"].tolist() == [apart[i, j] for i, j in expected]


def test_near_vectors_between_two_sets_and_of_few():
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal((n, 8)).astype("float32") for n in (70, 50))
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
    a[3] = 0  # could not be read
    found = features.near_vectors(a, 4, b)
    assert len(found) == 4 * 50 and set(found["j"]) == set(range(50))
    best = np.sort(a @ b.T, axis=0)[::-1][:4].ravel()
    np.testing.assert_allclose(np.sort(found["similarity"]), np.sort(best), atol=4 * FLOAT32)
    swapped = features.near_vectors(b, 4, a)
    assert set(zip(swapped["j"], swapped["i"])) == set(zip(found["i"], found["j"]))
    assert features.near_vectors(a[:1], 5).empty
    assert features.near_vectors(a[:0], 5).empty


def test_a_chain_does_not_swallow_the_dataset():
    manifest = pd.DataFrame({"image_id": [f"{i:04}" for i in range(1000)]})
    names = manifest["image_id"].to_numpy(object)
    chain = pairs_of(a=names[:-1], b=names[1:])
    grouped, told = duplicates.group_duplicates(manifest, chain)
    assert grouped["lesion_id"].value_counts().max() == duplicates.CHAIN
    assert 0 < (~told["grouped"]).sum() < 200
    assert leakage.audit_split(manifest.assign(split="train"), told).empty
    # two hundred equal images are one lesion, however many
    equal = pairs_of(a=names[[0] * 199], b=names[1:200]).assign(bits=0, kind="same bytes")
    assert duplicates.group_duplicates(manifest, equal)[0]["lesion_id"].value_counts().max() == 200
    # one image that is like all others is grouped with no more than a chain may
    star = pairs_of(a=names[[0] * 199], b=names[1:200])
    assert duplicates.group_duplicates(manifest, star)[0]["lesion_id"].value_counts().max() == 8


def test_lesion_ids_are_grouped_and_kept():
    manifest = pd.DataFrame(
        {
            "image_id": list("abcdef"),
            "lesion_id": pd.array(["L2", "L2", "L1", None, None, "L9"], "string"),
        }
    )
    grouped, pairs = duplicates.group_duplicates(manifest, pairs_of(a=["b", "d", "a"], b=["c", "e", "b"]))
    expected = ["L1", "L1", "L1", "found:d", "found:d", "L9"]
    assert grouped["lesion_id"].tolist() == expected
    assert pairs["new"].tolist() == [True, True, False] and pairs["grouped"].all()
    nothing, _ = duplicates.group_duplicates(manifest, pairs_of(a=["b"], b=["elsewhere"]))
    assert nothing["lesion_id"].fillna("").tolist() == ["L2", "L2", "L1", "", "", "L9"]
    with pytest.raises(ConfigError, match="more than once"):
        duplicates.group_duplicates(pd.concat([manifest, manifest]), pairs)


def test_findings_name_duplicates_lesions_patients_and_two_labels():
    manifest = pd.DataFrame(
        {
            "image_id": list("abcdefg"),
            "lesion_id": ["1", "1", "2", "3", "4", "5", None],
            "patient_id": [None, None, "p", "p", "q", None, "q"],
            "label": ["nv", "mel", "nv", "nv", "nv", "nv", "bkl"],
            "split": ["train", "test", "train", "val", "test", "train", "test"],
        }
    )
    pairs = pairs_of(a=["e", "f"], b=["g", "g"], kind=["near duplicate", "same lesion"])
    findings = leakage.audit_split(manifest, pairs)
    across = findings[findings["finding"] == "across parts"]
    assert across["kind"].tolist() == ["lesion id", "patient id", "same lesion"]
    assert across["a"].tolist() == ["a", "c", "f"]
    two = findings[findings["finding"] == "two labels"]
    assert [*zip(two["a"], two["b"])] == [("e", "g"), ("a", "b"), ("f", "g")]
    assert findings["detail"].iloc[0] == "lesion id 1: train and test"
    assert leakage.audit_split(manifest[["image_id"]], pairs).empty


def test_an_id_counts_once_for_every_two_splits_that_share_it():
    splits = ["val", "test", "train", "train", "test"]
    manifest = pd.DataFrame(
        {"image_id": list("abcde"), "lesion_id": ["1"] * 5, "split": splits, "label": "nv"}
    )
    found = leakage.audit_split(manifest, pairs_of())
    assert [*zip(found["a"], found["b"])] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert set(found["kind"]) == {"lesion id"}
    labels = manifest.assign(split="train", label=["nv", "mel", "bkl", "bkl", "nv"])
    assert leakage.audit_split(labels, pairs_of())["finding"].tolist() == ["two labels"] * 3


def test_pairs_that_are_not_grouped_are_counted_where_a_split_divides_them():
    names = [f"{i:02}" for i in range(12)]
    manifest = pd.DataFrame({"image_id": names})
    star = pairs_of(a=[names[0]] * 11, b=names[1:])
    grouped, told = duplicates.group_duplicates(manifest, star)
    apart = told.loc[~told["grouped"], "b"].tolist()
    assert len(apart) == 12 - duplicates.CHAIN
    split = np.where(grouped["image_id"].isin(apart[1:]), "test", "train")
    grouped = grouped.assign(split=split)
    findings = leakage.audit_split(grouped, told)
    assert findings.empty
    refused = leakage.refused_across(grouped, told)
    assert refused == len(apart) - 1
    done = duplicates.Audit("hashes", star, 12, 0)
    record = leakage.audit_record(done, told, findings, refused)
    assert record["refused_across"] == refused and record["leaks"] == {}
    assert leakage.refused_across(grouped.assign(split="train"), told) == 0
    assert leakage.refused_across(grouped.drop(columns="split"), told) == 0
    assert leakage.audit_record(done, told, findings)["refused_across"] == 0


def test_records_of_several_runs_are_one():
    one = {
        "method": "network", "note": "", "images": 90, "seconds": 1.5, "leaks": {"image id": 2},
        "pairs": {"same bytes": 4}, "findings": [{"a": "x"}, {"a": "y"}], "chains_refused": 3,
    }  # fmt: skip
    assert leakage.combine_records({"a": one, "b": one | {"seconds": 9.0}}) == one
    other = one | {"method": "hashes", "note": "base c was not compared", "afterwards": True}
    other |= {"images": 80, "leaks": {"image id": 1, "same pixels": 5}, "findings": [{"a": "y"}]}
    both = leakage.combine_records({"a": one, "b": other})
    assert both["method"] == "hashes" and both["images"] == 80 and both["afterwards"]
    assert both["leaks"] == {"image id": 2, "same pixels": 5}
    assert both["pairs"] == {"same bytes": 4} and both["chains_refused"] == 3
    assert both["findings"] == one["findings"] and both["note"] == other["note"]
    none = leakage.combine_records({"a": one, "b": {"method": "none", "note": "no audit was asked for"}})
    assert none["method"] == "none" and none["leaks"] == one["leaks"]
    silent = leakage.combine_records({"a": one, "b": None})
    assert silent["note"] == "member b was not audited" and silent["leaks"] == one["leaks"]
    assert leakage.combine_records({"a": None, "b": None}) is None


def test_record_is_plain_and_names_no_path(collection):
    manifest, _, cache = collection
    done = duplicates.audit_images(manifest, cache)
    grouped, pairs = duplicates.group_duplicates(manifest, done.pairs)
    split = np.where(np.arange(len(grouped)) < 30, "train", "test")
    findings = leakage.audit_split(manifest.assign(split=split), pairs)
    record = leakage.audit_record(done, pairs, findings)
    text = json.dumps(record)
    assert str(cache.parent) not in text
    assert record["leaks"] == {"same bytes": 1, "near duplicate": 5}
    assert record["new_pairs"] == record["pairs"] == record["leaks"]
    assert (record["groups_joined"], record["images_joined"]) == (6, 12)
    assert record["method"] == "hashes" and record["note"] == ""
    none = leakage.audit_record(duplicates.audit_images(manifest, cache, "none"))
    assert none["method"] == "none" and none["note"]


def test_one_datasets_test_in_anothers_training(collection):
    manifest, _, cache = collection
    mine = manifest[:30].assign(split="train", lesion_id="x" + manifest["image_id"])
    theirs = manifest[30:].assign(split="test")
    findings, record = leakage.audit_datasets({"mine": mine, "theirs": theirs}, cache)
    assert record["leaks"] == {"same bytes": 1, "near duplicate": 5}
    assert set(findings["part_b"]) == {"theirs/test"}
    same_ids = {"mine": mine[:3].assign(path=pd.NA), "theirs": mine[:3].assign(split="test")}
    findings, record = leakage.audit_datasets(same_ids, cache)
    assert record["leaks"] == {"image id": 3} and record["unreadable"] == 3
    alone, _ = leakage.audit_datasets({"all": manifest}, cache)
    assert alone["finding"].tolist() == ["two lesions"] * 6
    with pytest.raises(ConfigError, match="no images"):
        leakage.audit_datasets({"mine": mine[:0]}, cache)
    with pytest.raises(ConfigError, match="at least one"):
        leakage.audit_datasets({}, cache)


def test_unreadable_empty_and_single_color_files(tmp_path):
    names = ["<script>", "../up", "x" * 300, "\u202eabc", "", "sixth", "seventh"]
    manifest = written(tmp_path, dict.fromkeys(names, lesion(1)))
    (tmp_path / "000.png").write_bytes(b"")
    (tmp_path / "001.png").write_bytes((tmp_path / "002.png").read_bytes()[:300])
    Image.new("RGB", (19, 19), "white").save(tmp_path / "003.png")
    Image.new("L", (19, 90), "black").save(tmp_path / "004.png")
    manifest.loc[5, "path"] = str(tmp_path / "gone.png")
    manifest.loc[6, "path"] = pd.NA
    prints = hashes.fingerprints(manifest, tmp_path / "cache")
    assert prints["image_id"].tolist() == names
    assert prints["pixels"].notna().tolist() == [False] * 2 + [True] * 3 + [False] * 2
    assert prints["hash"].notna().sum() == 1
    assert duplicates.find_pairs(prints).empty
    one = duplicates.find_pairs(prints[2:3])
    assert one.empty and leakage.audit_split(manifest[2:3], one).empty
    with pytest.raises(ConfigError, match="occurs twice"):
        duplicates.find_pairs(pd.concat([prints, prints]))
    with pytest.raises(ConfigError, match="at least one"):
        hashes.fingerprints(manifest[:0], tmp_path / "cache")
    with pytest.raises(ConfigError, match="did you mean"):
        duplicates.audit_images(manifest, tmp_path / "cache", "hash")


def test_fingerprints_follow_a_file_that_changes(tmp_path):
    manifest = written(tmp_path, {"a": lesion(1)})
    old = 1_600_000_000
    os.utime(manifest["path"][0], (old, old))
    first = hashes.fingerprints(manifest, tmp_path / "cache")
    pd.testing.assert_frame_equal(hashes.fingerprints(manifest, tmp_path / "cache"), first)
    lesion(2).save(manifest["path"][0])
    second = hashes.fingerprints(manifest, tmp_path / "cache")
    assert second["bytes"][0] != first["bytes"][0]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="fingerprints cannot be kept"):
        hashes.fingerprints(manifest, tmp_path / "file")


def test_a_pass_with_a_network_is_not_answered_by_what_hashes_found(
    collection, tmp_path, monkeypatch
):
    manifest, prints, cache = collection
    weights, looked = tmp_path / "weights.h5", []

    def embed(*_):
        looked.append(weights.read_bytes())
        return np.random.default_rng(0).standard_normal((len(prints), features.FEATURES))

    monkeypatch.setattr(features, "audit_weights", lambda: weights)
    monkeypatch.setattr(duplicates, "embed", embed)
    duplicates.audit_images(manifest, cache, "hashes")
    for content in (b"one", b"one", b"two", b"one"):
        weights.write_bytes(content)
        assert duplicates.audit_images(manifest, cache, "network").method == "network"
    assert looked == [b"one", b"two"]  # other weights are another question


def test_network_finds_what_hashes_miss_and_keeps_candidates(collection, tmp_path):
    manifest, prints, _ = collection
    cropped = lesion(7).rotate(25).crop((40, 30, 130, 97))
    cropped.save(tmp_path / "cropped.png")
    row = pd.DataFrame({"image_id": ["cropped"], "path": [str(tmp_path / "cropped.png")]})
    more = pd.concat([prints, hashes.fingerprints(row, tmp_path)], ignore_index=True)
    registration.store_keypoints(pd.concat([manifest, row]), more, tmp_path)
    rng = np.random.default_rng(0)  # they stand in for the network's
    seen = rng.standard_normal((len(more), features.FEATURES)).astype("float32")
    seen[-1] = seen[7] + 0.2 * seen[-1]
    assert "cropped" not in set(duplicates.find_pairs(more)["b"])
    seen[3] = np.nan  # an image that could not be read
    pairs = duplicates.find_pairs(more, seen, cache=tmp_path, least=0)
    found = pairs.set_index("b").loc[["cropped"]].iloc[0]
    assert (found["a"], found["kind"] != duplicates.CANDIDATE) == ("lesion7", True)
    # points of `lesion7` to points of the crop, in units of the longer sides
    middle = np.reshape(found["affine"], (2, 3)) @ [0.5, 0.375, 1]
    np.testing.assert_allclose(middle, [40 / 90, 30 / 90], atol=0.03)
    below = pairs[pairs["kind"] == duplicates.CANDIDATE]
    assert len(below) and below["score"].is_monotonic_decreasing
    assert below["score"].max() < duplicates.SAME_LESION
    again = duplicates.find_pairs(more, seen, cache=tmp_path)  # matches are kept
    pd.testing.assert_frame_equal(again, pairs[pairs["kind"] != duplicates.CANDIDATE])


def test_without_opencv_an_audit_says_what_it_did_not_do(collection, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    done = duplicates.audit_images(collection[0], tmp_path)
    assert set(done.pairs["kind"]) == {"same bytes", "near duplicate"}
    near = duplicates.find_pairs(collection[1]).attrs["unregistered"]
    assert done.note == (f"{near} candidates were not registered: OpenCV is not installed" if near else "")
    with pytest.raises(ConfigError, match="without OpenCV"):
        duplicates.audit_images(collection[0], tmp_path, "network")


def test_auditing_loads_no_framework():
    code = "import sys, dermnb.audit.leakage; print({'keras', 'tensorflow', 'jax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
