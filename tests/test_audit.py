"""The same lesion twice: found, joined, kept out of other parts; and what cannot be read."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageEnhance, ImageOps
from tolerances import FLOAT32

from dermnb.audit import duplicates as audit
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
    return manifest, audit.fingerprints(manifest, folder / "cache"), folder / "cache"


def test_hashes_find_every_copy_that_keeps_the_frame_and_nothing_else(collection):
    manifest, prints, _ = collection
    pairs = audit.find_pairs(prints)
    found = dict(zip(pairs["b"], zip(pairs["a"], pairs["kind"], strict=True), strict=True))
    assert found.pop("copy") == ("lesion0", "same bytes")
    near = {"half": 1, "mirrored": 2, "turned": 3, "dark": 4, "gray": 5}
    assert found == {b: (f"lesion{k}", "near duplicate") for b, k in near.items()}
    again = audit.find_pairs(prints)
    pd.testing.assert_frame_equal(pairs, again)
    copies = prints["image_id"].isin([*near, "copy"])
    across = audit.find_pairs(prints[~copies], other=prints[copies])
    assert set(zip(across["a"], across["b"])) == set(zip(pairs["a"], pairs["b"]))
    joined, _ = audit.merge_found(manifest, pairs)
    assert joined["lesion_id"].nunique() == 6 and joined["lesion_id"].isna().sum() == 24
    assert joined["lesion_id"].iloc[-1] == joined["lesion_id"].iloc[5] == "found:gray"


def test_agreement_knows_crops_and_tilts_from_other_lesions():
    def looks(images):
        return audit.prepare_looks(
            np.stack([audit.miniature(i) for i in images]),
            [i.width / i.height for i in images],
        )

    first = [lesion(k) for k in range(12)]
    cropped = [i.crop((14, 8, 150, 110)) for i in first]
    tilted = [i.rotate(15).crop((30, 22, 130, 97)) for i in first]
    for copies in (cropped, tilted):
        assert np.median(audit.agreement(looks(first), looks(copies))) > audit.SAME_PHOTO
    strangers = audit.agreement(looks(first), looks(first[1:] + first[:1]))
    assert strangers.max() < audit.SAME_LESION
    swapped = audit.agreement(looks(cropped), looks(first))
    assert np.median(swapped) > audit.SAME_PHOTO


def test_near_hashes_are_those_of_a_comparison_of_all():
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 256, (300, 32), dtype=np.uint8)
    hashes[:, 0] &= 127
    hashes[150:] = hashes[:150]
    bits = np.unpackbits(hashes, axis=1)
    for n, row in enumerate(bits[150:]):
        row[1 + rng.choice(255, n % 18, replace=False)] ^= 1
    hashes = np.packbits(bits, axis=1)
    turned = np.stack(list(audit.turned_hashes(hashes)))
    apart = np.bitwise_count(turned[:, :, None] ^ hashes).sum(-1).min(0)
    expected = np.argwhere(np.triu(apart <= 17, 1))
    found = audit.near_hashes(hashes, 17)
    assert found[["i", "j"]].to_numpy().tolist() == expected.tolist()
    assert found["bits"].tolist() == [apart[i, j] for i, j in expected]


def test_near_vectors_between_two_sets_and_of_few():
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal((n, 8)).astype("float32") for n in (70, 50))
    found = audit.near_vectors(a, 20, b)
    expected = np.sort((a @ b.T).ravel())[::-1][:20]
    np.testing.assert_allclose(found["similarity"], expected, rtol=FLOAT32)
    assert audit.near_vectors(a[:1], 5).empty
    assert audit.near_vectors(a[:0], 5).empty


def test_a_chain_does_not_swallow_the_dataset():
    manifest = pd.DataFrame({"image_id": [f"{i:04}" for i in range(1000)]})
    names = manifest["image_id"].to_numpy(object)
    chain = pairs_of(a=names[:-1], b=names[1:])
    merged, told = audit.merge_found(manifest, chain)
    assert merged["lesion_id"].value_counts().max() == audit.CHAIN
    assert 0 < (~told["joined"]).sum() < 200
    assert audit.audit_split(manifest.assign(split="train"), told).empty
    # two hundred equal pictures are one lesion, however many
    equal = pairs_of(a=names[[0] * 199], b=names[1:200]).assign(bits=0, kind="same bytes")
    assert audit.merge_found(manifest, equal)[0]["lesion_id"].value_counts().max() == 200
    # one picture that is like all others joins no more than a chain may
    star = pairs_of(a=names[[0] * 199], b=names[1:200])
    assert audit.merge_found(manifest, star)[0]["lesion_id"].value_counts().max() == 8


def test_lesion_ids_are_joined_and_kept():
    manifest = pd.DataFrame(
        {
            "image_id": list("abcdef"),
            "lesion_id": pd.array(["L2", "L2", "L1", None, None, "L9"], "string"),
        }
    )
    merged, pairs = audit.merge_found(manifest, pairs_of(a=["b", "d", "a"], b=["c", "e", "b"]))
    expected = ["L1", "L1", "L1", "found:d", "found:d", "L9"]
    assert merged["lesion_id"].tolist() == expected
    assert pairs["new"].tolist() == [True, True, False] and pairs["joined"].all()
    nothing, _ = audit.merge_found(manifest, pairs_of(a=["b"], b=["elsewhere"]))
    assert nothing["lesion_id"].fillna("").tolist() == ["L2", "L2", "L1", "", "", "L9"]
    with pytest.raises(ConfigError, match="more than once"):
        audit.merge_found(pd.concat([manifest, manifest]), pairs)


def test_findings_name_pictures_lesions_patients_and_two_labels():
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
    findings = audit.audit_split(manifest, pairs)
    across = findings[findings["finding"] == "across parts"]
    assert across["kind"].tolist() == ["lesion id", "patient id", "same lesion"]
    assert across["a"].tolist() == ["a", "c", "f"]
    two = findings[findings["finding"] == "two labels"]
    assert [*zip(two["a"], two["b"])] == [("e", "g"), ("a", "b"), ("f", "g")]
    assert findings["detail"].iloc[0] == "lesion id 1: train and test"
    assert audit.audit_split(manifest[["image_id"]], pairs).empty


def test_an_id_counts_once_for_every_two_parts_that_share_it():
    parts = ["val", "test", "train", "train", "test"]
    manifest = pd.DataFrame(
        {"image_id": list("abcde"), "lesion_id": ["1"] * 5, "split": parts, "label": "nv"}
    )
    found = audit.audit_split(manifest, pairs_of())
    assert [*zip(found["a"], found["b"])] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert set(found["kind"]) == {"lesion id"}
    labels = manifest.assign(split="train", label=["nv", "mel", "bkl", "bkl", "nv"])
    assert audit.audit_split(labels, pairs_of())["finding"].tolist() == ["two labels"] * 3


def test_pairs_that_are_not_joined_are_counted_where_a_split_divides_them():
    names = [f"{i:02}" for i in range(12)]
    manifest = pd.DataFrame({"image_id": names})
    star = pairs_of(a=[names[0]] * 11, b=names[1:])
    merged, told = audit.merge_found(manifest, star)
    apart = told.loc[~told["joined"], "b"].tolist()
    assert len(apart) == 12 - audit.CHAIN
    split = np.where(merged["image_id"].isin(apart[1:]), "test", "train")
    merged = merged.assign(split=split)
    findings = audit.audit_split(merged, told)
    assert findings.empty
    refused = audit.refused_across(merged, told)
    assert refused == len(apart) - 1
    done = audit.Audit("hashes", star, 12, 0)
    record = audit.audit_record(done, told, findings, refused)
    assert record["refused_across"] == refused and record["leaks"] == {}
    assert audit.refused_across(merged.assign(split="train"), told) == 0
    assert audit.refused_across(merged.drop(columns="split"), told) == 0
    assert audit.audit_record(done, told, findings)["refused_across"] == 0


def test_records_of_several_runs_are_one():
    one = {
        "method": "network", "note": "", "images": 90, "seconds": 1.5, "leaks": {"image id": 2},
        "pairs": {"same bytes": 4}, "findings": [{"a": "x"}, {"a": "y"}], "chains_refused": 3,
    }  # fmt: skip
    assert audit.join_records({"a": one, "b": one | {"seconds": 9.0}}) == one
    other = one | {"method": "hashes", "note": "base c was not compared", "afterwards": True}
    other |= {"images": 80, "leaks": {"image id": 1, "same pixels": 5}, "findings": [{"a": "y"}]}
    both = audit.join_records({"a": one, "b": other})
    assert both["method"] == "hashes" and both["images"] == 80 and both["afterwards"]
    assert both["leaks"] == {"image id": 2, "same pixels": 5}
    assert both["pairs"] == {"same bytes": 4} and both["chains_refused"] == 3
    assert both["findings"] == one["findings"] and both["note"] == other["note"]
    none = audit.join_records({"a": one, "b": {"method": "none", "note": "no audit was asked for"}})
    assert none["method"] == "none" and none["leaks"] == one["leaks"]
    silent = audit.join_records({"a": one, "b": None})
    assert silent["note"] == "member b was not audited" and silent["leaks"] == one["leaks"]
    assert audit.join_records({"a": None, "b": None}) is None


def test_record_is_plain_and_names_no_path(collection):
    manifest, _, cache = collection
    done = audit.audit_images(manifest, cache)
    merged, pairs = audit.merge_found(manifest, done.pairs)
    parts = np.where(np.arange(len(merged)) < 30, "train", "test")
    findings = audit.audit_split(manifest.assign(split=parts), pairs)
    record = audit.audit_record(done, pairs, findings)
    text = json.dumps(record)
    assert str(cache.parent) not in text
    assert record["leaks"] == {"same bytes": 1, "near duplicate": 5}
    assert record["new_pairs"] == record["pairs"] == record["leaks"]
    assert (record["groups_joined"], record["images_joined"]) == (6, 12)
    assert record["method"] == "hashes" and record["note"] == ""
    none = audit.audit_record(audit.audit_images(manifest, cache, "none"))
    assert none["method"] == "none" and none["note"]


def test_one_datasets_test_in_anothers_training(collection):
    manifest, _, cache = collection
    mine = manifest[:30].assign(split="train", lesion_id="x" + manifest["image_id"])
    theirs = manifest[30:].assign(split="test")
    findings, record = audit.audit_datasets({"mine": mine, "theirs": theirs}, cache)
    assert record["leaks"] == {"same bytes": 1, "near duplicate": 5}
    assert set(findings["part_b"]) == {"theirs/test"}
    same_ids = {"mine": mine[:3].assign(path=pd.NA), "theirs": mine[:3].assign(split="test")}
    findings, record = audit.audit_datasets(same_ids, cache)
    assert record["leaks"] == {"image id": 3} and record["unreadable"] == 3
    alone, _ = audit.audit_datasets({"all": manifest}, cache)
    assert alone["finding"].tolist() == ["two lesions"] * 6
    with pytest.raises(ConfigError, match="no images"):
        audit.audit_datasets({"mine": mine[:0]}, cache)
    with pytest.raises(ConfigError, match="at least one"):
        audit.audit_datasets({}, cache)


def test_unreadable_empty_and_single_color_files(tmp_path):
    names = ["<script>", "../up", "x" * 300, "\u202eabc", "", "sixth", "seventh"]
    manifest = written(tmp_path, dict.fromkeys(names, lesion(1)))
    (tmp_path / "000.png").write_bytes(b"")
    (tmp_path / "001.png").write_bytes((tmp_path / "002.png").read_bytes()[:300])
    Image.new("RGB", (19, 19), "white").save(tmp_path / "003.png")
    Image.new("L", (19, 90), "black").save(tmp_path / "004.png")
    manifest.loc[5, "path"] = str(tmp_path / "gone.png")
    manifest.loc[6, "path"] = pd.NA
    prints = audit.fingerprints(manifest, tmp_path / "cache")
    assert prints["image_id"].tolist() == names
    assert prints["pixels"].notna().tolist() == [False] * 2 + [True] * 3 + [False] * 2
    assert prints["hash"].notna().sum() == 1
    assert audit.find_pairs(prints).empty
    one = audit.find_pairs(prints[2:3])
    assert one.empty and audit.audit_split(manifest[2:3], one).empty
    with pytest.raises(ConfigError, match="occurs twice"):
        audit.find_pairs(pd.concat([prints, prints]))
    with pytest.raises(ConfigError, match="at least one"):
        audit.fingerprints(manifest[:0], tmp_path / "cache")
    with pytest.raises(ConfigError, match="did you mean"):
        audit.audit_images(manifest, tmp_path / "cache", "hash")


def test_fingerprints_follow_a_file_that_changes(tmp_path):
    manifest = written(tmp_path, {"a": lesion(1)})
    old = 1_600_000_000
    os.utime(manifest["path"][0], (old, old))
    first = audit.fingerprints(manifest, tmp_path / "cache")
    pd.testing.assert_frame_equal(audit.fingerprints(manifest, tmp_path / "cache"), first)
    lesion(2).save(manifest["path"][0])
    second = audit.fingerprints(manifest, tmp_path / "cache")
    assert second["bytes"][0] != first["bytes"][0]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / audit._STORE).write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match="fingerprints cannot be kept"):
        audit.fingerprints(manifest, tmp_path / "broken")


def test_a_pass_with_a_network_is_not_answered_by_what_hashes_found(
    collection, tmp_path, monkeypatch
):
    manifest, prints, cache = collection
    weights, looked = tmp_path / "weights.h5", []

    def embed(*_):
        looked.append(weights.read_bytes())
        return np.random.default_rng(0).standard_normal((len(prints), audit.FEATURES))

    monkeypatch.setattr(audit, "audit_weights", lambda: weights)
    monkeypatch.setattr(audit, "embed", embed)
    audit.audit_images(manifest, cache, "hashes")
    for content in (b"one", b"one", b"two", b"one"):
        weights.write_bytes(content)
        assert audit.audit_images(manifest, cache, "network").method == "network"
    assert looked == [b"one", b"two"]  # other weights are another question


def test_network_finds_what_hashes_miss(collection):
    prints = collection[1]
    rng = np.random.default_rng(0)  # features stand in for the network's
    features = rng.standard_normal((len(prints) + 1, audit.FEATURES)).astype("float32")
    features[-1] = features[7] + 0.2 * features[-1]
    cropped = lesion(7).crop((14, 8, 150, 110))
    small = audit.miniature(cropped)
    row = {"image_id": "cropped", "look": small.tobytes(), "aspect": 136 / 102}
    row["hash"] = audit.hash_bits(small).tobytes().hex()
    more = pd.concat([prints, pd.DataFrame([row])], ignore_index=True)
    assert "cropped" not in set(audit.find_pairs(more)["b"])
    pairs = audit.find_pairs(more, features).set_index("b")
    assert pairs.loc["cropped", "a"] == "lesion7"
    features[3] = np.nan  # an image that could not be read
    assert "cropped" in set(audit.find_pairs(more, features)["b"])


def test_auditing_loads_no_framework():
    code = "import sys, dermnb.audit.duplicates; print({'keras', 'tensorflow', 'jax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
