"""Drawing of the thorax phantom: the grid, soft edges, compositing and textures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from medinr.phantoms.thorax_tree import draw_tubes

Array = NDArray[np.floating[Any]]
Volume = NDArray[np.float32]


def ellipsoid(x: Array, y: Array, z: Array, centre: tuple[float, float, float], radii: tuple[float, ...]) -> Array:
    """Approximate signed distance (negative inside) of an axis-aligned ellipsoid."""
    level = np.sqrt(sum(((v - c) / r) ** 2 for v, c, r in zip((x, y, z), centre, radii, strict=True)))
    return np.asarray((level - 1.0) * min(radii))


def smooth_max(a: Array, b: Array, k: float) -> Array:
    """Maximum with corners rounded over a width k (polynomial blend)."""
    h = np.maximum(k - np.abs(a - b), 0.0) / k
    return np.asarray(np.maximum(a, b) + 0.25 * k * h * h)


def cover(d: Array, edge: float) -> Array:
    """Share of a voxel of size ``edge`` inside a surface at signed distance d."""
    return np.asarray(np.clip(0.5 - d / edge, 0.0, 1.0))


def over(values: Array, hu: Array | float, share: Array) -> Array:
    """Composite a material over what is there."""
    return np.asarray(values + share * (hu - values))


def texture(shape: tuple[int, ...], step: Array, width: float, rng: np.random.Generator) -> Volume:
    """Gaussian random field of unit variance and correlation width ``width`` mm."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    field = gaussian_filter(noise, width / step, mode="wrap", truncate=3.0)
    return np.asarray(field / max(float(field.std()), 1e-9), dtype=np.float32)


@dataclass(frozen=True)
class Canvas:
    """A regular grid in the body frame: voxel (i, j, k) at ``origin + step * (i, j, k)``."""

    origin: Array
    step: Array
    shape: tuple[int, int, int]

    def slab(self, first: int, last: int) -> tuple[Array, Array, Array]:
        """Open coordinate grids of the slices first ... last - 1."""
        x, y, z = (self.origin[a] + self.step[a] * np.arange(self.shape[a]) for a in range(3))
        return x[:, None, None], y[None, :, None], z[None, None, first:last]

    @property
    def edge(self) -> float:
        """Width over which edges are softened, mm."""
        return float(np.cbrt(np.prod(self.step)))


def drawn(canvas: Canvas, groups: list[Array], margin: float = 0.0) -> Volume:
    volume = np.zeros(canvas.shape, dtype=np.float32)
    for tubes in groups:
        draw_tubes(volume, canvas.origin, canvas.step, tubes, margin)
    return volume
