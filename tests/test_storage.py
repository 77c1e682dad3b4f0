"""Files that survive a kill at any instant: journals cut at any byte, whole files, segments, a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import RunError
from workbench.storage import Journal, SegmentReader, SegmentWriter, read_lines, write_atomic

LINES = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), max_size=30), max_size=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journals")


@settings(max_examples=200, deadline=None)
@given(lines=LINES, cut=st.floats(0, 1), more=LINES)
def test_a_journal_cut_at_any_byte_gives_its_complete_lines_and_goes_on(
    lines: list[str], cut: float, more: list[str], folder: Path
) -> None:
    path = folder / "journal"
    path.unlink(missing_ok=True)
    journal = Journal(path)
    for line in lines:
        journal.append(line)
    journal.close()
    whole = path.read_bytes()
    size = round(cut * len(whole))
    path.write_bytes(whole[:size])
    complete = whole[:size].count(b"\n")

    found, cursor = read_lines(path)
    assert [line.decode() for line in found] == lines[:complete]
    assert cursor == len(b"".join(line.encode() + b"\n" for line in lines[:complete]))

    journal = Journal(path)  # the torn tail goes
    for line in more:
        journal.append(line, durable=True)
    journal.close()
    rest, end = read_lines(path, cursor)
    assert [line.decode() for line in rest] == more
    assert end == path.stat().st_size
    assert read_lines(path, end) == ([], end)


@settings(max_examples=100, deadline=None)
@given(lines=LINES, writes=st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_a_reader_that_follows_sees_each_line_once_however_it_arrives(lines: list[str], writes: list[int], folder: Path) -> None:
    path = folder / "followed"
    content, seen, cursor = b"".join(line.encode() + b"\n" for line in lines), [], 0
    path.write_bytes(b"")
    with path.open("ab", buffering=0) as file:
        for size in [*writes, len(content)]:
            part, content = content[:size], content[size:]
            file.write(part)
            found, cursor = read_lines(path, cursor)
            seen += found
    assert [line.decode() for line in seen] == lines


def test_a_long_torn_tail_is_cut_at_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b'{"a":1}\n' + b"x" * 200_000)
    journal = Journal(path)
    assert path.read_bytes() == b'{"a":1}\n'
    journal.append("second")
    assert read_lines(path)[0] == [b'{"a":1}', b"second"]


def test_there_is_nothing_to_read_before_the_journal_exists(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "none", 0) == ([], 0)


WRITER = """
import sys
from pathlib import Path
from workbench.storage import Journal, write_atomic
path, kind = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
journal = Journal(path) if kind == "journal" else None
number = 0
while True:
    number += 1
    if kind == "journal":
        journal.append(f"{number}:" + "x" * (number % 5000))
    else:
        write_atomic(path, f"{number}:" + str(number % 10) * 100_000, durable=number % 10 == 0)
"""


@pytest.mark.parametrize("kind", ["journal", "whole"])
def test_a_writer_killed_at_any_instant_leaves_whole_lines_and_whole_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for pause in (0.002, 0.01, 0.03, 0.05, 0.08):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), kind], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        while not path.exists():
            time.sleep(0.001)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if kind == "journal":
            Journal(path).close()
            lines = read_lines(path)[0]
            assert all(line == f"{(n := int(line.split(b':')[0]))}:".encode() + b"x" * (n % 5000) for line in lines)
            numbers = [int(line.split(b":")[0]) for line in lines]
            assert all(b == a + 1 or b == 1 for a, b in zip(numbers, numbers[1:], strict=False))
        else:
            number, _, body = path.read_text().partition(":")
            assert body == str(int(number) % 10) * 100_000


def test_a_line_that_does_not_fit_the_disk_is_taken_back(tmp_path: Path) -> None:
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom workbench.storage import Journal\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "journal = Journal(Path(sys.argv[1]))\njournal.append('a' * 900)\n"
        "try:\n    journal.append('b' * 900)\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
        "journal.append('c' * 50)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "journal")], capture_output=True, text=True, check=True)
    assert (
        done.stdout.startswith("RunError The disk that holds") and "is full" in done.stdout and "Free some space" in done.stdout
    )
    assert read_lines(tmp_path / "journal")[0] == [b"a" * 900, b"c" * 50]


def test_a_file_that_fails_to_be_written_leaves_the_old_one_and_no_scrap(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", "old")

    def broken(file: object) -> None:
        file.write(b"new")  # type: ignore[attr-defined]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_atomic(tmp_path / "file", broken)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "none" / "file", "x")


def test_files_are_their_owners_alone(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", "x")
    Journal(tmp_path / "journal").close()
    SegmentWriter(tmp_path, 1, 0).write("memory", pa.table({"step": [1]}), 1)
    assert {path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {0}


def steps_of(reader: SegmentReader, kind: str = "gradients") -> list[tuple[int, int, list[int]]]:
    return [(attempt, rank, table["step"].to_pylist()) for attempt, rank, table in reader.read(kind)]


def test_segments_appear_whole_in_order_and_once(tmp_path: Path) -> None:
    reader = SegmentReader(tmp_path)
    assert steps_of(reader) == []
    for attempt, rank, step in [(2, 0, 5), (1, 0, 10), (1, 1, 10), (1, 0, 2)]:
        SegmentWriter(tmp_path, attempt, rank).write("gradients", pa.table({"step": [step]}), step)
    SegmentWriter(tmp_path, 1, 0).write("activations", pa.table({"step": [1]}), 1)
    assert steps_of(reader) == [(1, 0, [2]), (1, 0, [10]), (1, 1, [10]), (2, 0, [5])]
    SegmentWriter(tmp_path, 2, 0).write("gradients", pa.table({"step": [6]}), 6)
    assert steps_of(reader) == [(2, 0, [6])] and steps_of(reader) == []


def test_a_segment_grows_and_any_part_of_it_reads_as_the_tables_that_are_whole(tmp_path: Path) -> None:
    """A reader that meets every length of the file, as of a writer that is slow or was killed."""
    writer, other = SegmentWriter(tmp_path / "readings", 1, 0), tmp_path / "other"
    ends, tables = [], [pa.table({"step": [step] * 3, "layer": ["a", "b", "c"], "norm": [float(step)] * 3}) for step in range(3)]
    for step, table in enumerate(tables):
        path = writer.write("gradients", pa.concat_tables([table, table]), step)
        ends.append(path.stat().st_size)
    assert [file.name for file in (tmp_path / "readings").iterdir()] == ["gradients-a0001-r00000-s000000000.arrows"]
    content = path.read_bytes()
    other.mkdir()
    reader, found = SegmentReader(other), []
    for length in range(0, len(content) + 1, 1):
        (other / path.name).write_bytes(content[:length])
        found += [table for _, _, table in reader.read("gradients")]
        assert len(found) == sum(length >= end for end in ends), length
    assert [table.to_pylist() for table in found] == [table.to_pylist() * 2 for table in tables]
    assert pa.ipc.open_stream(content).read_all().num_rows == 18  # what any other reader of Arrow makes of it


def test_other_columns_begin_another_segment(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, 1, 0)
    for step, columns in enumerate([{"a": [1]}, {"a": [1]}, {"a": [1.0]}, {"a": [2.0], "b": [1]}]):
        writer.write("memory", pa.table({"step": [step], **columns}), step)
    writer.close()
    assert sorted(path.stem[-1] for path in tmp_path.iterdir()) == ["0", "2", "3"]
    assert [table.to_pylist()[0] for _, _, table in SegmentReader(tmp_path).read("memory")] == [
        {"step": 0, "a": 1}, {"step": 1, "a": 1}, {"step": 2, "a": 1.0}, {"step": 3, "a": 2.0, "b": 1},
    ]  # fmt: skip


def test_a_table_that_found_no_room_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader, write = SegmentWriter(tmp_path, 1, 0), SegmentReader(tmp_path), os.write
    table = pa.table({"step": [1]})
    for step in (1, 2):  # with the columns, and after them
        monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[: len(content) // 2]))
        with pytest.raises(RunError, match="is full"):
            writer.write("memory", table, step)
        monkeypatch.undo()
        writer.write("memory", table, step)
        assert steps_of(reader, "memory") == [(1, 0, [1])]


def test_a_kind_whose_name_starts_another_is_not_mixed_up(tmp_path: Path) -> None:
    SegmentWriter(tmp_path, 1, 0).write("grad", pa.table({"step": [1]}), 1)
    SegmentWriter(tmp_path, 1, 0).write("grad-advanced", pa.table({"step": [2]}), 2)
    reader = SegmentReader(tmp_path)
    assert steps_of(reader, "grad") == [(1, 0, [1])] and steps_of(reader, "grad-advanced") == [(1, 0, [2])]


def test_a_journal_is_read_while_it_is_written(tmp_path: Path) -> None:
    path, count = tmp_path / "journal", 3000
    journal = Journal(path)

    def write() -> None:
        for number in range(count):
            journal.append(json.dumps({"number": number, "more": "x" * (number % 97)}))

    writer = threading.Thread(target=write)
    writer.start()
    seen, cursor = [], 0
    while writer.is_alive() or len(seen) < count:
        lines, cursor = read_lines(path, cursor)
        seen += [json.loads(line)["number"] for line in lines]
    writer.join()
    assert seen == list(range(count))


def test_an_error_that_is_no_full_disk_stays_what_it_is(tmp_path: Path) -> None:
    if os.getuid() == 0:
        with pytest.raises(NotADirectoryError):
            write_atomic(Path("/dev/null/file"), "x")
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError) as caught:  # noqa: PT011 - which one depends on the system
        write_atomic(tmp_path / "file", "x")
    assert not isinstance(caught.value, RunError)
