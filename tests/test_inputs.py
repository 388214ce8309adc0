"""Inputs that people have: columns, unknown values, layouts and names of every hand."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_datasets import jpeg, put, sentence

from dermnb.data.datasets import inspect_dataset, load_dataset
from dermnb.data.files import list_files, read_image_bytes
from dermnb.data.manifests import problem_counts
from dermnb.data.taxonomies import load_taxonomy
from dermnb.data.values import (
    find_columns,
    likely_column,
    parse_column,
    split_word,
    column_values,
)


def told(dataset, what: str) -> str:
    "What the account says under a title."
    account = dataset.account
    return "; ".join(t for w, t in account.found + account.not_used if w == what)


def trees(folder: Path, *places: str, images: int = 2, suffix: str = ".jpg") -> Path:
    for place in places:
        for i in range(images):
            put(folder / place / f"{i}{suffix}", jpeg(hash((place, i)) % 2**31))
    return folder


def table(folder: Path, header: str, *rows: str, images: str = "im/{}.jpg") -> Path:
    put(folder / "t.csv", "\n".join([header, *rows]) + "\n")
    for i, row in enumerate(rows):
        put(folder / images.format(Path(row.split(",")[0]).stem), jpeg(i))
    return folder


# Cells


@pytest.mark.parametrize(
    "cell",
    [
        "",
        " ",
        "unknown",
        "UNKNOWN ",
        "Unk",
        "NA",
        "n/a",
        "N.A.",
        "nan",
        "None",
        "null",
        "-",
        "--",
        "?",
    ]
    + [
        "...",
        "not specified",
        "Not_Reported",
        "missing",
        "(unknown)",
        "#N/A",
        "<NA>",
        "-1",
        "-1.0",
    ]
    + [
        "keine Angabe",
        "k.A.",
        "unbekannt",
        "inconnu",
        "Non renseigné",
        "desconocido",
        "Bilinmiyor",
        "未知",
    ],
)
@pytest.mark.parametrize("kind", ["id", "age", "sex", "site", "skin_tone", "size_mm"])
def test_what_stands_for_unknown_is_unknown_in_every_kind(kind, cell):
    assert column_values(pd.Series([cell, None]), kind).isna().all()


@pytest.mark.parametrize(
    ("kind", "cell", "value"),
    [
        ("age", "0", 0), ("age", "45.0", 45), ("age", "45 years", 45), ("age", "45y", 45),
        ("age", "45 Jahre", 45), ("age", "45,5", 45.5), ("age", "80+", 80), ("age", ">85", 85),
        ("age", "18 months", 1.5), ("age", "120", 120), ("age", 33.0, 33),
        ("size_mm", "1,5 cm", 15), ("size_mm", "6 mm", 6), ("size_mm", "0.4", 0.4),
        ("sex", "M", "male"), ("sex", "Weiblich", "female"), ("sex", "FEMALE", "female"),
        ("sex", "féminin", "female"), ("sex", "intersex", "intersex"), ("sex", "1", "1"),
        ("site", " Head / Neck ", "head/neck"), ("site", "lower_extremity", "lower extremity"),
        ("skin_tone", "IV", "4"), ("skin_tone", "4.0", "4"), ("skin_tone", "Type iv", "4"),
        ("skin_tone", "FST 4", "4"), ("skin_tone", "MST 9", "9"), ("skin_tone", "56", "56"),
        ("skin_tone", "III-IV", "34"), ("skin_tone", "V/VI", "56"), ("skin_tone", "1 to 2", "12"),
        ("id", "999", "999"), ("id", " 007 ", "007"),
        ("split", "TRAIN ", "train"), ("split", "Valid", "val"), ("split", "validierung", "val"),
        ("split", "dev", "val"), ("split", "Testing", "test"), ("split", "hold-out", "test"),
        ("split", "test_images", "test"), ("split", "entraînement", "train"),
    ],
)  # fmt: skip
def test_cells_are_understood(kind, cell, value):
    assert column_values(pd.Series([cell]), kind).tolist() == [value]


@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        ("age", c)
        for c in (
            "-5",
            "130",
            "121",
            "old",
            "40-49",
            "inf",
            "1e9",
            "<18",
            "45 mm",
            "1.2.3",
        )
    ]
    + [("size_mm", c) for c in ("-3", "501", "wide", "12 kg")]
    + [("skin_tone", c) for c in ("7.5", "45", "11", "II-III", "2-3")]
    + [("split", c) for c in ("fold1", "3", "training and test", "trial")],
)
def test_what_is_neither_right_nor_unknown_is_refused_in_a_sentence(kind, cell):
    column = pd.Series([cell, None, cell, "unknown"], name="col")
    text = sentence(column_values, column, kind, "t.csv")
    assert text.startswith(f"t.csv: col {cell!r} is not ") and "nor is 1 other" in text


def test_zero_is_an_age_and_no_size_or_skin_tone():
    for kind, known in (("age", True), ("size_mm", False), ("skin_tone", False)):
        assert column_values(pd.Series(["0", "0.0"]), kind).notna().all() == known


@pytest.mark.parametrize(
    ("ids", "known"),
    [("0 1 2 3", True), ("0 57 58", True), ("00 01 02", True), ("0 0 0", False),
     ("0 P1 P2", False), ("0 00 xxx n.n.", False), ("0 8812345 8812346", False)],
)  # fmt: skip
def test_zero_is_an_id_where_ids_are_counted(ids, known):
    column = pd.Series(ids.split())
    assert column_values(column, "id").notna().iloc[0] == known


def test_codes_and_phrases_for_unknown():
    for kind, cells in (
        ("sex", ["0", "9", "9.0", "Sex unknown"]),
        ("site", ["0", "Unknown site", "location not specified"]),
        ("age", ["age unknown"]),
        ("id", ["n.n.", "unknown patient"]),
    ):
        assert column_values(pd.Series(cells), kind).isna().all(), kind
    assert column_values(pd.Series(["1", "2", "0"]), "sex").tolist()[:2] == ["1", "2"]
    assert column_values(pd.Series(["site", "type b"]), "site").notna().all()
    text = sentence(column_values, pd.Series(["0", "1", "1"]), "sex")
    assert "write male and female" in text


def test_h_and_m_are_not_taken_for_male_twice():
    assert "mujer" in sentence(column_values, pd.Series(["H", "M", "H"]), "sex")
    assert column_values(pd.Series(["M", "F"]), "sex").tolist() == ["male", "female"]


def test_what_was_read_is_counted():
    cells = parse_column(pd.Series(["80+", "40", "NA", "NA", "-1", ""]), "age")
    assert cells.unknown == {"NA": 2, "-1": 1} and cells.changed == {"80+": "80"}


def test_manifests_are_read_again_without_change():
    for kind, values in (
        ("sex", ["male", "diverse"]),
        ("site", ["head/neck"]),
        ("skin_tone", ["4", "dark"]),
    ):
        assert column_values(pd.Series(values), kind).tolist() == values


# Columns


@pytest.mark.parametrize(
    ("column", "names"),
    [
        (
            "patient_id",
            "patient_id PatientID patient-id Patient_Id PATIENT SubjectID mrn Hasta_No",
        ),
        ("lesion_id", "LesionID lesion Läsion"),
        ("age", "Age age_approx AGE_YEARS Alter âge Yaş"),
        ("sex", "Gender Geschlecht sexe"),
        ("site", "localization anatom_site_general anatom_site_1 Lokalisation"),
        ("label", "dx Diagnosis Diagnose diagnostic"),
        ("image_id", "image isic_id img_id Image_Name Bild filename"),
    ],
)
def test_columns_have_many_names(column, names):
    for name in names.split():
        assert find_columns(["x", name], [column]) == {column: name}


@pytest.mark.parametrize(
    "name",
    ["Patient No.", "patients", "patient_study_id", "Case ID", "pid", "Subj-Patient"],
)
def test_a_column_that_looks_like_a_patient_is_never_passed_over(tmp_path, name):
    folder = table(tmp_path, f"image_id,label,{name}", "a,nv,1", "b,mel,1", "c,nv,2")
    dataset = load_dataset("csv", folder)
    if dataset.manifest.patient_id.isna().all():
        assert f"{name} of t.csv (did you mean patient_id?" in told(dataset, "columns")
    else:
        assert f"patient_id from {name}" in told(dataset, "table")


def test_columns_of_every_spelling_are_read_by_every_reader(tmp_path):
    "Subject ID, AGE and Geschlecht in a CSV, beside class folders, and with HAM10000's names."
    folder = table(
        tmp_path / "csv", "Bild,Diagnose,Subject ID,AGE,Geschlecht,itch", "a,nv,P1,44 Jahre,w,1",
        "b,mel,P1,unbekannt,m,2",
    )  # fmt: skip
    csv = load_dataset("csv", folder)
    trees(tmp_path / "tree", "nv", "mel", images=1)
    put(
        tmp_path / "tree/metadata.csv",
        "file,PatientID,Age\nNV/0.JPG,P1,3\nmel/0.jpg,P2,-1\n",
    )
    tree = load_dataset("folders", tmp_path / "tree")
    put(
        tmp_path / "ham/HAM10000_metadata.csv",
        "image_id,lesion_id,dx,Age,patient,gender\nI0,L,nv,5,P1,F\n",
    )
    put(tmp_path / "ham/I0.jpg", jpeg())
    ham = load_dataset("ham10000", tmp_path / "ham")
    assert csv.manifest.patient_id.tolist() == ["P1", "P1"]
    assert csv.manifest.age.fillna(-1).tolist() == [44, -1]
    assert csv.manifest.sex.tolist() == ["female", "male"]
    assert told(csv, "columns") == "itch of t.csv"
    by_label = tree.manifest.set_index("label")
    assert by_label.patient_id.to_dict() == {"nv": "P1", "mel": "P2"}
    assert by_label.age.fillna(-1).to_dict() == {"nv": 3, "mel": -1}
    assert ham.manifest[["patient_id", "sex"]].iloc[0].tolist() == ["P1", "female"]


def test_a_column_of_file_names_is_the_images(tmp_path):
    folder = table(tmp_path, "foto,label", "a.jpg,nv", "b.png,mel")
    assert load_dataset("csv", folder).manifest.image_id.tolist() == ["a.jpg", "b.png"]
    put(folder / "t.csv", "derm,clinic,label\na.jpg,c.jpg,nv\nb.jpg,d.jpg,mel\n")
    assert "did you mean 'derm' and 'clinic'?" in sentence(load_dataset, "csv", folder)


def test_columns_can_be_left_out_by_name(tmp_path):
    folder = table(tmp_path, "image_id,label,split", "a,nv,fold 1", "b,mel,fold 2")
    assert "split 'fold 1' is not train, val or test" in sentence(
        load_dataset, "csv", folder
    )
    assert "'columns: {split: }' in" in sentence(load_dataset, "csv", folder)
    put(folder / "dataset.yaml", "columns: {split: }\n")
    dataset = load_dataset("csv", folder)
    assert dataset.manifest.split.isna().all() and "split of t.csv" in told(
        dataset, "columns"
    )


def test_placeholder_ids_are_no_giant_group(tmp_path):
    rows = [
        f"i{i},{'nv' if i % 2 else 'mel'},{'unknown' if i % 4 else f'L{i}'},N/A"
        for i in range(12)
    ]
    dataset = load_dataset(
        "csv", table(tmp_path, "image_id,label,lesion_id,patient_id", *rows)
    )
    assert dataset.manifest.lesion_id.notna().sum() == 3
    assert dataset.manifest.patient_id.isna().all()
    assert "9 of 12 images have no lesion id" in told(dataset, "lesions")
    assert "lesion_id 9 'unknown'; patient_id 12 'N/A'" in told(
        dataset, "unknown cells"
    )


def test_one_id_of_very_many_images_is_shown(tmp_path):
    rows = [
        f"i{i},{'nv' if i % 2 else 'mel'},{'xx' if i < 12 else i}" for i in range(20)
    ]
    dataset = load_dataset("csv", table(tmp_path, "image_id,label,patient_id", *rows))
    assert "12 images are of patient 'xx'" in told(dataset, "patients")


def test_isic_archive_sites_are_read_from_their_levels(tmp_path):
    put(
        tmp_path / "metadata.csv",
        "isic_id,diagnosis_1,anatom_site_1,anatom_site_2\nI0,Benign,Head and neck,Face\nI1,Malignant,NA,\n",
    )
    dataset = load_dataset("isic_archive", tmp_path, "binary")
    assert dataset.manifest.site.fillna("").tolist() == ["head and neck", ""]
    assert "anatom_site_2" in told(dataset, "columns")


# Labels


def test_one_column_a_class_is_read_by_every_reader(tmp_path):
    text = "image,MEL,NV,BCC\nA,1.0,0.0,0.0\nB,0.0,1.0,0.0\nC,0.0,0.0,1.0\n"
    put(tmp_path / "ISIC2018_Task3_Training_GroundTruth.csv", text)
    for i, name in enumerate("ABC"):
        put(tmp_path / f"ISIC2018_Task3_Training_Input/{name}.jpg", jpeg(i))
    assert load_dataset("csv", tmp_path).manifest.label.tolist() == ["MEL", "NV", "BCC"]
    assert load_dataset("ham10000", tmp_path).manifest.label.tolist() == [
        "mel",
        "nv",
        "bcc",
    ]
    put(tmp_path / "ISIC2018_Task3_Validation_GroundTruth.csv", "image,MEL,NV\nD,0,1\n")
    put(
        tmp_path / "ISIC2018_Task3_Training_LesionGroupings.csv",
        "image,lesion_id\nA,L1\nB,L1\n",
    )
    put(tmp_path / "ISIC2018_Task3_Validation_Input/D.jpg", jpeg(9))
    both = load_dataset("ham10000", tmp_path).manifest
    assert both.split.tolist() == ["train"] * 3 + ["val"]
    assert both.lesion_id.fillna("").tolist() == ["L1", "L1", "", ""]


def test_marks_may_be_words(tmp_path):
    folder = table(tmp_path, "image,MEL,NV", "a,True,False", "b,false,TRUE")
    assert load_dataset("csv", folder).manifest.label.tolist() == ["MEL", "NV"]


def test_columns_named_for_the_same_are_told(tmp_path):
    folder = table(tmp_path, "image_id,dx,label", "a,melanoma,0", "b,nevus,1")
    assert "dx of t.csv (label is read from label)" in told(
        load_dataset("csv", folder), "columns"
    )


def test_tables_with_tabs_are_read_and_sheets_are_named(tmp_path):
    table(tmp_path, "image_id,label", "a,nv", "b,mel")
    (tmp_path / "t.csv").unlink()
    put(tmp_path / "labels.xlsx", "x")
    text = sentence(load_dataset, "csv", tmp_path)
    assert "none, but labels.xlsx: save as CSV" in text
    put(tmp_path / "labels.tsv", "image_id\tlabel\na\tnv\nb\tmel\n")
    assert load_dataset("csv", tmp_path).classes == ("mel", "nv")
    put(tmp_path / "labels.csv", "image_id;label;age\na;nv;45,5\nb;mel;\n")
    assert load_dataset("csv", tmp_path).manifest.age[0] == 45.5


def test_known_sources_in_another_case_or_of_another_year(tmp_path):
    head = "LESION_ID,image_id,DX\nL,I0,nv\n"
    put(tmp_path / "ham/ham10000_METADATA.csv", head)
    put(tmp_path / "ham/I0.jpg", jpeg())
    ham = load_dataset("ham10000", tmp_path / "ham")
    assert ham.manifest[["lesion_id", "label"]].iloc[0].tolist() == ["L", "nv"]
    put(
        tmp_path / "arc/metadata.csv",
        "isic_id,diagnosis,benign_malignant\nA,melanoma,malignant\nB,,benign\n",
    )
    archive = load_dataset("isic_archive", tmp_path / "arc", "binary")
    assert archive.manifest.label.tolist() == ["malignant", "benign"]
    put(
        tmp_path / "isic/ISIC_2019_Training_GroundTruth.csv",
        "image,MEL,NV\nA,1,0\nB,0,1\n",
    )
    for name in "AB":
        put(tmp_path / f"isic/{name}.jpg", jpeg(ord(name)))
    isic = load_dataset("isic2019", tmp_path / "isic")
    assert isic.manifest.label.tolist() == ["MEL", "NV"]
    assert "there is no ISIC_2019_Training_Metadata.csv" in told(isic, "table")


def test_a_mark_for_something_else_is_no_class(tmp_path):
    folder = table(tmp_path, "image_id,mel,nv,hairy", "a,1,0,1", "b,0,1,1", "c,0,1,0")
    dataset = load_dataset("csv", folder)
    assert (
        dataset.classes == ("mel", "nv")
        and told(dataset, "columns") == "hairy of t.csv"
    )


def test_tables_of_pixels_are_refused_in_short(tmp_path):
    names = ",".join(f"pixel{i:04}" for i in range(2352))
    put(tmp_path / "hmnist_28_28_RGB.csv", f"{names},label\n{','.join(['3'] * 2353)}\n")
    text = sentence(load_dataset, "csv", tmp_path)
    assert "a table of pixels (2,352 numbered columns)" in text and len(text) < 400


def test_many_columns_make_no_long_sentence(tmp_path):
    put(
        tmp_path / "t.csv",
        ",".join(f"gene_{'abc'[i % 3]}x{i}y" for i in range(900)) + "\n1\n",
    )
    assert len(sentence(load_dataset, "csv", tmp_path)) < 600
    put(tmp_path / "dataset.yaml", "columns: {image_id: foto}\n")
    assert len(sentence(load_dataset, "csv", tmp_path)) < 600


@pytest.mark.parametrize("name", ["binary", "dx7", "isic8"])
def test_codes_of_pad_ufes(name):
    taxonomy = load_taxonomy(name)
    for code, meaning in {
        "ACK": "Actinic keratosis", "SEK": "Seborrheic keratosis", "NEV": "Nevus",
        "BCC": "Basal cell carcinoma", "SCC": "Squamous cell carcinoma", "MEL": "Melanoma",
    }.items():  # fmt: skip
        assert taxonomy.code(code) == taxonomy.code(meaning) is not None


# Splits


def test_split_words_of_a_column(tmp_path):
    words = ["Train", "TRAINING", "Valid", "dev", "Test", "testing "]
    rows = [f"i{i},{'nv' if i % 2 else 'mel'},{word}" for i, word in enumerate(words)]
    dataset = load_dataset("csv", table(tmp_path, "image_id,label,Split", *rows))
    assert dataset.manifest.split.tolist() == [
        "train",
        "train",
        "val",
        "val",
        "test",
        "test",
    ]
    assert "train 2, val 2 and test 2" in told(dataset, "split")


def test_one_table_a_split(tmp_path):
    for split, row in (("train", "a,nv\nb,mel"), ("Valid", "c,nv"), ("test", "d,mel")):
        put(tmp_path / f"{split}.csv", f"image,dx\n{row}\n")
    for i, name in enumerate("abcd"):
        put(tmp_path / f"im/{name}.jpg", jpeg(i))
    dataset = load_dataset("csv", tmp_path)
    assert dataset.manifest.split.tolist() == ["train", "train", "val", "test"]
    put(tmp_path / "test.csv", "image\nd\n")
    dataset = load_dataset("csv", tmp_path)
    assert dataset.manifest.split.tolist() == ["train", "train", "val"]
    assert "test.csv: it has no labels" in told(dataset, "tables")


@pytest.mark.parametrize(
    "word", ["data", "nevus", "", "training nevus", "folder", "trial", "tester"]
)
def test_other_words_are_no_split(word):
    assert split_word(word) is None


# Layouts


@pytest.mark.parametrize(
    ("places", "splits", "classes"),
    [
        (["train/nv", "train/mel", "test/nv", "test/mel"], "test train", "mel nv"),
        (["Training/nv", "TEST SET/mel", "Valid/nv"], "test train val", "mel nv"),
        (["archive/x_dataset/train/nv", "archive/x_dataset/test/mel"], "test train", "mel nv"),
        (["nv/train", "nv/test", "mel/train", "mel/test"], "test train", "mel nv"),
        (["a/nv/Train", "a/mel/Valid"], "train val", "mel nv"),
        (["train/train/nv", "test/test/mel"], "test train", "mel nv"),
        (["train/images/nv", "test/images/mel"], "test train", "mel nv"),
        (["archive/nv", "archive/mel"], "", "mel nv"),
        (["train_nv", "train_mel", "test_nv"], "test train", "mel nv"),
        (["train/nv", "train/mel"], "train", "mel nv"),
        (["nv/clinic_a", "mel/clinic_b"], "", "mel nv"),
        (["train/nv", "test/mel", "data/train/nv", "data/test/mel"], "test train", "mel nv"),
        (["train/nv", "test/mel", "samples"], "test train", "mel nv"),
        (["train/nv", "test/mel", "train/masks", "__MACOSX/train/nv"], "test train", "mel nv"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_layouts_are_understood(tmp_path, places, splits, classes, packed):
    folder = trees(tmp_path / "d", *places)
    put(folder / "README.txt", "x")
    put(folder / "Thumbs.db", "x")
    if packed:
        with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
            for path in sorted(folder.rglob("*.*")):
                archive.write(path, path.relative_to(folder))
        folder = put(tmp_path / "z" / "z.zip", (tmp_path / "z.zip").read_bytes()).parent
    dataset = load_dataset("folders", folder)
    assert sorted(dataset.manifest.split.dropna().unique()) == splits.split()
    assert sorted(dataset.manifest.label.unique()) == classes.split()
    beside = [p.split("/")[0] for p in places if p.startswith(("data", "samples"))]
    for name in beside:
        assert f"{name}/" in told(dataset, "folders") and "beside" in told(
            dataset, "folders"
        )
    assert "1 .txt" in told(dataset, "files") and "Thumbs" not in dataset.description


@pytest.mark.parametrize(
    "places",
    [
        ["data/nv", "train/nv", "train/mel"],
        ["archive/train/nv", "archive/test/mel", "samples"],
        ["images/a", "pictures/b"],
        ["nv", "mel", "images"],
        ["train/nv", "train/mel", "unlabeled"],
    ],
)
def test_layouts_that_are_not_clear_are_shown(tmp_path, places):
    text = sentence(load_dataset, "folders", trees(tmp_path, *places))
    for top in {place.split("/")[0] for place in places}:
        assert f"{top}/ (" in text


@pytest.mark.parametrize(
    "places",
    [
        ["fold1/mel", "fold1/nv", "fold2/mel", "fold2/nv"],
        ["clinic_a/mel", "clinic_a/nv", "clinic_b/nv"],
        ["a/x", "a/y", "b/x", "b/y"],
        ["patient1/lesion1", "patient1/lesion2", "patient2/lesion1"],
        ["fold_1", "fold_2"],
        ["HAM10000_images_part_1/nv", "HAM10000_images_part_2/mel"],
        ["mel", "nv", "extra/mel", "extra/bcc"],
    ],
)
def test_folders_that_may_be_no_classes_are_refused(tmp_path, places):
    text = sentence(load_dataset, "folders", trees(tmp_path, *places))
    for top in {place.split("/")[0] for place in places}:
        assert f"{top}/ (" in text


@pytest.mark.parametrize(
    "places",
    [
        ["patient0/mel", "patient0/nv", "patient1/nv"],
        ["mel/Pat-0", "nv/Pat-0", "nv/Pat-1"],
        ["patient7/mel", "patient7/nv"],
        ["train/subject 1/mel", "train/subject 2/nv", "test/subject 3/nv"],
        ["train/mel/p/patient_1", "test/nv/p/patient_2"],
    ],
)
def test_folders_named_like_patients_are_the_patients(tmp_path, places):
    dataset = load_dataset("folders", trees(tmp_path, *places, images=3))
    assert dataset.classes == ("mel", "nv")
    names = {p for place in places for p in place.split("/") if p[-1].isdigit()}
    assert set(dataset.manifest.patient_id) == names
    assert f"patient_id from {len(names)} folder name" in told(dataset, "folders")


def test_a_taxonomy_beside_the_folders_tells_which_are_the_classes(tmp_path):
    folder = trees(tmp_path, "benli/a", "benli/b", "kanserli/a", "kanserli/b")
    assert "name them in a taxonomy.yaml" in sentence(load_dataset, "folders", folder)
    put(folder / "taxonomy.yaml", "classes: {benli: [], kanserli: []}\n")
    assert load_dataset("folders", folder).classes == ("benli", "kanserli")


def test_folders_of_the_same_classes_again_are_not_used(tmp_path):
    places = "mel", "nv", "augmented/mel", "augmented/nv", "nv/blue"
    both = (f"{split}/{place}" for split in ("train", "test") for place in places)
    split = load_dataset("folders", trees(tmp_path / "split", *both))
    assert split.manifest.label.value_counts().to_dict() == {"nv": 8, "mel": 4}
    dataset = load_dataset("folders", trees(tmp_path / "flat", *places))
    assert dataset.manifest.label.value_counts().to_dict() == {"nv": 4, "mel": 2}
    text = told(dataset, "folders")
    assert "augmented/ (4): the same classes again" in text
    assert "blue/ (2) below the classes: no class of their own" in text


def test_what_is_in_no_class_folder_is_told(tmp_path):
    folder = trees(tmp_path, "train/mel", "train/nv", "test")
    (folder / "train/bcc").mkdir()
    put(folder / "notes/readme.txt", "x")
    (folder / "train/mel/gone.jpg").symlink_to("/nowhere")
    dataset = load_dataset("folders", folder, on_problem="exclude")
    assert "train/ is the split" in told(dataset, "folders")
    assert "test/ (2): in no class folder, so they have no label" in told(
        dataset, "images"
    )
    assert "notes/ and train/bcc/: without any image" in told(dataset, "folders")
    assert dataset.problems.detail.tolist() == ["a link that leads nowhere"]


def test_archives_are_splits_or_classes_by_their_names(tmp_path):
    for name in ("train", "test"):
        with zipfile.ZipFile(put(tmp_path / f"a/{name}.zip", b""), "w") as archive:
            archive.writestr("nv/0.jpg", jpeg(len(name)))
            archive.writestr("mel/1.jpg", jpeg(len(name) + 9))
    assert load_dataset("folders", tmp_path / "a").manifest.split.nunique() == 2
    for i, name in enumerate(("nevus", "melanoma")):
        with zipfile.ZipFile(put(tmp_path / f"b/{name}.zip", b""), "w") as archive:
            archive.writestr("0.jpg", jpeg(i))
    assert load_dataset("folders", tmp_path / "b").classes == ("melanoma", "nevus")


def test_segmented_pictures_are_images_and_masks_are_not(tmp_path):
    folder = table(
        tmp_path,
        "image_id,label",
        "a,nv",
        "b,mel",
        images="lesions_segmentation/{}.jpg",
    )
    dataset = load_dataset("csv", folder)
    assert len(dataset.manifest) == 2 and dataset.manifest["mask"].isna().all()
    assert "2 in lesions_segmentation are read as images" in told(dataset, "segmented")
    gray = io.BytesIO()
    Image.fromarray(np.eye(24, dtype=np.uint8) * 255).save(gray, "PNG")
    for name in "ab":
        put(folder / f"masks/{name}.png", gray.getvalue())
    again = load_dataset("csv", folder)
    assert again.manifest["mask"].notna().all() and "2: masks (2)" in told(
        again, "masks"
    )


# Names of files


@pytest.mark.parametrize(
    ("listed", "file"),
    [
        ("IMG_1.JPG", "img_1.jpg"), ("img_1", "IMG_1.JPEG"), ("img_1.png", "img_1.jpg"),
        ("images\\Img_1.PNG", "d/images/img_1.png"), ("/home/x/im/IMG_1.jpg", "im/img_1.jpg"),
        ("Nævus_1.jpg", "NÆVUS_1.jpg"), ("ne\u0301vus.jpg", "n\u00e9vus.jpg"),
    ],
)  # fmt: skip
def test_names_with_another_case_or_ending_are_found(tmp_path, listed, file):
    put(tmp_path / "t.csv", f"image_id,label\n{listed},nv\nother,mel\n")
    put(tmp_path / file, jpeg(1))
    put(tmp_path / "other.jpg", jpeg(2))
    dataset = load_dataset("csv", tmp_path)
    assert len(dataset.manifest) == 2
    assert "1 file by another case or ending" in told(dataset, "names")


def test_names_that_are_not_clear_are_refused(tmp_path):
    put(tmp_path / "t.csv", "image_id,label\nA.jpg,nv\na.png,mel\nb,nv\nB,mel\n")
    put(tmp_path / "a.jpg", jpeg(1))
    put(tmp_path / "x/b.jpg", jpeg(2))
    put(tmp_path / "y/b.jpg", jpeg(3, (64, 64)))
    counts = problem_counts(inspect_dataset("csv", tmp_path).problems)
    assert counts["absent"] == 3 and counts["duplicate id"] == 1


def test_names_in_archives_without_the_flag(tmp_path):
    names = {
        b"A" * 12: "Siğil/0.jpg".encode(),
        b"B" * 11: "N\u00e4vus/1.jpg".encode("cp1252"),
    }
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name.decode(), jpeg(i))
    packed = (tmp_path / "a.zip").read_bytes()
    for name, raw in names.items():
        assert len(name) == len(raw)
        packed = packed.replace(name, raw)
    put(tmp_path / "a.zip", packed)
    dataset = load_dataset("folders", tmp_path)
    assert "Siğil" in dataset.classes and "1 names in a.zip are not in UTF-8" in told(
        dataset, "names"
    )
    assert [read_image_bytes(p) for p in dataset.manifest.path] == [jpeg(0), jpeg(1)]


def test_backslashes_in_archives_are_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i, name in enumerate(("nv", "mel")):
            member = zipfile.ZipInfo("x")
            member.filename = f"data\\{name}\\0.jpg"
            archive.writestr(member, jpeg(i))
    dataset = load_dataset("folders", tmp_path, verify=True)
    assert dataset.manifest.label.tolist() == ["nv", "mel"]


def test_members_of_odd_names_are_read_or_named(tmp_path):
    names = "./nv/0.jpg ./mel/1.jpg ../2.jpg nv/.3.jpg mel/4.jpg".split()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, jpeg(i))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("mel/4.jpg", jpeg(5))
    dataset = load_dataset("folders", tmp_path, verify=True)
    rels = [image.rel for image in list_files(tmp_path).images]
    assert rels == ["nv/0.jpg", "mel/1.jpg", "mel/4.jpg"]
    assert read_image_bytes(dataset.manifest.path[2]) == jpeg(5)
    assert "../2.jpg of a.zip" in dataset.description
    assert "more than one file named mel/4.jpg" in dataset.description


def test_what_cannot_be_opened_stops_nothing(tmp_path, monkeypatch):
    folder = trees(tmp_path, "nv", "mel", "nv/closed")
    (folder / "mel" / "loop").symlink_to(folder / "mel" / "loop")
    (folder / "mel" / "gone.zip").symlink_to("/nowhere")
    scan = os.scandir

    def refusing(path):  # as for a folder of somebody else
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    dataset = load_dataset("folders", folder)
    assert len(dataset.manifest) == 4
    lost = "mel/gone.zip, mel/loop and nv/closed (cannot be opened)"
    assert told(dataset, "not read") == lost


def test_file_names_that_are_no_utf8(tmp_path):
    trees(tmp_path, "nv", "mel")
    odd = os.fsencode(tmp_path / "nv") + b"/caf\xe9.jpg"
    os.makedirs(os.fsencode(tmp_path) + b"/m\xfcll")
    try:
        Path(os.fsdecode(odd)).write_bytes(jpeg(7))
    except OSError:
        pytest.skip("this disk takes UTF-8 names only")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xfcll/\xfe.txt")).write_text("x")
    dataset = inspect_dataset("folders", tmp_path)
    assert problem_counts(dataset.problems) == {} and len(dataset.manifest) == 5
    row = dataset.manifest[dataset.manifest.image_id.str.startswith("caf")].iloc[0]
    assert row.image_id == "caf\\udce9" and read_image_bytes(row.path) == jpeg(7)
    dataset.manifest.to_parquet(tmp_path / "m.parquet")
    print(dataset.description.encode("utf-8"))


# What is not used


def test_what_is_not_used_is_listed(tmp_path):
    rows = ("a,nv,1,x,2", "b,mel,2,y,3")
    folder = table(tmp_path, "image_id,label,itch,case_id,notes", *rows)
    for name in (
        "one.heic",
        "two.heic",
        "three.dcm",
        "README.txt",
        "labels.xlsx",
        "more.tar.gz",
    ):
        put(folder / name, "x")
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("c.jpg", jpeg(3))
    with zipfile.ZipFile(folder / "outer.zip", "w") as archive:
        archive.writestr("parts/inner.zip", inner.getvalue())
    put(folder / "beside/c.jpg", jpeg(4))
    put(folder / "dataset.yaml", "table: t.csv\n")
    put(folder / "other.csv", "x\n1\n")
    dataset = load_dataset("csv", folder)
    assert "itch and notes of t.csv" in told(dataset, "columns")
    assert "case_id of t.csv (did you mean patient_id?" in told(dataset, "columns")
    assert "2 .heic" in told(dataset, "images") and "beside (1)" in told(
        dataset, "images"
    )
    assert told(dataset, "files") == "1 .txt"
    assert told(dataset, "tables") == "labels.xlsx and other.csv"
    assert "parts/inner.zip in outer.zip" in told(dataset, "archives")
    assert str(tmp_path) not in dataset.description


def test_a_table_beside_class_folders_is_named(tmp_path):
    put(
        trees(tmp_path, "nv", "mel", images=1) / "people.csv",
        "image,PatientID\nnv/0,P1\n",
    )
    dataset = load_dataset("folders", tmp_path)
    text = "people.csv with patient_id (to have it read, call it metadata.csv)"
    assert text in told(dataset, "tables")
    (tmp_path / "people.csv").rename(tmp_path / "MetaData.CSV")
    assert load_dataset("folders", tmp_path).manifest.patient_id.notna().sum() == 1


def test_lists_are_cut(tmp_path):
    names = ",".join(f"c{i}" for i in range(60))
    folder = table(
        tmp_path, f"image_id,label,{names}", "a,nv" + ",z" * 60, "b,mel" + ",z" * 60
    )
    assert told(load_dataset("csv", folder), "columns").endswith(
        "c7 and 52 more of t.csv"
    )


@pytest.mark.parametrize("reader", ["csv", "folders"])
def test_a_placeholder_is_no_label_unless_a_taxonomy_names_it(tmp_path, reader):
    words = ("nv", "mel", "Unknown", "unlabelled")
    if reader == "csv":
        table(tmp_path, "image_id,label", *(f"i{i},{w}" for i, w in enumerate(words)))
    else:
        trees(tmp_path, *words, images=1)
    dataset = load_dataset(reader, tmp_path, on_problem="exclude")
    assert dataset.classes == ("mel", "nv")
    assert problem_counts(dataset.problems) == {"unknown label": 2}
    assert "no label ('Unknown')" in set(dataset.problems.detail)
    own = "classes: {mel: [], nv: [], other: [unknown]}\nignore: [unlabelled]\n"
    named = load_dataset(reader, tmp_path, put(tmp_path / "own.yaml", own))
    assert sorted(named.manifest.label) == ["mel", "nv", "other"]


def test_a_class_without_an_image_is_no_output(tmp_path):
    rows = ("a,nv", "b,mel", "c,bcc")
    folder = table(tmp_path, "image_id,label", *rows)
    (folder / "im/c.jpg").unlink()
    dataset = load_dataset("csv", folder, on_problem="exclude")
    assert dataset.classes == ("mel", "nv")
    assert told(dataset, "classes").endswith("bcc: without any image")


def test_a_class_without_an_image_for_training_is_a_problem(tmp_path):
    places = "train/Melanoma", "train/Nevus", "test/melanomas", "test/Nevus"
    dataset = load_dataset("folders", trees(tmp_path, *places))
    assert problem_counts(dataset.problems) == {"not trained": 1}
    detail = "class 'melanomas' has 2 images, none for training; is it 'Melanoma'?"
    assert dataset.problems.detail.tolist() == [detail]
    assert detail in dataset.description


def test_files_are_listed_once(tmp_path):
    trees(tmp_path, "nv", "masks")
    put(tmp_path / "x.pdf", "x")
    files = list_files(tmp_path)
    assert [len(files.images), len(files.others)] == [4, 1] or len(files.masks) == 2


def test_likely_names_are_proposed():
    assert likely_column("case_id") == "patient_id" and likely_column("itch") == ""
