"""Images that lie in zip archives, read without unpacking anything to disk."""

import gzip
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from medinr.errors import UserError
from medinr.io import existing_file, read_domain
from medinr.space import Domain


@dataclass(frozen=True)
class ZipMember:
    """One file in a zip archive."""

    archive: Path
    member: str

    def __str__(self) -> str:
        return f"{self.archive}!{self.member}"


UNREADABLE = (HeaderDataError, WrapStructError, OSError, EOFError, zlib.error, ValueError)
"""What a header or voxels that are damaged raise."""
HEADER_BYTES = 348
"""Of a NIfTI-1 file."""
Source: TypeAlias = str | Path | ZipMember
"""Where an image lies."""


def members(archive: str | Path) -> frozenset[str]:
    """Names of the files in an archive.

    Raises:
        UserError: missing, empty or damaged archive.
    """
    file = existing_file(archive)
    try:
        with zipfile.ZipFile(file) as opened:
            return frozenset(opened.namelist())
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f"{file}: expected a whole zip archive, found a damaged one ({error}); copy it again") from None


def read_bytes(source: Source) -> bytes:
    """The content of a file or of a member of an archive.

    Raises:
        UserError: damaged archive; no such file.
    """
    if not isinstance(source, ZipMember):
        return existing_file(source).read_bytes()
    try:
        with zipfile.ZipFile(existing_file(source.archive)) as opened:
            return opened.read(source.member)
    except KeyError:
        raise UserError(f"{source}: expected this file in the archive, found none; copy the archive again") from None
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source}: expected a whole archive, found a damaged one ({error}); copy it again") from None


def open_source(source: Source) -> str | Path | nib.nifti1.Nifti1Image:
    """What the readers of `medinr.io` accept: a path as it is, a member of an archive as a nibabel image in memory.

    Raises:
        UserError: damaged archive; no such member; a member that is no NIfTI image.
    """
    if not isinstance(source, ZipMember):
        return source
    data = read_bytes(source)
    try:
        image = nib.nifti1.Nifti1Image.from_bytes(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
        np.asanyarray(image.dataobj)  # a member that is cut short shows here
    except (ImageFileError, *UNREADABLE) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(
            f"{source}: expected a whole NIfTI image, found one that cannot be read ({reason}); copy the archive again"
        ) from None
    image.set_filename(str(source))  # for messages
    return image


def source_domain(source: Source) -> Domain:
    """The grid of an image, from its header alone; of a member of an archive, no more than that is unpacked.

    Raises:
        UserError: as `open_source`.
    """
    if not isinstance(source, ZipMember):
        return read_domain(source)
    try:
        with zipfile.ZipFile(existing_file(source.archive)) as opened, opened.open(source.member) as stream:
            plain = gzip.GzipFile(fileobj=stream) if source.member.endswith(".gz") else stream
            header = nib.nifti1.Nifti1Header(plain.read(HEADER_BYTES))
        x, y, z = (*header.get_data_shape(), 1, 1, 1)[:3]
        return Domain.of((x, y, z), header.get_best_affine())
    except (KeyError, zipfile.BadZipFile, *UNREADABLE):
        return read_domain(open_source(source))  # another format, or what is wrong with it
