"""Rows of a data file, whatever its format: what it holds decides before what it is called.

A file that is not understood is refused: sent line by line as text, a table would measure something else unnoticed.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loadtest.errors import LoadTestError

Row = tuple[str, Any]
"""Where a row is, for messages (``file.csv:7``), and what it is: a text, or an object by its columns."""

_INSTALL = "pip install 'vllm-pareto[loadtest]'"
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
_PARQUET = b"PAR1"


def optional(module: str, why: str) -> Any:
    """Import a package that only some inputs need.

    Raises:
        LoadTestError: it is not installed; the message says how to install it.

    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LoadTestError(f"{why} needs {module.partition('.')[0]}: {_INSTALL}") from error


def iter_rows(path: Path, flag: str) -> Iterator[Row]:
    """Yield the rows of a file: a text for each line of a ``.txt``, else an object or a text for each row.

    Traces have millions of rows, which fit into memory as requests but not as rows.

    Args:
        path: a ``.txt``, ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file; upper case is as good. Parquet
            is known by its first bytes, whatever its name; a name without a suffix is understood by what is in it.
        flag: the flag it was given to, for the error.

    Raises:
        LoadTestError: it is missing, empty, or of no format that is known; one line says which and where.

    """
    where = f"{flag} {path}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LoadTestError(f"{where}: {error.strerror or error}") from error
    for magic, name in _PACKED.items():
        if data.startswith(magic):
            raise LoadTestError(f"{where}: the file is packed ({name}); unpack it first")
    suffix = path.suffix.lower()
    if data.startswith(_PARQUET) or suffix == ".parquet":
        rows = _parquet(path, data, where)
    else:
        text = _decode(data, where)
        reader = READERS.get(suffix) if suffix else _guess(text)
        if reader is None:
            raise LoadTestError(f"{where}: unknown format {suffix!r}; expected {', '.join(READERS)} or .parquet")
        rows = reader(text, where)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise LoadTestError(f"{where}: no rows in the file")


def _decode(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LoadTestError(f"{where}: not UTF-8 text: {error}") from error
    if "\0" in text:
        raise LoadTestError(f"{where}: a binary file; expected {', '.join(READERS)} or .parquet")
    return text


def _guess(text: str) -> Callable[[str, str], Iterator[Row]]:
    if text.lstrip().startswith(("[", "{")):
        return _json
    return _text


def _text(text: str, where: str) -> Iterator[Row]:
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if lines and (all(_is_object(line) for _, line in lines) or _is_list(text)):
        raise LoadTestError(f"{where}: holds JSON, which would be sent as text; name it .jsonl or .json")
    for number, line in lines:
        yield f"{where}:{number}", line


def _is_object(line: str) -> bool:
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _is_list(text: str) -> bool:
    try:
        return text.lstrip().startswith("[") and isinstance(json.loads(text), list)
    except ValueError:
        return False


def _json_lines(text: str, where: str) -> Iterator[Row]:
    # Not splitlines: JSON may hold U+2028 and the like as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{where}:{number}", json.loads(line)
        except ValueError:
            raise LoadTestError(f"{where}:{number}: not JSON") from None


def _json(text: str, where: str) -> Iterator[Row]:
    try:
        data = json.loads(text)
    except ValueError as error:
        # Many data sets call JSON Lines .json.
        if _is_object(text.lstrip().partition("\n")[0].strip()):
            yield from _json_lines(text, where)
            return
        raise LoadTestError(f"{where}: not JSON: {error}") from None
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list)]
        # An object may wrap the rows, as {"data": [...]} does; one that has columns itself is the only row.
        wrapped = len(lists) == 1 and len(data) == 1 and all(isinstance(each, dict) for each in lists[0])
        data = lists[0] if wrapped and "messages" not in data and "conversations" not in data else [data]
    if not isinstance(data, list):
        raise LoadTestError(f"{where}: expected a list of objects or texts")
    for number, row in enumerate(data, 1):
        yield f"{where}: row {number}", row


def _csv(delimiter: str) -> Callable[[str, str], Iterator[Row]]:
    def read(text: str, where: str) -> Iterator[Row]:
        csv.field_size_limit(sys.maxsize)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise LoadTestError(f"{where}:1: a column name comes twice")
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise LoadTestError(
                        f"{where}:{reader.line_num}: {len(fields)} fields, but the header has {len(header)}"
                    )
                yield f"{where}:{reader.line_num}", dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise LoadTestError(f"{where}:{reader.line_num}: {error}") from None

    return read


def _parquet(path: Path, data: bytes, where: str) -> Iterator[Row]:
    if not data.startswith(_PARQUET):
        raise LoadTestError(f"{where}: not a Parquet file")
    parquet = optional("pyarrow.parquet", f"{where}: Parquet")
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise LoadTestError(f"{where}: {' '.join(str(error).split())[:200]}") from error
    rows = (row for batch in table.to_batches() for row in batch.to_pylist())
    for number, row in enumerate(rows, 1):
        yield f"{where}: row {number}", row


READERS: dict[str, Callable[[str, str], Iterator[Row]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv(","),
    ".tsv": _csv("\t"),
}


def hub_rows(name: str, subset: str | None, split: str) -> list[Row]:
    """Return all rows of a split of a data set on the Hugging Face Hub, or in a local folder of one.

    Raises:
        LoadTestError: ``datasets`` is not installed, or it cannot load this.

    """
    where = f"--prompts hf:{name}"
    datasets = optional("datasets", where)
    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # It raises whatever the file system, the network and the formats do.
        raise LoadTestError(f"{where}: {' '.join(str(error).split())[:300]}") from error
    return [(f"{where}: row {number}", row) for number, row in enumerate(loaded, 1)]


def whole_number(value: Any, where: str, column: str, least: int = 1) -> int | None:
    """Return a count from a row, None where it has none: text of CSV, and floats of columns with gaps, are understood.

    Raises:
        LoadTestError: it is there, and is no whole number from ``least`` on.

    """
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise LoadTestError(f"{where}: {column} must be a whole number, at least {least}, not {value!r}")
    return number
