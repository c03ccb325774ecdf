"""DICOM series through SimpleITK (GDCM): a folder, or one slice of the series that is meant.

Slices are sorted along their normal by their own positions; ITK itself only warns of missing, double and tilted slices,
and then gives a grid that is wrong. Rescale slope and intercept are applied slice by slice.
"""

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medinr.errors import RegistrationWarning, UserError
from medinr.io.itk import checked_domain, import_sitk, ras_affine, silent
from medinr.space import Domain

SUFFIXES = (".dcm", ".dicom", ".ima")
SERIES_UID = "0020|000e"
DESCRIPTION = "0008|103e"
MODALITY = "0008|0060"
UNEVEN = 0.05
"""Distances between slices may differ by this share of their median: headers round positions."""
TILT_MM = 0.2
"""Slices may be shifted sideways by this much over the whole stack (gantry tilt shifts them by centimetres)."""


class Slice(NamedTuple):
    """What one file says of its place."""

    file: str
    size: tuple[int, ...]
    spacing: NDArray[np.float64]
    origin: NDArray[np.float64]
    direction: NDArray[np.float64]


def is_dicom(path: Path) -> bool:
    """Whether a path is a folder (of slices), or a DICOM file by its suffix or its magic word."""
    if path.is_dir() or path.suffix.lower() in SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def series_domain(path: Path) -> Domain:
    """The grid of a series; reads the headers alone."""
    sitk = import_sitk(str(path))
    with silent(sitk):
        return _geometry(series_slices(sitk, path), str(path))


def read_series(path: Path) -> tuple[NDArray[np.float32], Domain]:
    """Values [X, Y, Z] (columns, rows, slices along the normal of rows and columns) and the domain of a series.

    Raises:
        UserError: no series or several; slices that are missing, double, tilted, or of different size; unreadable.

    Warns:
        RegistrationWarning: DICOM files in the folder that are no images, or damaged.
    """
    sitk = import_sitk(str(path))
    with silent(sitk):
        slices = series_slices(sitk, path)
        domain = _geometry(slices, str(path))
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames([s.file for s in slices])
        # Without a type, that of the first slice counts for all: slopes that differ from slice to slice would be lost.
        reader.SetOutputPixelType(sitk.sitkFloat32)
        try:
            values = sitk.GetArrayFromImage(reader.Execute())
        except RuntimeError as error:
            raise _unreadable(str(path), error) from error
    if values.ndim != 3:
        raise UserError(f"{path}: expected grey values, found {values.shape[-1]} channels; convert to grey values")
    return values.T, domain


def series_under(root: Path) -> list[tuple[str, Path]]:
    """All image series in a folder and the folders below it: description, and the first slice, which names the series.

    What is no image (structures, doses, plans) is passed over.
    """
    sitk = import_sitk(str(root))
    found = []
    with silent(sitk):
        for folder in (root, *sorted(p for p in root.rglob("*") if p.is_dir())):
            if not any(f.is_file() and is_dicom(f) for f in folder.iterdir()):
                continue
            for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)):
                name = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)[0]
                try:
                    header = _header(sitk, name)
                except UserError:
                    continue
                if header.HasMetaDataKey(MODALITY) and header.GetMetaData(MODALITY).strip().startswith("RT"):
                    continue
                found.append((_description(header), Path(name)))
    return found


def series_slices(sitk: ModuleType, path: Path) -> list[Slice]:
    """The slices of the series that ``path`` (folder, or one of its files) means, sorted along their normal."""
    folder = path if path.is_dir() else path.parent
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    files = {uid: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid) for uid in series}
    if path.is_dir():
        if not files:
            raise UserError(f"{path}: expected a folder with a DICOM series, found none; name the folder of the slices")
        if len(files) > 1:
            raise UserError(_several(sitk, path, files))
        names = next(iter(files.values()))
    else:
        names = next((f for f in files.values() if any(Path(n).name == path.name for n in f)), ())
        if not names:
            raise UserError(f"{path}: expected a slice of a DICOM series, found none; is it a DICOM image?")
    _tell_of_the_rest(folder, files)
    slices = [_slice(sitk, name) for name in names]
    normal = slices[0].direction[:, 2]
    return sorted(slices, key=lambda s: float(s.origin @ normal))


def _several(sitk: ModuleType, path: Path, files: dict[str, tuple[str, ...]]) -> str:
    shown = []
    for names in list(files.values())[:12]:
        told = _description(_header(sitk, names[0]))
        shown.append(f"{told or 'no description'} ({len(names)} slices, {Path(names[0]).name} ...)")
    more = ", ..." if len(files) > len(shown) else ""
    return (
        f"{path}: expected one DICOM series, found {len(files)}: {', '.join(shown)}{more}; "
        "name one slice of the series that is meant instead of the folder"
    )


def _description(header: Any) -> str:
    return str(header.GetMetaData(DESCRIPTION)).strip() if header.HasMetaDataKey(DESCRIPTION) else ""


def _tell_of_the_rest(folder: Path, files: dict[str, tuple[str, ...]]) -> None:
    """GDCM passes over damaged files; a slice that is lost at the end of a stack leaves no gap to be found."""
    known = {Path(name).name for names in files.values() for name in names} | {"DICOMDIR"}
    left = sorted(f.name for f in folder.iterdir() if f.is_file() and f.name not in known and is_dicom(f))
    if left:
        warnings.warn(
            f"{folder}: {len(left)} DICOM file(s) are not read, {left[0]} first: damaged, or no images",
            RegistrationWarning,
            stacklevel=2,
        )


def _header(sitk: ModuleType, name: str) -> Any:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(name)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(name, error) from error
    return reader


def _slice(sitk: ModuleType, name: str) -> Slice:
    header = _header(sitk, name)
    n = header.GetDimension()
    if n != 3:
        raise UserError(f"{name}: expected a slice with a position in space, found a {n}-D image; give a volume")
    direction = np.reshape(header.GetDirection(), (3, 3))
    return Slice(name, header.GetSize(), np.array(header.GetSpacing()), np.array(header.GetOrigin()), direction)


def _geometry(slices: list[Slice], name: str) -> Domain:
    """The domain of sorted slices, or a UserError where they do not make a grid."""
    first, last, n = slices[0], slices[-1], len(slices)
    for s in slices:
        if s.size != first.size or not np.allclose(s.spacing[:2], first.spacing[:2], rtol=1e-3):
            raise UserError(
                f"{name}: expected slices of one size, found {first.size[:2]} x {first.spacing[:2].round(3).tolist()} "
                f"mm and, in {Path(s.file).name}, {s.size[:2]} x {s.spacing[:2].round(3).tolist()} mm; separate them"
            )
        if not np.allclose(s.direction, first.direction, atol=1e-3):
            raise UserError(
                f"{name}: expected parallel slices, found {Path(s.file).name} turned against "
                f"{Path(first.file).name}; separate them (scouts are often in the same folder)"
            )
    spacing = first.spacing.copy()
    depth = first.size[2] if n == 1 else n
    if n > 1:
        normal = first.direction[:, 2]
        along = np.array([s.origin @ normal for s in slices])
        spacing[2] = _even_step(along, slices, name)
        sideways = last.origin - first.origin - (along[-1] - along[0]) * normal
        if np.linalg.norm(sideways) > TILT_MM:
            raise UserError(
                f"{name}: expected slices above each other, found them shifted sideways by "
                f"{np.linalg.norm(sideways):.1f} mm over the stack (gantry tilt); convert them with dcm2niix"
            )
    affine = ras_affine(first.direction.ravel(), spacing, first.origin)
    return checked_domain((*first.size[:2], depth), affine, name)


def _even_step(along: NDArray[np.float64], slices: list[Slice], name: str) -> float:
    """Mean distance of the slices in mm, or a UserError where one is missing or double."""
    steps = np.diff(along)
    if steps.min() < 1e-3:
        i = int(steps.argmin())
        raise UserError(
            f"{name}: expected one slice at each position, found {Path(slices[i].file).name} and "
            f"{Path(slices[i + 1].file).name} at one; separate them (several phases or echoes in one series?)"
        )
    usual = float(np.median(steps))
    worst = int(np.abs(steps - usual).argmax())
    if abs(steps[worst] - usual) > UNEVEN * usual:
        raise UserError(
            f"{name}: expected slices {usual:.3g} mm apart, found {steps[worst]:.3g} mm between "
            f"{Path(slices[worst].file).name} and {Path(slices[worst + 1].file).name}; copy the missing slices"
        )
    return float(along[-1] - along[0]) / len(steps)


def _unreadable(name: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return UserError(f"{name}: expected a whole DICOM image, found one that cannot be read ({reason}); copy it again")
