"""Collections in the form in which they are distributed, made small here"""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dermnb.core import ConfigError, make_config
from dermnb.data.datasets import load_dataset
from dermnb.data.manifests import problem_counts

HERE = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("DERMNB_REAL_DATA", HERE / ".." / "shared" / "data"))


def needs(*paths: str):
    absent = [p for p in paths if not (REAL / p).exists()]
    return pytest.mark.skipif(
        bool(absent), reason=f"{absent} absent: set DERMNB_REAL_DATA (looked in {REAL})"
    )


def picture(seed=0, kind="JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def put(path: Path, content: bytes | str = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pack(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def sentence(function, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and text.endswith("."), text
    return text


# ISIC 2018


def isic2018(ham: Path, held_out: Path) -> None:
    put(
        ham / "HAM10000_metadata.csv",
        "lesion_id,image_id,dx,dx_type,age,sex,localization\n"
        "HAM_1,ISIC_1,akiec,histo,80.0,male,scalp\nHAM_1,ISIC_2,akiec,histo,80.0,male,scalp\n"
        "HAM_2,ISIC_3,nv,follow_up,,unknown,back\n",
    )
    images = {f"ISIC_{i}.jpg": picture(i) for i in range(1, 7)}
    names = list(images)
    pack(ham / "HAM10000_images_part_1.zip", {n: images[n] for n in names[:3]})
    head = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n"
    for split, ids in (("Validation", (4,)), ("Test", (5, 6))):
        name = f"ISIC2018_Task3_{split}"
        rows = (f"ISIC_{i},0.0,{i % 2}.0,0.0,{1 - i % 2}.0,0,0,0\n" for i in ids)
        put(held_out / f"{name}_GroundTruth.csv", head + "".join(rows))
        members = {f"{name}_Input/{names[i - 1]}": images[names[i - 1]] for i in ids}
        pack(held_out / f"{name}_Input.zip", members)
    put(
        held_out / "metadata.csv",
        "isic_id,lesion_id,age_approx,dx_type\nISIC_4,IL_1,40,h\nISIC_5,IL_2,,h\nISIC_6,IL_2,,h\n",
    )


@pytest.mark.parametrize("folders", [("", ""), ("ham10000", "isic2018")])
def test_isic2018_keeps_its_own_split_side_by_side_or_in_folders(tmp_path, folders):
    isic2018(*(tmp_path / f for f in folders))
    dataset = load_dataset("isic2018", tmp_path)
    manifest = dataset.manifest.set_index("image_id").sort_index()
    assert manifest.split.tolist() == ["train"] * 3 + ["val", "test", "test"]
    assert manifest.label.tolist() == ["akiec", "akiec", "nv", "akiec", "nv", "akiec"]
    lesions = ["HAM_1", "HAM_1", "HAM_2", "IL_1", "IL_2", "IL_2"]
    assert manifest.lesion_id.tolist() == lesions
    assert manifest.age.fillna(0).tolist() == [80, 80, 0, 40, 0, 0]
    assert manifest.source.tolist() == ["HAM10000"] * 3 + ["ISIC 2018"] * 3
    assert problem_counts(dataset.problems) == {}


def test_isic2018_without_its_held_out_tables_is_refused(tmp_path):
    isic2018(tmp_path, tmp_path)
    (tmp_path / "ISIC2018_Task3_Test_GroundTruth.csv").unlink()
    assert "no ISIC2018_Task3_Test_GroundTruth.csv" in sentence(
        load_dataset, "isic2018", tmp_path
    )


def test_a_dataset_measured_on_its_own_split_is_split_so_by_default():
    assert make_config({"dataset": "isic2018"}).split == "official"
    assert make_config({"dataset": "isic2018", "split": "lesion"}).split == "lesion"
    assert make_config({"dataset": "ham10000"}).split == "lesion"


@needs("ham10000", "isic2018")
def test_isic2018_as_published():
    dataset = load_dataset("isic2018", REAL)
    counts = dataset.manifest.split.value_counts().to_dict()
    assert counts == {"train": 10_015, "test": 1_512, "val": 193}
    manifest = dataset.manifest
    assert (manifest.groupby("lesion_id").split.nunique() == 1).all()
    assert manifest.lesion_id.notna().all() and len(dataset.problems) == 0
