"""The floors of the house: imports point down only, and importing a package does no work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The table of CONTRIBUTING.md: what each module may import beside the standard library and formats.__version__.
FLOORS: dict[str, set[str]] = {
    "formats": set(),
    "formats.errors": set(),
    "formats.layout": {"formats.errors"},
    "formats.sizes": {"formats.layout"},
    "formats.selection": {"formats.errors", "formats.layout"},
    "formats.files": {"formats.errors"},
    "formats.lane": set(),
    "formats.strict_json": {"formats.errors"},
    "formats.records": {"formats.errors", "formats.layout"},
    "formats.container": {
        "formats.errors",
        "formats.files",
        "formats.lane",
        "formats.layout",
        "formats.strict_json",
    },
    "formats.codec": {"formats.errors", "formats.layout", "torch"},
    "formats.tensors": {"formats.container", "formats.layout", "torch"},
    "formats.devices": {"formats.errors", "torch", "triton"},
    "formats.progress": {"tqdm"},
    "formats.hub": {"formats.errors", "formats.progress", "huggingface_hub"},
    "formats.entry": set(),
    "formats.command": {"formats.entry", "formats.errors", "formats.progress", "click"},
    "formats.architecture": {"formats.errors", "formats.progress", "transformers"},
    "formats.mapping": {"torch", "transformers"},
    "formats.texts": {"formats.errors", "formats.hub", "formats.architecture", "torch"},
}
FLOORS["formats.manifest"] = {
    "formats.container", "formats.errors", "formats.files", "formats.layout", "formats.records", "formats.sizes",
    "formats.strict_json",
}  # fmt: skip
FLOORS["formats.checkpoint"] = {
    "formats.codec", "formats.container", "formats.errors", "formats.files", "formats.layout", "formats.manifest",
    "formats.tensors", "torch",
}  # fmt: skip
FLOORS["formats.__main__"] = {"formats.entry"}
INTEROP = {"formats.codec", "formats.errors", "formats.interop.base", "formats.layout", "torch"}
FLOORS["formats.interop.base"] = INTEROP - {"formats.interop.base"}
FLOORS["formats.interop.signs"] = {"torch"}
FLOORS["formats.interop.groups"] = {"formats.codec", "formats.layout", "torch"}
FLOORS |= {f"formats.interop.{name}": INTEROP for name in ("compressed_tensors", "gptq", "mlx", "proof")}
FLOORS["formats.interop.awq"] = INTEROP | {"formats.interop.signs"}
FLOORS["formats.interop.imported"] = INTEROP | {"formats.interop.proof", "formats.interop.signs"}
FLOORS["formats.interop"] = {f"formats.interop.{name}" for name in ("base", "compressed_tensors", "gptq", "awq", "mlx")}
FLOORS["formats.cli"] = {
    "formats.checkpoint", "formats.command", "formats.layout", "formats.manifest", "formats.records", "click",
}  # fmt: skip
ROOMS = {"formats": {"formats"}, "converter": {"converter", "formats"}, "runtime": {"runtime", "formats"}}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
}


def imported(module: str) -> set[str]:
    """What a module imports, as full names for modules of ours and as packages for others."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= parts & MODULES.keys() or {node.module}
    return {name if name in MODULES else name.partition(".")[0] for name in names}


@pytest.mark.parametrize("module", MODULES)
def test_imports_stay_in_their_rooms(module: str) -> None:
    rooms = {name.partition(".")[0] for name in imported(module)} & ROOMS.keys()
    assert rooms <= ROOMS[module.partition(".")[0]]


@pytest.mark.parametrize("module", [name for name in MODULES if name.partition(".")[0] == "formats"])
def test_imports_of_formats_point_down_only(module: str) -> None:
    assert imported(module) - sys.stdlib_module_names - {"formats"} <= FLOORS[module]


def test_progress_is_shown_in_one_way() -> None:
    assert [module for module in MODULES if "tqdm" in imported(module)] == ["formats.progress"]


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("runtime", ["converter", "huggingface_hub", "transformers", "triton.language"]),
        ("converter.cli", ["runtime", "huggingface_hub", "transformers"]),
        ("converter.push_cli", ["runtime", "huggingface_hub", "transformers"]),
        ("formats.cli", ["converter", "runtime", "huggingface_hub", "transformers"]),
    ],
)
def test_importing_a_package_loads_nothing_that_it_may_not_need(package: str, absent: list[str]) -> None:
    program = f"import sys, {package}; print(*[name for name in {absent!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == ""
