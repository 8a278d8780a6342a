"""Whether the wheel and the source distribution of a folder hold what they should, install, and run by themselves.

Each is installed into a new environment outside the checkout, from where the commands convert and verify the example
and the runtime loads it. torch and the other dependencies are those of the Python that runs this script, lent by a
.pth file: so they are not fetched again, but that pyproject.toml names all of them is not tested. Its lines lend no
editable installs, so nothing of the checkout can be imported; where the modules come from is checked too.

Run: python tests/check_dist.py dist
"""

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from formats import __version__

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "tiny-llama"
PACKAGES = ("formats", "converter", "runtime")
LOAD = """
import sys, torch, formats, converter, runtime
assert all(module.__file__.startswith(sys.prefix) for module in (formats, converter, runtime)), formats.__file__
assert runtime.load("out", device="cpu")(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
"""


def check_contents(wheel: Path) -> None:
    """The wheel must hold the files of the packages, all of them, and its own description: no tests, nothing else."""
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    if found != expected:
        sys.exit(f"{wheel}: lacks {sorted(expected - found)}, holds {sorted(found - expected)} beside the packages")


def check_run(distribution: Path, folder: Path) -> None:
    """Install `distribution` into a new environment in `folder`, and use it there."""
    home = folder / "venv"
    venv.create(home, with_pip=False)
    [packages] = home.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("-packages")))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def call(program: str | Path, *arguments: str | Path) -> str:
        return subprocess.check_output([home / "bin" / program, *arguments], cwd=folder, env=environment, text=True)

    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
    call(sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", *options, distribution.resolve())
    if (version := call("int4-convert", "--version").split()[-1]) != __version__:
        sys.exit(f"{distribution}: int4-convert says it is {version}, expected {__version__}")
    call("int4-convert", EXAMPLE, "out", "--quiet")
    call("int4-inspect", "out", "--verify")
    for command in ("int4-eval", "int4-export", "int4-push"):
        call(command, "--version")
    call("python", "-c", LOAD)


def main() -> None:
    """Check the two distributions in the folder that the command line names."""
    [folder] = map(Path, sys.argv[1:])
    [wheel], [source] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_contents(wheel)
    for distribution in (wheel, source):
        with tempfile.TemporaryDirectory() as temporary:
            check_run(distribution, Path(temporary))
        print(f"{distribution.name}: installs and runs outside the checkout")


if __name__ == "__main__":
    main()
