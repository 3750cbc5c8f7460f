"""A file -> its lines or JSON records, read with a bound on memory; a folder -> its parts.

Design: a record is held in memory only up to `MAX_RECORD_BYTES`, so that one broken 100 MB line costs 16 MiB and one
line of `rejected.jsonl`. Encodings and compressions that are not read are named, not taken for broken text.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from oppu_ray.core import Rejected
from oppu_ray.formats.raw import MAX_VALUE_CHARS, short, user_name
from oppu_ray.values import kind_of

MAX_RECORD_BYTES = 16 * 2**20
CHUNK = 2**20
GZIP = b"\x1f\x8b"
UTF_16 = b"\xff\xfe"
NOT_READ = {
    b"\xff\xfe\0\0": "UTF-32 text: iconv -f UTF-32 -t UTF-8",
    UTF_16: "UTF-16 text: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16 text: iconv -f UTF-16 -t UTF-8",
    b"BZh": "compressed by bzip2: bunzip2",
    b"\xfd7zXZ\0": "compressed by xz: unxz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unzstd",
    b"\x04\x22\x4d\x18": "compressed by lz4: unlz4",
    b"PK\x03\x04": "a zip archive (or an Excel sheet, to be saved as CSV): unzip",
    b"PAR1": "a Parquet file: name it .parquet",
    b"SQLite format 3": "an SQLite database: export the table as CSV",
}
"""First bytes of files that are not text in UTF-8: what they are, and how to make them so."""


def suffix_of(path: Path) -> str:
    """The suffix that says what is in a file, in lower case and without `.gz`: ".csv" for DATA.CSV.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return (suffixes[:-1] if suffixes[-1:] == [".gz"] else suffixes)[-1:][0] if suffixes else ""


def parts_of(path: Path) -> list[Path]:
    """The files of a folder of parts in the order of their names, hidden ones left out; a file is its own part."""
    if not path.is_dir():
        return [path]
    found = sorted(part for part in path.rglob("*") if part.is_file())
    return [part for part in found if not any(name[0] in "._" for name in part.relative_to(path).parts)]


def open_binary(path: Path) -> IO[bytes]:
    """The bytes of a file, decompressed where it is gzip, whatever its name.

    Raises:
        ValueError: It cannot be read, or it is neither text in UTF-8 nor gzip.
    """
    try:
        stream: IO[bytes] = path.open("rb")
        head = stream.read(1024)
        stream.seek(0)
        if head.startswith(GZIP):
            stream = gzip.open(stream)  # type: ignore[assignment]
            head = _peek(stream)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    for magic, what in NOT_READ.items():
        if head.startswith(magic):
            raise ValueError(f"{path}: expected text in UTF-8, plain or gzipped; this file is {what}")
    if len(head) > 3 and {head[0:4:2], head[1:4:2]} & {b"\0\0"}:
        raise ValueError(f"{path}: expected text in UTF-8; this file is {NOT_READ[UTF_16]}")
    return stream


def _peek(stream: Any) -> bytes:
    try:
        head: bytes = stream.peek(1024)[:1024]
        return head
    except (EOFError, OSError, zlib.error):  # named where the lines are read
        return b""


def bounded_lines(path: Path) -> Iterator[tuple[int, str | Rejected]]:
    """(line number from 1, line) of a text file, plain or gzipped; a line over the limit is skipped, not held.

    Invalid UTF-8 bytes arrive as lone surrogates, so that the check of the text can name the user they belong to.
    """
    number = 0
    with open_binary(path) as stream:
        while True:
            number += 1
            try:
                line = stream.readline(MAX_RECORD_BYTES + 1)
                if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                    size = len(line)
                    while (more := stream.readline(2**20)) and not more.endswith(b"\n"):
                        size += len(more)
                    head = line[:4096].decode("utf-8", "surrogateescape")
                    reason = f"The line has {size + len(more)} bytes; expected at most {MAX_RECORD_BYTES}."
                    yield number, Rejected(str(path), number, guess_user(head), short(head), reason)
                    continue
            except (EOFError, OSError, zlib.error) as error:
                yield number, Rejected(str(path), number, None, "", f"The file is unreadable from here on: {error}.")
                return
            if not line:
                return
            yield number, line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode("utf-8", "surrogateescape")


def json_lines(path: Path) -> Iterator[tuple[int, Any | Rejected]]:
    """(line number, value) of a file of one JSON value a line; blank lines are left out."""
    for number, line in bounded_lines(path):
        if isinstance(line, Rejected):
            yield number, line
            continue
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            what = "it holds a NUL byte" if "\0" in line else json_fault(error)
            yield (
                number,
                Rejected(str(path), number, guess_user(line), short(line), f"The line is not valid JSON: {what}."),
            )


def json_file(path: Path) -> Any:
    """The value of a file that is one JSON value.

    Raises:
        ValueError: It cannot be read or is not valid JSON.
    """
    try:
        with open_binary(path) as stream:
            return json.load(stream)
    except (EOFError, OSError, RecursionError, ValueError, zlib.error) as error:
        reason = str(error) if str(path) in str(error) else f"{path}: expected JSON: {json_fault(error)}"
        raise ValueError(reason) from error


def json_array(path: Path) -> Iterator[dict[str, Any] | Rejected]:
    """The objects of a file that is one JSON list, one at a time; a broken one is `Rejected` and ends the file."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a JSON list")
    with open_binary(path) as binary:
        stream = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape")
        text = _read_more(stream, CHUNK)
        if not text.lstrip().startswith("["):
            raise ValueError(f"{path}: expected a JSON list, it starts with {short(text[:MAX_VALUE_CHARS])!r}")
        decoder, start, number = json.JSONDecoder(), text.index("[") + 1, 1
        while True:
            while start < len(text) and text[start] in ", \t\r\n":
                start += 1
            if text.startswith("]", start):
                return
            try:
                value, start = decoder.raw_decode(text, start)
            except (ValueError, RecursionError) as error:
                text = text[start:]
                more = _read_more(stream, max(CHUNK, len(text))) if len(text) < MAX_RECORD_BYTES else ""
                if more:  # the record may only be cut by the end of what was read; try again with twice as much
                    text, start = text + more, 0
                    continue
                fault = f"broken, cut off or over {MAX_RECORD_BYTES} characters: {json_fault(error)}"
                reason = f"Record {number} of the list is {fault}; the rest is not read."
                yield Rejected(str(path), None, guess_user(text), short(text), reason)
                return
            if isinstance(value, dict):
                yield value
            else:
                reason = f"Record {number} of the list is {kind_of(value)}; expected an object."
                yield Rejected(str(path), None, None, short(value), reason)
            number += 1


def is_json_list(path: Path) -> bool:
    with open_binary(path) as stream:
        return _peek(stream).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _read_more(stream: io.TextIOWrapper, size: int) -> str:
    """Up to `size` characters; nothing where the file ends or cannot be read on (a cut .gz)."""
    try:
        return stream.read(size)
    except (EOFError, OSError, zlib.error):
        return ""


def guess_user(text: str) -> str | None:
    """The user id in the first characters of a record that cannot be parsed, to name it in the error."""
    found = re.search(r'"user_id"\s*:\s*(?:"([^"\\]{1,1024})"|(\d{1,20}))', text[:4096])
    return user_name(found[1] or found[2]) if found else None


def json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (character {error.pos})"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
