"""What a command takes: seconds, memory of all its processes, and disk."""

import os
import subprocess
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import NamedTuple

KIBIBYTE = 1024
SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(frozen=True)
class Measured:
    """What running a command took.

    Attributes:
        returncode: as the command left it.
        output: its standard output and errors.
        seconds: by the clock on the wall.
        processor_seconds: of all its processes.
        peak_bytes: the largest resident memory of its processes together, as far as looking every
            tenth of a second shows it, and at least the highest of any of them.
        peak_own_bytes: the same of anonymous memory alone, without the pages of mapped files, which
            the system may take away and read again.
    """

    returncode: int
    output: str
    seconds: float
    processor_seconds: float
    peak_bytes: int
    peak_own_bytes: int


def run_measured(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path
) -> Measured:
    """Run a command to its end.

    Args:
        command: program and arguments.
        environment: of the process.
        folder: where it runs.
        log: file that its output goes to.
    """
    started = monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=dict(environment), cwd=folder, stdout=file, stderr=subprocess.STDOUT
        )
        watch = MemoryWatch(process.pid)
        watch.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            raise
        finally:
            watch.stop()
    process.returncode = os.waitstatus_to_exitcode(status)
    return Measured(
        process.returncode,
        log.read_text(encoding="utf-8", errors="replace"),
        monotonic() - started,
        usage.ru_utime + usage.ru_stime,
        watch.peak,
        watch.own_peak,
    )


class MemoryWatch:
    """Looks at the memory of a process and its descendants until it is stopped.

    Attributes:
        peak, own_peak: largest sums seen so far, in bytes; see `Measured`.
    """

    def __init__(self, process: int):
        self.process = process
        self.peak = self.own_peak = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(SECONDS_BETWEEN_LOOKS):
            held = [resident_bytes(each) for each in descendants(self.process)]
            together = sum(each.whole for each in held)
            self.peak = max(self.peak, together, *(each.highest for each in held), 0)
            self.own_peak = max(self.own_peak, sum(each.own for each in held))


def descendants(process: int) -> list[int]:
    """A process and all that it and its children started and that still run."""
    found = [process]
    for each in found:
        for file in Path(f"/proc/{each}/task").glob("*/children"):
            found += [int(child) for child in _read(file).split()]
    return found


class Resident(NamedTuple):
    """Resident memory of a process in bytes: all, its highest value so far, and anonymous."""

    whole: int
    highest: int
    own: int


def resident_bytes(process: int) -> Resident:
    """What a process holds; zeros when it has ended.

    The kernel's accounts of processes that have ended (`ru_maxrss`) are of no use here: they count
    what the process that started them held.
    """
    lines = (line.partition(":") for line in _read(Path(f"/proc/{process}/status")).splitlines())
    fields = {name: value.split() for name, _, value in lines}
    names = ("VmRSS", "VmHWM", "RssAnon")
    return Resident(*(KIBIBYTE * int(fields.get(name, ["0"])[0]) for name in names))


def disk_bytes(folders: Iterable[Path]) -> int:
    """Bytes of the files in folders; a file with several names counts once."""
    files = (path for folder in folders for path in folder.rglob("*"))
    status = [path.lstat() for path in files if path.is_file() and not path.is_symlink()]
    return sum({each.st_ino: each.st_size for each in status}.values())


def _read(path: Path) -> str:
    """The content of a file that may vanish with its process."""
    try:
        return path.read_text()
    except OSError:
        return ""
