"""A fuzz target for what reads bytes of strangers: the header of a safetensors file, and the manifest.

Either may refuse its input with `CheckpointError`, and nothing else may come out. Mutates the golden files.

Run: PYTHONPATH=.:tests python tests/fuzz_parsers.py [--rounds 100000] [--seed 0]
"""

import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import click

from formats.container import parse_header
from formats.errors import CheckpointError
from formats.manifest import MANIFEST_NAME, read_manifest

DATA = Path(__file__).parent / "data"
WORDS = (b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b"-1", b"1e999", b"9" * 40, b"NaN", b"\\u0000",
         b"\xff", b"[" * 3000, b'"shape"', b'"data_offsets"', b'"dtype":"F32"', b'"__metadata__"')  # fmt: skip


def one_header(data: bytes) -> None:
    """Parse `data` as a safetensors file."""
    with suppress(CheckpointError):
        parse_header(lambda count: data[:count], len(data), "fuzzed")


def one_manifest(data: bytes, folder: Path) -> None:
    """Parse `data` as a manifest."""
    (folder / MANIFEST_NAME).write_bytes(data)
    with suppress(CheckpointError):
        read_manifest(folder)


def mutated(data: bytes, chances: random.Random) -> bytes:
    """`data` with a few bytes flipped, cut, doubled, or words of JSON put in."""
    found = bytearray(data)
    for _ in range(chances.randint(1, 4)):
        place = chances.randrange(len(found) + 1)
        kind = chances.randrange(4)
        if kind == 0 and place < len(found):
            found[place] ^= 1 << chances.randrange(8)
        elif kind == 1:
            del found[place : place + chances.randint(1, 40)]
        elif kind == 2:
            found[place:place] = found[place : place + chances.randint(1, 40)]
        else:
            found[place : place + chances.randint(0, 8)] = chances.choice(WORDS)
    return bytes(found)


def fuzz(rounds: int, seed: int) -> None:
    """Give both parsers `rounds` mutations of each file."""
    chances = random.Random(seed)
    shard = next((DATA / "asymmetric").glob("model-00001*")).read_bytes()
    manifests = [(DATA / kind / MANIFEST_NAME).read_bytes() for kind in ("asymmetric", "transposed")]
    with tempfile.TemporaryDirectory() as name:
        targets: list[tuple[bytes, Callable[[bytes], None]]] = [
            (shard, one_header),
            *((manifest, lambda data: one_manifest(data, Path(name))) for manifest in manifests),
        ]
        for _ in range(rounds):
            for whole, target in targets:
                target(mutated(whole, chances))


@click.command(help=__doc__)
@click.option("--rounds", default=100_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(rounds: int, seed: int) -> None:
    """Print how many inputs each parser has survived."""
    fuzz(rounds, seed)
    print(f"{rounds} headers and twice as many manifests: nothing but CheckpointError")


if __name__ == "__main__":
    main()
