"""Run folders with made-up but plausible results, for tests of what reads them."""

import base64
import hashlib
import io
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from dermnb.core import ExperimentConfig, read_json, write_json
from dermnb.metrics.scores import evaluate

ISIC8 = {
    "MEL": "Melanoma",
    "NV": "Melanocytic nevus",
    "BCC": "Basal cell carcinoma",
    "AK": "Actinic keratosis",
    "BKL": "Benign keratosis",
    "DF": "Dermatofibroma",
    "VASC": "Vascular lesion",
    "SCC": "Squamous cell carcinoma",
}
SHARES = np.array([0.18, 0.45, 0.13, 0.06, 0.1, 0.02, 0.02, 0.04])


def make_predictions(classes, lesions=600, skill=1.0, seed=0, shares=None):
    """A predictions table (val and test): one to three images a lesion.

    The truth depends on the number of lesions and classes only, so that tables of
    different skill and seed are of the same images.
    """
    k = len(classes)
    fixed = np.random.default_rng(20)
    shares = np.full(k, 1 / k) if shares is None else np.asarray(shares, float)
    truth = fixed.choice(k, lesions, p=shares / shares.sum())
    lesion = np.repeat(np.arange(lesions), fixed.choice([1, 1, 1, 2, 3], lesions))
    rng = np.random.default_rng(seed)
    logits = (
        rng.normal(size=(len(lesion), k)) + 0.7 * rng.normal(size=(lesions, k))[lesion]
    )
    logits[np.arange(len(lesion)), truth[lesion]] += skill
    logits += 0.5 * np.log(shares + 1e-9)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    table = pd.DataFrame(
        p / p.sum(axis=1, keepdims=True), columns=[f"p_{c}" for c in classes]
    )
    table.insert(0, "image_id", [f"DEMO_{i:07d}" for i in range(len(lesion))])
    table.insert(1, "lesion_id", [f"DL_{i:07d}" for i in lesion])
    table.insert(2, "split", np.where(lesion % 2, "val", "test"))
    table.insert(3, "y_true", np.array(list(classes), dtype=object)[truth[lesion]])
    return table


def make_history(epochs=10, skill=1.0, stages=("all",), seed=0):
    "Curves that fall and rise as curves do, with the epochs shared among the stages."
    rng = np.random.default_rng(seed)
    epoch = np.arange(1, epochs + 1)
    fall = np.exp(-0.25 * skill * epoch)
    bounds = np.array_split(epoch, len(stages))
    noise = rng.normal(0, 0.02, (2, epochs))
    return pd.DataFrame(
        {
            "epoch": epoch,
            "stage": [s for s, part in zip(stages, bounds, strict=True) for _ in part],
            "learning_rate": 1e-3 * 0.9**epoch,
            "loss": 0.3 + 1.6 * fall,
            "accuracy": 0.92 - 0.5 * fall,
            "val_loss": 0.6 + 1.4 * fall + 0.01 * epoch + noise[0],
            "val_accuracy": 0.78 - 0.35 * fall + noise[1] / 2,
            "seconds": rng.uniform(3, 5, epochs),
            "trainable_parameters": 20_000,
        }
    )


def _png():
    from PIL import Image

    data = io.BytesIO()
    pixels = np.random.default_rng(0).integers(120, 200, (90, 320, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def make_notebook(path, extra_cells=()):
    "An executed notebook with each kind of output that a run's notebook has."
    table = pd.DataFrame({"MEL": [120, 25], "NV": [300, 61]}, index=["train", "val"])
    chart = {
        "data": [{"type": "scatter", "x": [1, 2, 3], "y": [3, 1, 2]}],
        "layout": {"title": {"text": "A chart"}, "height": 300},
    }
    cells = [
        new_markdown_cell(
            "# One training run\n\n**Question.** How *well* does it do?\n\n- a\n- b"
        ),
        new_code_cell(
            "import pandas as pd\n\n# what was drawn\ndata.groupby(['split', 'label']).size()",
            outputs=[
                new_output(
                    "execute_result",
                    {"text/html": table.to_html(), "text/plain": str(table)},
                    execution_count=1,
                )
            ],
        ),
        new_markdown_cell("## Training"),
        new_code_cell(
            "history = train_model(config, data, model)",
            outputs=[
                new_output(
                    "stream",
                    name="stdout",
                    text="".join(f"epoch {i}\r" for i in range(300)),
                )
            ],
        ),
        new_code_cell(
            "figure.show()",
            outputs=[
                new_output(
                    "display_data",
                    {
                        "application/vnd.plotly.v1+json": chart,
                        "text/html": "<script src='https://cdn.plot.ly/x.js'></script>",
                    },
                )
            ],
        ),
        new_markdown_cell("The first batch, as the network sees it."),
        new_code_cell(
            "show_images(images)",
            outputs=[
                new_output(
                    "display_data", {"image/png": _png(), "text/plain": "<Figure>"}
                )
            ],
        ),
        new_code_cell(
            "1 / 0",
            outputs=[
                new_output(
                    "error",
                    ename="ZeroDivisionError",
                    evalue="division by zero",
                    traceback=["\x1b[31mZeroDivisionError\x1b[0m: division <by> zero"],
                )
            ],
        ),
        *extra_cells,
    ]
    notebook = new_notebook(cells=cells)
    nbformat.write(notebook, path)


def make_facts(n, seed=0):
    "Who is in the images, some of it unknown."
    rng = np.random.default_rng(seed)
    age = rng.integers(5, 18, n) * 5.0
    age[rng.random(n) < 0.05] = np.nan
    sexes, sites = ["female", "male"], ["back", "face", "lower extremity", "foot"]
    return pd.DataFrame(
        {
            "age": age,
            "sex": rng.choice(sexes, n),
            "site": rng.choice(sites, n, p=[0.5, 0.3, 0.18, 0.02]),
            "source": "demo",
        }
    )


AUDIT = {
    "method": "hashes",
    "note": "the second pass was not made: no weights of MobileNetV2 are here",
    "images": 1400,
    "unreadable": 1,
    "seconds": 2.5,
    "pairs": {"same bytes": 3, "near duplicate": 9},
    "new_pairs": {"near duplicate": 4},
    "images_joined": 7,
    "groups_joined": 3,
    "chains_refused": 0,
    "examples": [{"a": "DEMO_1", "b": "DEMO_2", "kind": "near duplicate"}],
    "leaks": {"near duplicate": 2},
    "two_labels": {"same bytes": 1},
    "findings": [
        {
            "finding": "across parts",
            "kind": "near duplicate",
            "a": "DEMO_3",
            "b": "DEMO_4",
            "part_a": "train",
            "part_b": "test",
            "detail": "near duplicate: train and test",
        }
    ],
}


def make_run(
    folder,
    skill=1.0,
    seed=0,
    classes=None,
    lesions=600,
    synthetic=True,
    stages=("scratch",),
    epochs=10,
    parameters=25_000,
    train_s=40.0,
    predictions=None,
    resamples=200,
    notebook=True,
    shares=None,
    positive="",
    leaky=False,
    facts=False,
    record=None,
    **config,
):
    """A finished run folder, but for its model; `record` adds to its run.json.

    With `leaky`, half of the test lesions are in training too, and known by heart. With
    `facts`, age, sex, site and source of its images are known.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    titles = dict(ISIC8 if classes is None else classes)
    codes = list(titles)
    if predictions is None:
        if shares is None:
            shares = SHARES if classes is None else None
        predictions = make_predictions(codes, lesions, skill, seed, shares)
    known = sorted(predictions.loc[predictions["split"] == "test", "lesion_id"].unique())
    known = known[::2] if leaky else []
    if leaky:
        rows = predictions["lesion_id"].isin(known)
        right = np.eye(len(codes))[pd.Index(codes).get_indexer(predictions["y_true"])]
        columns = [f"p_{c}" for c in codes]
        p = predictions[columns].to_numpy() + right
        predictions.loc[rows, columns] = (p / p.sum(axis=1, keepdims=True))[rows]
        config |= {"split": "image", "allow_leakage": True}
    metrics = evaluate(predictions, codes, resamples=resamples, positive=positive)
    write_json(folder / "metrics.json", metrics)
    predictions.to_parquet(folder / "predictions.parquet", index=False)
    make_history(epochs, skill, stages, seed).to_csv(
        folder / "history.csv", index=False
    )
    split = predictions.rename(columns={"y_true": "label"})
    train = split.assign(
        image_id="T" + split["image_id"],
        lesion_id="T" + split["lesion_id"],
        split="train",
    )
    seen = split[split["lesion_id"].isin(known)]
    seen = seen.assign(image_id="S" + seen["image_id"], split="train")
    split = pd.concat([train, seen, split])[["image_id", "lesion_id", "label", "split"]]
    if facts:
        split = split.reset_index(drop=True).join(make_facts(len(split), seed))
    split.to_parquet(folder / "split.parquet", index=False)
    summary = {
        name: {
            "images": len(part),
            "lesions": int(part["lesion_id"].nunique()),
            "per_class": {c: int((part["label"] == c).sum()) for c in codes},
        }
        for name, part in split.groupby("split")
    }
    # As a run could have them: names that are no folder names reach only the page.
    fit = {k: v for k, v in config.items() if k in ExperimentConfig.model_fields}
    settings = ExperimentConfig(seed=seed, epochs=epochs, **fit).model_dump(
        exclude={"data_dir"}
    )
    in_test = predictions["lesion_id"].isin(known) & (predictions["split"] == "test")
    write_json(
        folder / "run.json",
        {
            "schema": 1,
            "notebook": "train",
            "parents": {},
            "leak": {
                "lesions": len(known),
                "val_images": 0,
                "test_images": int(in_test.sum()),
            },
            "train_draw": None,
            "metadata": None,
            "suite": folder.parent.name,
            "run": folder.name,
            "config": settings | {"suite": folder.parent.name, "run": folder.name},
            "classes": codes,
            "class_titles": titles,
            "dataset": {
                "name": "demo",
                "title": (
                    "Generated dermoscopy-like images" if synthetic else "HAM10000"
                ),
                "synthetic": synthetic,
                "license": "MIT" if synthetic else "CC BY-NC 4.0",
                "citation": (
                    "Generated by this project."
                    if synthetic
                    else "Tschandl et al., Scientific Data 5, 180161 (2018)"
                ),
                "images": len(split),
                "lesions": int(split["lesion_id"].nunique()),
                "manifest_hash": "5f0c3a9d2b7e4c61",
                "problems": {"file unreadable": 2},
                "found": [["classes", "nv 3"], ["unknown cells", "sex 57 'unknown'"]],
                "not_used": [["columns", "dx_type of t.csv"], ["files", "2 .heic"]],
                "positive": positive,
            },
            "split": summary,
            "model": {
                "backbone": settings["backbone"],
                "title": settings["backbone"].capitalize(),
                "weights": settings["weights"],
                "parameters": parameters,
                "trainable_parameters": parameters // 2,
                "size_mb": round(parameters * 4 / 2**20, 1),
                "flops": parameters * 90,
            },
            "stages": [{"name": s, "epochs": epochs // len(stages)} for s in stages],
            "timing": {
                "data_s": 3.2,
                "build_s": 1.5,
                "train_s": train_s,
                "epoch_s": train_s / epochs,
                "predict_s": train_s / 30,
                "total_s": train_s * 1.1 + 5,
            },
            "peak_memory_mb": 1200 + parameters // 40_000,
            "provenance": {
                "git_commit": "736125f9d0c1a2b3",
                "git_dirty": False,
                "python": "3.11.9",
                "packages": {
                    "keras": "3.15.1",
                    "tensorflow": "2.21.0",
                    "numpy": "2.4.6",
                },
                "hardware": {
                    "cpu": "Example CPU @ 2.5 GHz",
                    "cores": 2,
                    "memory_gb": 16.0,
                    "gpus": [],
                    "platform": "Linux",
                },
                "backend": "tensorflow",
                "started": f"2026-11-21T01:{seed:02d}:00+00:00",
                "finished": f"2026-11-21T02:{seed:02d}:00+00:00",
            },
        }
        | (record or {}),
    )
    if notebook:
        make_notebook(folder / "notebook.ipynb")
    return folder


def make_explanation(
    folder,
    seed=0,
    synthetic=True,
    license="MIT",
    masks="dataset",
    n=120,
    plain=0.8,
    covered=0.66,
    border=0.64,
    majority=0.67,
    **record,
):
    "explain.json and a gallery in a run's folder; `record` replaces keys of the first."
    from PIL import Image

    folder, rng = Path(folder), np.random.default_rng(seed)
    classes = read_json(folder / "run.json")["classes"]

    def est(value, half=0.06):
        return {"value": value, "low": value - half, "high": value + half, "n": n}

    share = np.linspace(0, 1, 11)
    fall, line = 0.15 + 0.6 * (1 - share) ** 3, 0.75 - 0.6 * share

    def removal(curve, random, value):
        means = [float(np.mean(c)) for c in (curve, random)]
        return {
            "share": share.round(2).tolist(),
            "curve": curve.round(4).tolist(),
            "random": random.round(4).tolist(),
            "area": est(means[0], 0.03),
            "random_area": est(means[1], 0.03),
            "difference": est(value, 0.04),
        }

    groups = [f"{a} and {b}" for a in ("right", "wrong") for b in ("confident", "unsure")]
    (folder / "gallery").mkdir(exist_ok=True)
    gallery = []
    for i, group in enumerate(groups * 2):
        files = {k: f"gallery/{i}_{k}.jpg" for k in ("image", "map")}
        pixels = np.full((96, 96, 3), rng.integers(120, 220, 3), dtype=np.uint8)
        for file in files.values():
            Image.fromarray(pixels).save(folder / file, "JPEG")
            pixels = pixels // 2
        true = classes[i % len(classes)]
        gallery.append(
            {
                "image_id": f"DEMO_{i:07d}",
                "y_true": true,
                "predicted": true if "right" in group else classes[(i + 1) % len(classes)],
                "confidence": 0.93 if "confident" in group else 0.41,
                "group": group,
                "file": files["image"],
                "map": files["map"],
            }
        )
    place = np.linspace(-1, 1, 16)
    mean = np.exp(-2 * (place[:, None] ** 2 + place**2)) * 0.8
    views = {"plain": plain, "covered": covered, "border": border}
    write_json(
        folder / "explain.json",
        {
            "schema": 1,
            "split": "test",
            "n": n,
            "lesions": n - 20,
            "method": "gradcam",
            "layers": {folder.name: "conv_2"},
            "synthetic": synthetic,
            "license": license,
            "masks": masks,
            "randomization": {
                "head": est(0.31),
                "all": est(0.24),
                "head_chance": est(0.23),
                "all_chance": est(0.22),
            },
            "draws": 3,
            "deletion": removal(fall, line, -0.11),
            "insertion": removal(0.9 - fall, 0.9 - line, 0.13),
            "inside": {"share": est(0.52), "area": est(0.31, 0.03), "difference": est(0.21)},
            "shortcuts": {
                view: {"accuracy": est(a), "balanced_accuracy": est(max(a - 0.5, 0.1), 0.05)}
                for view, a in views.items()
            }
            | {"majority": majority},
            "mean_map": mean.round(4).tolist(),
            "foreign": [
                {"kind": "uniform noise", "n": 20, "refused": 18},
                {"kind": "one color", "n": 20, "refused": 20},
                {"kind": "text on paper", "n": 20, "refused": 11},
            ],
            "refused_test": est(0.05, 0.03),
            "gallery": gallery,
        }
        | record,
    )
    return folder


def make_suite(folder, synthetic=True):
    "Four networks, one run that failed and one that is missing."
    folder = Path(folder)
    rows = [
        ("cnn", 1.0, 25_640, 42.0, ("scratch",)),
        ("xception", 1.7, 20_877_872, 610.0, ("scratch",)),
        ("efficientnetb5", 1.9, 28_529_911, 1450.0, ("head", "top")),
        ("efficientnetb7", 1.85, 64_117_831, 2980.0, ("head", "top")),
    ]
    for i, (name, skill, parameters, seconds, stages) in enumerate(rows):
        make_run(
            folder / name,
            skill,
            seed=i,
            synthetic=synthetic,
            stages=stages,
            parameters=parameters,
            train_s=seconds,
            backbone=name,
            facts=True,
            record={"audit": AUDIT} if i < 3 else None,
            **(
                {"weights": "imagenet", "schedule": "head_then_top"}
                if len(stages) > 1
                else {"learning_rate": 3e-3 if i else 1e-3}
            ),
        )
    license = "MIT" if synthetic else "CC BY-NC 4.0"
    for i, name in enumerate(("cnn", "xception")):
        make_explanation(folder / name, i, synthetic, license, covered=0.66 + 0.14 * i)
    states = [{"run": name, "status": "done", "error": ""} for name, *_ in rows]
    states += [
        {
            "run": "densenet121",
            "status": "failed",
            "error": "ConfigError: /home/x/densenet121.weights.h5 is no weights file.",
        },
        {"run": "resnet50", "status": "missing", "error": ""},
    ]
    write_json(
        folder / "suite.json",
        {
            "schema": 1,
            "suite": folder.name,
            "title": "CNN, Xception, EfficientNetB5 and EfficientNetB7 under one recipe",
            "question": "Which of the four networks tells the diagnoses apart best, when data, "
            "split, image size, loss and schedule are the same?",
            "expected": "All do better than chance level, and the two-layer CNN stays behind.",
            "caveats": ["A few epochs at a small size are a test of the chain."],
            "profile": "cpu",
            "runs": states,
        },
    )
    return folder


def predictions_hash(folder):
    "As a run made from this one notes it."
    return hashlib.sha256((Path(folder) / "predictions.parquet").read_bytes()).hexdigest()


def make_ensemble(folder, members, weights, notebook=False, resamples=200):
    "A folder that combines finished runs: no history and no network."
    folder = Path(folder)
    (folder / "model").mkdir(parents=True)
    paths = [folder.parent / m for m in members]
    tables = [pd.read_parquet(p / "predictions.parquet") for p in paths]
    records = [read_json(p / "run.json") for p in paths]
    classes = records[0]["classes"]
    columns = [f"p_{c}" for c in classes]
    table = tables[0].copy()
    table[columns] = sum(
        w * t[columns] for w, t in zip(weights, tables, strict=True)
    ) / sum(weights)
    table.to_parquet(folder / "predictions.parquet", index=False)
    positive = records[0]["dataset"]["positive"]
    metrics = evaluate(table, classes, resamples=resamples, positive=positive)
    write_json(folder / "metrics.json", metrics)
    (folder / "split.parquet").write_bytes((paths[0] / "split.parquet").read_bytes())
    combined = {
        "schema": 1,
        "combine": "mean",
        "members": [
            {"run": m, "weight": w} for m, w in zip(members, weights, strict=True)
        ],
        "classes": classes,
    }
    write_json(folder / "model" / "ensemble.json", combined)
    parameters = sum(r["model"]["parameters"] for r in records)
    config = records[0]["config"] | {"run": folder.name, "members": list(members)}
    write_json(
        folder / "run.json",
        records[0]
        | {
            "notebook": "ensemble",
            "run": folder.name,
            "config": config | {"member_weights": list(weights)},
            "ensemble": combined,
            "parents": {m: predictions_hash(p) for m, p in zip(members, paths, strict=True)},
            "model": {
                "backbone": "ensemble",
                "title": f"Ensemble of {len(members)}",
                "weights": "",
                "parameters": parameters,
                "trainable_parameters": 0,
                "size_mb": round(parameters * 4 / 2**20, 1),
            },
            "stages": [],
            "timing": {"total_s": 1.3},
        },
    )
    if notebook:
        make_notebook(folder / "notebook.ipynb")
    return folder


PUBLISHED = [[80, 15, 5], [10, 30, 0], [3, 0, 2]]


def make_study(folder, synthetic=False, resamples=200):
    "A suite with all that only some suites have, but for two classes."
    folder = Path(folder)
    common = {"synthetic": synthetic, "resamples": resamples, "notebook": False}
    draw = {"per_class": 300, "hash": "d41d8cd98f00b204e9800998ecf8427e"}
    plain = make_run(folder / "cnn", 1.2, 0, record={"train_draw": draw}, **common)
    make_run(folder / "cnn_image", 1.2, 0, leaky=True, **common)
    for i in (1, 2, 3):
        make_run(folder / f"xception-seed{i}", 1.9, i, backbone="xception", **common)
    for i in (0, 1):
        table = make_predictions(list(ISIC8), 300, 1.5, i, SHARES)
        for column in ("image_id", "lesion_id"):
            table[column] = f"F{i}_" + table[column]
        fold = {"split": "kfold", "fold": i, "predictions": table}
        make_run(folder / f"folded-fold{i}", 1.5, i, **fold, **common)
    metadata = {
        "fusion": "concat",
        "shuffled": False,
        "columns": ["age", "sex", "site"],
        "missing": {"age": 57, "sex": 50, "site": 0},
    }
    tuned = {
        "notebook": "transfer",
        "parents": {"cnn": predictions_hash(plain)},
        "metadata": metadata,
        "train_draw": draw,
    }
    make_run(folder / "tuned", 1.6, 7, base="cnn", metadata="concat", record=tuned, **common)
    make_ensemble(folder / "both", ["cnn", "tuned"], [0.3, 0.7], resamples=resamples)
    names = ["cnn", "cnn_image", "tuned", "both"]
    states = [{"run": n, "group": n, "repeat": ""} for n in names]
    states += [
        {"run": f"xception-seed{i}", "group": "xception", "repeat": f"seed {i}"}
        for i in (1, 2, 3)
    ]
    states += [
        {"run": f"folded-fold{i}", "group": "folded", "repeat": f"fold {i}"}
        for i in (0, 1)
    ]
    states = [s | {"status": "done", "error": ""} for s in states]
    failed = {"status": "failed", "error": "MemoryError: too large"}
    states.append({"run": "b7", "group": "b7", "repeat": ""} | failed)
    said = {
        "split": "val",
        "conditions": {
            "classes": 6,
            "image_size": 224,
            "images": 35_000,
            "note": "split not said to be by lesion",
        },
        "source": "README of the system",
    }
    single = {"run": "tuned"} | said
    exact = {"run": "both", "split": "test", "confusion": PUBLISHED}
    write_json(
        folder / "suite.json",
        {
            "schema": 1,
            "suite": folder.name,
            "title": "What a base, an ensemble and a leak are worth",
            "question": "Which published figures hold on lesions that were not trained on?",
            "expected": "The split by image is optimistic.",
            "caveats": [],
            "profile": "cpu",
            "runs": states,
            "claims": [
                single | {"metric": "macro_precision", "value": 0.6538},
                single | {"metric": "macro_recall", "value": 0.6229},
                single | {"metric": "macro_f1", "value": 0.6718},
                exact | {"metric": "accuracy", "value": 0.7724, "source": "Table 2"},
                {"run": "xception", "metric": "accuracy", "value": 0.92, "n": 600, "digits": 2},
                {"run": "tuned", "metric": "recall:rarest", "better_than": "cnn"},
                {"run": "both", "metric": "accuracy", "better_than": "cnn"},
                {"run": "folded", "metric": "accuracy", "better_than": "cnn"},
                {"run": "b7", "metric": "accuracy", "value": 0.93},
                {"run": "cnn", "metric": "sensitivity", "value": 0.9},
            ],
            "compare": [["both", "cnn"], ["xception", "cnn"], ["cnn", "b7"], ["folded", "cnn"]],
        },
    )
    return folder


def make_search(folder, resamples=100):
    "A suite of one run beside a search of six trials, of which one ended early and one failed."
    folder = Path(folder)
    quick = {"resamples": resamples, "notebook": False, "lesions": 300}
    tried = [(1e-2, 0.2, 0.6), (1e-3, 0.2, 2.2), (1e-3, 0.5, 1.6), (1e-4, 0.2, 1.0), (1e-5, 0.5, 0.2)]
    rows = [{"run": "plain", "group": "plain", "status": "done", "trial": {}}]
    make_run(folder / "plain", 1.2, 50, **quick)
    for number, (rate, dropout, skill) in enumerate(tried, 1):
        values = {"learning_rate": rate, "dropout": dropout}
        early = {"epoch": 3, "of": 10, "reason": "its validation loss was number 5 of 5"}
        make_run(
            folder / f"cnn-t{number:02d}",
            skill,
            number,
            epochs=3 if rate == 1e-5 else 10,
            record={"ended": early if rate == 1e-5 else None},
            searched=list(values),
            halving=[3, 3],
            **values,
            **quick,
        )
        rows.append({"run": f"cnn-t{number:02d}", "group": "cnn", "status": "done", "trial": values})
    lost = {"learning_rate": 1.0, "dropout": 0.5}
    rows.append({"run": "cnn-t06", "group": "cnn", "status": "failed", "error": "TrainingError: no loss", "trial": lost})
    write_json(
        folder / "suite.json",
        {
            "title": "A search",
            "question": "Which settings?",
            "answer": "best",
            "runs": rows,
            "search": {"run": "cnn", "draw": {"learning_rate": {}, "dropout": []}, "trials": 6, "seed": 0},
            "compare": [["cnn", "plain"]],
            "claims": [{"run": "cnn", "metric": "accuracy", "better_than": "plain"}],
        },
    )
    return folder
