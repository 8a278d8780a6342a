import sys
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import EXAMPLE, SHARED

from formats import texts
from formats.errors import CheckpointError, TemporaryError, UsageError

WIKITEXT = SHARED / "data" / "wiki.test.raw"
TEST, TRAIN = texts.DATASETS["wikitext2"], texts.CALIBRATION_DATASETS["wikitext2"]


def offer(folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> Path:
    """Have the archive of WikiText be one of `files`, compressed by nothing, so that its bytes are there to be seen."""
    with zipfile.ZipFile(folder / texts.WIKITEXT_ZIP, "w") as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)
    monkeypatch.setattr(texts, "download", lambda *args, **kwargs: folder)
    return folder / texts.WIKITEXT_ZIP


def test_a_split_that_is_not_the_official_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(tmp_path, monkeypatch, {TEST.member: b"other words\n"})
    with pytest.raises(CheckpointError, match=r"wiki\.test\.raw is not the official file"):
        texts.wikitext2(TEST)


@pytest.mark.skipif(not WIKITEXT.exists(), reason="the official file is not here")
def test_the_official_split_is_joined_as_the_protocol_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(tmp_path, monkeypatch, {TEST.member: WIKITEXT.read_bytes()})
    text = texts.wikitext2(TEST)
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English")
    assert len(text.split("\n\n")) == 4358


def test_the_split_to_calibrate_with_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(tmp_path, monkeypatch, {TEST.member: b"test\n", TRAIN.member: b" \n train\n"})
    assert texts.calibration_text("wikitext2") == "\n\n train\n"


def test_a_damaged_split_of_no_known_hash_is_found_by_the_sum_of_its_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = offer(tmp_path, monkeypatch, {TRAIN.member: b"many words\n"})
    archive.write_bytes(archive.read_bytes().replace(b"many", b"main"))
    with pytest.raises(CheckpointError, match=r"wiki\.train\.raw cannot be read \(BadZipFile Bad CRC-32.*delete /"):
        texts.calibration_text("wikitext2")


def test_an_archive_without_the_split_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(tmp_path, monkeypatch, {"README": b""})
    with pytest.raises(CheckpointError, match=r"wiki\.test\.raw cannot be read \(KeyError"):
        texts.wikitext2(TEST)


def test_what_is_no_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(tmp_path, monkeypatch, {}).write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match=r"cannot be read \(BadZipFile"):
        texts.wikitext2(TEST)


def test_a_dataset_that_cannot_be_fetched_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(repo_id: str, **options: object) -> Path:
        raise TemporaryError(f"{repo_id}: the Hub cannot be reached")

    monkeypatch.setattr(texts, "download", offline)
    with pytest.raises(TemporaryError, match="wikitext2, in the repository ggml-org/ci: the Hub cannot be reached"):
        texts.wikitext2(TEST)


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


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": '{"version": "1.0"}'}], ids=["none", "broken"])
def test_a_folder_without_a_tokenizer_says_what_to_copy(tmp_path: Path, files: dict[str, str]) -> None:
    pytest.importorskip("transformers")
    for name, text in {"config.json": (EXAMPLE / "config.json").read_text(), **files}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match="holds no tokenizer that transformers can load .*; copy tokenizer.json"):
        texts.load_tokenizer(tmp_path)


def test_an_empty_text_is_called_empty() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UsageError, match="the text is empty"):
        texts.windows_of(texts.tokenize(EXAMPLE, ""), 8)


def test_a_text_that_is_too_short_could_be_longer() -> None:
    with pytest.raises(UsageError, match="5 tokens, too few for a window of 8; give a longer text, or lower --seq-len"):
        texts.windows_of(torch.arange(5), 8)
