"""Published results: the predictions give the metrics beside them, and these are those of published.json.

A suite that is published again changes published.json as well, and so on purpose.
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from dermnb.metrics.claims import ALIASES
from dermnb.metrics.scores import METRICS, evaluate, recorded_positive
from dermnb.report.blocks import interval, number
from dermnb.report.build import build_suite_page

REPORTS = Path(__file__).resolve().parent.parent / "reports"
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
RUNS = sorted(p.parent for suite in PUBLISHED for p in REPORTS.glob(f"{suite}/*/metrics.json"))
FIRST = [min(r for r in RUNS if r.parent == suite) for suite in sorted({r.parent for r in RUNS})]
OLD_NAMES = {old: new for old, new in ALIASES.items() if old not in METRICS}

EXACT = 1e-12  # sums of a few thousand numbers below 1 in another order


def read(run: Path, resamples: int | None = None) -> tuple[dict, dict]:
    "metrics.json, and what `evaluate` makes of predictions.parquet."
    record, kept = (json.loads((run / f).read_text()) for f in ("run.json", "metrics.json"))
    table = pd.read_parquet(run / "predictions.parquet")
    resamples = resamples or kept["resamples"]
    settings = {"level": kept["level"], "seed": kept["seed"], "resamples": resamples}
    positive = recorded_positive(record)
    return kept, evaluate(table, record["classes"], **settings, positive=positive)


def differing(kept, made, without=(), place="") -> list[str]:
    "Where two records of metrics are not the same."
    if isinstance(made, dict):
        names = [n for n in kept.keys() | made.keys() if n not in (*without, *OLD_NAMES)]
        return [
            fault
            for n in names
            for fault in differing(kept.get(n, "absent"), made.get(n), without, f"{place}/{n}")
        ]
    if isinstance(made, list) and isinstance(kept, list) and len(kept) == len(made):
        pairs = enumerate(zip(kept, made, strict=True))
        return [f for i, pair in pairs for f in differing(*pair, without, f"{place}/{i}")]
    number = isinstance(made, float) and isinstance(kept, float)
    same = abs(kept - made) <= EXACT if number else kept == made
    return [] if same else [f"{place}: {kept} is published, {made} follows"]


@pytest.mark.parametrize("run", RUNS, ids=lambda r: f"{r.parent.name}/{r.name}")
def test_values_follow_from_the_predictions(run):
    kept, made = read(run, 1)
    assert differing(kept, made, ("low", "high", "resamples")) == []
    for split in kept["splits"].values():  # of runs that list one quantity by two names
        for name in OLD_NAMES.keys() & split["metrics"].keys():
            assert differing(split["metrics"][name], split["metrics"][OLD_NAMES[name]]) == []


@pytest.mark.parametrize("run", FIRST, ids=lambda r: f"{r.parent.name}/{r.name}")
def test_intervals_follow_from_the_predictions(run):
    assert differing(*read(run)) == []


def test_published_values_stay():
    found = {}
    for run in RUNS:
        splits = json.loads((run / "metrics.json").read_text())["splits"]
        found.setdefault(run.parent.name, {})[run.name] = splits
    assert {s: set(runs) for s, runs in found.items()} == {s: set(r) for s, r in PUBLISHED.items()}
    for suite, runs in PUBLISHED.items():
        for run, splits in runs.items():
            for split, metrics in splits.items():
                for name, value in metrics.items():
                    now = found[suite][run][split]["metrics"][name]
                    assert [now["value"], now["low"], now["high"]] == value, (suite, run, name)


def test_what_is_published_is_light():
    "So that a clone takes seconds, also on a slow line."
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPORTS.parent, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("this is no git checkout")
    files = [REPORTS.parent / name for name in listed.stdout.split("\0") if name]
    sizes = {f: f.lstat().st_size for f in files if f.is_symlink() or f.is_file()}
    assert sum(n for f, n in sizes.items() if REPORTS in f.parents) < 12e6
    assert sum(sizes.values()) < 20e6


def boards(page: str) -> dict[str, dict[str, dict[str, str]]]:
    "The tables of a leaderboard: split -> run -> title of a metric -> value and interval as they are shown."
    found = {}
    section = page[page.index('<section id="leaderboard">') :].replace("<wbr>", "")
    for table in re.findall("(?s)<table.*?</table>", section[: section.index("</section>")]):
        split = {"Test": "test", "Validation": "val"}[re.search(r"<strong>(\w+) split", table)[1]]
        titles = re.findall(r"<th scope=\"col\".*?<bdi>(.*?)</bdi></th>", table)
        for row in re.findall("(?s)<tr><th scope=\"row\".*?</tr>", table):
            cells = [html.unescape(re.sub("<[^>]*>", "", c)) for c in re.findall("(?s)<t[hd].*?</t[hd]>", row)]
            name = re.search("<bdi>(.*?)</bdi>", row)[1]
            titled = dict(zip(map(html.unescape, titles), cells, strict=True))
            found.setdefault(split, {}).setdefault(name, {}).update(titled)
    return found


@pytest.mark.parametrize("suite", ["ham10000", "isic2019"])
def test_pages_show_the_published_values(suite, tmp_path):
    "The leaderboards of pages rebuilt, with intervals, to the digits shown."
    shutil.copytree(REPORTS / suite, tmp_path / "r" / suite)  # follows the links
    shown = boards(build_suite_page(tmp_path / "r" / suite).read_text(encoding="utf-8"))
    assert set(shown["test"]) == set(PUBLISHED[suite])
    for run, splits in PUBLISHED[suite].items():
        for split, metrics in splits.items():
            for name, (value, low, high) in metrics.items():
                wanted = f"{number(value)} {interval({'low': low, 'high': high})}".strip()
                assert shown[split][run][METRICS[name].title] == wanted, (run, split, name)
