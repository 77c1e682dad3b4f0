"""Files that survive a kill at any instant.

* :func:`write_atomic` — whole files: temporary name, fsync, rename.
* :class:`Journal` / :func:`read_lines` — append-only JSON lines; a reader goes on from a byte cursor and stops at a torn tail.
* :class:`SegmentWriter` / :class:`SegmentReader` — tables of readings in Arrow streams that grow; the same holds for them.
* :func:`dump_object` / :func:`load_dumped` — Python objects by cloudpickle, opened only from the owner's own files.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from workbench.errors import RunError

if TYPE_CHECKING:
    import pyarrow as pa


def write_atomic(path: Path, content: bytes | str | Callable[[BinaryIO], None], *, durable: bool = True) -> None:
    """Replace ``path`` as a whole: a reader sees the old content or the new, never a part.

    Args:
        content: the bytes, the text, or a function that writes to the open file.
        durable: survive a power cut too (fsync); off for what is rewritten every second.

    Raises:
        RunError: the disk is full.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise as_run_error(error, path) from error
        raise
    if durable:
        fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """fsync every file below ``folder``, then the folders."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            fsync_folder(path)
    fsync_folder(folder)


def as_run_error(error: OSError, path: Path) -> OSError | RunError:
    """A full disk or quota in words; any other error as it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return RunError(
            f"The disk that holds {path.parent} is full ({error.strerror}).",
            "Free some space (old runs and checkpoints lie there), then resume the run: it goes on from its last checkpoint.",
        )
    return error


class Journal:
    """An append-only file of lines; each line is written whole by one call, or taken back.

    A tail torn by a kill is cut off when the journal is opened again, so readers' cursors, which never pass a torn tail,
    stay valid. One process writes one journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._size = _end_of_last_line(self._descriptor)
        os.ftruncate(self._descriptor, self._size)

    def append(self, line: str, *, durable: bool = False) -> None:
        """Write one line; with ``durable``, return only once it would survive a power cut."""
        written = _append(self._descriptor, line.encode() + b"\n", self._size, self.path)
        if durable:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                os.ftruncate(self._descriptor, self._size)
                raise as_run_error(error, self.path) from error
        self._size += written

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _end_of_last_line(descriptor: int) -> int:
    """Byte offset just past the last newline, 0 without one."""
    size = os.fstat(descriptor).st_size
    block = 1 << 16
    while size > 0:
        start = max(0, size - block)
        found = os.pread(descriptor, size - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        size = start
    return 0


def read_lines(path: Path, cursor: int = 0) -> tuple[list[bytes], int]:
    """Complete lines of a journal from a byte cursor, and the cursor to go on from."""
    try:
        with path.open("rb") as file:
            file.seek(cursor)
            content = file.read()
    except FileNotFoundError:
        return [], cursor
    end = content.rfind(b"\n") + 1
    return content[:end].splitlines(), cursor + end


class SegmentWriter:
    """Tables of readings, each appended by one call to the Arrow stream of its kind, or taken back.

    A stream is named by attempt, rank and its first step, ``KIND-a0001-r00000-s000000001.arrows``: a tail torn by a kill is never
    written on. Columns that differ from those before begin another stream. One process writes for a rank.
    """

    def __init__(self, folder: Path, attempt: int, rank: int) -> None:
        self.folder, self.attempt, self.rank = folder, attempt, rank
        self._streams: dict[str, _Stream] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, kind: str, table: pa.Table, step: int) -> Path:
        """Append ``table``, whose first step is ``step``; the file it is in.

        Raises:
            RunError: the disk is full.
        """
        stream = self._streams.get(kind)
        if stream is None or not stream.schema.equals(table.schema):
            if stream is not None:
                stream.close()
            path = self.folder / f"{kind}-a{self.attempt:04d}-r{self.rank:05d}-s{step:09d}.arrows"
            stream = self._streams[kind] = _Stream(path, table.schema)
        stream.append(table)
        return stream.path

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        for stream in self._streams.values():
            os.fsync(stream.descriptor)
        if self._streams:
            fsync_folder(self.folder)

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()


class _Stream:
    """A growing file in Arrow's stream format: the columns, then one message a table."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema, self._size = path, schema, 0
        self._begin()
        try:
            self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        except OSError as error:
            raise as_run_error(error, path) from error

    def _begin(self) -> None:
        import pyarrow as pa

        self._message = io.BytesIO()
        self._writer = pa.ipc.new_stream(self._message, self.schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))

    def append(self, table: pa.Table) -> None:
        for batch in table.combine_chunks().to_batches():
            self._writer.write_batch(batch)  # the first with the columns before it
        try:
            self._size += _append(self.descriptor, self._message.getvalue(), self._size, self.path)
        finally:
            self._message.seek(self._message.truncate(0))
            if not self._size:
                self._begin()

    def close(self) -> None:
        os.close(self.descriptor)


def _append(descriptor: int, content: bytes, size: int, path: Path) -> int:
    """Write ``content`` behind the ``size`` bytes there are, or cut the file off there; the bytes written.

    Raises:
        RunError: the disk is full.
    """
    try:
        written = os.write(descriptor, content)
        if written < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written
    except OSError as error:
        os.ftruncate(descriptor, size)
        raise as_run_error(error, path) from error


class SegmentReader:
    """Readings from a folder that :class:`SegmentWriter` writes or has written, each table once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, tuple[pa.Schema, int]] = {}
        """By file: its columns, and the byte up to which it has been read."""

    def read(self, kind: str) -> Iterator[tuple[int, int, pa.Table]]:
        """(attempt, rank, table) of each table of ``kind`` not yet read, by attempt, rank and step.

        Raises:
            pyarrow.ArrowInvalid, OSError: a table is whole and cannot be read.
        """
        for path in sorted(self._folder.glob(f"{glob.escape(kind)}-a[0-9]*-r[0-9]*-s[0-9]*.arrows")):
            _, attempt, rank, _ = path.stem.rsplit("-", 3)
            for table in self._new(path):
                yield int(attempt[1:]), int(rank[1:]), table

    def _new(self, path: Path) -> Iterator[pa.Table]:
        import pyarrow as pa

        schema, cursor = self._known.get(path.name, (None, 0))
        if path.stat().st_size <= cursor:
            return
        with pa.OSFile(str(path), "rb") as source:
            source.seek(cursor)
            while True:
                try:
                    message = pa.ipc.read_message(source)
                except (EOFError, OSError, pa.ArrowInvalid):
                    return  # the end, or what is not yet whole
                if schema is None:
                    schema = pa.ipc.read_schema(message)
                    self._known[path.name] = schema, source.tell()
                    continue
                table = pa.Table.from_batches([pa.ipc.read_record_batch(message, schema)])
                self._known[path.name] = schema, source.tell()
                yield table


def dump_object(value: Any, path: Path) -> None:
    """Keep a Python object, classes and functions of a notebook included.

    Raises:
        RunError: the object holds something that cannot be pickled.
    """
    import cloudpickle

    try:
        content = cloudpickle.dumps(value)
    except Exception as error:
        raise RunError(
            f"The {type(value).__name__} cannot be kept in the run folder: {error}.",
            "Put what makes it into a file, and name it: 'file.py:function'.",
        ) from error
    write_atomic(path, content)


def load_dumped(path: Path) -> Any:
    """What :func:`dump_object` kept.

    Raises:
        RunError: the file belongs to another user, or what it needs cannot be imported.
    """
    check_owner(path)
    try:
        with path.open("rb") as file:
            return pickle.load(file)  # noqa: S301 - of this user's own making
    except Exception as error:
        raise RunError(
            f"{path} cannot be opened: {type(error).__name__}: {error}.", "Run where its modules can be imported."
        ) from error


def check_owner(path: Path, *, trust: bool = False) -> None:
    """Refuse what another user wrote, unless trusted, where opening one can run code.

    Raises:
        RunError: the file or folder belongs to another user.
    """
    if trust or not hasattr(os, "getuid") or path.stat().st_uid == os.getuid():
        return
    raise RunError(
        f"{path} belongs to another user, and opening one can run code.",
        "If you trust its author, copy the run folder: the copy is yours.",
    )
