"""Writes tests/official.json: random tables, and what ISIC's own scorer says of the submissions made of them.

Not run by the tests. The scorer, isic-challenge-scoring, needs Python 3.13 and takes more than a minute to install; its
rdp fails with NumPy 2.5. So its answers are kept. To make them anew, in a Python 3.13:

    pip install isic-challenge-scoring==5.8.0 "numpy<2.4" && python tests/isic_oracle.py
"""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
from isic_challenge_scoring.classification import ClassificationMetric, ClassificationScore
from isic_challenge_scoring.load_csv import parse_csv, parse_truth_csv
from isic_challenge_scoring.metrics import balanced_multiclass_accuracy

MILK10K = "AKIEC BCC BEN_OTH BKL DF INF MAL_OTH MEL NV SCCKA VASC"
ISIC2019 = "MEL NV BCC AK BKL DF VASC SCC"
# Challenge, columns of its truth, classes of the network, what ranks.
TABLES = [
    ("isic2018", "MEL NV BCC AKIEC BKL DF VASC", "MEL NV BCC AKIEC BKL DF VASC", "balanced_accuracy"),
    ("isic2019", f"{ISIC2019} UNK", f"{ISIC2019} UNK", "balanced_accuracy"),
    ("isic2019", f"{ISIC2019} UNK", ISIC2019, "balanced_accuracy"),
    ("isic2020", "target", "MEL NV BKL", "auc"),
    ("milk10k", MILK10K, MILK10K, "dice"),
]


def stream(ids: list[str], index: str, values: np.ndarray, columns: list[str]) -> io.StringIO:
    text = pd.DataFrame(values.astype(float), index=pd.Index(ids, name=index), columns=columns).to_csv()
    return io.StringIO(text)


def oracle(seed: int, challenge: str, columns: list[str], classes: list[str], metric: str) -> dict:
    rng, n = np.random.default_rng(seed), 60
    truth = rng.permutation(np.arange(n) % len(classes))
    p = rng.dirichlet(np.full(len(classes), 0.6), n) + 0.3 * np.eye(len(classes))[truth]
    p = np.array([rng.multinomial(200, row / row.sum()) for row in p]) / 200  # with ties
    ids = [f"ISIC_{35050 + i:07}" for i in range(n)]  # ISIC_0035068 has no weight
    if challenge == "isic2020":
        given, true = p[:, :1], (truth == 0)[:, None]
    else:
        given = np.zeros((n, len(columns)))
        given[:, : len(classes)] = p
        chosen = np.arange(n), p.argmax(axis=1)
        given[chosen] = np.maximum(given[chosen], 0.500001)  # the predicted class is above 0.5
        given[given == 0.5] = 0.499999
        true = np.eye(len(columns))[truth]
    index = "lesion_id" if challenge == "milk10k" else "image"
    files = [stream(ids, index, values, columns) for values in (true, given)]
    if true.any(axis=0).all():
        official = ClassificationScore.from_stream(*files, ClassificationMetric(metric)).overall
    else:  # the command cannot draw the ROC curve of a class without images; its metric can do without
        (known, weights), asked = parse_truth_csv(files[0]), parse_csv(files[1], pd.Index(columns))
        official = balanced_multiclass_accuracy(known, asked, weights["score_weight"])
    kept = {"challenge": challenge, "classes": classes, "truth": [classes[t] for t in truth], "ids": ids}
    return kept | {"p": p.tolist(), "official": float(official)}


if __name__ == "__main__":
    made = [
        oracle(seed, challenge, columns.split(), classes.split(), metric)
        for challenge, columns, classes, metric in TABLES
        for seed in (0, 1)
    ]
    Path(__file__).with_name("official.json").write_text("[\n" + ",\n".join(map(json.dumps, made)) + "\n]\n")
