"""How the commands explain themselves: help, completion, `python -m`."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

import converter.cli
import converter.export_cli
import converter.push_cli
import formats.cli
import runtime.cli
from formats.command import Command, quiet_option, run

ROOT = Path(__file__).parents[1]

COMMANDS = {
    "int4-convert": converter.cli.command,
    "int4-export": converter.export_cli.command,
    "int4-push": converter.push_cli.command,
    "int4-inspect": formats.cli.command,
    "int4-eval": runtime.cli.command,
}


def toy(**groups: tuple[str, ...]) -> Command:
    @click.command(cls=Command, groups=groups, examples={"Say it twice": "toy --times 2"})
    @click.option("--times", default=1, help="How often.")
    @click.option("--a-name-that-is-too-long-for-the-column", is_flag=True, help="Below.")
    @quiet_option
    def command(times: int, a_name_that_is_too_long_for_the_column: bool, quiet: bool) -> None:
        """Say something."""

    return command


def help_of(command: click.Command) -> str:
    return CliRunner().invoke(command, ["--help"]).output


def test_help_has_options_under_headings_and_examples_to_copy() -> None:
    assert help_of(toy(Loudness=("--times", "--quiet"))).split("\n\n")[2:] == [
        "Loudness:\n"
        "  --times INTEGER  How often.  [default: 1]\n"
        "  --quiet          Print nothing but warnings and errors, and what --json asks\n                   for.",
        "Other options:\n"
        "  --a-name-that-is-too-long-for-the-column\n"
        "                   Below.\n"
        "  -h, --help       Show this message and exit.",
        "Examples:\n  # Say it twice\n  toy --times 2\n",
    ]


def test_a_group_names_no_option_that_is_gone() -> None:
    with pytest.raises(ValueError, match="--volume"):
        toy(Loudness=("--volume",))


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_right(name: str) -> None:
    """Every example parses, as the command that it is of."""
    command = COMMANDS[name]
    for line in command.examples.values():
        words = shlex.split(line.partition("|")[0])
        assert words[0] == name
        for word in words[1:]:
            assert not word.startswith("--") or any(word in param.opts for param in command.params)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    assert [p.name for p in COMMANDS[name].params if isinstance(p, click.Option) and not p.help] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_alone_explains_itself_and_ends_with_2(name: str) -> None:
    result = CliRunner().invoke(COMMANDS[name], [])
    assert (result.exit_code, "Examples:" in result.output) == (2, True)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_option_says_what_to_do(name: str) -> None:
    result = CliRunner().invoke(COMMANDS[name], ["--quite", "x", "y"])
    assert (result.exit_code, "--quiet" in result.output, "-h" in result.output) == (2, True, True)


@pytest.mark.parametrize(
    ("package", "name"), [("converter", "MODEL"), ("formats", "FOLDER"), ("runtime", "CHECKPOINT")]
)
def test_every_package_is_a_command(package: str, name: str) -> None:
    done = subprocess.run([sys.executable, "-m", package, "-h"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"Usage: python -m {package} [OPTIONS] {name}")


SCRIPTS = dict(
    re.findall(r'^(int4-\w+) = "(formats\.entry:\w+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
)
BEGINNINGS = {
    name: ["-c", f"from {entry.replace(':', ' import ')} as begin; begin()"] for name, entry in SCRIPTS.items()
} | {f"python -m {package}": ["-m", package] for package in ("converter", "formats")}


@pytest.mark.parametrize("name", [*COMMANDS, "python -m converter", "python -m formats"])
@pytest.mark.parametrize(
    ("signum", "end"), [(signal.SIGINT, (130, "interrupted\n")), (signal.SIGTERM, (143, "terminated\n"))]
)
def test_a_signal_while_a_command_imports_its_parts_ends_it_with_a_word(
    tmp_path: Path, name: str, signum: signal.Signals, end: tuple[int, str]
) -> None:
    program = "import time\nprint('importing', flush=True)\ntry:\n    time.sleep(9)\nexcept BaseException:\n    0\n"
    (tmp_path / "torch.py").write_text(program)  # which swallows what is raised in it
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, *BEGINNINGS[name], "x", "y"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signum)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == end


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("asked", ["bash_source", "zsh_source", "bash_complete"])
def test_what_a_shell_asks_at_every_start_is_answered_without_another_word(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str, asked: str
) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # else click takes the name for pytest's
    variables = {f"_{name.replace('-', '_').upper()}_COMPLETE": asked, "COMP_WORDS": f"{name} --", "COMP_CWORD": "1"}
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(signal, "signal", lambda *rest: None)  # pytest's handlers stay
    with pytest.raises(SystemExit) as exit_info:
        run(COMMANDS[name], once_stopped="; the same again")
    printed = capfd.readouterr()
    assert (exit_info.value.code, bool(printed.out), printed.err) == (0, True, "")


def test_the_shell_is_told_how_to_complete() -> None:
    """What README has people put into their shell's start-up file, and what the shell asks then."""

    def answer(**variables: str) -> str:
        program = "import sys; sys.argv = ['int4-inspect']; from formats.entry import inspect; inspect()"
        environment = os.environ | variables
        return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True).stdout

    assert "complete -o nosort -F _int4_inspect_completion int4-inspect" in answer(_INT4_INSPECT_COMPLETE="bash_source")
    words = {"COMP_WORDS": "int4-inspect --ver", "COMP_CWORD": "1"}
    assert answer(_INT4_INSPECT_COMPLETE="bash_complete", **words) == "plain,--verify\nplain,--version\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_folders_complete_where_they_may_stand(name: str) -> None:
    completion = ShellComplete(COMMANDS[name], {}, name, "_COMPLETE")
    assert [item.type for item in completion.get_completions([], "ex")] == ["dir"]
