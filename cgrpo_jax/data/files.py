"""Rows of a local file: .jsonl, .json, .parquet or .csv, UTF-8 whatever the locale says; a bad one in its place."""

from __future__ import annotations

import csv
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from cgrpo_jax.data.cells import RowError, plain
from cgrpo_jax.workdir.places import expanded

FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_BOM = b"\xef\xbb\xbf"
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[][{},]', re.DOTALL)

Row = Mapping[str, Any] | RowError


def local_file(source: str) -> pathlib.Path | None:
    """The file that a source names (`~` is the home folder), whether it is there or not; None for what names none."""
    path = expanded(source)
    return path if path.suffix.lower() in FILE_SUFFIXES else None


def file_rows(path: pathlib.Path) -> Iterator[tuple[int, Row]]:
    """(line or row number from 1, row) of a local file; an unreadable row is an error in its place.

    Raises:
      OSError, ValueError, csv.Error: the file as a whole cannot be read.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        yield from enumerate(with_shortest(table.to_pylist(), table.schema), 1)
    elif kind == ".csv":
        yield from enumerate(_rows_of_csv(path), 1)
    elif kind == ".json":
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        yield from enumerate(_rows_of_json(text), 1)
    else:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(_BOM) if number == 1 else line
                if line.strip():
                    yield number, _row_of_line(line)


def with_shortest(rows: Iterable[Mapping[str, Any]], schema: Any) -> Iterator[Mapping[str, Any]]:
    """Rows of an Arrow schema; of floats of 16 and 32 bits the shortest decimal, as 0.1."""
    short = {field.name: convert for field in schema if (convert := _shortest(field.type)) is not None}
    for row in rows:
        yield {name: short[name](value) if name in short else value for name, value in row.items()} if short else row


def _shortest(kind: Any) -> Callable[[Any], Any] | None:
    """What turns the values of an Arrow type into shortest decimals; None where there is nothing to do."""
    import pyarrow.types as types

    if types.is_float16(kind) or types.is_float32(kind):
        scalar = kind.to_pandas_dtype()
        return lambda value: None if value is None else plain(scalar(value))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        part = _shortest(kind.value_type)
        return part and (lambda values: None if values is None else [part(value) for value in values])
    if types.is_struct(kind):
        fields = {field.name: convert for field in kind if (convert := _shortest(field.type)) is not None}
        return lambda values: values and values | {name: convert(values[name]) for name, convert in fields.items()}
    return None


def _rows_of_csv(path: pathlib.Path) -> Iterator[Row]:
    """A cell may be of any length. One whose quotation mark is never closed holds all rows behind it, and says so."""
    csv.field_size_limit(2**31 - 1)
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.DictReader(file, strict=True)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                why = "a quotation mark is never closed" if "end of data" in str(error) else str(error)
                yield RowError("-", f"cannot be read ({why})")
            else:
                yield RowError("-", "more cells than the header names") if None in row else row


def _row_of_line(line: bytes) -> Row:
    try:
        return _row(line.decode())
    except UnicodeDecodeError as error:
        return RowError("-", f"cannot be read: byte {error.start + 1} is no UTF-8 ({error.object[error.start]:#04x})")


def _row(text: str) -> Row:
    """A JSON object, or what is wrong with it: also lists within lists without end, a number of thousands of digits."""
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        return RowError("-", f"not valid JSON ({error})")
    except (ValueError, RecursionError) as error:
        return RowError("-", f"JSON that cannot be read ({str(error).split(';')[0][:100]})")
    return row if isinstance(row, dict) else RowError("-", "not a JSON object")


def _rows_of_json(text: str) -> list[Row]:
    """Of a list of rows, or of an object that holds one list. Raises ValueError for anything else."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        return [_row(line) for line in text.split("\n") if line.strip()]  # .jsonl under another name
    except (ValueError, RecursionError):  # of one row, perhaps
        return [_row(element) for element in _elements(text)]
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise ValueError(f"an object with {len(lists)} lists; a list of rows, or an object with one, is needed")
        whole = lists[0]
    if not isinstance(whole, list):
        raise ValueError(f"a list of rows is needed, not {type(whole).__name__}")
    return [row if isinstance(row, dict) else RowError("-", "not a JSON object") for row in whole]


def _elements(text: str) -> Iterator[str]:
    """The texts between the commas of the outermost list."""
    depth, start = 0, 0
    outer: int | None = None
    for match in _TOKEN.finditer(text):
        if match[0] in ("[", "{"):
            depth += 1
            if outer is None and match[0] == "[":
                outer, start = depth, match.end()
        elif match[0] in ("]", "}", ","):
            if depth == outer:
                if text[start : match.start()].strip():
                    yield text[start : match.start()]
                start = match.end()
            depth -= match[0] != ","
            if outer is not None and depth < outer:
                return
