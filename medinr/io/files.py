"""Files that are either whole or not there."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from medinr.errors import UserError

STAGED = ".staged"


@contextmanager
def staged_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder inside ``path`` for files that belong together: they move into ``path`` when the block ends well.

    When it fails, or is interrupted, all of them go, and so do the folders that were made for them: the results are
    complete or are not there.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    target = Path(path)
    made = _missing(target)
    staged = target / f".{uuid.uuid4().hex}{STAGED}"
    try:
        with _users_fault(target):
            staged.mkdir(parents=True)
        yield staged
        with _users_fault(target):
            for file in sorted(f for f in staged.rglob("*") if f.is_file()):
                place = target / file.relative_to(staged)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)
        made = []
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        _remove(made)


def _missing(folder: Path) -> list[Path]:
    """The folders that would have to be made for this one to be there, innermost first."""
    return [f for f in (folder, *folder.parents) if not f.exists()]


def _remove(folders: list[Path]) -> None:
    """Remove those that are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _users_fault(target: Path) -> Iterator[None]:
    """What the system refuses, in one line that names the file the user knows of."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError of its archive writer, without the system's reason.
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
            reason = "no more can be written (is the disk full?)"
        else:
            raise
        shown = Path(*(part for part in target.parts if not part.endswith(STAGED)))
        raise UserError(
            f"{shown}: expected to be able to write it, found: {reason}; choose a folder that is writable and has room"
        ) from error


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, with the same suffixes; it replaces ``path`` when the block ends well.

    Missing folders are made. When the block fails the temporary file and those folders are removed, and an older file
    of that name stays as it was.

    Raises:
        UserError: the folder cannot be made or written to, or the disk is full.
    """
    target = Path(path)
    made = _missing(target.parent)
    suffix = "".join(target.suffixes[-2:]) if target.suffix == ".gz" else target.suffix
    temporary = target.with_name(f".{uuid.uuid4().hex}{suffix}")
    try:
        with _users_fault(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, target)
        made = []
    finally:
        if target.parent.is_dir():
            temporary.unlink(missing_ok=True)
        _remove(made)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def existing_file(path: str | Path) -> Path:
    """``path`` if it is a file with something in it.

    Raises:
        UserError: it is missing, a folder, empty or unreadable.
    """
    file = Path(path)
    try:
        if not file.exists():
            raise UserError(f"{file}: expected a file, found nothing of that name; check the path")
        if file.is_dir():
            raise UserError(f"{file}: expected a file, found a folder; name one file in it")
        if file.stat().st_size == 0:
            raise UserError(f"{file}: expected data, found an empty file (0 bytes); copy or export it again")
        if not os.access(file, os.R_OK):
            raise UserError(f"{file}: expected a readable file, found no permission to read; change its permissions")
    except OSError as error:
        raise UserError(f"{file}: expected a readable file, found: {error.strerror}; check the path") from error
    return file


def existing_source(path: str | Path) -> Path:
    """``path`` if an image may be read from it: a folder (of DICOM slices), or an `existing_file`."""
    return Path(path) if Path(path).is_dir() else existing_file(path)
