"""The architecture: imports between packages go one way, and the method does not need Megatron."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_meap

ROOT = Path(megatron_meap.__file__).parent
LEVELS = {
    "errors": 0,
    "files": 1,
    "records": 1,
    "flags": 1,
    "backend": 2,
    "checkpoint": 2,
    "tokenization": 2,
    "meap": 3,
    "cluster": 3,
    "preprocessing": 4,
    "sft": 5,
    "trainer": 6,
    "planning": 7,
    "huggingface": 7,
    "inspection": 8,
    "evaluation": 8,
    "commands": 9,
    "pretrain": 9,
    "study": 9,
    "cli": 10,
    "__main__": 11,
}
"""Level of every room: imports go down, or stay within a room."""

MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imports(path: Path) -> list[str]:
    """Names of the modules that a file imports anywhere in it, lazily too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{each.name}" for each in node.names]
    return found


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    own = room(path)
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "megatron_meap" and rest and not rest.startswith("__"):
            other = rest.split(".")[0]
            assert other == own or LEVELS[other] < LEVELS[own], f"{own} imports {name}"


def test_the_method_needs_no_megatron():
    for path in (ROOT / "meap").glob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] == "megatron"], path


@pytest.mark.parametrize("module", ["megatron_meap.pretrain", "megatron_meap.cli", "tests.run_many"])
def test_what_torchrun_starts_imports_little(module):
    """Megatron's first save starts a process that imports the main module again: PyTorch would take seconds."""
    heavy = f"import sys, {module}; print('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", heavy], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_modules_are_small():
    sizes = sorted(len(path.read_text().splitlines()) for path in MODULES)
    assert sizes[-1] <= 350
    assert sizes[len(sizes) // 2] <= 150


def test_the_page_shows_the_rooms_as_they_are():
    check = [sys.executable, "tools/draw_architecture.py", "--check", "--no-walk"]
    subprocess.run(check, cwd=ROOT.parent, check=True)
