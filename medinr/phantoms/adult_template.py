"""The brain that the adult phantom deforms: nilearn's MNI ICBM152 where it is installed, else a synthetic one."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, binary_fill_holes, distance_transform_edt, gaussian_filter, label

from medinr import io
from medinr.data.layouts_brain import MNI_CORNER, MNI_SHAPE
from medinr.data.working import on_grid
from medinr.errors import UserError
from medinr.phantoms.brain_anatomy import BrainShape, anatomy, nuclei
from medinr.phantoms.brain_image import layers, painted_image
from medinr.phantoms.brain_shapes import Array
from medinr.space import Domain, transform_points

ADULT = BrainShape(
    scale=1.46, sulci=(16.0, 12.0, 8.0), cortex=2.9, gap=0.9, csf=2.5, sylvian=0.03, ventricles=1.0, callosum=5.0,
    hindbrain=1.02, shift=0.0,
)  # fmt: skip
MIDDLE = (0.0, -17.0, 7.0)
"""MNI mm of the origin of body coordinates."""
TISSUES = ("csf", "gm", "wm")
CONTRAST = {
    "scalp": 0.9, "skull": 0.15, "csf": 0.20, "cortex": 0.56, "white": 0.86, "callosum": 0.90, "capsule": 0.88,
    "deep": 0.66, "hippocampus": 0.58, "cerebellum": 0.60, "brainstem": 0.80, "midline": 0.18, "ventricles": 0.17,
}  # fmt: skip
GREY = {"cortex": 1.0, "deep": 0.85, "hippocampus": 1.0, "cerebellum": 0.75, "brainstem": 0.1}
FIRST = {"brainstem": (16,), "thalamus": (10, 49), "caudate": (11, 50), "lentiform": (12, 51), "hippocampus": (17, 53)}
"""Values of FIRST, left and right; the lentiform nucleus counts as putamen."""
FLUID = ("csf", "midline", "ventricles")
NILEARN = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"


@dataclass(frozen=True)
class Template:
    """A brain in MNI space.

    Args:
        name: ``synthetic`` or ``nilearn``.
        domain: the grid.
        t1: intensities [X, Y, Z], white matter about 0.86.
        tissues: shares of CSF, grey and white matter [3, X, Y, Z].
        ventricles: signed distance from the lateral ventricles, mm.
        pial: signed distance from the surface of the brain, ventricles not counted, mm.
        head: signed distance from the outer surface of the CSF, mm.
        first: subcortical structures [X, Y, Z] as FIRST numbers them, or None where they are not known.
    """

    name: str
    domain: Domain
    t1: Array
    tissues: Array
    ventricles: Array
    pial: Array
    head: Array
    first: NDArray[np.uint8] | None = None


def mni_grid(spacing: float) -> Domain:
    """MNI152's box with voxels of this size."""
    affine = np.diag([-spacing, spacing, spacing, 1.0])
    affine[:3, 3] = [c + s * spacing / 2 for c, s in zip(MNI_CORNER, (-1, 1, 1), strict=True)]
    return Domain.of([round(n / spacing) for n in MNI_SHAPE], affine)


def nilearn_folder() -> Path | None:
    """Where nilearn keeps its templates, or None; nothing is imported."""
    found = find_spec("nilearn")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "datasets" / "data"
    return folder if (folder / NILEARN.format("t1")).exists() else None


@lru_cache(maxsize=2)
def template(spacing: float, source: str = "auto") -> Template:
    """The brain on `mni_grid`.

    Args:
        source: ``nilearn``, ``synthetic``, or ``auto``: nilearn's where it is installed.

    Raises:
        UserError: another source; nilearn asked for and not installed.
    """
    if source not in ("auto", "nilearn", "synthetic"):
        raise UserError(f"--template: expected auto, nilearn or synthetic, got {source!r}")
    folder = nilearn_folder()
    if source == "nilearn" and folder is None:
        raise UserError("--template nilearn: expected nilearn to be installed, found none; pip install nilearn")
    if folder is None or source == "synthetic":
        return synthetic_template(spacing)
    return nilearn_template(spacing, folder)


def synthetic_template(spacing: float) -> Template:
    """The geometry of the perinatal phantom, grown up."""
    domain = mni_grid(spacing)
    world = transform_points(domain.voxel_to_world, domain.voxels().double()).numpy().astype(np.float32)
    body = ((world - np.array(MIDDLE, dtype=np.float32)) / ADULT.scale).T.reshape(3, *domain.shape)
    found = anatomy(body, ADULT, spacing / ADULT.scale, np.random.default_rng(0))
    shapes = layers(found)
    outside = {"scalp": 0.0, "skull": 0.0}
    t1 = painted_image(shapes, {**CONTRAST, **outside}, spacing)
    grey = painted_image(shapes, {**dict.fromkeys(shapes, 0.0), **GREY}, spacing)
    fluid = painted_image(shapes, {name: float(name in FLUID) for name in shapes}, spacing)
    inside = painted_image(shapes, {name: float(name not in outside) for name in shapes}, spacing)
    white = np.clip(inside - grey - fluid, 0, 1)
    pial = np.minimum(np.minimum(found.pial, found.cerebellum), found.brainstem)
    return Template(
        "synthetic", domain, t1, np.stack([fluid, grey, white]).astype(np.float32), shapes["ventricles"],
        pial.astype(np.float32), found.head, _first_labels(body, shapes),
    )  # fmt: skip


def _first_labels(body: Array, shapes: Mapping[str, Array]) -> NDArray[np.uint8]:
    found = np.zeros(body.shape[1:], dtype=np.uint8)
    found[shapes["brainstem"] < 0] = FIRST["brainstem"][0]
    parts = {**nuclei(body), "hippocampus": shapes["hippocampus"]}
    for name, distance in parts.items():
        for side, value in zip((body[0] < 0, body[0] >= 0), FIRST[name], strict=True):
            found[(distance < 0) & (shapes["white"] < 0) & (shapes["ventricles"] > 0) & side] = value
    return found


def nilearn_template(spacing: float, folder: Path) -> Template:
    """MNI ICBM152 2009a as nilearn ships it: T1 without skull, maps of grey and white matter."""
    domain = mni_grid(spacing)
    t1, grey, white = (
        on_grid(io.read_image(folder / NILEARN.format(what)), domain, torch.eye(4))[0].numpy() / 255
        for what in ("t1", "gm", "wm")
    )
    brain = np.clip(grey + white, 0, 1)
    mask = binary_fill_holes(_largest(binary_dilation(brain > 0.5, iterations=max(1, round(1.5 / spacing)))))
    fluid = np.where(mask, 1 - brain, 0)
    head = _distance(mask, spacing)
    ventricles = _distance(_lateral_ventricles(fluid > 0.4, head, domain), spacing)
    pial = _distance((brain > 0.5) | (ventricles < 1.5), spacing)
    bright = np.median(t1[white > 0.9])
    tissues = np.stack([fluid, np.where(mask, grey, 0), np.where(mask, white, 0)]).astype(np.float32)
    image = np.where(mask, np.clip(t1 / bright * CONTRAST["white"], 0, None), 0)
    return Template("nilearn", domain, image.astype(np.float32), tissues, ventricles, pial, head)


def _distance(mask: NDArray[np.bool_], spacing: float) -> Array:
    """Signed distance from a mask's surface, mm, smoothed over the steps of the voxels."""
    signed = distance_transform_edt(~mask) - distance_transform_edt(mask)
    signed -= 0.5 * np.sign(signed)
    return np.asarray(gaussian_filter(signed * spacing, 0.7), dtype=np.float32)


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    parts, _ = label(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.asarray(parts == sizes.argmax())


def _lateral_ventricles(fluid: NDArray[np.bool_], head: Array, domain: Domain) -> NDArray[np.bool_]:
    """Fluid deep in the brain, between the poles of the ventricles; not the third, nor the cisterns behind it."""
    world = transform_points(domain.voxel_to_world, domain.voxels().double()).numpy().reshape(*domain.shape, 3)
    x, y, z = np.abs(world[..., 0]), world[..., 1], world[..., 2]
    room = (x < 36) & (y > -55) & (y < 38) & (z > -2) & (z < 32) & (head < -16)
    midline = ((x < 9) & (y < -26)) | ((x < 3) & (z < 5))
    parts, _ = label(fluid & room & ~midline)
    sizes = np.bincount(parts.ravel()) * np.prod(domain.spacing)
    sizes[0] = 0
    return np.asarray(np.isin(parts, np.flatnonzero(sizes > 300)))
