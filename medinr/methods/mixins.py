"""What the methods share: evaluation of a map on points, similarity on extrapolated patches, penalties.

Behaviour only: no constructor and no Lightning hook. What a mixin needs of its host is annotated at its head.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from medinr import jets
from medinr.fields import Map
from medinr.fields.planar import within
from medinr.fields.tangent import own_jets
from medinr.jets import Jet
from medinr.losses import OwnCoordinates, Regularizer, Similarity
from medinr.methods.levels import Level
from medinr.sampling import fitted_offsets, interpolate, nearest
from medinr.space import REFERENCE_LENGTH_MM, Domain, transform_points
from medinr.types import Mask, Matrix, Points, Scalar

GUIDE_SCALE_MM = 1.0
"""Below this distance the guides' penalty is quadratic, above it linear: the precision of a click."""
MOST_GUIDES = 512
"""More guides than this are drawn from at every step."""


def robust_distance(gap_mm: Tensor, scale_mm: float = GUIDE_SCALE_MM) -> Tensor:
    """Pseudo-Huber norm of gaps [..., 3] in mm: sqrt(|r|^2 + s^2) - s, near |r| for large gaps, |r|^2 / 2s for small.

    A landmark that was set wrongly pulls no harder than any other.
    """
    distance: Tensor = (gap_mm.square().sum(-1) + scale_mm**2).sqrt() - scale_mm
    return distance


class INRMixin:
    """Evaluates the host's map, and compares the images through it."""

    map: Map
    similarity: Similarity
    domain: Domain
    to_moving_voxels: Matrix
    moving_mask: Mask | None
    fixed_exclude: Mask | None = None
    moving_exclude: Mask | None = None

    @property
    def motion(self) -> Map:
        """The host's map; on a single slice, confined to its plane."""
        return within(self.map, self.domain)

    def displacement_jet(self, x: Points, order: int, context: Tensor | None = None) -> Jet:
        """Jet of u at x along the canonical basis."""
        return self.motion.displacement_jet(jets.seed(x, order), context)

    def guide_distance(self, fixed: Points, moving: Points, to_moving: Matrix, context: Tensor | None = None) -> Scalar:
        """Mean robust distance |phi(p) - q| of guiding landmarks, in units of 100 mm (see `robust_distance`).

        Args:
            fixed, moving: corresponding points p, q [n, 3], RAS mm.
            to_moving: from normalised coordinates through the start to the moving world.
            context: the condition of the map.
        """
        if len(fixed) > MOST_GUIDES:
            some = torch.randperm(len(fixed), device=fixed.device)[:MOST_GUIDES]
            fixed, moving = fixed[some], moving[some]
        # In float64 up to the network: world coordinates of some scanners are metres away from the origin.
        x = transform_points(self.domain.world_to_normalised, fixed)
        u = self.motion.displacement(x.float(), context)
        at_start = transform_points(to_moving, x) - moving
        gap = at_start.to(u) + u @ to_moving[:3, :3].to(u).T
        distance: Scalar = robust_distance(gap).mean() / REFERENCE_LENGTH_MM
        return distance

    def compare(self, x: Points, u: Jet, level: Level) -> tuple[Scalar, Scalar, Scalar]:
        """Similarity of the images through id + u at x.

        A patch similarity needs the first derivatives of u: the moving patch is phi(x) + J_phi(x) d.

        Returns:
            the similarity; the overlap (share of samples with weight); the mean distance outside the moving grid of
            points that the start maps inside, in units of 100 mm.
        """
        offsets = self.similarity.offsets(level.smoothing_mm)
        matrix = self.to_moving_voxels.to(x)
        target = transform_points(matrix, x + u.value)
        source = transform_points(self.domain.normalised_to_voxel, x)
        outside = self._outside(target, transform_points(matrix, x), level)
        if offsets is not None:
            offsets = fitted_offsets(offsets, self.domain, self.similarity.unordered)
            d = offsets.to(x) @ self.domain.world_to_normalised[:3, :3].to(x).T
            source = source[:, None] + d @ self.domain.normalised_to_voxel[:3, :3].to(x).T
            carried = d + torch.einsum("nci,pi->npc", u.jacobian, d)
            target = target[:, None] + carried @ matrix[:3, :3].T
        weight = self._weight(source, target, level)
        with torch.no_grad():
            fixed = interpolate(level.fixed, source)
        moved = interpolate(level.moving, target)
        losses = [self.similarity(f, m, weight) for f, m in zip(fixed, moved, strict=True)]
        return torch.stack(losses).mean(), weight.mean(), outside

    @torch.no_grad()
    def _weight(self, source: Tensor, target: Tensor, level: Level) -> Tensor:
        """1 where a sample lies inside both grids and the moving mask, and in nothing that is excluded, else 0."""
        weight = self.domain.contains_voxels(source)
        upper = torch.tensor(level.moving.shape[1:], device=target.device) - 0.5
        weight &= ((target >= -0.5) & (target <= upper)).all(-1)
        if self.moving_mask is not None:
            weight &= nearest(self.moving_mask, target)
        for excluded, voxels in ((self.fixed_exclude, source), (self.moving_exclude, target)):
            if excluded is not None:
                weight &= ~nearest(excluded, voxels)
        return weight.to(target.dtype)

    def _outside(self, target: Points, start: Points, level: Level) -> Scalar:
        upper = torch.tensor(level.moving.shape[1:], device=target.device, dtype=target.dtype) - 1
        step = self.to_moving_voxels[:3, :3].to(target).norm(dim=1).reciprocal() * self.domain.unit_mm
        beyond = ((-target).clamp(min=0) + (target - upper).clamp(min=0)) * step
        # Across a single slice the points are at its centre up to rounding, and they stay there.
        slack = torch.where(upper > 0, 0.0, 0.5).to(upper)
        was_inside = ((start >= -slack) & (start <= upper + slack)).all(-1)
        outside: Scalar = (beyond.sum(-1) * was_inside).mean() / REFERENCE_LENGTH_MM
        return outside


class RegularizerMixin:
    """Evaluates the host's penalties, each at its own share of the points and along its own directions."""

    domain: Domain
    penalties: Mapping[str, Regularizer]

    @property
    def motion(self) -> Map:
        """The map that is fitted."""
        raise NotImplementedError

    def penalty(self, regularizer: Regularizer, x: Points, u: Jet, context: Tensor | None = None) -> Scalar:
        """Raw penalty; ``u`` is a jet at x that is used again where it already holds what is needed."""
        n = max(1, round(regularizer.fraction * len(x)))
        if regularizer.directions == "probes":
            seed = jets.probe(x[:n])
        elif regularizer.order > u.order or isinstance(regularizer, OwnCoordinates):
            seed = jets.seed(x[:n], regularizer.order)
        else:
            return self._raw(regularizer, u[slice(0, n)])
        if isinstance(regularizer, OwnCoordinates):
            parts = [self._raw(regularizer, own) for own in own_jets(self.motion, seed, context)]
            return torch.stack(parts).sum()
        return self._raw(regularizer, self.motion.displacement_jet(seed, context))

    def _raw(self, regularizer: Regularizer, u: Jet) -> Scalar:
        unit = self.domain.unit_mm / REFERENCE_LENGTH_MM if self.domain.scale != "per-axis" else 1.0
        raw: Scalar = regularizer(u.rescale(unit, unit))
        return raw
