"""The floors of the house: imports point down only, and importing a package does no work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {"formats": {"formats"}, "converter": {"converter", "formats"}, "runtime": {"runtime", "formats"}}
STDLIB_ONLY = ("errors", "layout", "files", "strict_json", "selection", "sizes", "records")
MODULES = [path for room in ALLOWED for path in sorted((ROOT / room).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down_only(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    assert imported(path) & set(ALLOWED) <= ALLOWED[room]


@pytest.mark.parametrize("name", STDLIB_ONLY)
def test_the_ground_floor_needs_the_standard_library_alone(name: str) -> None:
    assert imported(ROOT / "formats" / f"{name}.py") <= set(sys.stdlib_module_names) | {"formats"}


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("runtime", ["converter", "huggingface_hub", "transformers", "triton.language"]),
        ("converter.cli", ["runtime", "huggingface_hub", "transformers"]),
        ("formats.cli", ["converter", "runtime", "huggingface_hub", "transformers"]),
    ],
)
def test_importing_a_package_loads_nothing_that_it_may_not_need(package: str, absent: list[str]) -> None:
    program = f"import sys, {package}; print(*[name for name in {absent!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == ""
