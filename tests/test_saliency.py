"""Saliency on pages: what maps and covered lesions show, and pictures only where licenses allow them."""

import re

import pytest
from fabricate import make_explanation, make_run
from pages import ReadPage

from dermnb.core import ConfigError, read_json
from dermnb.report.build import build_report, build_run_page, build_suite_page
from dermnb.report.saliency import may_be_shown


def test_saliency_of_runs(demo_suite):
    page = ReadPage(demo_suite / "xception" / "report.html")
    text = page.said("saliency")
    assert "Grad-CAM at layer conv_2 of xception, for the predicted class" in text
    assert "maps of other images by 0.220 (0.160 to 0.280): they depend on what was" in text
    assert "Deletion: better than a random order" in text and "Insertion: better than" in text
    assert "lies within the lesion masks (0.310" in text
    # Covered, it is right far more often than naming the commonest class would be.
    assert "an accuracy of 0.800 (0.740 to 0.860), above the 0.670" in text
    assert "something other than the lesion gives the answer away" in text
    assert "no proof" in text and "120 images of 100 lesions" in text
    for id in ("shortcuts", "removal", "mean-map"):
        assert f'data-figure="{id}"' in page.text
    assert "Uniform noise" in text and "18 of 20" in text and "False alarms" in text
    assert "DEMO_0000002 : true BCC , predicted AK , confidence 0.93" in text
    assert page.text.count('src="data:image/jpeg') == 16
    assert page.text.count(' alt="') >= 16
    page = ReadPage(demo_suite / "index.html")
    text = page.said("saliency")
    assert "no shortcut is shown, which is not to say that there is none" in text  # cnn
    assert "xception : With the lesion covered" in text and "something other than the lesion" in text
    assert "Not explained: efficientnetb5 and efficientnetb7" in text
    assert "data:image" not in page.text.replace('href="data:,"', "")
    text = ReadPage(demo_suite / "efficientnetb5" / "report.html").said("saliency")
    assert "has not been explained. To compute saliency: dermnb explain RUN_FOLDER --data-dir DIR" in text


def test_numbers_of_the_removal_are_those_recorded(demo_suite):
    e, text = read_json(demo_suite / "cnn" / "explain.json"), ReadPage(demo_suite / "cnn" / "report.html").said("saliency")
    for i, share in enumerate(e["deletion"]["share"]):
        row = [e[k][c][i] for k in ("deletion", "insertion") for c in ("curve", "random")]
        assert f"{share:.0%} " + " ".join(f"{v:.3f}" for v in row) in text
    for row in e["mean_map"]:
        assert " ".join(f"{v:.2f}" for v in row) in text


def test_a_network_without_images_has_no_saliency(tmp_path):
    common = {"lesions": 60, "resamples": 10, "notebook": False}
    run = make_run(tmp_path / "s" / "a", metadata="only", **common)
    text = ReadPage(build_run_page(run)).said("saliency")
    assert "sees no image" in text and "dermnb explain" not in text


def alike(same, chance):
    "How maps before and after weights are re-initialized resemble each other."
    found = {"head": same, "all": same, "head_chance": chance, "all_chance": chance}
    return {k: {"value": v, "low": v - 0.1, "high": v + 0.1, "n": 9} for k, v in found.items()}


def moved(value):
    "A removal whose area differs from that of a random order by `value` +- 0.04."
    change = {"value": value, "low": value - 0.04, "high": value + 0.04, "n": 9}
    area = {"value": 0.4, "low": 0.3, "high": 0.5, "n": 9}
    curve = [0.8, 0.1]
    return {"share": [0, 1], "curve": curve, "random": curve, "area": area, "random_area": area, "difference": change}


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"covered": 0.8, "border": 0.75}, "The border alone gives an accuracy"),
        ({"covered": 0.5, "border": 0.85}, "The border of the image alone gives an accuracy of 0.850"),
        ({"covered": 0.65, "majority": 0.9, "plain": 0.5}, "no shortcut is shown"),
        ({"covered": 0.72, "majority": 0.9}, "a balanced accuracy of 0.220"),
        ({"masks": "central"}, "no lesion masks: a central ellipse"),
        ({"shortcuts": {}, "gallery": [], "deletion": None, "foreign": []}, "Insertion: better"),
        ({"randomization": alike(0.9, 0.2)}, "hardly depend on what was learned"),
        ({"randomization": alike(0.4, 0.2)}, "in part they show the picture"),
        ({"randomization": alike(0.3, 0.25)}, "they depend on what was learned"),
        ({"deletion": moved(0.1)}, "Deletion: worse than a random order"),
        ({"insertion": moved(-0.1)}, "Insertion: worse than a random order"),
        ({"insertion": moved(0.02)}, "Insertion: not shown to beat a random order"),
        ({"lesions": 60}, "of 60 lesions, which is few"),
        ({"masked": 118}, "2 images without a lesion mask"),
    ],
)  # fmt: skip
def test_what_a_map_is_said_to_show(tmp_path, numbers, said):
    run = make_run(tmp_path / "s" / "a", lesions=100, resamples=10, notebook=False)
    make_explanation(run, **numbers)
    assert said in ReadPage(build_run_page(run)).said("saliency")
    assert "saliency" in ReadPage(build_suite_page(tmp_path / "s")).parts


@pytest.mark.parametrize(
    "record",
    [
        {"lesions": "many"},
        {"deletion": {"area": 0.3}},
        {"mean_map": [[0.1, 0.2], [0.3]]},
        {"gallery": [{"image_id": "x"}]},
        {"shortcuts": {"plain": {}}},
        {"layers": 3},
    ],
)
def test_an_explanation_that_cannot_be_read_is_said(tmp_path, record):
    run = make_run(tmp_path / "s" / "a", lesions=60, resamples=10, notebook=False)
    make_explanation(run, **record)
    build_report(tmp_path / "s")
    assert "explain.json is there but cannot be read" in ReadPage(run / "report.html").prose
    (run / "explain.json").write_text("{")
    assert "cannot be read" in ReadPage(build_run_page(run)).prose


def test_photographs_are_shown_only_where_asked_and_allowed(tmp_path):
    folder = tmp_path / "s"
    make_run(folder / "a", synthetic=False, lesions=60, resamples=10, notebook=False)
    run = folder / "a"
    make_explanation(run, synthetic=False, license="CC BY-NC 4.0")

    def pictures():
        return ReadPage(run / "report.html").text.count("data:image/")

    build_report(folder)
    text = ReadPage(run / "report.html").prose
    assert not pictures() and "dermnb report DIR --photographs" in text
    build_report(folder, photographs=True)
    text = ReadPage(run / "report.html").prose
    assert pictures() == 16 and "Photographs: HAM10000. Tschandl et al." in text
    assert "data:image/" not in (folder / "index.html").read_text()
    build_report(folder)
    assert not pictures()  # and gone again
    with pytest.raises(ConfigError, match="single file"):
        build_report(folder, single_file=True, photographs=True)
    # Both records must allow it, and both must say that images are generated.
    for license, synthetic in (("all rights reserved", False), ("unknown", True)):
        make_explanation(run, synthetic=synthetic, license=license)
        with pytest.raises(ConfigError, match="a: photographs under the license"):
            build_report(folder, photographs=True)
        build_report(folder)
        assert not pictures()


@pytest.mark.parametrize(
    ("license", "allowed"),
    [
        ("CC0 1.0", True),
        ("CC-0", True),
        ("CC BY 4.0", True),
        ("CC BY-NC 4.0", True),
        ("Creative Commons Attribution-NonCommercial 4.0 International", True),
        ("CC BY-NC-ND 4.0", False),
        ("CC BY 4.0 for non-members only", False),
        ("not CC0", False),
        ("stated for each image", False),
        ("", False),
    ],
)
def test_licenses(license, allowed):
    assert may_be_shown(license) is allowed


def test_a_gallery_cannot_reach_beyond_its_run_or_write_html(tmp_path):
    run = make_run(tmp_path / "s" / "a", lesions=60, resamples=10, notebook=False)
    make_explanation(run)
    other = make_run(tmp_path / "s" / "b", lesions=60, resamples=10, notebook=False)
    make_explanation(other)
    bad = "<img src=x onerror=alert(1)>"
    row = {
        "image_id": bad, "y_true": bad, "predicted": '"><script>alert(1)</script>',
        "confidence": 0.5, "group": bad, "file": "gallery/0_image.jpg", "map": "gallery/0_map.jpg",
    }  # fmt: skip
    rows = [
        row,
        row | {"file": "../b/gallery/0_image.jpg"},
        row | {"file": str(other / "gallery" / "0_image.jpg")},
        row | {"file": "run.json"},
        row | {"file": "gallery/absent.jpg"},
    ]
    hostile = {"kind": bad, "n": 0, "refused": 0}
    make_explanation(
        run, gallery=rows, foreign=[hostile], layers={bad: bad}, method=bad, split=bad
    )
    build_report(tmp_path / "s")
    page = ReadPage(run / "report.html")
    assert page.text.count("data:image/") == 2
    for path in (run / "report.html", tmp_path / "s" / "index.html"):
        assert not re.search(r"<img src=x|<script>alert", path.read_text())
        assert bad in ReadPage(path).prose
    for file in (run / "gallery").iterdir():
        file.unlink()
    assert "not in the folder of this run" in ReadPage(build_run_page(run)).prose
