"""The house rules that a machine can check: who may import whom, how large a room is, and what an import may cost."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "slas_trl"
FILES = sorted(PACKAGE.rglob("*.py"))

# What a room may import of the package, besides itself; and how many lines of code it may have, docstrings, comments,
# blank lines and imports aside. A room that grows has to give up something else, or say why in a pull request.
ROOMS: dict[str, tuple[set[str], int]] = {
    "__init__": (set(), 15),
    "images": (set(), 15),
    "statistics": (set(), 80),
    "run_files": (set(), 30),
    "seeds": (set(), 10),
    "advantages": (set(), 160),
    "objective": (set(), 40),
    "trust_region": ({"advantages"}, 150),
    "schedulers": (set(), 250),
    "policy": ({"schedulers"}, 485),
    "shapes": ({"images"}, 315),
    "rewards": ({"images", "shapes"}, 1390),
    "evaluation": ({"seeds", "shapes", "statistics"}, 90),
    "reports": ({"statistics", "run_files", "images", "publishing"}, 435),
    "loading": ({"policy", "shapes", "run_files"}, 115),
    "publishing": ({"run_files", "statistics"}, 465),
    "trainer": (
        {
            *("advantages", "objective", "trust_region", "schedulers", "policy", "rewards", "reports", "publishing"),
            *("images", "statistics", "run_files", "loading", "seeds", "shapes"),
        },
        2380,
    ),
    "scripts": ({"*"}, 1075),
    "cli": ({"scripts"}, 180),
}
NOT_CORE = {
    *("torchvision", "timm", "open_clip", "rapidocr", "rapidfuzz", "onnxruntime", "cv2", "hpsv2", "openai"),
    *("fastapi", "uvicorn", "trackio", "tensorboard"),
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports_of(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute names of what a file imports, with `from x import y` as x and as x.y; not under `if TYPE_CHECKING`."""
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


MODULES = {module_of(path): path for path in FILES}
GRAPH = {module: (imports_of(path) & MODULES.keys()) - {module} for module, path in MODULES.items()}


def test_imports_point_inward():
    wrong = []
    for module, imported in GRAPH.items():
        allowed = ROOMS[room_of(module)][0] | {room_of(module)}
        wrong += [
            f"{module} imports {other}"
            for other in imported
            if other != "slas_trl" and "*" not in allowed and room_of(other) not in allowed
        ]
    assert not wrong


def test_no_circle_of_imports():
    """Not even inside a room. A package's own `__init__`, which names what is in it, is none of its modules' needs."""
    graph = {
        module: {other for other in imported if not module.startswith(f"{other}.")}
        for module, imported in GRAPH.items()
    }
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, f"circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def lines_of_code(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            skipped |= {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in silent]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - skipped)


def test_rooms_are_small():
    sizes = dict.fromkeys(ROOMS, 0)
    for module, path in MODULES.items():
        sizes[room_of(module)] += lines_of_code(path)
    assert not {room: size for room, size in sizes.items() if size > ROOMS[room][1]}
    assert sum(sizes.values()) <= 7700


def test_optional_packages_are_imported_where_they_are_used():
    wrong = {
        module: found
        for module, path in MODULES.items()
        if module != "slas_trl.rewards.server"  # imported by `serve-reward` alone
        and (found := {name.split(".")[0] for name in imports_of(path, top_level_only=True)} & NOT_CORE)
    }
    assert not wrong, "not a core dependency: import it in the function that needs it"


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
