"""Registration on whole regular grids of the image, for splines and for statistics that want every voxel."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from medinr.data.pair import Pair
from medinr.errors import UserError
from medinr.fields import Field
from medinr.losses import LocalNCC, Regularizer, Similarity
from medinr.losses.volumes import ForwardDiffusion, VolumeNCC, VolumePoints, VolumeSimilarity
from medinr.methods.base import RegistrationMethod
from medinr.methods.grids import Grid, compare_on_grid, make_grid, voxel_mm
from medinr.methods.levels import Level, Window
from medinr.sampling import PointSampler
from medinr.space import transform_points
from medinr.types import Points, Scalar


class VolumeRegistration(RegistrationMethod):
    """min over the field of similarity(all points of a grid) + sum_k weight_k R_k + overlap_weight * outside.

    SINR (Sideri-Lampretsa et al., MIDL 2024) compares all voxels in each step: its spline gives a whole grid at little
    more than the cost of the grid itself, and the mutual information of few points is noisy. Here the grid gets finer
    in the course of the steps. Fields with an `on_grid` of their own (SINR, a control lattice, sums of them) are meant;
    any other is asked at every point, which takes time and memory.

    Penalties look at random points of the mask or the image, with exact derivatives, as in every method; only
    `ForwardDiffusion` looks at the grid.

    Args:
        field: the displacement (or a map), in normalised coordinates.
        similarity: `NCC`, `NMI` or `MSE` of all points of the grid at once, or `LocalNCC`: that of the windows of the
            grid's points next to its radius, by box filters.
        regularizers: penalties by name; the names appear in the logs.
        shrinks: distance of the grid's points in voxels, one number a level, each for an equal share of the steps. The
            images are smoothed by half of it.
        most: a grid has at most this many points; larger images get a larger distance.
        points: random points a step, for the penalties.
        scale: always ``oriented``: lengths of the grid are those of space.

    Other arguments as for `RegistrationMethod`.
    """

    def __init__(
        self,
        field: Field,
        similarity: Similarity,
        regularizers: dict[str, Regularizer] | None = None,
        shrinks: Sequence[float] = (1.0,),
        most: int = 4_000_000,
        points: int = 2048,
        lr: float = 1e-4,
        warmup: float = 0.0,
        cosine: bool = False,
        overlap_weight: float = 1.0,
        window: tuple[float, float] | None = None,
        use_mask: bool = True,
        use_moving_mask: bool = False,
        landmark_weight: float = 0.0,
    ) -> None:
        super().__init__(
            field, similarity, regularizers, points, (0.0,), lr, warmup, cosine, overlap_weight, window, True,
            use_mask, use_moving_mask, "oriented", landmark_weight, 1.0,
        )  # fmt: skip
        if not shrinks or min(shrinks) <= 0 or most < 1000:
            raise UserError(f"shrinks: expected distances above 0 and most >= 1000, got {list(shrinks)} and {most}")
        if not isinstance(similarity, LocalNCC) and similarity.offsets(0.0) is not None:
            name = type(similarity).__name__
            raise UserError(f"similarity: VolumeRegistration knows NCC, NMI, MSE and LocalNCC, got {name}")
        self.shrinks, self.most = tuple(shrinks), most
        self._grid: tuple[int, Grid] | None = None

    def attach(self, pair: Pair) -> None:
        super().attach(pair)
        self._grid = None

    # -- the grid ------------------------------------------------------------------------------------------------

    @property
    def _level_index(self) -> int:
        share = self.trainer.global_step / max(self.total_steps, 1) if self._trainer is not None else 1.0
        return min(int(share * len(self.shrinks)), len(self.shrinks) - 1)

    @property
    def level(self) -> Level:
        return self.grid().level

    @property
    def sampler(self) -> PointSampler:
        return self.samplers[0]

    def grid(self) -> Grid:
        """That of the present level."""
        index, pair = self._level_index, self.pair
        if self._grid is None or self._grid[0] != index:
            assert pair is not None
            self._grid = None  # the memory of the last one, before the next is made
            flat = [(float(w[0]), float(w[1])) for w in self.state["windows"]]
            n = len(pair.fixed.data)
            windows: list[list[Window]] = [flat[:n], flat[n:]]
            mask = pair.fixed_mask if self.use_mask else None
            radius, compare = self.comparison(self.shrinks[index])
            grid = make_grid(pair, windows, self.domain, self.shrinks[index], radius, compare, mask, self.most)
            self._grid = index, grid
        return self._grid[1]

    def comparison(self, shrink: float) -> tuple[int, Callable[..., VolumeSimilarity]]:
        """Half side of the windows in points of a grid, and the similarity for one channel of the fixed image."""
        similarity = self.similarity
        if not isinstance(similarity, LocalNCC):
            return 0, partial(VolumePoints, similarity=similarity)
        step = shrink * voxel_mm(self.domain)
        reach = float(similarity.offsets(0.5 * step if shrink > 1 else 0.0).max())
        radius = max(1, round(reach / step))
        return radius, partial(VolumeNCC, radius=radius, floor=similarity.floor, signed=similarity.signed)

    # -- the loss ------------------------------------------------------------------------------------------------

    def terms(self, x: Points, context: Tensor | None = None) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
        """Data terms and raw penalties: the images on the grid, the field's derivatives at points x [N, 3]."""
        grid = self.grid()
        u = self.map.displacement_on_grid(grid.lines, context)
        if self.domain.in_plane is not None:
            u = u @ self.domain.in_plane.to(u)
        similarity, overlap = compare_on_grid(grid, u, self.to_moving_voxels, self.moving_mask)
        exact = any(r.order == 1 and r.directions == "exact" for r in self.penalties.values())
        at = self.displacement_jet(x, 1 if exact else 0, context)
        start = transform_points(self.to_moving_voxels, x)
        outside = self._outside(transform_points(self.to_moving_voxels, x + at.value), start, grid.level)
        data = {"similarity": similarity, "outside": outside, "overlap": overlap.detach()}
        voxel = voxel_mm(self.domain) / self.domain.unit_mm
        raw = {
            name: r.on_grid(u, grid.steps, voxel)
            if isinstance(r, ForwardDiffusion)
            else self.penalty(r, x, at, context)
            for name, r in self.penalties.items()
        }
        return data | self.guides(context), raw

    def loss_at(self, batch: Points, conditions: Sequence[Tensor | None]) -> dict[str, Scalar]:
        data, raw = self.terms(batch, conditions[0])
        return self.weigh(data, raw)
