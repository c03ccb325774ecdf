"""Images, masks and label volumes: NIfTI by nibabel; MetaImage, NRRD and DICOM series by SimpleITK (optional).

Arrays keep the axes of the file, [i, j, k] as nibabel gives them, whatever their orientation; the affine maps voxel
indices to RAS millimetres. ITK's LPS is converted here and nowhere above.
"""

import gzip
import warnings
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from medinr.errors import RegistrationWarning, UserError
from medinr.io.dicom import is_dicom, read_series, series_domain
from medinr.io.files import atomic_path, existing_file
from medinr.io.itk import checked_domain, image_domain, import_sitk, silent
from medinr.space import Domain, Image
from medinr.types import Mask

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")

UNREADABLE = (
    ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError, OverflowError, MemoryError
)  # fmt: skip
"""What a damaged NIfTI file makes nibabel raise."""

ImageLike = str | Path | SpatialImage | Image
"""What :func:`as_image` accepts; a SimpleITK image too, which cannot be named here without importing SimpleITK."""


def read_image(path: str | Path) -> Image:
    """Read a 3-D scan, or a 2-D image as a single slice: float32 [1, X, Y, Z] with its domain.

    ``path`` is a NIfTI, MetaImage or NRRD file, a folder with one DICOM series, or one slice of the series that is
    meant. Intensity scaling (scl_slope and scl_inter, rescale slope and intercept) is applied; the affine of NIfTI is
    nibabel's best one (sform, else qform). A fourth axis of one is dropped; a longer one is an error (see
    `medinr.io.read_channels`).

    Raises:
        UserError: missing, empty, truncated or unreadable file; more than three axes; NaN or infinite voxels; a
            constant image; a singular affine.
    """
    values, domain = _read_array(path)
    return _checked_image(values, domain, str(path))


def as_image(source: Any) -> Image:
    """An :class:`Image` from a path, a nibabel image, a SimpleITK image or an :class:`Image`, checked as read_image."""
    if isinstance(source, Image):
        return _checked_image(source.data, source.domain, source.source or "image")
    values, domain, name = _array_of(source)
    if domain is None:
        raise _no_affine(name, source)
    return _checked_image(values, domain, name)


def read_mask(source: Any, domain: Domain) -> Mask:
    """Read a mask, bool [X, Y, Z] (voxels above 0.5), on the grid of its image.

    Args:
        source: a path, a nibabel or SimpleITK image, an Image, or an array [X, Y, Z] that is on the grid already.
        domain: grid of the image that the mask belongs to.

    Raises:
        UserError: as for read_image; another grid; no voxel inside.
    """
    values, name = _on_grid(source, domain, "mask")
    mask = torch.from_numpy(np.ascontiguousarray(values > 0.5))
    if not mask.any():
        raise UserError(f"{name}: expected a mask with voxels above 0.5, found none; give a mask that is not empty")
    return mask


def read_labels(source: Any, domain: Domain) -> Tensor:
    """Read a label volume, int16 (int32 where needed) [X, Y, Z], on the grid of its image; arguments as read_mask.

    Raises:
        UserError: as for read_image; another grid; values that are not whole numbers; no label but 0.
    """
    values, name = _on_grid(source, domain, "labels")
    whole = np.rint(values) if values.dtype.kind == "f" else values
    if values.dtype.kind == "f" and np.abs(values - whole).max() > 1e-3:
        wrong = values[np.abs(values - whole) > 1e-3][0]
        raise UserError(
            f"{name}: expected whole numbers as labels, found {wrong:g}; resample labels with nearest neighbour"
        )
    if not whole.any():
        raise UserError(
            f"{name}: expected labels above 0, found background only; give a label volume that is not empty"
        )
    limits = np.iinfo(np.int16)
    small = limits.min <= whole.min() and whole.max() <= limits.max
    return torch.from_numpy(np.ascontiguousarray(whole.astype(np.int16 if small else np.int32)))


def write_image(path: str | Path, data: Tensor | NDArray[Any], domain: Domain, dtype: DTypeLike | None = None) -> None:
    """Write [X, Y, Z] (or [1, X, Y, Z]) as NIfTI with sform and qform in scanner coordinates, millimetres.

    The file is whole or not there. Without ``dtype``: bool becomes uint8, 64-bit types become 32-bit ones. A sheared
    affine does not fit into a qform; its code is then 0, so that no reader takes it for the truth.

    Raises:
        UserError: a suffix other than .nii or .nii.gz; a folder that cannot be written to; a full disk.
    """
    array = _numpy(data)
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.shape != domain.shape:
        raise ValueError(f"{path}: expected values {domain.shape}, got {array.shape}")
    save_nifti(path, array.astype(dtype or _storage_type(array.dtype), copy=False), domain)


def save_nifti(
    path: str | Path, array: NDArray[Any], domain: Domain, intent: str = "none", slope: float | None = None
) -> None:
    """Write an array whose first three axes are the domain's; ``intent`` is nibabel's name of the NIfTI intent.

    ``slope``: the factor by which a reader multiplies the stored whole numbers.
    """
    if suffix_of(Path(path)) not in NIFTI_SUFFIXES:
        raise UserError(f"{path}: expected a name ending in .nii or .nii.gz, found {Path(path).name}; change the name")
    affine = domain.voxel_to_world.numpy()
    image = nib.nifti1.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.header.set_intent(intent)
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    written = Domain.of(domain.shape, image.get_qform())
    if not written.same_grid(domain, tolerance_mm=1e-2):
        image.set_qform(None, code=0)
    with atomic_path(path) as temporary:
        image.to_filename(temporary)


def suffix_of(path: Path) -> str:
    """The suffix in lower case, ``.nii.gz`` as one."""
    name = path.name.lower()
    return next((s for s in (*NIFTI_SUFFIXES, *ITK_SUFFIXES) if name.endswith(s)), path.suffix.lower())


def _numpy(data: Any) -> NDArray[Any]:
    return data.detach().cpu().numpy() if isinstance(data, Tensor) else np.asarray(data)


def _storage_type(dtype: np.dtype[Any]) -> DTypeLike:
    if dtype.kind == "b":
        return np.uint8
    if dtype.kind == "f":
        return np.float32
    return np.int32 if dtype == np.int64 else dtype


def read_domain(source: Any) -> Domain:
    """The grid of an image; its voxels are not looked at, so a constant image, one of NaN or a time series will do.

    Args:
        source: what `as_image` accepts.

    Raises:
        UserError: as `read_image`, but for the voxels.
    """
    if isinstance(source, Image):
        return source.domain
    if not isinstance(source, str | Path):
        _, domain, name = _array_of(source)
        if domain is None:
            raise _no_affine(name, source)
        return domain
    path = Path(source)
    if is_dicom(path):
        return series_domain(path)
    file = existing_file(path)
    if suffix_of(file) not in NIFTI_SUFFIXES:
        return _read_array(file)[1]
    image = load_nifti(file)
    return checked_domain((*image.shape, 1, 1), image.affine, str(file))


def _read_array(path: str | Path) -> tuple[NDArray[Any], Domain]:
    """Values [X, Y, Z] in the type that the file gives, and the domain."""
    if is_dicom(Path(path)):
        return read_series(Path(path))
    file = existing_file(path)
    suffix = suffix_of(file)
    if suffix in NIFTI_SUFFIXES:
        image = load_nifti(file)
        values = _volume(nifti_values(image, str(file)), str(file))
        _warn_of_header(image, file)
        return values, checked_domain(values.shape, image.affine, str(file))
    if suffix in ITK_SUFFIXES:
        return _from_sitk(load_sitk(file), str(file))
    raise UserError(
        f"{file}: expected {', '.join((*NIFTI_SUFFIXES, *ITK_SUFFIXES))} or a folder with a DICOM series, found "
        f"{suffix or 'no suffix'}; convert it to NIfTI"
    )


def load_sitk(file: Path) -> Any:
    """The SimpleITK image of a MetaImage or NRRD file."""
    sitk = import_sitk(str(file))
    try:
        with silent(sitk):
            return sitk.ReadImage(str(file))
    except RuntimeError as error:
        raise _unreadable(str(file), suffix_of(file), error) from error


def load_nifti(file: Path) -> Any:
    """The nibabel image of a NIfTI file, its voxels not read yet."""
    try:
        image = nib.loadsave.load(file)
    except UNREADABLE as error:
        raise _unreadable(str(file), "NIfTI", error) from error
    if not isinstance(image, nib.nifti1.Nifti1Pair):
        raise UserError(f"{file}: expected a NIfTI volume, found a {type(image).__name__}; give an image of voxels")
    return image


def nifti_values(image: Any, name: str) -> NDArray[Any]:
    """The scaled voxels of a nibabel image."""
    try:
        values: NDArray[Any] = np.asanyarray(image.dataobj)
        if nib.is_proxy(image.dataobj):
            _check_sum(image.get_filename())
    except UNREADABLE as error:
        raise _unreadable(name, "NIfTI", error) from error
    if values.dtype.kind not in "biuf":
        raise UserError(
            f"{name}: expected one real number per voxel, found type {values.dtype}; convert to grey values"
        )
    return values


def _check_sum(name: str | None) -> None:
    """Read a compressed file to its end, where its checksum is: nibabel stops before, and sees no damage."""
    if name is not None and name.endswith(".gz") and Path(name).is_file():
        with gzip.open(name) as stream:
            while stream.read(1 << 24):
                pass


def _warn_of_header(image: Any, file: Path) -> None:
    """Say what in a NIfTI header other programs may read otherwise than it is read here."""
    header, found = image.header, []
    sform, qform = (bool(header[f"{name}_code"]) for name in ("sform", "qform"))
    if not sform and not qform:
        found.append("neither sform nor qform says how it lies in space: left and right are a guess")
    if sform and qform and nib.aff2axcodes(header.get_sform()) != nib.aff2axcodes(header.get_qform()):
        found.append("sform and qform give it different orientations; the sform counts")
    if int(header["xyzt_units"]) & 7 in (1, 3):
        found.append(f"its header gives lengths in {header.get_xyzt_units()[0]}s; they are taken as mm")
    for what in found:
        warnings.warn(f"{file}: {what}", RegistrationWarning, stacklevel=2)


def _unreadable(name: str, kind: str, error: Exception) -> UserError:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    reason = " ".join(line.strip() for line in lines) if kind == "NIfTI" else lines[-1]  # ITK's first ones are its own
    return UserError(
        f"{name}: expected a whole {kind} file, found one that cannot be read ({reason}); copy or export it again"
    )


def _from_sitk(image: Any, name: str) -> tuple[NDArray[Any], Domain]:
    sitk = import_sitk(name)
    components = image.GetNumberOfComponentsPerPixel()
    if components != 1:
        raise UserError(f"{name}: expected one value per voxel, found {components}; convert to grey values")
    return _volume(sitk.GetArrayFromImage(image).T, name), image_domain(image, name)


def _volume(values: NDArray[Any], name: str) -> NDArray[Any]:
    """Three axes, or a UserError; further axes of one are dropped, and a 2-D image becomes a single slice."""
    shape = values.shape
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3:
        advice = "give one volume of it, or --multichannel if it holds channels" if values.ndim > 3 else "give a volume"
        raise UserError(f"{name}: expected a 3-D image, found {len(shape)}-D of shape {tuple(shape)}; {advice}")
    return values


def _checked_image(values: Any, domain: Domain, name: str) -> Image:
    data = (
        values if isinstance(values, Tensor) else torch.from_numpy(np.array(values, dtype=np.float32, order="C"))[None]
    )
    data = data.float()
    bad = int((~torch.isfinite(data)).sum())
    if bad:
        raise UserError(
            f"{name}: expected finite voxels, found {bad} of {data.numel()} that are NaN or infinite; replace them"
        )
    low, high = float(data.min()), float(data.max())
    if low == high:
        raise UserError(f"{name}: expected an image with contrast, found the constant {low:g}; is it the right file?")
    return Image(data, domain, name)


def _no_affine(name: str, source: Any) -> UserError:
    return UserError(
        f"{name}: expected a path, a nibabel or SimpleITK image or a medinr Image, found {type(source).__name__} "
        "which has no affine; wrap it as medinr.space.Image(data[None], Domain.of(shape, affine))"
    )


def _array_of(source: Any) -> tuple[NDArray[Any], Domain | None, str]:
    """Values [X, Y, Z], the domain where the source has one, and a name for messages."""
    if isinstance(source, str | Path):
        return *_read_array(source), str(source)
    if isinstance(source, Image):
        return _volume(_numpy(source.data[0]), source.source or "image"), source.domain, source.source or "image"
    if isinstance(source, SpatialImage):
        name = str(source.get_filename() or "nibabel image")
        values = _volume(nifti_values(source, name), name)
        return values, checked_domain(values.shape, source.affine, name), name
    if type(source).__module__.startswith("SimpleITK"):
        return *_from_sitk(source, "SimpleITK image"), "SimpleITK image"
    if isinstance(source, Tensor | np.ndarray):
        values = _numpy(source)
        return _volume(values[0] if values.ndim == 4 and values.shape[0] == 1 else values, "array"), None, "array"
    raise UserError(
        f"image: expected a path, a nibabel or SimpleITK image or an array, found {type(source).__name__}; "
        "give one of these"
    )


def _on_grid(source: Any, domain: Domain, what: str) -> tuple[NDArray[Any], str]:
    """Finite values [X, Y, Z] on the grid of ``domain``, and a name for messages."""
    values, own, name = _array_of(source)
    name = f"{what} {name}" if own is None else name
    own = own or Domain(values.shape, domain.affine)
    if own.shape != domain.shape:
        raise UserError(
            f"{name}: expected the grid of its image, shape {domain.shape}, found {own.shape}; "
            f"resample the {what} onto the image"
        )
    if not own.same_grid(domain, tolerance_mm=domain.rounding_mm):
        gap = (own.voxel_to_world[:3] - domain.voxel_to_world[:3]).abs().max(dim=0).values
        raise UserError(
            f"{name}: expected the affine of its image, found one that differs by up to {float(gap[3]):.3g} mm in the "
            f"origin and {float(gap[:3].max()):.3g} mm in the voxel axes; resample the {what} onto the image"
        )
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UserError(f"{name}: expected finite voxels, found NaN or infinite ones; replace them")
    return values, name
