"Generated data: what needs other processes, or would slow the notebook down."

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dermnb.core import ConfigError
from dermnb.data import synthetic
from dermnb.data.synthetic import CLASSES, draw_lesion, generate_demo, render_view

SIZE = (64, 48)


def test_module_loads_no_framework():
    code = (
        "import sys, dermnb.data.synthetic; "
        "sys.exit(any(m in sys.modules for m in ('tensorflow', 'keras', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_another_process_makes_the_same_files(tmp_path):
    here = generate_demo(tmp_path / "here", lesions=4, size=SIZE, workers=2)
    code = (
        "import sys; from dermnb.data.synthetic import generate_demo; "
        f"generate_demo(sys.argv[1], lesions=4, size={SIZE})"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True)
    files = [p.relative_to(here) for p in here.rglob("*") if p.is_file()]
    assert len(files) > 8
    for name in files:
        assert (here / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_interrupted_work_is_taken_up(tmp_path, monkeypatch):
    calls = []

    def counted(lesion, *args):
        calls.append(lesion.index)
        if len(calls) == 3:
            raise OSError("disk full")
        return render_view(lesion, *args)

    monkeypatch.setattr(synthetic, "render_view", counted)
    with pytest.raises(ConfigError, match="disk full"):
        generate_demo(tmp_path / "demo", lesions=5, size=SIZE)
    assert not (tmp_path / "demo").exists()
    before = len(calls)
    generate_demo(tmp_path / "demo", lesions=5, size=SIZE)
    images = list((tmp_path / "demo" / "ISIC_2019_Training_Input").iterdir())
    assert len(calls) - before < len(images)  # what was there is not painted again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo"]


def test_an_empty_folder_where_nothing_open_or_present_is_replaced(tmp_path, monkeypatch):
    "As on Windows, which neither renames onto a folder nor removes an open file."
    folder = tmp_path / "demo"
    folder.mkdir()
    replace, unlink = os.replace, Path.unlink

    def strict(part, target):
        if os.path.isdir(target):
            raise PermissionError(target)
        replace(part, target)

    def held(path, **options):
        if path.suffix == ".lock":
            raise PermissionError(path)
        unlink(path, **options)

    monkeypatch.setattr(os, "replace", strict)
    monkeypatch.setattr(Path, "unlink", held)
    assert (generate_demo(folder, lesions=2, size=SIZE) / "demo.json").is_file()


def test_files_agree(tmp_path):
    demo = generate_demo(tmp_path / "demo", lesions=40, size=SIZE)
    truth = pd.read_csv(demo / "ISIC_2019_Training_GroundTruth.csv")
    people = pd.read_csv(demo / "ISIC_2019_Training_Metadata.csv")
    assert list(truth.columns) == ["image", *CLASSES, "UNK"]
    assert (truth.drop(columns="image").sum(axis=1) == 1).all()
    assert truth["image"].equals(people["image"])
    assert people["lesion_id"].nunique() == 40
    assert (truth[list(CLASSES)].sum() > 0).all()
    for name in truth["image"].head(10):
        photo = Image.open(demo / "ISIC_2019_Training_Input" / f"{name}.jpg")
        mask = np.asarray(Image.open(demo / "masks" / f"{name}.png"))
        assert photo.size == SIZE and photo.mode == "RGB"
        assert set(np.unique(mask)) == {0, 255}


@pytest.mark.parametrize("label", CLASSES)
@pytest.mark.parametrize("size", [(64, 64), (96, 128), (200, 150)])
def test_any_class_at_any_size(label, size):
    image, mask = render_view(draw_lesion(3, 5, label), 0, size)
    assert image.shape == (size[1], size[0], 3) and image.dtype == np.uint8
    assert 0.02 < (mask > 0).mean() < 0.95
    assert image.std() > 5


def test_runs_that_start_together_make_one_set(tmp_path):
    "Several processes ask for the same set at once; all get it, and nothing is left beside it."
    code = (
        "import sys; from dermnb.data.synthetic import generate_demo; "
        "print(generate_demo(sys.argv[1], lesions=30, seed=5))"
    )
    folder = tmp_path / "demo"
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(folder)], stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    for process in started:
        _, problem = process.communicate(timeout=120)
        assert process.returncode == 0, problem.decode()
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]
    assert (folder / "demo.json").is_file()
