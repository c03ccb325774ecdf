"""Images of several channels: several files of one grid, or one file whose last axis holds them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nibabel.spatialimages import SpatialImage
from numpy.typing import NDArray

from medinr.errors import UserError
from medinr.io.files import existing_file
from medinr.io.images import ITK_SUFFIXES, as_image, load_nifti, load_sitk, nifti_values, suffix_of
from medinr.io.itk import checked_domain, image_domain, import_sitk
from medinr.space import Domain, Image


def as_channels(source: Any, multichannel: bool = False) -> Image:
    """An image [C, X, Y, Z] from what `as_image` accepts, or from a list of these, one a channel.

    Args:
        source: one source, or a list of sources on one grid.
        multichannel: the last axis of each file holds channels (4-D NIfTI, 5-D vector NIfTI, vector MetaImage).
            Without it a file of more than three axes is an error: most are time series.

    Raises:
        UserError: as `as_image`; channels on different grids.
    """
    sources = list(source) if isinstance(source, list | tuple) else [source]
    if not sources:
        raise UserError("image: expected at least one channel, found an empty list; give a file")
    images = [read_channels(s) if multichannel else as_image(s) for s in sources]
    return images[0] if len(images) == 1 else stack_channels(images)


def stack_channels(images: Sequence[Image]) -> Image:
    """One image of all channels, on the grid and under the name of the first.

    Raises:
        UserError: another shape or affine than the first.
    """
    first = images[0]
    for image in images[1:]:
        if not image.domain.same_grid(first.domain, tolerance_mm=first.domain.rounding_mm):
            raise UserError(
                f"{image.source}: expected the grid of the first channel {first.source}, shape {first.domain.shape}, "
                f"found shape {image.domain.shape} or another affine; resample the channels onto one grid"
            )
    return Image(torch.cat([image.data for image in images]), first.domain, first.source)


def read_channels(source: Any) -> Image:
    """An image [C, X, Y, Z] whose channels lie along the last axis of a file, nibabel or SimpleITK image.

    Raises:
        UserError: as `as_image`, for each channel; other than four axes.
    """
    if isinstance(source, Image):
        return as_image(source)
    values, domain, name = _vectors(source)
    channels = [
        as_image(Image(torch.from_numpy(np.array(v, dtype=np.float32))[None], domain, f"{name}, channel {c + 1}"))
        for c, v in enumerate(np.moveaxis(values, -1, 0))
    ]
    return Image(torch.cat([c.data for c in channels]), domain, name)


def _vectors(source: Any) -> tuple[NDArray[Any], Domain, str]:
    """Values [X, Y, Z, C], the domain and a name."""
    name = str(source) if isinstance(source, str | Path) else "image"
    image = source
    if isinstance(source, str | Path):
        file = existing_file(source)
        image = load_sitk(file) if suffix_of(file) in ITK_SUFFIXES else load_nifti(file)
    if isinstance(image, SpatialImage):
        name = str(image.get_filename() or name)
        values = nifti_values(image, name)
        if values.ndim == 5 and values.shape[3] == 1:  # a vector image: NIfTI keeps the fourth axis for time
            values = values[..., 0, :]
        affine = image.affine
        if values.ndim == 4:
            return values, checked_domain(values.shape[:3], affine, name), name
    elif type(image).__module__.startswith("SimpleITK"):
        values = import_sitk(name).GetArrayFromImage(image)
        vector = image.GetNumberOfComponentsPerPixel() > 1
        values = np.moveaxis(values, -1, 0).T if vector else values.T
        if vector and values.ndim == 3:
            values = values[:, :, None]
        if values.ndim == 4:
            return values, image_domain(image, name), name
    else:
        raise UserError(f"{name}: expected a file, a nibabel or a SimpleITK image with channels, found something else")
    raise UserError(
        f"{name}: expected channels along a fourth axis, found shape {tuple(values.shape)}; leave --multichannel out"
    )
