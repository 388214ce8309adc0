"""The parts stand in the order in which data flows, and nothing imports upwards."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["core", "data", "nets", "audit", "metrics", "runs", "report", "serve", "suite", "cli"]
CHAPTERS = sorted(p for p in ROOT.glob("nbs/**/[0-9]*.ipynb") if p.stem != "00_core")


def place(module: str) -> tuple[int, int]:
    "Part and chapter of a module such as data.splits; its order is the order of the notebooks."
    part, _, name = module.partition(".")
    numbers = {p.stem[3:]: int(p.stem[:2]) for p in CHAPTERS if p.parent.name == part}
    return PARTS.index(part), numbers.get(name.split(".")[0], 0)


def imported(path: Path) -> set[str]:
    "Modules of dermnb that a module imports anywhere, also within functions."
    package, found = path.relative_to(ROOT).parent.parts, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            names = ".".join([*start, node.module] if node.module else start)
            found.add(names.removeprefix("dermnb."))
    return {m for m in found if m.split(".")[0] in PARTS}


def test_nothing_imports_upwards():
    up = []
    for path in sorted((ROOT / "dermnb").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT / "dermnb").with_suffix("").parts)
        if module.split(".")[0] in PARTS and not module.endswith("__init__"):
            up += [(module, m) for m in imported(path) - {module} if place(m) >= place(module)]
    assert up == []


def test_every_notebook_has_a_number_of_its_own():
    for part in PARTS[1:-2]:
        numbers = sorted(int(p.stem[:2]) for p in CHAPTERS if p.parent.name == part)
        assert numbers == list(range(len(numbers))), part
