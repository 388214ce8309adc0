"""Runs read back: old records, records that do not fit, what is kept, and paths of other machines."""

from pathlib import PureWindowsPath

import pandas as pd
import pytest
from fabricate import ISIC8, make_predictions, make_run

from dermnb.core import ConfigError, read_json, write_json
from dermnb.report.build import build_run_page
from dermnb.runs import results
from dermnb.runs.results import forget_paths, load_run, load_suite_runs

QUICK = {"resamples": 50, "notebook": False}


def test_metrics_of_other_predictions_are_refused(tmp_path):
    run = make_run(tmp_path / "s" / "a", 1.5, lesions=80, **QUICK)
    table = load_run(run).predictions.copy()
    first = table.index[(table["split"] == "test") & (table["y_true"] != "NV")][0]
    table.loc[first, [f"p_{c}" for c in ISIC8]] = [float(c == "NV") for c in ISIC8]
    right = load_run(run).predictions.loc[first]
    assert right[[f"p_{c}" for c in ISIC8]].astype(float).idxmax() != "p_NV"
    table.to_parquet(run / "predictions.parquet")
    with pytest.raises(ConfigError, match="was not computed from predictions.parquet; repeat"):
        load_run(run)
    assert load_suite_runs(tmp_path / "s")[1][0].status == "failed"


def test_metrics_of_an_older_run_are_computed_anew(tmp_path):
    run = make_run(tmp_path / "s" / "a", 1.5, lesions=80, **QUICK)
    today = read_json(run / "metrics.json")
    old = read_json(run / "metrics.json") | {"schema": 1}
    for scored in old["splits"].values():
        scored["metrics"] = {k: scored["metrics"][k] for k in ("accuracy", "macro_f1")}
    write_json(run / "metrics.json", old)
    assert load_run(run).metrics == today == read_json(run / "metrics.json")
    assert load_run(run).score("log_loss")["value"] > 0
    # A page built from the old records is not built again for it.
    write_json(run / "metrics.json", old)
    page = build_run_page(run)
    before = page.stat().st_mtime_ns
    assert build_run_page(run).stat().st_mtime_ns == before
    # Metrics of other predictions are not passed off as those of these.
    write_json(run / "metrics.json", old)
    make_predictions(list(ISIC8), 70, 0.2, 5).to_parquet(run / "predictions.parquet")
    with pytest.raises(ConfigError, match="was not computed from predictions.parquet"):
        load_run(run)
    (run / "predictions.parquet").unlink()
    with pytest.raises(ConfigError, match="older dermnb"):
        load_run(run)


def test_what_takes_long_is_kept_until_its_tables_change(tmp_path, monkeypatch):
    run = make_run(tmp_path / "s" / "a", 1.5, facts=True, **QUICK)
    first = load_run(run)
    said, decision = first.subgroups, first.calibration.decision
    assert {"sex", "age"} < {row["kind"] for row in said["rows"]} and decision.n
    with monkeypatch.context() as m:  # read back, not computed
        m.setattr(results, "subgroups", None)
        m.setattr(results, "calibration_summary", None)
        again = load_run(run)
        assert again.subgroups == said and again.calibration.decision == decision
        assert again.calibration.summary == first.calibration.summary

    kept = run / results.MEASURED
    for broken in (kept.read_text()[:200], "[]", "{}"):
        kept.write_text(broken)
        assert load_run(run).subgroups == said

    table = pd.read_parquet(run / "split.parquet")
    table.drop(columns=[c for c in table if c in ("sex", "age", "site")]).to_parquet(
        run / "split.parquet"
    )
    kinds = {row["kind"] for row in load_run(run).subgroups["rows"]}
    assert kinds < {row["kind"] for row in said["rows"]}


def test_pages_forget_paths_of_every_system(monkeypatch):
    from dermnb.report import pages

    for text, left in (
        ("OSError: /home/me/x/w.h5 is gone", "OSError: w.h5 is gone"),
        (r"OSError: C:\Users\Me\x\w.h5 is gone", "OSError: w.h5 is gone"),
        (r"'D:\\data\\im.jpg' and D:/data/b.jpg", "'im.jpg' and b.jpg"),
        ("fetch https://a.org/b/c.h5 into E:\\", "fetch https://a.org/b/c.h5 into "),
    ):
        assert forget_paths(text) == left
    monkeypatch.setattr(pages, "Path", PureWindowsPath)
    for name, place in (("cwd", r"C:\Work\clone"), ("home", "C:\\")):
        monkeypatch.setattr(PureWindowsPath, name, lambda p=place: PureWindowsPath(p), raising=False)
    text = r'C:\Work\clone\a "C:\\Work\\clone\\b" C:/Work/clone/c C:\d'
    assert pages._forget_paths_in_text(text) == r'\a "\\b" /c C:\d'

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(PureWindowsPath, "home", no_home, raising=False)
    assert pages._forget_paths_in_text(r"C:\Work\clone\a") == r"\a"
