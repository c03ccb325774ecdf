"""MONAI dictionary transforms that make a pair of images out of file names.

While a sample goes through the pipeline every volume is a float `MetaTensor` [C, X, Y, Z] whose affine (RAS mm) follows
it through cropping and resampling; points are RAS mm. The keys are the names of :class:`medinr.data.pair.Pair`'s
fields: ``fixed``, ``fixed_mask``, ``fixed_exclude``, ``fixed_points``, ``fixed_guides``, ``fixed_labels`` and the same
for ``moving``; a key that is missing is no error. The last transform leaves plain tensors, which a cache on disk loads
without unpickling code.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.croppad.array import SpatialCrop
from monai.transforms.spatial.array import Spacing
from monai.transforms.transform import MapTransform
from scipy.ndimage import gaussian_filter
from torch import Tensor

from medinr.data.lungs import lung_mask
from medinr.data.pair import Pair
from medinr.errors import UserError
from medinr.io import PointsSpace, as_channels, check_points_inside, read_labels, read_mask, read_points
from medinr.space import Domain, Image

SIDES = ("fixed", "moving")
MASKS = ("fixed_mask", "moving_mask", "fixed_exclude", "moving_exclude")
LABELS = ("fixed_labels", "moving_labels")
POINTS = ("fixed_points", "moving_points", "fixed_guides", "moving_guides")
VOLUMES = (*SIDES, *MASKS, *LABELS)


def to_meta(values: Tensor, domain: Domain, source: str = "") -> MetaTensor:
    """A `MetaTensor` [C, X, Y, Z] float32 with the domain's affine and the name of its file."""
    volume = values if values.ndim == 4 else values[None]
    return MetaTensor(volume.float(), affine=domain.voxel_to_world, meta={"source": source})


def domain_of(volume: MetaTensor) -> Domain:
    """The grid of a `MetaTensor` [C, X, Y, Z]."""
    return Domain.of(volume.shape[1:], volume.affine)


def to_image(volume: MetaTensor) -> Image:
    """The opposite of `to_meta`."""
    return Image(volume.as_tensor(), domain_of(volume), str(volume.meta.get("source", "")))


class Reading(MapTransform):
    """A `MapTransform` over those of its keys that the sample has; `one` maps one value."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        super().__init__(keys, allow_missing_keys=True)

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        sample = dict(data)
        for key in self.key_iterator(sample):
            sample[key] = self.one(str(key), sample)
        return sample

    def one(self, key: str, sample: Mapping[str, Any]) -> Any:
        raise NotImplementedError


class ReadImaged(Reading):
    """Read images from the path, or the paths of the channels, under the keys (`medinr.io.as_channels`)."""

    def __init__(self, keys: tuple[str, ...] = SIDES, multichannel: bool = False) -> None:
        super().__init__(keys)
        self.multichannel = multichannel

    def one(self, key: str, sample: Mapping[str, Any]) -> MetaTensor:
        image = as_channels(sample[key], self.multichannel)
        return to_meta(image.data, image.domain, image.source or str(sample[key]))


class ReadOnGridd(Reading):
    """Read masks and label volumes from the paths under their keys, each on the grid of its own image."""

    def __init__(self, keys: tuple[str, ...] = (*MASKS, *LABELS)) -> None:
        super().__init__(keys)

    def one(self, key: str, sample: Mapping[str, Any]) -> MetaTensor:
        domain = domain_of(sample[_side(key)])
        read = read_mask if key in MASKS else read_labels
        return to_meta(read(sample[key], domain), domain, str(sample[key]))


class ReadPointsd(Reading):
    """Read points from the paths under their keys to RAS mm, float64 [n, 3]; they must lie in their image."""

    def __init__(self, space: PointsSpace = "ras", keys: tuple[str, ...] = POINTS) -> None:
        super().__init__(keys)
        self.space = space

    def one(self, key: str, sample: Mapping[str, Any]) -> Tensor:
        domain = domain_of(sample[_side(key)])
        points = read_points(sample[key], self.space, domain)
        check_points_inside(points, domain, str(sample[key]))
        return points


class LungMaskd(Reading):
    """Compute a lung mask (`medinr.data.lungs.lung_mask`) for the images under the keys, where there is none yet."""

    def __init__(self, dilate_mm: float = 0.0, keys: tuple[str, ...] = SIDES) -> None:
        super().__init__(keys)
        self.dilate_mm = dilate_mm

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        sample = dict(data)
        for key in self.key_iterator(sample):
            if f"{key}_mask" not in sample:
                image = to_image(sample[key])
                sample[f"{key}_mask"] = to_meta(lung_mask(image, self.dilate_mm), image.domain)
        return sample


class CropToMaskd(Reading):
    """Crop each image, and what lies on its grid, to the box of its mask and a margin.

    Raises:
        UserError: an image has no mask, or its points would be cut off.
    """

    def __init__(self, margin_mm: float, keys: tuple[str, ...] = SIDES) -> None:
        super().__init__(keys)
        self.margin_mm = margin_mm

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        sample = dict(data)
        for side in self.key_iterator(sample):
            if f"{side}_mask" not in sample:
                raise UserError(
                    f"margin_mm: expected a mask of the {side} image to crop to, found none; give one, or no margin"
                )
            start, stop = mask_box(sample[f"{side}_mask"], self.margin_mm)
            crop = SpatialCrop(roi_start=start, roi_end=stop)
            for key in (side, f"{side}_mask", f"{side}_exclude", f"{side}_labels"):
                if key in sample:
                    sample[key] = crop(sample[key])
            domain = domain_of(sample[side])
            for kind in ("points", "guides"):
                if f"{side}_{kind}" in sample:
                    name = f"{side} {kind}, margin_mm {self.margin_mm:g}"
                    check_points_inside(sample[f"{side}_{kind}"], domain, name)
        return sample


class Resampled(Reading):
    """Resample volumes to an isotropic spacing: images linearly, masks and labels by nearest neighbour.

    A single slice keeps its thickness.

    An image that becomes coarser is smoothed first, with the Gaussian that widens the voxel's half-maximum width from
    the old spacing to the new one, or fine vessels would alias.
    """

    def __init__(self, spacing_mm: float, keys: tuple[str, ...] = VOLUMES) -> None:
        super().__init__(keys)
        self.spacing_mm = spacing_mm

    def one(self, key: str, sample: Mapping[str, Any]) -> MetaTensor:
        volume = sample[key]
        domain = domain_of(volume)
        pixdim = [s if n == 1 else self.spacing_mm for n, s in zip(domain.shape, domain.spacing, strict=True)]
        if key not in SIDES:
            return _meta(Spacing(pixdim, mode="nearest", padding_mode="border")(volume))
        factors = [p / s for p, s in zip(pixdim, domain.spacing, strict=True)]
        sigmas = [np.sqrt(max(f * f - 1.0, 0.0)) / 2.355 for f in factors]
        if max(sigmas) > 0:
            # Not MONAI's GaussianSmooth: it pads with zeros, and the air around a CT is -1000.
            smooth = gaussian_filter(volume.as_tensor().numpy(), (0, *sigmas), mode="nearest")
            volume = to_meta(torch.from_numpy(smooth), domain, str(volume.meta.get("source", "")))
        return _meta(Spacing(pixdim, mode="bilinear", padding_mode="border")(volume))


class PlainTensorsd(Reading):
    """Replace each `MetaTensor` by a plain tensor of its final type; affine and file name get keys of their own."""

    def __init__(self, keys: tuple[str, ...] = VOLUMES) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        sample = dict(data)
        for key in self.key_iterator(sample):
            volume = sample[key]
            values = volume.as_tensor()
            if key in MASKS:
                sample[key] = values[0] > 0.5
            elif key in LABELS:
                sample[key] = values[0].round().int()
            else:
                sample[key] = values.float().contiguous()
                sample[f"{key}_affine"] = volume.affine.double()
                sample[f"{key}_source"] = str(volume.meta.get("source", ""))
        return sample


def mask_box(mask: Tensor, margin_mm: float) -> tuple[list[int], list[int]]:
    """First and one-past-last voxel of a mask [1, X, Y, Z], ``margin_mm`` added, inside the image."""
    domain = domain_of(mask) if isinstance(mask, MetaTensor) else Domain.of(mask.shape[1:], torch.eye(4))
    voxels = (mask[0] > 0.5).nonzero()
    margin = torch.tensor([int(np.ceil(margin_mm / s)) for s in domain.spacing])
    start = (voxels.amin(0) - margin).clamp(min=0)
    stop = torch.minimum(voxels.amax(0) + 1 + margin, torch.tensor(domain.shape))
    return start.tolist(), stop.tolist()


def pair_of(sample: Mapping[str, Any], name: str) -> Pair:
    """The pair of a sample that has gone through `PlainTensorsd`."""
    images = {
        side: Image(
            sample[side],
            Domain.of(sample[side].shape[1:], sample[f"{side}_affine"]),
            str(sample.get(f"{side}_source", "")),
        )
        for side in SIDES
    }
    rest = {key: sample[key] for key in (*MASKS, *LABELS, *POINTS) if key in sample}
    return Pair(name, images["fixed"], images["moving"], **rest)


def _meta(volume: Tensor) -> MetaTensor:
    assert isinstance(volume, MetaTensor)  # MONAI's annotations say Tensor
    return volume


def _side(key: str) -> str:
    return key.split("_")[0]
