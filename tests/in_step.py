"""Check that the notebooks are clean and that dermnb/ is what they export.

Works on a copy of the project, so that a check never changes the files it checks.
"""

import filecmp
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("nbs/**/*.ipynb"))


def differences(copy: Path) -> list[str]:
    "Files of nbs/ and dermnb/ that nbdev would write otherwise, and modules of no notebook."
    found = []
    for path in NOTEBOOKS:
        name = path.relative_to(ROOT)
        if not filecmp.cmp(path, copy / name, shallow=False):
            found.append(f"{name} is not clean: run `make export`")
        if any(cell.get("outputs") for cell in json.loads(path.read_text())["cells"]):
            found.append(f"{name} holds outputs: clear them before committing")
    for path in (copy / "dermnb").rglob("*.py"):
        name = path.relative_to(copy)
        if not (ROOT / name).exists() or not filecmp.cmp(path, ROOT / name, shallow=False):
            found.append(f"{name} is not what nbs/ exports: run `make export`")
    for path in (ROOT / "dermnb").rglob("*.py"):
        name = path.relative_to(ROOT)
        if not (copy / name).exists():
            found.append(f"{name} belongs to no notebook: remove it")
    return found


def main() -> int:
    "Print what is out of step; 1 if anything is."
    with tempfile.TemporaryDirectory(prefix="dermnb-step-") as folder:
        copy = Path(folder) / "dermnb"
        shutil.copytree(ROOT / "nbs", copy / "nbs")
        for name in ("settings.ini", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy / name)
        (copy / "dermnb").mkdir()
        shutil.copy(ROOT / "dermnb" / "__init__.py", copy / "dermnb")
        shutil.copytree(ROOT / "dermnb" / "taxonomies", copy / "dermnb" / "taxonomies")
        bin = Path(sys.executable).parent
        for command in ("nbdev_clean", "nbdev_export"):
            subprocess.run([bin / command], cwd=copy, check=True)
        found = differences(copy)
    print("\n".join(found) or "notebooks clean, export in step")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
