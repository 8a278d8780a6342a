"""`int4-push`: the command line that publishes a checkpoint."""

import dataclasses
import json
from pathlib import Path

import click

from converter.push import Upload
from formats import __version__
from formats.checkpoint import Checkpoint
from formats.command import Command, echo, quiet_option, run

EXAMPLES = {
    "Publish it": "int4-push out me/Qwen3-0.6B-int4",
    "For yourself alone": "int4-push out me/Qwen3-0.6B-int4 --private",
}


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="Make the repository, if there is none, for yourself alone.")
@click.option("--create-pr", is_flag=True, help="Make a pull request instead of a commit.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print the repository and where the commit is to see as JSON.")
@click.version_option(__version__)
def command(folder: Path, repo_id: str, private: bool, create_pr: bool, quiet: bool, as_json: bool) -> None:
    """Publish the int4 checkpoint in FOLDER as the Hub repository REPO_ID, with a model card, in one commit.

    Run again after any stop it sends what the Hub does not have yet.
    """
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    with Upload(repo_id, private=private, create_pr=create_pr, quiet=quiet) as upload:
        published = upload.commit(folder, checkpoint.manifest)
    if as_json:
        echo(json.dumps(dataclasses.asdict(published)))
    elif not quiet:
        echo(str(published))


def main() -> None:
    """Entry point of `int4-push`."""
    run(command, once_stopped="; the same command sends what the Hub does not have yet")
