import sys
import zipfile
from pathlib import Path

import pytest
from checkpoints import SHARED

from formats import texts
from formats.errors import CheckpointError, UsageError

WIKITEXT = SHARED / "data" / "wiki.test.raw"


def offer(folder: Path, raw: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(folder / texts.WIKITEXT_ZIP, "w") as archive:
        archive.writestr(texts.WIKITEXT_TEST, raw)
    monkeypatch.setattr(texts, "download", lambda *args, **kwargs: folder)


def test_a_split_that_is_not_the_official_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(tmp_path, b"other words\n", monkeypatch)
    with pytest.raises(CheckpointError, match="not the official test split"):
        texts.wikitext2()


@pytest.mark.skipif(not WIKITEXT.exists(), reason="the official file is not here")
def test_the_official_split_is_joined_as_the_protocol_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(tmp_path, WIKITEXT.read_bytes(), monkeypatch)
    text = texts.wikitext2()
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English")
    assert len(text.split("\n\n")) == 4358


def test_rows_are_lines_with_blank_ones_empty() -> None:
    assert texts.join_rows(" \n = Title = \n \n Text .\n") == "\n\n = Title = \n\n\n\n\n Text .\n"


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read as UTF-8"):
        texts.read_text(tmp_path / "file")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbfwords\r\n")
    assert texts.read_text(tmp_path / "file") == "words\r\n"


def test_without_transformers_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UsageError, match=r"its model and tokenizer come through transformers.*pip install 'int4-convert\[hf\]'"
    ):
        texts.tokenize(tmp_path, "words")
