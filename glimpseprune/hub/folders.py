"""Writing a folder completely or not at all, and placing large files in it without copying."""

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, which has no reflinks either
    fcntl = None

CLONE_FILE = 0x40049409  # FICLONE of linux/fs.h


def check_vacant(output: str | Path) -> None:
    """Raise a ValueError unless the folder is absent or empty."""
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists and is not an empty folder")


@contextmanager
def vacant_sibling(output: str | Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place on success and vanishes on failure.

    A process that is killed cannot tidy up; what it left is removed by the next one that writes the
    same output on the same machine.

    Raises:
        ValueError: unless `output` is absent or empty.
    """
    check_vacant(output)
    output = Path(output).absolute()
    prefix = f".{output.name}.partial-{_host_name()}-"
    _remove_abandoned(output.parent, prefix)
    folder = output.with_name(f"{prefix}{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.replace(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def place_file(source: Path, target: Path) -> None:
    """Put a file's content at `target`, taking no more disk where the file system allows.

    Tried in turn: a reflink, which shares blocks until one side is written; a hard link; a copy.
    """
    source = source.resolve()  # the Hub's cache holds links to its files
    if _clone(source, target):
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _clone(source: Path, target: Path) -> bool:
    if fcntl is None:
        return False
    with source.open("rb") as original, target.open("wb") as copy:
        try:
            fcntl.ioctl(copy.fileno(), CLONE_FILE, original.fileno())
        except OSError:
            cloned = False
        else:
            cloned = True
    if not cloned:
        target.unlink()
    return cloned


def _host_name() -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())


def _remove_abandoned(parent: Path, prefix: str) -> None:
    if not parent.is_dir():
        return
    for folder in parent.iterdir():
        process = folder.name.removeprefix(prefix)
        if folder.name.startswith(prefix) and process.isdigit() and not _runs(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
