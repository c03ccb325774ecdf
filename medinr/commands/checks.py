"""What a command can refuse before it starts to work."""

import tempfile
from pathlib import Path

import torch

from medinr.errors import UserError

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
