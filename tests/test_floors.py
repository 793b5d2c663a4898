"""The shape of the code: import floors, what may be imported where, names, and sizes. Read by AST alone."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nemojax"

# A file imports lower floors, or files of its own folder. Files at the root of the package do not import
# each other on one floor.
FLOORS = (
    ("buckets",),
    ("arch", "config", "tree", "commands"),
    ("hosts", "sharding", "backends", "optim"),
    ("model", "losses"),
    ("checkpoints", "data", "log", "plots"),
    ("generate", "train"),
    ("stage", "topology", "rewards"),
    ("evaluate",),
    ("compress", "distill", "tokenizer", "tokenize", "pretrain", "sft", "reward", "curate", "rl"),
    ("plan", "study", "sweep", "pipeline", "report", "serve", "cli"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
INSIDE_FUNCTIONS = {
    "transformers",
    "datasets",
    "grain",
    "orbax",
    "reasoning_gym",
    "math_verify",
    "matplotlib",
}
TORCH_IMPORT = re.compile(r"\b(import torch|from torch\b)")
NO_ARRAYS = ("__init__.py", "cli.py", "commands.py")
BANNED = {"utils", "common", "helpers", "misc", "manager", "base"}
MAX_FILE, MAX_FUNCTION, MAX_FIELDS = 450, 60, 12

FILES = sorted(PACKAGE.rglob("*.py"))
SHIPPED = "hf_files"  # torch files that an export carries: they run inside transformers, without nemojax
TREES = {path: ast.parse(path.read_text()) for path in FILES}
OURS = [path for path in FILES if SHIPPED not in path.parts]
AROUND = sorted(path for name in ("configs", "launch", "notebooks") for path in (ROOT / name).rglob("*.*"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
by_file = pytest.mark.parametrize("path", OURS, ids=lambda p: str(p.relative_to(ROOT)))


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of every import; `from nemojax import x` counts as nemojax.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written in full"
            if node.module == "nemojax":
                yield from ((f"nemojax.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module or "", node.lineno


def is_torch(module: str) -> bool:
    return module.split(".")[0] == "torch"


def room(module: str) -> str:
    """nemojax.model.rope -> model; nemojax.train -> train."""
    return module.split(".")[1]


def top_level(tree: ast.Module) -> ast.Module:
    """The tree without function bodies: what runs when the module is imported."""

    class Drop(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        def visit_AsyncFunctionDef(self, node):
            return None

        def visit_If(self, node):
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Drop().visit(ast.parse(ast.unparse(tree)))


@by_file
def test_every_file_stands_on_a_floor(path):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert name == "__init__" or name in FLOOR, f"{name}: give it a floor in tests/test_floors.py"


@by_file
def test_imports_go_down(path):
    parts = path.relative_to(PACKAGE).parts
    mine = parts[0].removesuffix(".py")
    if mine == "__init__":
        return
    is_folder = len(parts) > 1
    for module, line in imports(TREES[path]):
        if not module.startswith("nemojax.") or module == "nemojax.__version__":
            continue
        theirs = room(module)
        if theirs == mine and is_folder:
            continue
        assert FLOOR[theirs] < FLOOR[mine], (
            f"{path.relative_to(ROOT)}:{line}: floor {FLOOR[mine]} imports {module} of floor {FLOOR[theirs]}"
        )


@by_file
def test_heavy_libraries_are_imported_where_they_are_needed(path):
    for module, line in imports(top_level(TREES[path])):
        assert module.split(".")[0] not in INSIDE_FUNCTIONS, f"{path.name}: {module} at the top (line {line})"


@by_file
def test_torch_stays_in_the_exported_files(path):
    assert not [line for module, line in imports(TREES[path]) if is_torch(module)]


def test_torch_stays_out_of_recipes_scripts_and_notebooks():
    """Tests compare with it; what users run never needs it."""
    for path in AROUND:
        if path.suffix == ".py":
            found = [line for module, line in imports(ast.parse(path.read_text())) if is_torch(module)]
        else:
            text = path.read_text()
            found = [text[: m.start()].count("\n") + 1 for m in re.finditer(TORCH_IMPORT, text)]
        assert not found, f"{path.relative_to(ROOT)}:{found[0]} imports torch"


def test_names_around_the_package():
    found = [path for path in (*AROUND, *TESTS) if set(path.relative_to(ROOT).with_suffix("").parts) & BANNED]
    assert not found and {p.parts[len(ROOT.parts)] for p in AROUND} == {"configs", "launch", "notebooks"}


def config_classes() -> Iterator[tuple[str, int]]:
    """(name, number of fields) of every dataclass that has a field of nemojax.config."""
    for path in OURS:
        for node in ast.walk(TREES[path]):
            if not isinstance(node, ast.ClassDef) or "dataclass" not in " ".join(
                map(ast.unparse, node.decorator_list)
            ):
                continue
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            made_by = {ast.unparse(f.value.func) for f in fields if isinstance(f.value, ast.Call)}
            if made_by & {"field", "required", "config.field", "config.required"}:
                yield f"{path.relative_to(ROOT)}: {node.name}", len(fields)


def test_configurations_stay_small():
    sizes = dict(config_classes())
    assert sizes["nemojax/train.py: FitConfig"] >= 10 and "nemojax/data/sources.py: Source" in sizes
    assert not {name: size for name, size in sizes.items() if size > MAX_FIELDS}


@pytest.mark.parametrize("name", NO_ARRAYS)
def test_the_command_line_imports_no_arrays(name):
    found = {module.split(".")[0] for module, _ in imports(TREES[PACKAGE / name])}
    assert not found & {"jax", "jaxlib", "numpy", "flax", "optax"}


def test_help_loads_no_arrays():
    code = (
        "import sys; from nemojax.cli import main; main(['--help']);"
        "sys.exit(', '.join({'jax', 'numpy', 'flax', 'transformers', 'rich'} & set(sys.modules)) or None)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@by_file
def test_names_and_sizes(path):
    text = path.read_text()
    assert not set(path.relative_to(PACKAGE).with_suffix("").parts) & BANNED
    assert text.count("\n") <= MAX_FILE, f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines"
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MAX_FUNCTION, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines"
