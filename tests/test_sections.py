"""Sections of pages: what each tells of its figures, with tables that agree with the records."""

import re

import numpy as np
import pandas as pd
import pytest
from fabricate import AUDIT, ISIC8, make_ensemble, make_predictions, make_run
from pages import ReadPage

from dermnb.core import ConfigError, duration, make_config, read_json, write_json
from dermnb.metrics.calibration import calibration_summary, fit_decision
from dermnb.metrics.comparison import compare_all
from dermnb.metrics.scores import evaluate
from dermnb.metrics.subgroups import subgroups
from dermnb.report.blocks import DIFFERENCE, P_VALUE, spelled
from dermnb.report.build import build_report, build_run_page
from dermnb.report.comparison import pairwise, pairwise_blocks
from dermnb.report.leakage import leakage_audit, leakage_audit_blocks
from dermnb.report.sections import Page
from dermnb.runs.results import load_run, load_suite_runs, name_positive

QUICK = {"resamples": 50, "notebook": False}


@pytest.fixture(scope="module")
def index(four_runs):
    return ReadPage(four_runs / "index.html")


def test_claims(study):
    text = ReadPage(study / "index.html").said("claims")
    assert "10 published claims. 1 cannot be true whatever the data. 2 are not comparable" in text
    assert "cannot be true: Macro F1 is at most the mean of precision and recall" in text
    assert "here 0.63835, but 0.6718 is claimed" in text
    far = "not comparable: 8 classes against 6; 1,924 images in all against 35,000; 96 px against 224"
    assert sorted(far.split(": ")[1].split("; ")) == sorted(re.search(r"0\.6538 .*?not comparable: (.*?) tuned", text)[1].split("; "))
    assert "follows from the published confusion matrix" in text
    assert "measured below the claim" in text and "in all 3 repeats" in text
    assert "mean of 3: seed 1" in text
    assert "run failed: MemoryError: too large" in text
    assert "cnn does not tell two classes apart" in text
    assert "supported: the interval lies above 0" in text
    assert "not measured on the same test images" in text
    assert "6 classes; 224 px; 35,000 images in all; split not said to be by lesion" in text
    assert "8 classes; split by lesion" in text and "96 px" in text
    assert "600 evaluated images" in text and "483 evaluated images" in text
    assert "source: README of the system" in text
    assert "from cnn" in text and "10 epochs" in text and "2 members" in text
    value = read_json(study / "tuned" / "metrics.json")["splits"]["val"]["metrics"]
    assert f"{value['macro_f1']['value']:.3f}" in text  # the split of the claim


def test_a_claim_far_from_the_conditions_is_not_compared(tmp_path):
    make_run(tmp_path / "s" / "a", lesions=60, epochs=2, resamples=20, notebook=False)
    states = [{"run": "a", "status": "done"}]
    claim = {"run": "a", "metric": "accuracy", "value": 0.93, "digits": 2}
    claims = [
        claim | {"conditions": {"epochs": 400}},
        claim | {"conditions": {"epochs": 3}, "source": "another"},
        claim | {"conditions": "400 epochs, as far as one can tell", "source": "a third"},
    ]
    write_json(tmp_path / "s" / "suite.json", {"title": "S", "runs": states, "claims": claims})
    text = ReadPage(build_report(tmp_path / "s")).said("claims")
    assert text.count("not comparable") == 2 and "1 is not comparable with what was trained" in text
    assert "not comparable: 2 epochs against 400" in text
    assert text.count("measured below the claim") == 2
    assert "400 epochs, as far as one can tell" in text and "does not confirm it" not in text
    value = load_run(tmp_path / "s" / "a").score("accuracy")["value"]
    suite = {"title": "S", "runs": states, "claims": [claim | {"value": value, "digits": 12}]}
    write_json(tmp_path / "s" / "suite.json", suite)
    text = ReadPage(build_report(tmp_path / "s")).said("claims")
    assert "interval contains the claim" in text
    assert "An interval that contains a claim does not confirm it" in text


def test_claims_that_do_not_fit_are_one_sentence(tmp_path):
    make_run(tmp_path / "s" / "a", resamples=20, notebook=False)
    states = [{"run": "a", "status": "done"}]
    claims = [{"run": "a", "metric": "acuracy", "value": 0.5}]
    suite = {"title": "S", "runs": states, "claims": claims}
    write_json(tmp_path / "s" / "suite.json", suite)
    page = ReadPage(build_report(tmp_path / "s"))
    assert "did you mean 'accuracy'" in page.said("claims")


def test_claims_about_runs_without_results_have_a_reason(tmp_path):
    states = [{"run": "a", "status": "failed", "error": "MemoryError: too large"}]
    claims = [{"run": "a", "metric": "accuracy", "value": 0.5}]
    write_json(tmp_path / "suite.json", {"title": "S", "runs": states, "claims": claims})
    text = ReadPage(build_report(tmp_path)).said("claims")
    assert "a Accuracy 0.5000 split not said – run failed: MemoryError: too large" in text


def test_what_the_data_cannot_tell_apart_shares_its_ranks(four_runs, index):
    text = index.said("leaderboard")
    # Of the three that do not leak, c is first, and a and b share the rest.
    rank = {name: re.search(rf"\b{name} (?:leaks )?Cnn (\S+)", text)[1] for name in "abcd"}
    assert rank == {"c": "1", "a": "2–3", "b": "2–3", "d": "–"}
    text = index.said("pairs")
    tables = {n: load_run(four_runs / n).predictions for n in "cab"}
    for pair in compare_all(tables, list(ISIC8), resamples=50):
        assert pair["reason"] == "" and f"{pair['mcnemar']['b01']:,} and" in text
    assert "2 of 3 pairs differ in balanced accuracy" in text
    assert "Not shown to differ is not shown to be equal" in text
    assert 'data-figure="pairs-plot"' in index.text


def test_p_by_holm_is_the_adjusted_one(four_runs):
    found = load_run(four_runs / "c").subgroups
    text = ReadPage(four_runs / "c" / "report.html").said("subgroups")
    main, raised = found["metrics"][0], False
    for row in found["rows"]:
        if row["difference"] and row["difference"][main]["p_holm"] is not None:
            cell = row["difference"][main]
            shown, gap = P_VALUE(cell["p_holm"]).text, DIFFERENCE(cell)
            assert f"{gap.text} {gap.sub} {shown}" in text
            raised |= f"{cell['p']:.3f}" != f"{cell['p_holm']:.3f}"
    assert raised
    page = Page([load_run(four_runs / n) for n in "abc"])
    for i, pair in enumerate(page.pairs):  # p-values of which every one is another
        for j, test in enumerate((pair, pair["mcnemar"], pair["delong"])):
            test["p"], test["p_holm"] = 0.1 + 0.1 * i + 0.02 * j, 0.51 + 0.1 * i + 0.02 * j
    shown = next(b for b in pairwise_blocks(page, pairwise(page)) if b.kind == "table")
    for pair, cells in zip(page.pairs, shown.rows, strict=True):
        wanted = [pair["p_holm"], pair["mcnemar"]["p_holm"], pair["delong"]["p_holm"]]
        assert [cells[i].text for i in (2, 3, 5)] == [f"{p:.3f}" for p in wanted]


def test_repeats(study):
    page = ReadPage(study / "index.html")
    text = page.said("repeats")
    values = [load_run(study / f"xception-seed{i}").score()["value"] for i in (1, 2, 3)]
    assert f"xception 3 {np.mean(values):.3f} SD {np.std(values, ddof=1):.3f}; " in text
    assert f"{min(values):.3f}–{max(values):.3f}" in text
    for value in values:
        assert f"{value:.3f}" in text
    assert "A standard deviation of fewer than five values is itself only rough" in text
    assert "Test images of xception are the same in each repeat, so the spread is that of" in text
    assert "Test images of folded differ from repeat to repeat, so the spread is of other" in text
    assert "xception-seed2 seed 2" in text and "folded-fold1 fold 1" in text
    assert "xception (3)" in page.parts["repeats"]


def test_repetitions_without_results_are_named(tmp_path):
    folder = tmp_path / "s"
    states = [{"run": f"a-seed{i}", "group": "a", "repeat": f"seed {i}", "status": "done"} for i in (0, 1, 2)]
    states[2]["status"] = "missing"
    for i in (0, 1):
        make_run(folder / f"a-seed{i}", seed=i, **QUICK)
    write_json(folder / "suite.json", {"title": "S", "runs": states})
    text = ReadPage(build_report(folder)).said("repeats")
    assert "and so not in the means: a-seed2." in text and "a 2 0." in text


def test_paired_differences(study):
    text = ReadPage(study / "index.html").said("paired")
    assert "both minus cnn" in text and "Recall of DF" in text
    assert "mean of 3 repeats" in text
    assert "cnn against b7 Run failed: MemoryError: too large" in text
    assert "The runs were not measured on the same test images" in text
    assert "both is ahead." in ReadPage(study / "index.html").parts["paired"]


def test_what_leaks_is_measured(study):
    page = ReadPage(study / "index.html")
    text = page.said("leakage")
    assert "cnn_image: accuracy on lesions seen in training minus on new ones +0." in text
    row = spelled(load_run(study / "cnn").score("accuracy")).replace(" (", " ").replace(")", "")
    assert f"cnn by lesion {row.replace(' to ', '–')}" in text and "cnn_image leaks by image" in text
    assert "lesion in training 1.000" in text and "lesion new, with several photographs" in text
    assert "240 150 lesions" in text
    assert "by image at random" in page.said("data")


def test_an_effect_that_is_not_measured_is_not_claimed(tmp_path):
    make_run(tmp_path / "s" / "a", 0.8, 0, leaky=True, **QUICK)
    run = load_run(tmp_path / "s" / "a")
    # As a network that remembers nothing: predictions of the same images by another.
    plain = make_predictions(list(ISIC8), 600, 0.8, 5, None)
    p = [f"p_{c}" for c in ISIC8]
    table = run.predictions.copy()
    table[p] = plain[p].sample(frac=1, random_state=0).to_numpy()[: len(table)]
    table.to_parquet(run.folder / "predictions.parquet", index=False)
    write_json(run.folder / "metrics.json", evaluate(table, list(ISIC8), resamples=50))
    text = ReadPage(build_report(tmp_path / "s")).said("leakage")
    assert "No difference is shown here; a network trained for longer remembers more" in text


def test_ensembles_bases_metadata_and_samples(study):
    page = ReadPage(study / "index.html")
    text = page.said("ensembles")
    assert "both weighted mean of probabilities cnn 0.300" in text
    assert "both weighted mean of probabilities tuned 0.700" in text
    for name in ("cnn", "tuned", "both"):
        assert f"{load_run(study / name).score()['value']:.3f}" in text
    runs = page.said("runs")
    assert "tuned done Cnn \N{LEFTWARDS ARROW} cnn" in runs
    assert "both done Ensemble of 2 \N{LEFTWARDS ARROW} cnn and tuned" in runs
    assert "changed since" not in runs
    assert "age, sex, site; missing: age 57, sex 50; used by tuned (concat)" in page.said("data")
    assert "300 images a class, hash d41d8cd98f00b204; of cnn" in page.said("data")
    run = load_run(study / "both")
    assert run.history.empty and not run.leaks
    page = ReadPage(study / "both" / "report.html")
    assert "#ensembles" in page.links and "weighted mean of probabilities" in page.said("ensembles")
    assert "Made from: \N{LEFTWARDS ARROW} cnn and tuned" in page.head


def test_a_base_that_has_changed_is_named(tmp_path):
    parents = {"base": "0" * 64}
    make_run(tmp_path / "s" / "base", resamples=20, notebook=False)
    make_run(tmp_path / "s" / "top", resamples=20, notebook=False, record={"parents": parents})
    assert "base (changed since)" in ReadPage(build_report(tmp_path / "s")).said("runs")


def test_two_classes(tmp_path):
    folder, common = tmp_path / "s", {"resamples": 50, "notebook": False}
    two = {"benign": "Benign", "malignant": "Malignant"}
    draw = {"train_draw": {"per_class": 50, "hash": "abc"}}
    for i, name in enumerate(("alexnet", "resnet50")):
        make_run(
            folder / name, 1.5, i, two, positive="malignant", record=draw, **common
        )
    make_ensemble(folder / "all", ["alexnet", "resnet50"], [1, 1], notebook=True)
    claims = [
        {"run": "all", "metric": "sensitivity", "value": 0.9},
        {"run": "all", "metric": "partial_auc", "better_than": "resnet50"},
        {"run": "all", "metric": "sensitivity_at_threshold", "better_than": "resnet50"},
    ]
    states = [{"run": n, "status": "done"} for n in ("alexnet", "resnet50", "all")]
    write_json(
        folder / "suite.json",
        {"title": "Two", "runs": states, "claims": claims, "compare": [["all", "resnet50"]]},
    )
    page = ReadPage(build_report(folder))
    text = page.said("binary")
    assert "Positive class: malignant." in text and "Specificity at 95 % sensitivity" in text
    assert "The threshold was chosen here" in text
    assert "ISIC 2024 challenge" in text
    binary = read_json(folder / "all" / "metrics.json")["splits"]["test"]["binary"]
    assert f"{binary['metrics']['partial_auc']['value']:.3f}" in text
    assert "has no paired difference" in page.said("claims")
    assert "50 images a class, hash abc; shared by" in page.said("data")
    run = ReadPage(folder / "all" / "report.html")
    assert "Positive class: malignant" in run.said("binary") and "train_model" in run.text


def test_two_classes_without_a_named_positive_one(tmp_path):
    folder, two = tmp_path / "s", {"melanoma": "Melanoma", "nevus": "Nevus"}
    run = make_run(folder / "cnn", 1.5, 0, two, resamples=50, notebook=False)
    claims = [{"run": "cnn", "metric": "sensitivity", "value": 0.9}]
    states = [{"run": "cnn", "status": "done"}]
    write_json(folder / "suite.json", {"title": "Two", "runs": states, "claims": claims})
    # As an earlier version had it: the second of the alphabet.
    table, plain = load_run(run).predictions, read_json(run / "metrics.json")
    write_json(run / "metrics.json", evaluate(table, list(two), resamples=50, positive="nevus"))
    page = ReadPage(build_report(folder))
    assert read_json(run / "metrics.json") == plain
    for text in (page.said("binary"), ReadPage(run / "report.html").said("binary")):
        assert "Of melanoma and nevus none is named as the positive class" in text
        assert "melanoma is a malignant diagnosis: -p positive=melanoma names it." in text
        assert "Positive class:" not in text and "Specificity at that threshold" not in text
    assert "of cnn no positive class is named" in page.said("claims")
    # Named afterwards, nothing is trained; and taken back again.
    (run / "model").mkdir()
    write_json(run / "model" / "decision.json", {"positive": "nevus"})
    config = make_config(read_json(run / "run.json")["config"])
    named = config.model_copy(update={"positive": "melanoma"})
    assert not name_positive(run, config) and name_positive(run, named)
    assert not name_positive(run, named)
    decision = read_json(run / "model" / "decision.json")
    assert decision["positive"] == "melanoma" and 0 < decision["positive_threshold"] < 1
    assert "Positive class: melanoma." in ReadPage(build_report(folder)).said("binary")
    assert "AUC of melanoma" in (run / "model" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'melanoma'"):
        name_positive(run, config.model_copy(update={"positive": "melanom"}))
    assert name_positive(run, config) and read_json(run / "metrics.json") == plain
    assert "No positive class is named" in (run / "model" / "README.md").read_text(encoding="utf-8")


def test_calibration_of_a_run(demo_suite):
    run = load_run(demo_suite / "xception")
    classes = list(run.record["classes"])
    decision = fit_decision(run.predictions, classes)
    found = calibration_summary(run.predictions, classes, decision)["splits"]["test"]
    page = ReadPage(demo_suite / "xception" / "report.html")
    text = page.said("calibration")
    start = f"The temperature fitted on 479 validation images is {decision.temperature:.2f}"
    assert f"{start}: below 1: the network is underconfident." in text
    for stage in ("before", "after"):
        for part in ("log_loss", "brier", "calibration_error"):
            assert f"{found[part][stage]['value']:.3f}" in text
        for row in found["reliability"][stage]:
            assert f"{row['n']} {row['confidence']:.3f} {row['accuracy']['value']:.3f}" in text
    assert "Reliability diagram of xception" in text and "Calibration error after" in text
    assert f"hold the true class in {spelled(found['coverage'])} of images" in text
    for row in found["per_class"]:
        size = f"{row['n']} {row['lesions']} lesions"
        assert f"{row['class']} {size} {row['coverage']['value']:.3f}" in text
    for row in found["risk"][1:]:  # of all images it is 1 minus the accuracy
        assert f"{row['risk']['value']:.3f}" in text
    assert f"{1 - found['risk'][0]['risk']['value']:.3f}" in text
    assert f"{decision.min_confidence:.3f}" in text
    assert "not for each class" in text and "figures of that split are optimistic" in text
    # And beside the others on the page of the suite.
    page = ReadPage(demo_suite / "index.html")
    text = page.said("calibration")
    assert "1 of 4 runs (cnn)" in text and f"xception {decision.temperature:.2f}" in text
    assert f"{found['coverage']['value']:.3f}" in text and f"{found['aurc']['value']:.3f}" in text
    figure = page.text[page.text.index('id="risk-coverage"') :]
    assert all(f'"name":"{r}"' in figure for r in ("cnn", "xception", "efficientnetb5"))


def test_without_predictions_there_is_no_calibration(tmp_path):
    folder = tmp_path / "s"
    common = {"resamples": 20, "notebook": False}
    table = make_predictions(list(ISIC8), 200)
    make_run(folder / "no_val", predictions=table[table["split"] == "test"], **common)
    few = pd.concat([table[table["split"] == "val"][:5], table[table["split"] == "test"]])
    make_run(folder / "few", predictions=few, **common)
    make_run(folder / "lost", **common)
    (folder / "lost" / "predictions.parquet").unlink()
    page = ReadPage(build_report(folder))
    assert "No predictions that can be read: lost." in page.said("calibration")
    text = ReadPage(folder / "no_val" / "report.html").said("calibration")
    assert "There are no validation images to fit anything on" in text
    text = ReadPage(folder / "few" / "report.html").said("calibration")
    assert "allow no prediction sets of 90% coverage" in text
    lost = ReadPage(folder / "lost" / "report.html")
    for part in ("calibration", "subgroups"):
        assert "no predictions table" in lost.said(part)
    assert "no predictions to find errors in" in lost.said("errors")


def test_validation_images_that_are_unlike_the_test_images_are_said(tmp_path):
    two = {"benign": "Benign", "malignant": "Malignant"}
    table = make_predictions(list(two), 900, 0.8, 0, [0.8, 0.2])
    val, benign = table["split"] == "val", table["y_true"] == "benign"
    even = table[~val | ~benign | (table["lesion_id"].str[-2:] > "75")]
    folder = tmp_path / "s"
    make_run(folder / "even", predictions=even, classes=two, resamples=50, notebook=False)
    text = ReadPage(build_report(folder)).said("calibration")
    assert "not as common among validation as among test images of even" in text
    text = ReadPage(folder / "even" / "report.html").said("calibration")
    assert "need not fit the other" in text
    assert "benign: 0.50 of validation images, 0.81 of test images" in text


def test_figures_of_validation_are_not_called_test(tmp_path):
    table = make_predictions(list(ISIC8), 200)
    for i, name in enumerate("ab"):
        val = {"predictions": table[table["split"] == "val"], "facts": True}
        make_run(tmp_path / "s" / name, 1.5, i, **val, **QUICK)
    page = ReadPage(build_report(tmp_path / "s"))
    for part in ("answer", "leaderboard", "pairs", "classes", "confusion", "calibration", "subgroups", "errors", "cost"):
        text = page.said(part).lower()
        assert "test split" not in text and "test images" not in text, (part, text)
    for part in ("leaderboard", "pairs", "classes", "confusion", "subgroups"):
        assert "alidation split" in page.said(part)


def test_subgroups_have_figures_or_reasons(four_runs, index):
    run = load_run(four_runs / "c")
    found = subgroups(run.predictions, run.split_table, list(ISIC8))
    page = ReadPage(four_runs / "c" / "report.html")
    text = page.said("subgroups")
    assert found["summary"] in text and found["caution"] in text
    for row in found["rows"]:
        start = f"{row['title']}: {row['value']}"
        assert start in text
        if row["metrics"]:
            assert f"{row['metrics']['balanced_accuracy']['value']:.3f}" in text
        else:
            assert f"no figure: {row['reason']}" in text
    assert any(row["metrics"] is None for row in found["rows"])
    for silent in found["silent"]:
        assert silent in text and silent in index.said("subgroups")
    assert "skin tone is not known" in text and 'id="subgroups-plot"' in page.text
    told = index.said("subgroups")
    assert re.search(rf"\bc[^:]*: {re.escape(found['summary'])}", told)
    text = ReadPage(four_runs / "d" / "report.html").said("subgroups")
    assert "Nothing is known of these images that would divide them" in text


def test_balanced_accuracy_over_fewer_classes_never_stands_beside_that_over_all(four_runs, demo_suite):
    "A subgroup without some classes has a mean over fewer; accuracy means the same in each."
    for page in (ReadPage(four_runs / "index.html"), ReadPage(demo_suite / "index.html")):
        text = page.said("subgroups")
        assert "Accuracy by subgroup" in text and "Balanced accuracy, tests and their limits are" in text
        heads = re.findall("<th scope=\"col\".*?<bdi>(.*?)</bdi>", page.parts["subgroups"])
        assert heads[:2] == ["Subgroup", "Images"] and "Balanced accuracy" not in heads
    for folder in (four_runs, demo_suite):
        for run in load_suite_runs(folder)[1]:
            if run.status == "done" and run.subgroups["rows"]:
                overall, whole = run.subgroups["overall"], run.score()["value"]
                values = {f"{overall['metrics']['accuracy']['value']:.3f}", f"{run.score('accuracy')['value']:.3f}"}
                assert len(values) == 1, "accuracy of all images is the one number of this"
                page = ReadPage(run.folder / "report.html").said("subgroups")
                # On a run's page each mean says of how many classes it is.
                if len(overall["classes"]) < 8:
                    assert f"{overall['n']} {overall['lesions']} {len(overall['classes'])} " in page
                    assert f"{whole:.3f}" != f"{overall['metrics']['balanced_accuracy']['value']:.3f}"


def test_errors_and_doubts_have_ids(four_runs, index):
    run = load_run(four_runs / "c")
    table = run.predictions[run.predictions["split"] == "test"]
    p = table[[f"p_{c}" for c in ISIC8]]
    wrong = p.idxmax(axis=1) != "p_" + table["y_true"]
    worst = table.loc[p[wrong].max(axis=1).idxmax()]
    text = ReadPage(four_runs / "c" / "report.html").said("errors")
    assert f"of the label {worst['image_id']} {worst['lesion_id']} {worst['y_true']}" in text
    for part in (text, index.said("errors")):
        assert "contradicted with confidence" in part and "an upper bound" in part
        assert "onfident learning" in part and "Doubtful labels" in part
        assert "nothing is corrected" in part
    assert index.said("errors").startswith("Error analysis c: "), "whose labels they are"
    text = ReadPage(four_runs / "d" / "report.html").said("errors")
    assert "leaks, so its doubts about labels say nothing" in text


def test_the_checklist_says_what_is_not_known(index):
    text = index.said("checklist")
    assert re.search(r"Of \d+ questions that cover the items of CLAIM .* and TRIPOD\+AI .*: \d+ reported", text)
    assert "not known" in text and "TRIPOD+AI 1" in text
    assert "not that it was done well" in text


def test_costs_are_told_with_their_limits(four_runs, index, tmp_path):
    text = index.said("cost")
    assert "FLOPs per image" in text and "2.25 M" in text
    assert "wall-clock and memory is of the whole process" in text
    assert "Balanced accuracy against training time" in text
    record = read_json(four_runs / "c" / "run.json")
    seconds = 100 * record["timing"]["epoch_s"] * (224 / record["config"]["image_size"]) ** 2
    assert re.search(rf"100 epochs at 224 pixels would take on the same machine, by these times: .*\bc {duration(seconds)}", text)
    assert "4.0 s" in ReadPage(four_runs / "c" / "report.html").said("cost")
    assert "No FLOPs were counted" not in text
    model = {"backbone": "cnn", "parameters": 25_000}
    run = make_run(tmp_path / "s" / "old", lesions=60, record={"model": model, "timing": {}}, **QUICK)
    text = ReadPage(build_run_page(run)).said("cost")
    assert "No FLOPs were counted in these runs." in text and "25,000 – –" in text


def test_the_audit_is_told(four_runs, index):
    text = index.said("audit")
    assert "a and b" in text and "12 pairs show the same lesion, 4 of them not linked by lesion ID" in text
    assert "7 images were grouped into 3 lesions, so that a split keeps them together" in text
    assert "No pair lies in different splits" in text
    assert "The second pass was not made: no weights of MobileNetV2 are here." in text
    assert "This run was made before runs were audited" in text  # c
    assert "dermnb audit RUN_FOLDER" in text
    text = ReadPage(four_runs / "d" / "report.html").said("audit")
    assert "near duplicate 9 4 2 0" in text and "1 pair has two labels" in text
    assert "DEMO_3 DEMO_4 train test" in text and "DEMO_1 DEMO_2 near duplicate" in text


def audit_text(run, **record):
    "What the section says of a run whose record of the audit has these values."
    from dataclasses import replace

    record = dict(run.record) | {"audit": AUDIT | {"leaks": {}, "note": ""} | record}
    page = Page([replace(run, record=record)])
    return " ".join(str(b.text) for b in leakage_audit_blocks(page, leakage_audit(page)) if b.kind == "text")


def test_pairs_that_were_not_grouped_are_told(four_runs):
    run = load_run(four_runs / "a")
    text = audit_text(run, chains_refused=5, refused_across=1)
    assert "5 further pairs look alike only through a chain and were not grouped; 1 of them" in text
    assert "No pair lies" not in text
    assert "No pair lies" in audit_text(run, chains_refused=5, refused_across=0)
    assert "was not recorded" in audit_text(run, chains_refused=5)
    assert "No duplicates were found." in audit_text(run, pairs={}, new_pairs={}, two_labels={})
    assert "No audit was asked for" in audit_text(run, method="none")


@pytest.mark.parametrize("audit", [{"method": "hashes"}, {"method": 3, "images": "x"}, ["x"], "x"])
def test_an_audit_that_cannot_be_read_is_said(tmp_path, audit):
    run = make_run(tmp_path / "s" / "a", lesions=60, record={"audit": audit}, **QUICK)
    build_report(tmp_path / "s")
    assert "record of the audit cannot be read" in ReadPage(run / "report.html").said("audit")


def test_settings_and_provenance_say_what_differs(study, demo_suite):
    page = ReadPage(demo_suite / "index.html")
    text = page.said("settings")
    assert "Settings that differ between runs." in text and "backbone cnn xception" in text
    assert "settings shared by all runs" in text and "head_then_top" in text
    text = page.said("provenance")
    assert "Keras backend tensorflow" in text and "3 package versions" in text
    assert "2026-11-21 01:02:00" in text
    text = ReadPage(study / "cnn" / "report.html").said("settings")
    assert "learning_rate 0.001" in text and "differ" not in text
