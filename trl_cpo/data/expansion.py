"""Files of pairs that are small on disk and huge in memory, or nested too deep: measured before anything reads them whole."""

import bz2
import gzip
import lzma
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

#: A file may unpack to this many bytes, whatever its size, and to this many times its size. JSON of real answers packs to a
#: tenth; thousands of equal rows to a fiftieth.
LARGEST, TIMES = 2**30, 50
#: No row of JSON may be nested deeper: from some 10,000 on pyarrow's reader ends the process.
DEEPEST = 1000
# Of larger files nothing is measured: they take as much room where they come from.
_MEASURED = 2**30
_CHUNK = 2**20
_ROWS = 8192


class Bomb(ValueError):
    """A file that unpacks to far more than its size, or is nested too deep; the message names it."""


def refuse_bombs(files: Iterable[str | Path]) -> None:
    """Raises `Bomb` for a file that unpacks to more than `LARGEST` and `TIMES` its size, or nests beyond `DEEPEST`.

    Packed, parquet, Arrow and JSON files are measured, in bounded memory. Damaged ones pass: their reader says what is
    wrong.
    """
    for file in map(Path, files):
        size = file.stat().st_size
        if size >= _MEASURED:
            continue
        limit = max(LARGEST, TIMES * size)
        try:
            fault = _fault(file, limit)
        except (OSError, EOFError, ValueError, lzma.LZMAError, zipfile.BadZipFile, struct.error, IndexError):
            continue
        if fault is not None:
            raise Bomb(f"The file {file}, of {size:,} bytes, {fault}")


def _too_large(limit: int) -> str:
    return (
        f"unpacks to more than {limit:,}: {TIMES} times its size at most is taken for pairs. If that is meant, unpack it into "
        "a .jsonl file yourself, and give that."
    )


def _fault(file: Path, limit: int) -> str | None:
    with file.open("rb") as stream:
        head = stream.read(6)
    if head.startswith(b"PAR1"):
        return None if _parquet_fits(file, limit) else _too_large(limit)
    if head.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(file) as packed:
            return None if sum(part.file_size for part in packed.infolist()) <= limit else _too_large(limit)
    if file.suffix == ".arrow":
        return None if _arrow_fits(file, limit) else _too_large(limit)
    opened = next((opened for magic, opened in _PACKED.items() if head.startswith(magic)), None)
    if opened is None and head.lstrip()[:1] not in (b"{", b"["):
        return None
    with file.open("rb") if opened is None else opened(file) as stream:
        return _stream_fault(stream, limit)


def _stream_fault(stream: IO[bytes], limit: int) -> str | None:
    depth, seen = _Depth(), 0
    while chunk := stream.read(_CHUNK):
        seen += len(chunk)
        if seen > limit:
            return _too_large(limit)
        if depth.deepest(chunk) > DEEPEST:
            return f"has a row that is nested more than {DEEPEST:,} deep. Leave that row out."
    return None


class _Depth:
    """How deep the lines of a JSON text are nested, chunk by chunk."""

    _ESCAPED = re.compile(rb"\\.", re.DOTALL)

    def __init__(self):
        # The line that has begun, and of what is left out of a long one: its depth, and whether it ends within a string.
        self._line, self._depth, self._inside = b"", 0, False

    def deepest(self, chunk: bytes) -> int:
        """Of the lines that end in the chunk, and of the one that it begins."""
        first, *others = (self._line + chunk).split(b"\n")
        deepest = self._measure(first)[0]
        if others:
            *whole, first = others
            self._depth, self._inside = 0, False
            deepest = max(deepest, *(self._measure(line)[0] for line in (*whole, first)))
        self._line = first
        if len(first) > 4 * _CHUNK:
            cut = len(first) - (len(first) - len(first.rstrip(b"\\"))) % 2  # an escaped character stays whole
            _, self._depth, self._inside = self._measure(first[:cut], exactly=True)
            self._line = first[cut:]
        return deepest

    def _measure(self, line: bytes, exactly: bool = False) -> tuple[int, int, bool]:
        """The greatest depth, and where the line ends: how deep, and whether within a string."""
        if not exactly and self._depth + line.count(b"[") + line.count(b"{") <= DEEPEST:  # the usual case, and quick
            return 0, 0, False
        parts = self._ESCAPED.sub(b"", line).split(b'"')
        # Every second part is within a string.
        text = np.frombuffer(b"".join(parts[self._inside :: 2]), dtype="u1")
        ends_inside = self._inside ^ (len(parts) % 2 == 0)
        opened, closed = (np.isin(text, np.frombuffer(signs, dtype="u1")).astype("i4") for signs in (b"[{", b"]}"))
        depths = self._depth + np.cumsum(opened - closed)
        return int(depths.max(initial=self._depth)), int(depths[-1]) if len(depths) else self._depth, ends_inside


def _zstd(file: Path) -> IO[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise OSError("no zstandard: nothing else can read the file either") from error
    return zstandard.open(file, "rb")


_PACKED: dict[bytes, Callable[[Any], IO[bytes]]] = {
    b"\x1f\x8b": gzip.open,  # type: ignore[dict-item]
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstd,
}


def _arrow_fits(file: Path, limit: int) -> bool:
    """Whether the packed buffers of an Arrow stream fit; of those that are not packed the file's size tells."""
    import pyarrow as pa

    seen = 0
    with pa.memory_map(str(file)) as source:
        for message in pa.ipc.MessageReader.open_stream(source):
            seen += sum(_packed_buffers(message.metadata.to_pybytes(), message.body))
            if seen > limit:
                return False
    return True


def _packed_buffers(metadata: bytes, body: Any) -> Iterator[int]:
    """The sizes of a message's packed buffers, unpacked. The message is a flatbuffer, the format is Arrow's Message.fbs."""

    def number(place: int, kind: str) -> int:
        return struct.unpack_from(f"<{kind}", metadata, place)[0]

    def field(table: int, index: int) -> int | None:
        vtable = table - number(table, "i")
        if 4 + 2 * index >= number(vtable, "H"):
            return None
        offset = number(vtable + 4 + 2 * index, "H")
        return table + offset if offset else None

    message = number(0, "I")
    kind, header = field(message, 1), field(message, 2)
    if kind is None or header is None or number(kind, "B") != 3:  # a record batch
        return
    batch = header + number(header, "I")
    buffers, compression = field(batch, 2), field(batch, 3)
    if buffers is None or compression is None:
        return
    vector = buffers + number(buffers, "I")
    for place in range(vector + 4, vector + 4 + 16 * number(vector, "I"), 16):
        offset, length = number(place, "q"), number(place + 8, "q")
        if length >= 8:
            # A packed buffer begins with its size; −1: it is not packed.
            yield max(struct.unpack("<q", body.slice(offset, 8).to_pybytes())[0], 0)


def _parquet_fits(file: Path, limit: int) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        groups = [parquet.metadata.row_group(number) for number in range(parquet.metadata.num_row_groups)]
        columns = [group.column(number) for group in groups for number in range(group.num_columns)]
        # A value takes its place at least: an index or an offset.
        told = sum(max(column.total_uncompressed_size, 4 * column.num_values) for column in columns)
        texts = [parquet.schema.column(number) for number in range(len(parquet.schema))]
        paths = [text.path for text in texts if text.physical_type == "BYTE_ARRAY"]
    if told > limit:
        return False
    # Repeated text stays an index into its dictionary, and is not unpacked to be measured.
    with pq.ParquetFile(file, read_dictionary=paths) as parquet:
        seen = 0
        try:
            for batch in parquet.iter_batches(batch_size=_ROWS):
                seen += sum(map(_unpacked, batch.columns))
                if seen > limit:
                    return False
        except (MemoryError, pa.ArrowException) as error:
            if isinstance(error, MemoryError):
                return False
            raise ValueError(str(error)) from error
    return True


def _unpacked(array: Any) -> int:
    """The bytes of an Arrow array whose repeated texts were written out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(array.type):
        lengths = pc.binary_length(array.dictionary).take(array.indices)
        return (pc.sum(lengths).as_py() or 0) + 4 * len(array)
    if pa.types.is_struct(array.type):
        return sum(map(_unpacked, array.flatten()))
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_map(array.type):
        return _unpacked(array.flatten() if not pa.types.is_map(array.type) else array.items) + 4 * len(array)
    return array.nbytes
