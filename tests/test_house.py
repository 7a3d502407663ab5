"""The house rules that a machine can check: who may import whom, and what an import may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "slas_trl"

# What a room may import of the package, besides itself. One that is not listed may import all but the upper rooms.
ALLOWED = {
    "advantages": set(),
    "objective": set(),
    "trust_region": {"advantages"},
    "images": set(),
    "schedulers": set(),
    "policy": {"schedulers"},
    "shapes": {"images"},
    "rewards": {"images", "shapes"},
    "evaluation": {"rewards", "shapes"},
}
UPPER = {"trainer", "scripts", "cli"}
MAY_IMPORT_UPPER = {"__init__": {"trainer"}, "trainer": {"trainer"}, "scripts": UPPER, "cli": UPPER}
NOT_CORE = {
    *(
        "torchvision",
        "timm",
        "open_clip",
        "rapidocr",
        "rapidfuzz",
        "onnxruntime",
        "cv2",
        "hpsv2",
        "fastapi",
        "uvicorn",
    ),
    *("trackio", "tensorboard"),
}


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute names of the modules that a file imports, those under `if TYPE_CHECKING` aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # "from ..schedulers import x" in slas_trl/policy/replayer.py is slas_trl.schedulers.
            parents = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*parents, *filter(None, [node.module])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_inward(path):
    room = room_of(path)
    rooms = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir()}
    used = {name.split(".")[1] for name in imported(path) if name.startswith("slas_trl.")} & rooms - {room}
    allowed = ALLOWED.get(room, rooms - UPPER) | MAY_IMPORT_UPPER.get(room, set())
    assert used <= allowed, f"{room} must not import {sorted(used - allowed)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_optional_packages_are_imported_where_they_are_used(path):
    found = {name.split(".")[0] for name in imported(path, top_level_only=True)} & NOT_CORE
    assert not found, f"{sorted(found)} is not a core dependency: import it in the function that needs it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize(
    "statement", ["import slas_trl", "from slas_trl.cli.main import main; main(['--help'])"], ids=["import", "help"]
)
def test_light_imports(statement):
    # In a process of its own: this one has long imported everything.
    heavy = "('torch', 'transformers', 'diffusers', 'trl', 'peft', 'datasets', 'numpy', 'matplotlib')"
    code = f"""
import sys
try:
    {statement}
except SystemExit as end:
    assert end.code == 0, end.code
loaded = [name for name in {heavy} if name in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_public_names():
    import slas_trl

    assert dir(slas_trl) == sorted(dir(slas_trl))
    assert {"SLASConfig", "SLASTrainer", "slas_advantages", "__version__"} <= set(dir(slas_trl))
    assert slas_trl.slas_advantages([0.0, 1.0], 2).tolist() == [-1.0, 1.0]
    with pytest.raises(AttributeError, match="slas_advantage"):
        slas_trl.slas_advantage  # noqa: B018
