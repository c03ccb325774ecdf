"""What a command can refuse before it starts to work."""

import tempfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from medinr.errors import UserError
from medinr.io.listing import listed

REGISTER_WRITES = """
affine disp_* displacement inverse_displacement jacobian_determinant metrics moved_points residual_displacement
transform uncertainty warped warped_channel* warped_labels
"""
APPLY_WRITES = "image labels points"
"""Names, without suffix, of the files that `register` and `apply` write; ``*`` stands for any letters."""
DEVICES = ("auto", "cpu", "cuda", "mps")


def check_writable(out: str | Path) -> None:
    """Fail before the work, not after it, where a folder cannot be made or written to; leaves nothing behind.

    Raises:
        UserError: no name; a file stands in the way; nothing may be written there.
    """
    if not str(out).strip():
        raise UserError("--out: expected the name of a folder, found nothing; name one")
    folder = Path(out).absolute()
    try:
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{out}: expected a folder that can be written to, found {error.strerror}: {folder}; choose another"
        ) from None


def check_inputs_stay(out: str | Path, inputs: Iterable[Any], written: str) -> None:
    """Refuse a folder in which a file that the work begins with would be overwritten, or removed as an old result.

    Args:
        out: the folder.
        inputs: files, lists of files, or anything else, which is passed over.
        written: names of `REGISTER_WRITES` and the like.

    Raises:
        UserError: names that file.
    """
    folder = Path(out).resolve()
    earlier = listed(folder)
    for source in _files(inputs):
        file = source.resolve()
        if not file.is_relative_to(folder):
            continue
        name = file.relative_to(folder).as_posix()
        if name in earlier or any(fnmatch(name.partition(".")[0], pattern) for pattern in written.split()):
            raise UserError(f"--out {out}: expected to overwrite no input, found {source} there; choose another folder")


def _files(inputs: Iterable[Any]) -> Iterator[Path]:
    """Those of the inputs that are files, channels one by one."""
    for source in inputs:
        if isinstance(source, list | tuple):
            yield from _files(source)
        elif isinstance(source, str | Path) and Path(source).is_file():
            yield Path(source)


def check_device(name: str) -> str:
    """A device that is there: ``auto`` becomes ``cuda`` or ``cpu``.

    Raises:
        UserError: an unknown name, or a device that PyTorch does not find.
    """
    if name not in DEVICES:
        raise UserError(f"--device: expected one of {', '.join(DEVICES)}, got {name}")
    cuda = torch.cuda.is_available()
    if (name == "cuda" and not cuda) or (name == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"--device {name}: PyTorch finds no such device here; leave --device out or give cpu")
    if name == "auto":
        return "cuda" if cuda else "cpu"
    return name
