"""Small bundles of real, untrained networks, for tests of what asks them."""

from pathlib import Path

import numpy as np
import pandas as pd

from dermnb.core import write_json
from dermnb.metrics.scores import evaluate, probability_columns

CLASSES = ["MEL", "NV", "BCC"]
TITLES = {"MEL": "Melanoma", "NV": "Melanocytic nevus", "BCC": "Basal cell carcinoma"}


def photographs(n=24, size=(96, 72)):
    "Generated lesions, uint8 arrays (H, W, 3)."
    from dermnb.data.synthetic import draw_lesion, render_view

    lesions = [draw_lesion(3, i, CLASSES[i % 3]) for i in range(n)]
    return [render_view(lesion, size=size)[0] for lesion in lesions]


def make_record(name, backbone="cnn", classes=CLASSES):
    "A run.json with what a bundle is written from."
    counts = {"images": 8, "lesions": 8, "per_class": dict.fromkeys(classes, 2)}
    return {
        "suite": "study",
        "run": name,
        "config": {},
        "classes": list(classes),
        "class_titles": {c: TITLES.get(c, c) for c in classes},
        "dataset": {
            "name": "demo",
            "title": "Generated images",
            "license": "CC0 1.0",
            "citation": "none",
            "images": 24,
            "lesions": 24,
            "synthetic": True,
        },
        "split": {"train": counts, "val": counts, "test": counts},
        "model": {"backbone": backbone, "title": "Two-layer CNN", "parameters": 19_587},
    }


def make_table(p, classes=CLASSES):
    "A predictions table, half validation and half test, that is right half of the time."
    n, k = p.shape
    table = pd.DataFrame(p, columns=probability_columns(classes))
    truth = np.where(np.arange(n) % 4 < 2, p.argmax(1), np.arange(n) % k)
    table.insert(0, "image_id", [f"image{i}" for i in range(n)])
    table.insert(1, "lesion_id", [f"lesion{i}" for i in range(n)])
    table.insert(2, "split", np.where(np.arange(n) % 2, "test", "val"))
    table.insert(3, "y_true", np.array(list(classes), dtype=object)[truth])
    return table


def make_bundle(folder, name="tiny", size=32, seed=0, fusion="none", backbone="cnn"):
    "The folder of a run whose `model` is a whole bundle; and what was put into it."
    from PIL import Image

    from dermnb.nets.novelty import fit_novelty
    from dermnb.runs.bundle import write_bundle
    from dermnb.nets.gradcam import CamNetwork
    from dermnb.data.images import resize_image
    from dermnb.nets.models import MetadataEncoder, build_classifier, save_classifier

    encoder = MetadataEncoder(50.0, 15.0, ("female", "male"), ("back",))
    columns = len(encoder.columns) if fusion != "none" else 0
    model = build_classifier(
        backbone, 3, size, seed=seed, fusion=fusion, metadata_columns=columns
    )
    # Untrained networks say nearly the same of every image.
    logits = model.get_layer("logits")
    kernel, bias = logits.get_weights()
    logits.set_weights([kernel * 20, bias])
    images = [Image.fromarray(image) for image in photographs()]
    squares = np.stack([resize_image(image, size, "crop") for image in images])
    given = squares.astype("float32")
    if fusion != "none":
        rows = encoder.encode(pd.DataFrame({"age": np.linspace(20, 80, len(squares))}))
        given = {"image": given, "metadata": rows}
    p, features = CamNetwork(model, backbone).predict(given)
    table = make_table(p)
    metadata = {"age_mean": 50.0, "age_sd": 15.0, "sexes": ["female", "male"], "sites": ["back"]}
    labels = {"resize": "crop", "backbone": backbone, "synthetic": True, "titles": TITLES}
    labels["metadata"] = metadata if fusion != "none" else None
    run = Path(folder) / name
    save_classifier(model, run / "model", CLASSES, labels)
    metrics = evaluate(table, CLASSES, resamples=100)
    novelty = fit_novelty(features[::2], features, squares[::2], squares)
    write_bundle(run / "model", make_record(name, backbone), metrics, table, novelty)
    return run, table


def make_ensemble(folder, runs, weights, combine="mean", name="both"):
    "The folder of an ensemble of runs that `make_bundle` gave; and its mixed predictions."
    from dermnb.runs.bundle import take_members, write_bundle
    from dermnb.runs.ensemble import mix_probabilities

    columns = probability_columns(CLASSES)
    tables = [table for _, table in runs]
    references = None
    if combine == "rank":
        references = [t.loc[t["split"] == "val", columns].to_numpy() for t in tables]
    mixed = mix_probabilities([t[columns].to_numpy() for t in tables], weights, references)
    table = make_table(mixed)
    bundle = Path(folder) / name / "model"
    members = [{"run": r.name, "weight": w} for (r, _), w in zip(runs, weights, strict=True)]
    record = {"schema": 1, "combine": combine, "members": members, "classes": CLASSES}
    write_json(bundle / "ensemble.json", record)
    named = references and {r.name: p for (r, _), p in zip(runs, references, strict=True)}
    take_members(bundle, {r.name: r for r, _ in runs}, named)
    metrics = evaluate(table, CLASSES, resamples=100)
    write_bundle(bundle, make_record(name, "ensemble"), metrics, table)
    return bundle.parent, table
