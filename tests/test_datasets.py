"""Datasets: bad inputs, downloads over a line that breaks, and the real collections."""

import hashlib
import io
import json
import os
import threading
import time
import unicodedata
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dermnb.core import ConfigError
from dermnb.data.datasets import DATASETS, inspect_dataset, load_dataset
from dermnb.data.fetch import ResumingDownloader, fetch_dataset
from dermnb.data.files import image_fault, list_files, read_image_bytes
from dermnb.data.manifests import problem_counts
from dermnb.data.synthetic import generate_demo
from dermnb.data.tables import read_table
from dermnb.data.taxonomies import load_taxonomy
from dermnb.data.values import normalize_label

HERE = Path(__file__).resolve().parents[1]
TAXONOMIES = sorted(p.stem for p in (HERE / "dermnb" / "taxonomies").glob("*.yaml"))
REAL = Path(os.environ.get("DERMNB_REAL_DATA", HERE / ".." / "shared" / "data"))
needs_real = pytest.mark.skipif(
    not (REAL / "ham10000" / "HAM10000_metadata.csv").is_file(),
    reason=f"real images are absent: set DERMNB_REAL_DATA (looked in {REAL})",
)


def jpeg(seed=0, size=(32, 24)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def ham(folder: Path, rows: str, images=range(3)) -> Path:
    header = "lesion_id,image_id,dx,dx_type,age,sex,localization\n"
    put(folder / "HAM10000_metadata.csv", header + rows)
    for i in images:
        put(folder / f"I{i}.jpg", jpeg(i))
    return folder


ROWS = (
    "L0,I0,nv,histo,40.0,male,back\nL0,I1,nv,histo,40.0,male,back\nL1,I2,mel,histo,,,\n"
)


def sentence(function, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and text.endswith("."), text
    return text


# Taxonomies


@pytest.mark.parametrize("name", TAXONOMIES)
def test_taxonomy_files_are_sound(name):
    taxonomy = load_taxonomy(name)
    assert len(taxonomy.classes) >= 2
    assert set(taxonomy.titles) == set(taxonomy.classes)
    assert set(taxonomy.mapping.values()) <= set(taxonomy.classes)
    for code in taxonomy.classes:
        assert taxonomy.code(code) == code
        assert taxonomy.code(taxonomy.titles[code].upper()) == code


def test_every_isic2019_class_has_a_class_in_every_taxonomy():
    codes = load_taxonomy("isic8").classes
    assert len({load_taxonomy("dx7").code(c) for c in codes}) == 7
    assert {load_taxonomy("binary").code(c) for c in codes} == {"benign", "malignant"}
    assert load_taxonomy("isic8").code("UNK") is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("classes: [a, b]\n", "two classes or more"),
        ("classes:\n  a: [x]\n", "two classes or more"),
        ("clases:\n  a: [x]\n", "did you mean 'classes'"),
        ("classes:\n  a: [Nevus]\n  b: [nevus]\n", "stands for both"),
        ("classes:\n  a: {label: [x]}\n  b: []\n", "'title' and 'labels'"),
        ("classes:\n  a: [x]\n  b: [y]\nignore: x\n", "'ignore' must be a list"),
        ("classes:\n  a: [x]\n  b: [y]\nignore: [x]\n", "stands for both"),
        ("classes:\n  a: [x]\n  b: [y]\npositive: A\n", "did you mean 'a'"),
        ("classes:\n  a: [x]\n  b: [y]\npositive: [a]\n", "code of one class"),
        ("just text", "keys and values"),
        ("a: [", "is not YAML"),
    ],
)
def test_broken_taxonomies(tmp_path, content, said):
    assert said in sentence(load_taxonomy, put(tmp_path / "t.yaml", content))


def test_positive_class_is_known_where_a_taxonomy_names_one(tmp_path):
    assert load_taxonomy("binary").positive == "malignant"
    assert load_taxonomy("derm_categories").positive == ""
    assert load_taxonomy("dx7:nv,mel").positive == "mel"
    assert load_taxonomy("dx7:nv,bkl").positive == ""
    text = "classes:\n  a: [x]\n  b: [y]\n  c: [z]\npositive: c\n"
    own = put(tmp_path / "t.yaml", text)
    assert load_taxonomy(own).positive == "c"
    assert load_taxonomy(f"{own}:b,c").positive == "c"
    assert load_taxonomy(f"{own}:b,a").positive == ""


@pytest.mark.parametrize("name", TAXONOMIES)
def test_a_selection_knows_every_label_and_keeps_only_its_own(name):
    whole = load_taxonomy(name)
    codes = whole.classes[-2:][::-1]
    some = load_taxonomy(f"{name}: {codes[0]} , {codes[1]}")
    assert some.classes == codes and set(some.titles) == set(codes)
    assert some.name == f"{name}:{','.join(codes)}"
    assert set(some.mapping.values()) <= set(codes)
    for label in (*whole.classes, *whole.titles.values(), *whole.mapping):
        code = whole.code(label)
        assert some.code(label) == (code if code in codes else None), label
    for label in whole.ignored:
        assert some.code(label) is None
    again = load_taxonomy(f"{name}:{','.join(whole.classes)}")
    assert all(again.code(x) == whole.code(x) for x in whole.mapping)


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ("dx7:mel,nevus", "unknown class 'nevus'"),
        ("dx7:mel,akeic", "did you mean 'akiec'"),
        ("dx7:MEL,nv", "did you mean 'mel'"),
        ("dx7:mel", "two different classes or more"),
        ("dx7:mel,mel", "two different classes or more"),
        ("dx7:mel,mel,nv", "two different classes or more"),
        ("dx7:", "unknown class ''"),
        ("dx8:mel,nv", "did you mean 'dx7'"),
        ("none.yaml:mel,nv", "there is no file none.yaml"),
        (":mel,nv", "unknown taxonomy ''"),
    ],
)
def test_broken_selections(selection, said):
    assert said in sentence(load_taxonomy, selection)


def test_a_selection_leaves_images_out_and_counts_them(tmp_path):
    folder = ham(tmp_path, ROWS + "L2,I3,bcc,histo,,,\n", images=range(4))
    dataset = load_dataset("ham10000", folder, "dx7:nv,mel")
    assert dataset.classes == ("nv", "mel")
    assert dataset.manifest.label.tolist() == ["nv", "nv", "mel"]
    assert problem_counts(dataset.problems) == {"left out": 1}
    put(folder / "HAM10000_metadata.csv", "lesion_id,image_id,dx\nL0,I0,nvv\n")
    assert "1 unknown label" in sentence(load_dataset, "ham10000", folder, "dx7:nv,mel")


def test_paths_with_colons_and_taxonomies_beside_a_csv(tmp_path):
    text = "classes:\n  a: [x]\n  b: [y]\n  c: [z]\n"
    own = put(tmp_path / "a:b" / "own.yml", text)
    assert load_taxonomy(own).classes == ("a", "b", "c")
    assert load_taxonomy(f"{own}:c,a").classes == ("c", "a")
    folder = tmp_path / "csv"
    put(folder / "own.yaml", text)
    put(folder / "dataset.yaml", "taxonomy: own.yaml:c,a\n")
    put(folder / "t.csv", "image_id,label\nI0,x\nI1,y\nI2,z\n")
    for i in range(3):
        put(folder / f"I{i}.jpg", jpeg(i))
    dataset = load_dataset("csv", folder)
    assert dataset.classes == ("c", "a")
    assert dataset.manifest.label.tolist() == ["a", "c"]


TURKISH = {  # as folders are named by different people and machines
    "Enfeksiyonel": "Enfeksiyonel",
    "ENFEKSİYONEL HASTALIKLAR": "Enfeksiyonel",
    "Sığıl/SİĞİL": "Enfeksiyonel",
    "EKZAMA": "Ekzama",
    "akne": "Akne",
    "Gül_hastalığı": "Akne",
    "GÜL HASTALIĞI": "Akne",
    "PİGMENT": "Pigment",
    "Pigment-bozuklukları": "Pigment",
    "Benign pigmentli lezyonlar": "Benign",
    "BENIGN PIGMENTLI LEZYONLAR": "Benign",
    "İyi huylu": "Benign",
    "Nævus": "Benign",
    "MALİGN": "Malign",
    "Skuamöz hücreli karsinom": "Malign",
    "Malignant lesions": "Malign",
}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_turkish_class_folders_match_in_any_spelling(tmp_path, form):
    for i, folder in enumerate(TURKISH):
        name = unicodedata.normalize(form, folder)
        put(tmp_path / "data" / name / f"{i:02d}.jpg", jpeg(i))
    dataset = load_dataset("folders", tmp_path / "data", "cilt6")
    names = "Enfeksiyonel Ekzama Akne Pigment Benign Malign"
    assert dataset.classes == tuple(names.split())
    assert len(dataset.problems) == 0
    labels = dataset.manifest.sort_values("image_id")["label"].tolist()
    assert labels == list(TURKISH.values())


def test_the_four_letters_i_are_one():
    words = ["SIĞIL", "Sığıl", "SİĞİL", "siğil", unicodedata.normalize("NFD", "SİĞİL")]
    assert {normalize_label(word) for word in words} == {"siğil"}
    for word in [*words, "Bowen's_disease", "ｍｅｌ", "Straße"]:
        once = normalize_label(word)
        assert normalize_label(once) == once


def test_class_folders_from_macos_have_the_same_classes(tmp_path):
    for form in ("NFC", "NFD"):
        for i, name in enumerate(("nævus", "Sivilceler ğüşiöç")):
            folder = unicodedata.normalize(form, name)
            put(tmp_path / form / folder / f"{i}.jpg", jpeg(i))
    both = [load_dataset("folders", tmp_path / form) for form in ("NFC", "NFD")]
    assert both[0].classes == both[1].classes == ("Sivilceler ğüşiöç", "nævus")
    assert [set(d.manifest.label) for d in both] == [set(both[0].classes)] * 2
    put(tmp_path / "NFC" / "NÆVUS" / "9.jpg", jpeg(9))
    counts = load_dataset("folders", tmp_path / "NFC").manifest.label.value_counts()
    assert counts.to_dict() == {"NÆVUS": 2, "Sivilceler ğüşiöç": 1}


def test_disease_folders_of_one_category(tmp_path):
    folders = ["acne-cystic", "Rosacea", "Perioral_Dermatitis", "pemphigus", "melanoma"]
    for i, name in enumerate(folders):
        put(tmp_path / "train" / name / f"{i}.jpg", jpeg(i))
        put(tmp_path / "test" / name / f"t{i}.jpg", jpeg(i + 10))
    taxonomy = "derm_categories:acne,rosacea,perioral_dermatitis"
    dataset = load_dataset("folders", tmp_path, taxonomy)
    assert dataset.classes == ("acne", "rosacea", "perioral_dermatitis")
    assert len(dataset.manifest) == 6
    assert problem_counts(dataset.problems) == {"left out": 4}
    put(tmp_path / "train" / "psoriasis" / "9.jpg", jpeg(9))
    assert "1 unknown label" in sentence(load_dataset, "folders", tmp_path, taxonomy)


# Readers and problems


def test_folder_zip_and_mixed_layouts_give_the_same_table(tmp_path):
    one = ham(tmp_path / "one", ROWS)
    two = ham(tmp_path / "two", ROWS, images=[0])
    with zipfile.ZipFile(two / "part.zip", "w") as archive:
        archive.writestr("deep/I1.jpg", jpeg(1))
        archive.writestr("deep/I2.JPG", jpeg(2))
        archive.writestr("__MACOSX/deep/._I2.JPG", b"x")
    a, b = (load_dataset("ham10000", folder).manifest for folder in (one, two))
    pd.testing.assert_frame_equal(a.drop(columns="path"), b.drop(columns="path"))
    contents = [[read_image_bytes(p) for p in m.path] for m in (a, b)]
    assert contents[0] == contents[1]
    assert b.age.dtype == "float64" and np.isnan(b.age[2])
    assert b.sex[2] is pd.NA and b.patient_id.isna().all()


def test_kaggles_doubled_folders_do_no_harm_and_other_files_of_that_name_do(tmp_path):
    folder = ham(tmp_path, ROWS)
    put(folder / "copy" / "I0.jpg", jpeg(0))
    assert problem_counts(load_dataset("ham10000", folder).problems) == {}
    put(folder / "copy" / "I1.jpg", jpeg(1, (64, 48)))
    assert "1 duplicate id" in sentence(load_dataset, "ham10000", folder)


def test_masks_are_found_and_are_not_images(tmp_path):
    folder = ham(tmp_path, ROWS)
    put(folder / "masks" / "I0.png", jpeg())
    with zipfile.ZipFile(folder / "HAM10000_segmentations_lesion.zip", "w") as archive:
        archive.writestr("I1_segmentation.png", jpeg())
    dataset = load_dataset("ham10000", folder)
    assert dataset.manifest["mask"].notna().tolist() == [True, True, False]
    assert dataset.manifest["mask"][1].endswith(".zip::I1_segmentation.png")
    assert len(dataset.problems) == 0


def test_every_kind_of_problem_is_counted_named_and_excluded(tmp_path):
    rows = ROWS + (
        "L2,I3,nv,,,,\n"  # absent
        "L3,I4,nv,,,,\n"  # zero bytes
        "L4,I5,nv,,,,\n"  # cut short
        "L5,I6,nvv,,,,\n"  # unknown label
        "L6,I7,,,,,\n"  # no label
        "L7,I8,nv,,,,\nL7,I8,nv,,,,\n"  # twice the same
        "L8,I9,nv,,,,\nL8,I9,mel,,,,\n"  # twice, in contradiction
        "L9,,nv,,,,\n"  # no id
    )
    folder = ham(tmp_path, rows, images=[0, 1, 2, 6, 7, 8, 9, 10])
    put(folder / "I4.jpg", b"")
    put(folder / "I5.jpg", jpeg(5)[:-200])
    problems = inspect_dataset("ham10000", folder).problems
    assert problem_counts(problems) == {
        "absent": 2, "unreadable": 2, "unknown label": 2, "duplicate id": 2, "unlisted": 1,
    }  # fmt: skip
    assert set(problems.image_id.dropna()) == {f"I{i}" for i in range(3, 11)}
    detail = problems.set_index("image_id").detail
    assert "nearest: 'nv'" in detail["I6"] and "mel and nv" in detail["I9"]
    text = sentence(load_dataset, "ham10000", folder)
    assert "2 absent, 1 unreadable, 2 unknown label, 2 duplicate id among 13" in text
    assert f"dermnb data check ham10000 --data-dir {folder}" in text
    kept = load_dataset("ham10000", folder, on_problem="exclude", verify=True).manifest
    assert kept.image_id.tolist() == ["I0", "I1", "I2", "I8"]
    assert kept.index.tolist() == [0, 1, 2, 3]


def test_nothing_left_is_an_error(tmp_path):
    folder = ham(tmp_path, ROWS, images=[])
    text = sentence(load_dataset, "ham10000", folder, on_problem="exclude")
    assert "no image is left (3 absent)" in text


def test_damaged_member_of_an_archive_is_unreadable(tmp_path):
    path = tmp_path / "part.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("I0.jpg", jpeg(0))
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    path.write_bytes(bytes(data))
    images = list_files(tmp_path).images
    assert "CRC" in image_fault(images[0].path)


def test_official_test_tables_become_the_split_and_unk_is_left_out(tmp_path):
    folder = tmp_path
    put(
        folder / "ISIC_2019_Training_GroundTruth.csv",
        "image,MEL,NV,UNK\nA,1.0,0.0,0.0\n",
    )
    put(
        folder / "ISIC_2019_Training_Metadata.csv",
        "image,age_approx,lesion_id,sex\nA,,BCN_1,\n",
    )
    put(
        folder / "ISIC_2019_Test_GroundTruth.csv",
        "image,MEL,NV,UNK,score_weight\nB,0,1,0,1\nC,0,0,1,0\nD,1,1,0,1\n",
    )
    put(
        folder / "ISIC_2019_Test_Metadata.csv",
        "image,age_approx,sex\nB,45,male\nC,,\nD,,\n",
    )
    for name in "ABCD":
        put(folder / "images" / f"{name}.jpg", jpeg(ord(name)))
    dataset = load_dataset("isic2019", folder, on_problem="exclude")
    assert dataset.manifest.split.tolist() == ["train", "test"]
    assert dataset.manifest.source.tolist() == ["BCN20000", "ISIC 2019"]
    assert dataset.manifest.lesion_id.isna().tolist() == [False, True]
    counts = {"unknown label": 1, "not trained": 1, "left out": 1}
    assert problem_counts(dataset.problems) == counts
    assert "'MEL and NV'" in dataset.problems.detail[1]
    assert dataset.classes == load_taxonomy("isic8").classes and not dataset.synthetic


def test_contradicting_metadata_rows_are_a_duplicate(tmp_path):
    put(tmp_path / "ISIC_2019_Training_GroundTruth.csv", "image,MEL,NV\nA,1,0\nB,0,1\n")
    put(
        tmp_path / "ISIC_2019_Training_Metadata.csv",
        "image,age_approx,lesion_id\nA,40,L1\nA,40,L1\nB,40,L2\nB,50,L2\n",
    )
    for name in "AB":
        put(tmp_path / f"{name}.jpg", jpeg(ord(name)))
    dataset = load_dataset("isic2019", tmp_path, on_problem="exclude")
    assert dataset.manifest.image_id.tolist() == ["A"]


def test_split_folders_metadata_and_linked_folders(tmp_path):
    elsewhere = tmp_path / "disk"
    for i, name in enumerate(["train/mel/a", "train/mel/b", "test/nv/c"]):
        put(elsewhere / f"{name}.jpg", jpeg(i))
    (elsewhere / "train" / "loop").symlink_to(elsewhere)
    folder = tmp_path / "set"
    folder.mkdir()
    for part in ("train", "test"):
        (folder / part).symlink_to(elsewhere / part)
    (elsewhere / "train" / "loop").unlink()
    put(folder / "metadata.csv", "image_id,lesion_id,age\na,L1,50\nb,L1,\nz,L9,\n")
    dataset = load_dataset("folders", folder, on_problem="exclude")
    table = dataset.manifest.set_index("image_id")
    assert table.split.to_dict() == {"a": "train", "b": "train", "c": "test"}
    assert table.lesion_id.to_dict() == {"a": "L1", "b": "L1", "c": "c"}
    assert problem_counts(dataset.problems) == {"absent": 1, "not trained": 1}
    assert load_dataset("folders", folder, "dx7", "exclude").classes[0] == "akiec"


def test_a_link_that_leads_back_up_is_not_followed_for_ever(tmp_path):
    put(tmp_path / "nv" / "a.jpg", jpeg())
    (tmp_path / "nv" / "up").symlink_to(tmp_path)
    assert [image.rel for image in list_files(tmp_path).images] == ["nv/a.jpg"]


def test_class_folders_inside_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "tree.zip", "w") as archive:
        for i, name in enumerate(("黑色素瘤/1", "痣/1")):
            archive.writestr(f"{name}.png", jpeg(i))
    dataset = load_dataset("folders", tmp_path)
    assert set(dataset.manifest.label) == {"黑色素瘤", "痣"}
    assert set(dataset.manifest.image_id) == {"黑色素瘤/1", "痣/1"}
    assert not any(image_fault(path) for path in dataset.manifest.path)


def test_a_wrong_folder_in_a_path_column_is_not_the_image(tmp_path):
    put(tmp_path / "nv" / "1.jpg", jpeg(1))
    put(tmp_path / "mel" / "2.jpg", jpeg(2))
    put(
        tmp_path / "list.csv",
        "image_id,label,path\na,nv,/home/x/data/nv/1.jpg\nb,mel,nv/2.jpg\nc,nv,mel\\2.jpg\n",
    )
    dataset = load_dataset("csv", tmp_path, on_problem="exclude")
    assert dataset.manifest.image_id.tolist() == ["a", "c"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "must hold one CSV"),
        ({"a.csv": "image_id,label\n", "b.csv": ""}, "must hold one CSV"),
        ({"a.csv": "image_id,label\n"}, "a header and no rows"),
        ({"a.csv": ""}, "is empty"),
        (
            {"a.csv": "image_id,label\n1,n\xe4vus\n".encode("latin-1")},
            "is not utf-8 text",
        ),
        ({"a.csv": "image_id,label\n1,nv,3,4\n"}, "more cells than the header"),
        ({"a.csv": "image_id,label\n1,nv\n2,nv,5\n"}, "is not a regular table"),
        ({"a.csv": "photo,label\n1,nv\n"}, "did you mean 'photo'?"),
        ({"a.csv": "image_id,label,age\n1,nv,old\n"}, "age 'old' is not a number"),
        ({"a.csv": "image_id,label\n1,nv\n2,nv\n"}, "has only the class 'nv'"),
        (
            {"a.csv": "image_id,label\n1,nv\n", "dataset.yaml": "colums: {}"},
            "'columns'",
        ),
        (
            {"a.csv": "x,label\n1,nv\n", "dataset.yaml": "columns: {image_id: y}"},
            "unknown column 'y'",
        ),
        ({"dataset.yaml": "table: c.csv"}, "there is no file"),
        (
            {"a.csv": "image_id,label\n1,nv\n", "dataset.yaml": "images: x"},
            "no folder or",
        ),
        ({"a.csv": "image_id,label\n1,nv\n", "p.zip": "PK"}, "not a whole zip archive"),
    ],
)
def test_bad_csv_datasets_are_told_in_one_sentence(tmp_path, files, said):
    for name, content in files.items():
        put(tmp_path / name, content)
    assert said in sentence(load_dataset, "csv", tmp_path)


def test_wrong_names_and_places(tmp_path):
    put(tmp_path / "file.txt", "x")
    assert "did you mean 'ham10000'" in sentence(load_dataset, "ham1000", tmp_path)
    assert "did you mean 'exclude'" in sentence(
        load_dataset, "ham10000", tmp_path, on_problem="exlude"
    )
    assert "no HAM10000_metadata.csv" in sentence(load_dataset, "ham10000", tmp_path)
    assert "dermnb data fetch isic2019" in sentence(
        load_dataset, "isic2019", tmp_path / "nowhere"
    )
    assert "is a file" in sentence(load_dataset, "ham10000", tmp_path / "file.txt")
    put(tmp_path / "ISIC_2019_Training_GroundTruth.csv", "image,MEL,NV\nA,1,x\n")
    put(tmp_path / "ISIC_2019_Training_Metadata.csv", "image,age_approx\nA,1\n")
    assert "must be 0 or 1" in sentence(load_dataset, "isic2019", tmp_path)


def test_tabs_bom_and_windows_line_ends_are_read(tmp_path):
    path = put(tmp_path / "t.tab", b"\xef\xbb\xbfimage_id\tdx\r\nA\tnv\r\n")
    assert read_table(path, ["image_id", "dx"]).to_dict("list") == {
        "image_id": ["A"],
        "dx": ["nv"],
    }


def test_demo_is_generated_once_and_only_where_it_may_be(tmp_path, monkeypatch):
    def small(folder, workers=1):
        return generate_demo(folder, lesions=16, size=(32, 32))

    monkeypatch.setattr("dermnb.data.synthetic.generate_demo", small)
    dataset = load_dataset("demo", tmp_path / "demo")
    assert dataset.synthetic and len(dataset.problems) == 0
    assert dataset.manifest["mask"].notna().all()
    monkeypatch.delattr("dermnb.data.synthetic.generate_demo")
    again = load_dataset("demo", tmp_path / "demo")
    pd.testing.assert_frame_equal(dataset.manifest, again.manifest)
    assert load_dataset("isic2019", tmp_path / "demo").synthetic
    monkeypatch.undo()
    sentence(load_dataset, "demo", ham(tmp_path / "ham", ROWS))
    path = tmp_path / "demo" / "ISIC_2019_Training_GroundTruth.csv"
    text = path.read_text()
    put(path, text.replace("DEMO_", "REAL_"))
    assert "as dataset isic2019" in sentence(load_dataset, "demo", tmp_path / "demo")


def test_archives_are_read_by_many_threads(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(40):
            archive.writestr(f"{i}.jpg", jpeg(i))
    images = list_files(tmp_path).images
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda image: read_image_bytes(image.path), images * 5))
    assert got == [jpeg(int(image.stem)) for image in images] * 5


# Downloads


class Line:
    "A loopback server with files, and faults to try a downloader with."

    def __init__(self, files):
        self.files, self.asked = files, []
        self.ranges, self.etag, self.cut = True, "v1", {}
        line = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                line.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request):
        path = request.path.lstrip("/")
        asked = request.headers.get("Range", "")
        self.asked.append((path, asked))
        if path not in self.files:
            return request.send_error(404)
        data, start = self.files[path], 0
        same = request.headers.get("If-Range", f'"{self.etag}"') == f'"{self.etag}"'
        if self.ranges and asked and same:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        if start and start >= len(data):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(data)}")
            request.send_header("Content-Length", "0")
            return request.end_headers()
        request.send_response(206 if start else 200)
        if start:
            span = f"bytes {start}-{len(data) - 1}/{len(data)}"
            request.send_header("Content-Range", span)
        request.send_header("Content-Length", str(len(data) - start))
        request.send_header("ETag", f'"{self.etag}"')
        request.end_headers()
        limit = self.cut.get(path, [])
        stop = start + limit.pop(0) if limit else len(data)
        request.wfile.write(data[start:stop])
        request.close_connection = True


@pytest.fixture
def line():
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for i in range(20):
            file.writestr(f"ISIC_2019_Training_Input/I{i}.jpg", jpeg(i))
    truth = "image,MEL,NV\n" + "".join(f"I{i},{i % 2},{1 - i % 2}\n" for i in range(20))
    people = "image,age_approx,lesion_id\n" + "".join(
        f"I{i},40,L{i}\n" for i in range(20)
    )
    line = Line(
        {
            "ISIC_2019_Training_GroundTruth.csv": truth.encode(),
            "ISIC_2019_Training_Metadata.csv": people.encode(),
            "ISIC_2019_Training_Input.zip": archive.getvalue(),
        }
    )
    yield line
    line.server.shutdown()
    line.server.server_close()


ZIP = "ISIC_2019_Training_Input.zip"


def fetch(line, folder):
    return fetch_dataset("isic2019", folder, base_url=line.url, pause=0)


def test_fetch_continues_after_a_cut_and_records_what_came(line, tmp_path):
    line.cut[ZIP] = [5000, 3000]
    table = fetch(line, tmp_path).set_index("file")
    assert [r for path, r in line.asked if path == ZIP] == [
        "",
        "bytes=5000-",
        "bytes=8000-",
    ]
    digest = hashlib.sha256(line.files[ZIP]).hexdigest()
    assert table.sha256[ZIP] == digest
    assert (tmp_path / f"{ZIP}.sha256").read_text() == f"{digest}  {ZIP}\n"
    assert not list(tmp_path.glob("*.part*"))
    assert len(load_dataset("isic2019", tmp_path, verify=True).manifest) == 20


def test_fetch_that_gave_up_is_resumed_by_the_next_call(line, tmp_path):
    line.cut[ZIP] = [4000] + [0] * 10
    text = sentence(fetch, line, tmp_path)
    assert "4,000 bytes are kept" in text and "resumes" in text
    assert not (tmp_path / ZIP).exists()
    line.cut.clear()
    line.asked.clear()
    assert fetch(line, tmp_path).state.tolist() == ["already there"] * 2 + ["fetched"]
    assert line.asked == [(ZIP, "bytes=4000-")]
    assert (tmp_path / ZIP).read_bytes() == line.files[ZIP]


def test_fetch_starts_again_where_the_server_ignores_ranges(line, tmp_path):
    line.ranges, line.cut[ZIP] = False, [5000]
    fetch(line, tmp_path)
    assert (tmp_path / ZIP).read_bytes() == line.files[ZIP]


def test_fetch_does_not_join_two_versions_of_a_file(line, tmp_path):
    line.cut[ZIP] = [4000] + [0] * 10
    sentence(fetch, line, tmp_path)
    line.cut.clear()
    line.etag, before = "v2", line.files[ZIP]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("I0.jpg", os.urandom(len(before)))
    line.files[ZIP] = archive.getvalue()
    fetch(line, tmp_path)
    assert (tmp_path / ZIP).read_bytes() == line.files[ZIP]


@pytest.mark.parametrize("extra", [0, 10])
def test_a_part_that_is_complete_or_too_long(line, tmp_path, extra):
    put(tmp_path / f"{ZIP}.part", line.files[ZIP] + b"x" * extra)
    fetch(line, tmp_path)
    assert (tmp_path / ZIP).read_bytes() == line.files[ZIP]
    assert [r for path, r in line.asked if path == ZIP][1:] == ([""] if extra else [])


def test_a_wrong_checksum_is_refused(line, tmp_path, monkeypatch):
    spec = DATASETS["isic2019"]
    wrong = tuple(d._replace(hash="sha256:" + "0" * 64) for d in spec.downloads)
    changed = {**spec.__dict__, "downloads": wrong}
    monkeypatch.setitem(DATASETS, "isic2019", type(spec)(**changed))
    text = sentence(fetch, line, tmp_path)
    assert "was refused" in text and "hash" in text.lower()
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".")]


def test_an_archive_that_is_none_is_refused(line, tmp_path):
    line.files[ZIP] = b"<html>please log in</html>"
    assert "not a whole zip archive" in sentence(fetch, line, tmp_path)
    assert not (tmp_path / ZIP).exists()


def test_a_file_of_ones_own_is_not_overwritten(line, tmp_path):
    fetch(line, tmp_path)
    own = put(
        tmp_path / "ISIC_2019_Training_Metadata.csv", "image,age_approx\nmine,1\n"
    )
    assert "move it away" in sentence(fetch, line, tmp_path)
    assert "mine" in own.read_text()


def test_server_and_network_errors_are_sentences(line, tmp_path):
    del line.files["ISIC_2019_Training_Metadata.csv"]
    assert "answers 404" in sentence(fetch, line, tmp_path)
    url = "http://127.0.0.1:9"
    text = sentence(fetch_dataset, "isic2019", tmp_path / "x", base_url=url, pause=0)
    assert "cannot be reached" in text
    assert "is not fetched" in sentence(fetch_dataset, "isic_archive", tmp_path)


def test_a_full_disk_is_told_before(line, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("dermnb.data.fetch.shutil.disk_usage", lambda path: usage)
    assert "GB free" in sentence(fetch, line, tmp_path)


def test_dataverse_is_read_by_doi_with_its_checksums(tmp_path, monkeypatch):
    archives = {}
    for part in (1, 2):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr(f"I{part}.jpg", jpeg(part))
        archives[part] = buffer.getvalue()
    table = b"lesion_id\timage_id\tdx\tage\nL1\tI1\tnv\t40.0\nL2\tI2\tmel\t\n"
    listed = [
        ("HAM10000_metadata.tab", 3, "0" * 32, {"originalFileFormat": "text/csv"}),
        *[
            (f"HAM10000_images_part_{i}.zip", i, hashlib.md5(data).hexdigest(), {})
            for i, data in archives.items()
        ],
    ]
    answer = [
        {"dataFile": {"filename": n, "id": i, "md5": m, **x}} for n, i, m, x in listed
    ]
    line = Line(
        {
            "api/datasets/:persistentId?persistentId=doi:10.7910/DVN/DBW86T": json.dumps(
                {"data": {"latestVersion": {"files": answer}}}
            ).encode(),
            "api/access/datafile/3?format=original": table,
            **{f"api/access/datafile/{i}": data for i, data in archives.items()},
        }
    )
    monkeypatch.setattr(
        "pooch.downloaders.doi_to_url",
        lambda doi, **kwargs: f"{line.url}/dataset.xhtml",
    )
    line.cut["api/access/datafile/2"] = [50]
    fetch_dataset("ham10000", tmp_path, pause=0)
    assert load_dataset("ham10000", tmp_path, verify=True).manifest.label.tolist() == [
        "nv",
        "mel",
    ]
    (tmp_path / "HAM10000_images_part_1.zip").unlink()
    line.files["api/access/datafile/1"] = archives[2]
    assert "was refused" in sentence(fetch_dataset, "ham10000", tmp_path, pause=0)
    put(tmp_path / "HAM10000_images_part_1.zip", archives[2])
    assert "move it away" in sentence(fetch_dataset, "ham10000", tmp_path, pause=0)
    line.server.shutdown()
    line.server.server_close()


def test_downloader_works_alone(line, tmp_path):
    line.cut[ZIP] = [100]
    ResumingDownloader(tmp_path / "x.part", pause=0)(
        f"{line.url}/{ZIP}", str(tmp_path / "x.zip"), None
    )
    assert (tmp_path / "x.zip").read_bytes() == line.files[ZIP]


# The real collections


@needs_real
def test_ham10000_from_its_archives():
    start = time.process_time()  # not the clock, which other work would disturb
    dataset = load_dataset("ham10000", REAL / "ham10000")
    assert time.process_time() - start < 3
    manifest = dataset.manifest
    assert len(manifest) == manifest.image_id.nunique() == 10_015
    assert manifest.lesion_id.nunique() == 7_470 and len(dataset.problems) == 0
    assert manifest.label.value_counts()["nv"] == 6_705
    assert (manifest.groupby("lesion_id").label.nunique() == 1).all()
    sample = manifest.path.sample(50, random_state=0)
    assert not any(image_fault(path) for path in sample)


@needs_real
def test_isic2019_tables_with_the_images_of_ham10000(tmp_path):
    for path in (
        *(REAL / "isic2019").glob("*.csv"),
        *(REAL / "ham10000").glob("*.zip"),
    ):
        (tmp_path / path.name).symlink_to(path)
    assert "15,316 absent among 25,331" in sentence(load_dataset, "isic2019", tmp_path)
    dataset = load_dataset("isic2019", tmp_path, on_problem="exclude")
    assert problem_counts(dataset.problems) == {"absent": 15_316}
    assert len(dataset.manifest) == 10_015
    assert dataset.manifest.lesion_id.nunique() == 7_470
    assert dataset.manifest.label.value_counts()["AK"] == 130
    dx7 = load_dataset("isic2019", tmp_path, "dx7", "exclude").manifest
    own = load_dataset("ham10000", REAL / "ham10000").manifest
    same = dx7.set_index("image_id").label.reindex(own.image_id)
    assert (same.to_numpy() == own.label.to_numpy()).all()


def test_size_and_skin_tone_of_an_archive_export_and_of_any_table(tmp_path):
    archive = tmp_path / "archive"
    archive.mkdir()
    put(
        archive / "metadata.csv",
        "isic_id,diagnosis_1,clin_size_long_diam_mm,fitzpatrick_skin_type\n"
        "I0,Benign,4.5,III\nI1,Malignant,,\n",
    )
    manifest = load_dataset("isic_archive", archive, "binary", "exclude").manifest
    assert manifest["size_mm"].tolist()[0] == 4.5 and manifest["size_mm"].isna()[1]
    assert manifest["skin_tone"].fillna("").tolist() == ["3", ""]
    own = tmp_path / "own"
    own.mkdir()
    put(own / "t.csv", "image_id,label,size_mm\na,x,3\nb,y,wide\n")
    assert "size_mm 'wide' is not a number of millimeters" in sentence(
        load_dataset, "csv", own
    )


@needs_real
def test_isic_archive_agrees_with_ham10000_and_states_licenses():
    archive = load_dataset("isic_archive", REAL / "isic_archive")
    assert problem_counts(archive.problems) == {"no images": 1}
    assert archive.manifest.license.eq("CC-BY-NC").all()
    assert archive.manifest.path.isna().all()
    assert "no file" in sentence(read_image_bytes, archive.manifest.path[0])
    own = load_dataset("ham10000", REAL / "ham10000").manifest
    same = archive.manifest.set_index("image_id").label.reindex(own.image_id)
    assert (same.to_numpy() == own.label.to_numpy()).all()
    two = load_dataset("isic_archive", REAL / "isic_archive", "binary").manifest
    assert two.label.value_counts().to_dict() == {"benign": 8_061, "malignant": 1_954}
