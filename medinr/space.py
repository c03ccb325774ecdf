"""Voxel, world and normalised coordinates: the only place that converts between them.

World is RAS millimetres, as nibabel reads a NIfTI affine. Voxel coordinates are 0-based with voxel centres at the
integers. Normalised coordinates are ``(world - centre) / scale``: the centre of the box of *outer voxel edges* and one
scale, half its longest side, so that space stays isotropic and resampling an image does not change them. Methods on
grids turn them to the grid's own axes.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from medinr.types import Matrix, Points, Volume

Scale = Literal["isotropic", "oriented", "per-axis"]
REFERENCE_LENGTH_MM = 100.0
"""Second-order penalties are taken with lengths in units of 100 mm, whatever the image's size (DESIGN: space)."""


def transform_points(matrix: Matrix, points: Points) -> Points:
    """Apply a homogeneous 4 x 4 matrix to points [..., 3]; computes in the points' type, on their device."""
    m = matrix.to(device=points.device, dtype=points.dtype)
    return torch.add(points @ m[:3, :3].T, m[:3, 3])


@dataclass(frozen=True)
class Domain:
    """An image's grid: shape and 4 x 4 voxel-to-world affine (RAS mm), with the maps between the three frames.

    Args:
        shape: voxels along the three array axes.
        affine: rows of the 4 x 4 matrix, plain numbers (so a domain is hashable and goes into a checkpoint).
        scale: ``"isotropic"``: one scale for all axes, normalised axes parallel to the world's. ``"oriented"``: one
            scale, axes parallel to the grid's, so that a lattice fits an oblique image and its nodes meet the voxels.
            ``"per-axis"``: each voxel axis is normalised to [-1, 1] over the outer edges on its own, for comparison
            with codes that do so.
    """

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    scale: Scale = "isotropic"

    @classmethod
    def of(cls, shape: Any, affine: Any, scale: Scale = "isotropic") -> "Domain":
        """A domain from any sequence of three integers and any 4 x 4 array."""
        rows = torch.as_tensor(affine, dtype=torch.float64)
        if tuple(rows.shape) != (4, 4):
            raise ValueError(f"affine: expected a 4 x 4 matrix, got shape {tuple(rows.shape)}")
        if len(shape) != 3:
            raise ValueError(f"shape: expected three numbers of voxels, got {tuple(shape)}")
        x, y, z = (int(n) for n in shape)
        return cls((x, y, z), tuple(tuple(float(v) for v in row) for row in rows), scale)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Domain":
        return cls.of(values["shape"], values["affine"], values.get("scale", "isotropic"))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for checkpoints and JSON."""
        return {"shape": list(self.shape), "affine": [list(row) for row in self.affine], "scale": self.scale}

    def with_scale(self, scale: Scale) -> "Domain":
        return replace(self, scale=scale)

    @cached_property
    def voxel_to_world(self) -> Matrix:
        return torch.tensor(self.affine, dtype=torch.float64)

    @cached_property
    def world_to_voxel(self) -> Matrix:
        inverse: Matrix = torch.linalg.inv(self.voxel_to_world)
        return inverse

    @cached_property
    def spacing(self) -> tuple[float, float, float]:
        """Distance in mm between neighbouring voxel centres along each array axis."""
        sx, sy, sz = self.voxel_to_world[:3, :3].norm(dim=0).tolist()
        return sx, sy, sz

    @cached_property
    def sides_mm(self) -> tuple[float, float, float]:
        """Lengths of the box of outer voxel edges, n x spacing, along the array axes."""
        a, b, c = (n * s for n, s in zip(self.shape, self.spacing, strict=True))
        return a, b, c

    @cached_property
    def unit_mm(self) -> float:
        """Millimetres in one normalised unit: half the longest side (per-axis: geometric mean of the half sides)."""
        if self.scale != "per-axis":
            return max(self.sides_mm) / 2
        a, b, c = self.sides_mm
        return float((a * b * c) ** (1 / 3) / 2)

    @cached_property
    def directions(self) -> Matrix:
        """Those of the array axes, columns of an orthogonal [3, 3]; of a sheared grid the nearest orthogonal ones."""
        left, _, right = torch.linalg.svd(self.voxel_to_world[:3, :3] / torch.tensor(self.spacing).double())
        nearest: Matrix = left @ right
        return nearest

    @cached_property
    def axes(self) -> Matrix:
        """`directions` in the order and signs nearest to the world's axes."""
        along = self.directions
        order = max(itertools.permutations(range(3)), key=lambda p: float(along[range(3), p].abs().sum()))
        along = along[:, order]
        along = along * torch.where(along.diagonal() < 0, -1.0, 1.0)
        eye = torch.eye(3, dtype=torch.float64)
        return eye if torch.allclose(along, eye, rtol=0, atol=1e-6) else along

    @cached_property
    def normalised_to_world(self) -> Matrix:
        centre = transform_points(self.voxel_to_world, torch.tensor([(n - 1) / 2 for n in self.shape]).double())
        m = torch.eye(4, dtype=torch.float64)
        if self.scale == "per-axis":
            m[:3, :3] = self.voxel_to_world[:3, :3] * torch.tensor(self.shape, dtype=torch.float64) / 2
        else:
            m[:3, :3] = self.unit_mm * (self.axes if self.scale == "oriented" else torch.eye(3).double())
        m[:3, 3] = centre
        return m

    @cached_property
    def world_to_normalised(self) -> Matrix:
        inverse: Matrix = torch.linalg.inv(self.normalised_to_world)
        return inverse

    @cached_property
    def voxel_to_normalised(self) -> Matrix:
        return self.world_to_normalised @ self.voxel_to_world

    @cached_property
    def normalised_to_voxel(self) -> Matrix:
        return self.world_to_voxel @ self.normalised_to_world

    @cached_property
    def flat_axis(self) -> int | None:
        """The array axis of a single slice (one voxel thick), the last if there are several; None for a volume."""
        flat = [axis for axis, n in enumerate(self.shape) if n == 1]
        return flat[-1] if flat else None

    @cached_property
    def in_plane(self) -> Matrix | None:
        """Of a single slice: the orthogonal projection [3, 3] of normalised vectors onto its plane; None for a volume.

        The plane goes through the origin of normalised space, the centre of the slice.
        """
        if self.flat_axis is None:
            return None
        axes = [axis for axis in range(3) if axis != self.flat_axis]
        q, _ = torch.linalg.qr(self.voxel_to_normalised[:3, axes])
        projection: Matrix = q @ q.T
        return projection

    @property
    def n_voxels(self) -> int:
        x, y, z = self.shape
        return x * y * z

    def voxels(self, start: int = 0, stop: int | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Voxel coordinates [n, 3] (float32) of the voxels ``start:stop`` in C order, last array axis fastest."""
        flat = torch.arange(start, self.n_voxels if stop is None else min(stop, self.n_voxels), device=device)
        _, ny, nz = self.shape
        return torch.stack((flat // (ny * nz), flat // nz % ny, flat % nz), dim=1).float()

    def contains_voxels(self, voxels: Points, margin: float = 0.5) -> Tensor:
        """Whether voxel coordinates [..., 3] lie in the grid, up to ``margin`` voxels beyond the outer centres."""
        upper = torch.tensor(self.shape, device=voxels.device, dtype=voxels.dtype) - 1 + margin
        return torch.all((voxels >= -margin) & (voxels <= upper), dim=-1)

    @property
    def sheared(self) -> bool:
        """Whether the voxel axes are not at right angles."""
        axes = self.voxel_to_world[:3, :3] / self.voxel_to_world[:3, :3].norm(dim=0)
        return bool((axes.T @ axes - torch.eye(3, dtype=torch.float64)).abs().max() > 1e-4)

    @property
    def rounding_mm(self) -> float:
        """What two programs' affines of one grid may differ by: 0.001 mm or a hundredth of a voxel, never a tenth."""
        side = min(self.spacing)
        return min(max(0.01 * side, 1e-3), 0.1 * side)

    def same_grid(self, other: "Domain", tolerance_mm: float = 1e-3) -> bool:
        """Same shape, and corners that agree within ``tolerance_mm``."""
        if self.shape != other.shape:
            return False
        corners = torch.tensor(
            [[i, j, k] for i in (0, self.shape[0] - 1) for j in (0, self.shape[1] - 1) for k in (0, self.shape[2] - 1)],
            dtype=torch.float64,
        )
        gap = transform_points(self.voxel_to_world, corners) - transform_points(other.voxel_to_world, corners)
        return bool(gap.norm(dim=1).max() <= tolerance_mm)


@dataclass(frozen=True)
class Image:
    """Values [C, X, Y, Z] (float32; one channel for a plain scan) on a :class:`Domain`; ``source`` names the file."""

    data: Volume
    domain: Domain
    source: str = ""

    def __post_init__(self) -> None:
        if self.data.ndim != 4 or tuple(self.data.shape[1:]) != self.domain.shape:
            raise ValueError(f"image: expected values [C, {self.domain.shape}], got {tuple(self.data.shape)}")

    def to(self, device: torch.device | str) -> "Image":
        return replace(self, data=self.data.to(device))
