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
from dermnb.data.files import read_image_bytes
from dermnb.data.images import build_store, read_pixels
from dermnb.data.manifests import problem_counts
from dermnb.data.values import column_values

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


# The other collections


def facts(dataset, *columns) -> list[list]:
    table = dataset.manifest.set_index("image_id").sort_index()[list(columns)]
    return table.astype(object).where(table.notna(), None).values.tolist()


def not_used(dataset) -> str:
    return "; ".join(text for _, text in dataset.account.not_used)


def test_isic2019_with_its_test_tables_in_folders(tmp_path):
    head = "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK"
    train, test = tmp_path / "ISIC_2019_Training_Input", tmp_path / "ISIC_2019_Test_Input"
    put(tmp_path / "ISIC_2019_Training_GroundTruth.csv", f"{head}\nI1,1,0,0,0,0,0,0,0,0\n")
    put(tmp_path / "test" / "ISIC_2019_Test_GroundTruth.csv",
        f"{head},score_weight,validation_weight\nI2,0,1,0,0,0,0,0,0,0,1,1\nI3,0,0,0,0,0,0,0,0,1,1,0\n")  # fmt: skip
    put(tmp_path / "test" / "ISIC_2019_Test_Metadata.csv",
        "image,age_approx,anatom_site_general,sex\nI2,50,head/neck,male\nI3,,,\n")  # fmt: skip
    for folder, name in ((train, "I1"), (test, "I2"), (test, "I3")):
        put(folder / f"{name}.jpg", picture())
    dataset = load_dataset("isic2019", tmp_path)
    assert facts(dataset, "label", "split", "age") == [
        ["MEL", "train", None],
        ["NV", "test", 50.0],
    ]
    assert "1: taxonomy isic8 ignores 'UNK'" in not_used(dataset)


HEAD_2020 = "image_name,patient_id,lesion_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target\n"


def test_isic2020_has_patients_and_leaves_listed_duplicates_out(tmp_path):
    rows = (
        "I1,IP_1,IL_1,male,45.0,torso,unknown,benign,0\n"
        "I2,IP_1,IL_1,male,45.0,torso,unknown,benign,0\n"
        "I3,IP_2,IL_2,female,,head/neck,melanoma,malignant,1\n"
    )
    put(tmp_path / "ISIC_2020_Training_GroundTruth_v2.csv", HEAD_2020 + rows)
    names = (f"train/I{i}.jpg" for i in (1, 2, 3))
    pack(tmp_path / "ISIC_2020_Training_JPEG.zip", {n: picture() for n in names})
    before = load_dataset("isic2020", tmp_path)
    assert len(before.manifest) == 3 and "duplicates" in before.description
    put(tmp_path / "ISIC_2020_Training_Duplicates.csv", "image_name_1,image_name_2\nI1,I2\n")
    dataset = load_dataset("isic2020", tmp_path)
    assert facts(dataset, "label", "patient_id", "site") == [
        ["benign", "IP_1", "torso"],
        ["malignant", "IP_2", "head/neck"],
    ]
    assert "1 that ISIC_2020_Training_Duplicates.csv lists" in not_used(dataset)
    assert problem_counts(dataset.problems) == {}
    text = sentence(load_dataset, "isic2020", tmp_path, "dx7")  # "unknown" is no nevus
    assert "1 unknown label" in text


HEAD_2024 = "isic_id,target,patient_id,age_approx,sex,anatom_site_general,clin_size_long_diam_mm,image_type,tbp_lv_A,attribution,copyright_license,lesion_id,iddx_full,iddx_1,iddx_2,iddx_3,mel_thick_mm\n"


def test_isic2024_reads_jpegs_from_hdf5(tmp_path):
    import h5py

    rows = (
        "I1,0,IP_1,60.0,male,,3.04,TBP tile: close-up,20.2,Clinic,CC-BY,,Benign,Benign,,,\n"
        "I2,1,IP_2,,female,head/neck,7.1,TBP tile: close-up,1,Clinic,CC-BY-NC,IL_2,x,Malignant,Malignant adnexal,Basal cell carcinoma,\n"
    )
    put(tmp_path / "train-metadata.csv", HEAD_2024 + rows)
    with h5py.File(tmp_path / "train-image.hdf5", "w") as file:
        for i in (1, 2):
            file[f"I{i}"] = np.void(picture(i))
    dataset = load_dataset("isic2024", tmp_path, verify=True)
    assert facts(dataset, "label", "patient_id", "size_mm", "license", "lesion_id") == [
        ["benign", "IP_1", 3.04, "CC-BY", None],
        ["malignant", "IP_2", 7.1, "CC-BY-NC", "IL_2"],
    ]
    assert len(dataset.problems) == 0 and "hdf5" not in not_used(dataset)
    dx7 = load_dataset("isic2024", tmp_path, "dx7", "exclude")
    assert facts(dx7, "label") == [["bcc"]]
    wrong = (HEAD_2024 + rows).replace("I1,0", "I1,2")
    put(tmp_path / "train-metadata.csv", wrong)
    assert "target must be 1 or 0, not '2'" in sentence(load_dataset, "isic2024", tmp_path)


def milk10k(folder: Path) -> None:
    codes = "AKIEC,BCC,BEN_OTH,BKL,DF,INF,MAL_OTH,MEL,NV,SCCKA,VASC"
    hot = {"IL_1": 0, "IL_2": 5}
    truth, rows, supplement = [f"lesion_id,{codes}"], [], []
    for lesion, code in hot.items():
        truth.append(f"{lesion}," + ",".join(str(float(i == code)) for i in range(11)))
        for kind, name in (("clinical: close-up", "a"), ("dermoscopic", "b")):
            image = f"I{lesion[-1]}{name}"
            rows.append(f"{lesion},{kind},{image},CC-BY-NC,50,male,{code},trunk,0.2")
            full = "Solar or actinic keratosis" if code == 0 else "Psoriasis"
            supplement.append(f"{image},{full},histopathology")
            put(folder / "MILK10k_Training_Input" / lesion / f"{image}.jpg", picture())
    head = "lesion_id,image_type,isic_id,copyright_license,age_approx,sex,skin_tone_class,site,MONET_hair"
    put(folder / "MILK10k_Training_GroundTruth.csv", "\n".join(truth) + "\n")
    put(folder / "MILK10k_Training_Metadata.csv", "\n".join([head, *rows]) + "\n")
    head = "isic_id,diagnosis_full,diagnosis_confirm_type"
    put(folder / "MILK10k_Training_Supplement.csv", "\n".join([head, *supplement]) + "\n")


def test_milk10k_pairs_share_a_lesion_and_tones_are_a_scale_of_their_own(tmp_path):
    milk10k(tmp_path)
    dataset = load_dataset("milk10k", tmp_path)
    assert len(dataset.classes) == 11
    assert facts(dataset, "label", "lesion_id", "skin_tone", "source") == [
        ["AKIEC", "IL_1", "milk 0", "MILK10k close-up"],
        ["AKIEC", "IL_1", "milk 0", "MILK10k dermoscopic"],
        ["INF", "IL_2", "milk 5", "MILK10k close-up"],
        ["INF", "IL_2", "milk 5", "MILK10k dermoscopic"],
    ]
    tones = column_values(dataset.manifest["skin_tone"], "skin_tone")  # as subgroups do
    assert tones.tolist() == dataset.manifest["skin_tone"].tolist()
    one = load_dataset("milk10k_dermoscopic", tmp_path)
    assert [i for i in one.manifest.image_id] == ["I1b", "I2b"]
    assert "2 close-up photographs" in not_used(one) and len(one.problems) == 0
    # isic8 cannot have AKIEC, but knows the diagnosis in full.
    assert facts(load_dataset("milk10k", tmp_path, "isic8", "exclude"), "label") == [["AK"]] * 2


def test_pad_ufes_20_has_patients_tones_and_sizes(tmp_path):
    head = "patient_id,lesion_id,smoke,age,gender,fitspatrick,region,diameter_1,diameter_2,diagnostic,img_id,biopsed\n"
    rows = (
        "PAT_8,15,False,40,FEMALE,2.0,FACE,6.0,9.0,ACK,PAT_8_15_1.png,True\n"
        "PAT_9,16,,41,,,NECK,0.0,,NEV,PAT_9_16_2.png,False\n"
        "PAT_9,17,,41,,,BACK,,,SEK,PAT_9_17_3.png,False\n"
    )
    put(tmp_path / "metadata.csv", head + rows)
    for i, name in enumerate(["PAT_8_15_1", "PAT_9_16_2", "PAT_9_17_3"]):
        part = tmp_path / "images" / f"imgs_part_{i + 1}.zip"
        pack(part, {f"imgs_part_{i + 1}/{name}.png": picture(i, "PNG")})
    dataset = load_dataset("pad_ufes_20", tmp_path)
    assert facts(dataset, "label", "patient_id", "skin_tone", "size_mm", "site", "sex") == [
        ["AK", "PAT_8", "2", 9.0, "face", "female"],
        ["NV", "PAT_9", None, None, "neck", None],
        ["BKL", "PAT_9", None, None, "back", None],
    ]
    assert "biopsed" in not_used(dataset) and "tells what it is" in not_used(dataset)


def derm7pt(folder: Path) -> None:
    diagnoses = "clark nevus", "melanoma (less than 0.76 mm)", "lentigo"
    rows = ["case_num,diagnosis,seven_point_score,location,sex,management,clinic,derm"]
    for i, diagnosis in enumerate(diagnoses, 1):
        rows.append(f"{i},{diagnosis},1,back,female,excision,NEL/N{i}c.JPG,NEL/N{i}d.jpg")
        for name in (f"N{i}c.JPG", f"N{i}d.jpg"):
            put(folder / "images" / "NEL" / name, picture(i))
    put(folder / "meta" / "meta.csv", "\n".join(rows) + "\n")
    for i, name in enumerate(["train", "valid", "test"]):
        put(folder / "meta" / f"{name}_indexes.csv", f"indexes\n{i}\n")


def test_derm7pt_pairs_share_a_case_and_its_split(tmp_path):
    derm7pt(tmp_path)
    dataset = load_dataset("derm7pt", tmp_path)
    assert facts(dataset, "label", "split", "lesion_id", "source")[:3] == [
        ["NEV", "train", "case 1", "Derm7pt photograph"],
        ["NEV", "train", "case 1", "Derm7pt dermoscopic"],
        ["MEL", "val", "case 2", "Derm7pt photograph"],
    ]
    one = load_dataset("derm7pt_dermoscopic", tmp_path, "dx7", "exclude")
    assert facts(one, "label") == [["nv"], ["mel"]]  # of a lentigo dx7 has no class
    assert problem_counts(one.problems)["unknown label"] == 1


def test_ph2_has_masks_and_codes(tmp_path):
    for i, code in ((2, 0), (3, 1), (4, 2)):
        case = tmp_path / "PH2 Dataset images" / f"IMD00{i}"
        put(case / f"IMD00{i}_Dermoscopic_Image" / f"IMD00{i}.bmp", picture(i, "BMP"))
        put(case / f"IMD00{i}_lesion" / f"IMD00{i}_lesion.bmp", picture(i, "BMP"))
        put(case / f"IMD00{i}_roi" / f"IMD00{i}_R1_Label3.bmp", picture(i, "BMP"))
    text = "|| Name || Histological Diagnosis || Clinical Diagnosis || Colors ||\n" + "".join(
        f"|| IMD00{i} ||   ||  {code} |  0 |  T || 4 ||\n" for i, code in ((2, 0), (3, 1), (4, 2))
    )
    put(tmp_path / "PH2_dataset.txt", text)
    dataset = load_dataset("ph2", tmp_path)
    assert facts(dataset, "label") == [["nv"], ["nv"], ["mel"]]
    assert dataset.taxonomy.positive == "mel" and len(dataset.problems) == 0
    masks = [Path(m).stem for m in dataset.manifest["mask"]]
    assert masks == ["IMD002_lesion", "IMD003_lesion", "IMD004_lesion"]


def test_fitzpatrick17k_and_ddi_have_skin_tones(tmp_path):
    one, two = tmp_path / "fitzpatrick17k", tmp_path / "ddi"
    head = ",md5hash,fitzpatrick_scale,fitzpatrick_centaur,label,nine_partition_label,three_partition_label,qc,url\n"
    rows = (
        "0,aa,-1,2,psoriasis,inflammatory,non-neoplastic,,u\n"
        "1,bb,5,5,basal cell carcinoma,malignant epidermal,malignant,,u\n"
        "2,cc,2,2,nevocytic nevus,benign melanocyte,benign,,u\n"
    )
    put(one / "fitzpatrick17k.csv", head + rows)
    for name in ("aa", "bb"):
        put(one / "images" / f"{name}.jpg", picture())
    assert "1 absent among 3" in sentence(load_dataset, "fitzpatrick17k", one)
    dataset = load_dataset("fitzpatrick17k", one, on_problem="exclude")
    assert facts(dataset, "label", "skin_tone") == [["non-neoplastic", None], ["malignant", "5"]]
    dx7 = load_dataset("fitzpatrick17k", one, "dx7", on_problem="exclude")
    assert facts(dx7, "label") == [["bcc"]]
    rows = "0,1,000001.png,56,True,melanoma-in-situ\n1,2,000002.png,12,False,actinic-keratosis\n"
    put(two / "ddi_metadata.csv", f",DDI_ID,DDI_file,skin_tone,malignant,disease\n{rows}")
    for i in (1, 2):
        put(two / "images" / f"00000{i}.png", picture(i, "PNG"))
    ddi = load_dataset("ddi", two)  # benign by its own word, though binary holds AK for none
    assert facts(ddi, "label", "skin_tone") == [["malignant", "56"], ["benign", "12"]]
    assert facts(load_dataset("ddi", two, "dx7"), "label") == [["mel"], ["akiec"]]


def test_bcn20000_without_diagnoses_of_its_test(tmp_path):
    head = "bcn_filename,age_approx,anatom_site_general,diagnosis,lesion_id,capture_date,sex,split\n"
    rows = "B1.jpg,55.0,anterior torso,MEL,BCN_1,2012-05-16,male,train\nB2.jpg,,,SCC,BCN_2,,,train\n"
    put(tmp_path / "bcn_20k_train.csv", head + rows)
    put(tmp_path / "bcn_20k_test.csv", "bcn_filename,age_approx,split\nB3.jpg,60.0,test\n")
    for i in (1, 2):
        put(tmp_path / "BCN_20k_train" / "bcn_20k_train" / f"B{i}.jpg", picture(i))
    dataset = load_dataset("bcn20000", tmp_path)
    assert facts(dataset, "label", "lesion_id", "split") == [
        ["MEL", "BCN_1", None],
        ["SCC", "BCN_2", None],
    ]
    assert "bcn_20k_test.csv: it has no labels" in not_used(dataset)


def test_dermamnist_is_read_from_its_arrays_with_its_split(tmp_path):
    rng, arrays = np.random.default_rng(0), {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 255, (2, 28, 28, 3), np.uint8)
        arrays[f"{split}_labels"] = np.array([[0], [6]], np.uint8)
    np.savez_compressed(tmp_path / "dermamnist.npz", **arrays)
    dataset = load_dataset("dermamnist", tmp_path, verify=True)
    assert facts(dataset, "label", "split")[:2] == [["akiec", "test"], ["vasc", "test"]]
    manifest = dataset.manifest.set_index("image_id")
    pixels = np.asarray(Image.open(io.BytesIO(read_image_bytes(manifest.path["val_1"]))))
    assert (pixels == arrays["val_images"][1]).all()
    assert len(dataset.problems) == 0
    # Once decoded it is in the store, and found there without the file being read anew.
    os.utime(tmp_path / "dermamnist.npz", (0, 0))
    for decoded in (6, 0):
        store = build_store(dataset.manifest, 32, "crop", tmp_path / "store")
        assert store.decoded == decoded


# Lesion masks


def test_masks_lie_in_a_zip_beside_the_images(tmp_path):
    put(tmp_path / "HAM10000_metadata.csv",
        "lesion_id,image_id,dx\nHAM_1,ISIC_1,nv\nHAM_2,ISIC_2,mel\nHAM_3,ISIC_3,mel\n")  # fmt: skip
    images = {f"ISIC_{i}.jpg": picture(i) for i in (1, 2, 3)}
    pack(tmp_path / "HAM10000_images_part_1.zip", images)
    Image.fromarray(np.eye(24, 32, dtype=bool)).save(buffer := io.BytesIO(), "PNG")
    name = "HAM10000_segmentations_lesion_tschandl"
    members = {f"{name}/ISIC_{i}_segmentation.png": buffer.getvalue() for i in (1, 3, 9)}
    pack(tmp_path / f"{name}.zip", members)
    dataset = load_dataset("ham10000", tmp_path)
    found = [m if m is None else m.rpartition("/")[2] for (m,) in facts(dataset, "mask")]
    assert found == ["ISIC_1_segmentation.png", None, "ISIC_3_segmentation.png"]
    assert "3, of which 2 belong to an image" in dataset.description
    assert len(dataset.problems) == 0
    pixels = read_pixels(dataset.manifest["mask"][0], 24, "crop")
    assert set(np.unique(pixels[..., 0] > 127)) == {False, True}
