"""The base of the pairwise methods: field, similarity and penalties on random points, coarse to fine."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from medinr.data.pair import Pair
from medinr.errors import UserError
from medinr.fields import Field, TangentField, Transform, as_map
from medinr.losses import OwnCoordinates, Regularizer, Similarity
from medinr.methods.levels import Level, Window, pyramid, robust_windows, samplers
from medinr.methods.method import Group, share_of_rate
from medinr.methods.mixins import INRMixin, RegularizerMixin
from medinr.methods.module import RegistrationModule
from medinr.ranks import share
from medinr.sampling import PointSampler
from medinr.space import Domain, Scale
from medinr.types import Points, Scalar


class RegistrationMethod(INRMixin, RegularizerMixin, RegistrationModule):
    """Fits a map to one pair of images.

    A subclass says what its loss is (`loss_at`) and at which condition its result is read (`context`).

    With ``trainer.precision: bf16-mixed`` (on CUDA also ``16-mixed``) products between hidden layers are rounded to
    that type in training, all else is float32 (`medinr.precision`). With several processes each draws its share of the
    points from a random stream of its own, and the losses are those of all points together (`medinr.ranks`); metrics
    are computed by each.

    Args:
        field: the displacement (or a map), in normalised coordinates.
        similarity: image similarity; patch similarities get extrapolated patches.
        regularizers: penalties by name; the names appear in the logs.
        points: random points a step.
        pyramid_mm: smoothing of both images, one number a level, each for an equal share of the steps.
        lr: peak learning rate of Adam.
        warmup: share of the steps with a linearly rising learning rate.
        cosine: let the learning rate fall to zero along a cosine after the warm-up.
        overlap_weight: factor of the mean distance outside the moving grid (in 100 mm), so that no point escapes.
        window: intensities mapped to 0 and 1 in both images (None: the 0.5th and 99.5th percentile of each channel).
        jitter: draw points anywhere in a voxel, not at its centre only.
        use_mask: draw points from the fixed mask where the pair has one; False draws from the whole image.
        use_moving_mask: samples that map outside the moving mask carry no weight.
        scale: how coordinates are normalised (see `Domain`).
        landmark_weight: factor of the mean robust distance, in 100 mm, that the map leaves between the pair's guiding
            landmarks (see `INRMixin.guide_distance`); those that measure the error never enter the loss.
        background: without a mask and with a patch similarity, the share of points drawn from the whole grid; the
            others are drawn where patches of the fixed image are not constant. 1: all from the whole grid.
    """

    takes_condition: ClassVar[bool] = False
    """Whether the field is read at a condition."""

    def __init__(
        self,
        field: Field,
        similarity: Similarity,
        regularizers: dict[str, Regularizer] | None = None,
        points: int = 10_000,
        pyramid_mm: Sequence[float] = (0.0,),
        lr: float = 1e-4,
        warmup: float = 0.0,
        cosine: bool = False,
        overlap_weight: float = 1.0,
        window: tuple[float, float] | None = None,
        jitter: bool = True,
        use_mask: bool = True,
        use_moving_mask: bool = False,
        scale: Scale = "isotropic",
        landmark_weight: float = 0.0,
        background: float = 0.1,
    ) -> None:
        super().__init__()
        if points < 1:
            raise UserError(f"points: expected at least one point a step, got {points}")
        if not pyramid_mm:
            raise UserError("pyramid_mm: expected at least one level, [0] for the images as they are")
        if scale not in get_args(Scale):
            raise UserError(f"scale: expected one of {', '.join(get_args(Scale))}, got {scale}")
        if landmark_weight < 0:
            raise UserError(f"landmark_weight: expected 0 or more, got {landmark_weight}")
        if not 0 <= background <= 1:
            raise UserError(f"background: expected a share of the points in [0, 1], got {background}")
        if field.conditions and not self.takes_condition:
            raise UserError(
                f"field: expected one without a condition, got {type(field).__name__} of {field.conditions}; give it "
                "to ConditionedRegistration"
            )
        self.map = as_map(field)
        self.similarity = similarity
        self.regularizers = nn.ModuleDict(regularizers or {})
        self.points, self.pyramid_mm, self.lr = points, tuple(pyramid_mm), lr
        self.warmup, self.cosine, self.overlap_weight = warmup, cosine, overlap_weight
        self.window, self.jitter, self.scale = window, jitter, scale
        self.use_mask, self.use_moving_mask = use_mask, use_moving_mask
        self.landmark_weight, self.background = landmark_weight, background
        self.levels: list[Level] = []

    @property
    def penalties(self) -> Mapping[str, Regularizer]:  # type: ignore[override]
        """The regularizers by name."""
        return {k: v for k, v in self.regularizers.items() if isinstance(v, Regularizer)}

    # -- the pair ------------------------------------------------------------------------------------------------

    def attach(self, pair: Pair) -> None:
        """Take a pair: windows, pyramid, coordinate maps and sampler, all on the method's device."""
        pair = pair.to(self.device)
        windows: list[list[Window]] = [
            [self.window] * len(i.data) if self.window else robust_windows(i) for i in (pair.fixed, pair.moving)
        ]
        own = any(isinstance(r, OwnCoordinates) for r in self.penalties.values())
        if own and pair.domain.in_plane is not None and any(isinstance(m, TangentField) for m in self.map.modules()):
            raise UserError(f"regularizers: OwnCoordinates expects volumes, found the single slice {pair.name}")
        self.remember(pair.domain, pair.start, [w for image in windows for w in image])
        self.pair = pair
        self.levels = pyramid(pair, windows, self.pyramid_mm)
        self.moving_mask = pair.moving_mask if self.use_moving_mask else None
        self.to_moving_voxels = pair.moving.domain.world_to_voxel @ self.start @ self.domain.normalised_to_world
        self.fixed_exclude, self.moving_exclude = pair.fixed_exclude, pair.moving_exclude
        mask = pair.fixed_mask if self.use_mask else None
        self.samplers = samplers(self.levels, self.domain, mask, self.similarity, self.jitter, self.background)
        if (pair.fixed_guides is not None) != (self.landmark_weight > 0):
            what = "guiding landmarks" if self.landmark_weight else "a landmark_weight above 0"
            warnings.warn(f"landmarks do not guide this fit: expected {what}, found none", stacklevel=2)

    def remember(self, domain: Domain, start: Tensor, windows: Sequence[Sequence[float]]) -> None:
        """Keep what a checkpoint must carry for the transform to be used again without the images."""
        self.domain = self.cover(domain)
        self.start = start.double().cpu()
        self.state = {
            "domain": self.domain.to_dict(),
            "start": self.start.tolist(),
            "windows": [[float(v) for v in w] for w in windows],
        }

    def size(self, pair: Pair) -> None:
        self.domain = self.cover(pair.domain)

    def restore(self, kept: Mapping[str, Any]) -> None:
        domain, start = Domain.from_dict(kept["domain"]), torch.tensor(kept["start"], dtype=torch.float64)
        self.scale = domain.scale  # as the field was fitted
        self.remember(domain, start, kept["windows"])

    @property
    def attached(self) -> bool:
        return bool(self.levels)

    def cover(self, domain: Domain) -> Domain:
        """Let the map take its size from the image; returns the domain as the method normalises it."""
        scaled = domain.with_scale(self.scale)
        self.map.cover(scaled)
        return scaled

    def context(self) -> Tensor | None:
        """The condition at which the result is read."""
        return None

    def transform(self, context: Tensor | None = None) -> Transform:
        """phi, from fixed world to moving world, at the method's own condition or another."""
        return Transform(self.map, self.domain, self.start, self.context() if context is None else context)

    # -- the loss ------------------------------------------------------------------------------------------------

    @property
    def _level_index(self) -> int:
        share = self.trainer.global_step / max(self.total_steps, 1) if self._trainer is not None else 1.0
        return min(int(share * len(self.levels)), len(self.levels) - 1)

    @property
    def level(self) -> Level:
        """The pyramid level of the present step."""
        return self.levels[self._level_index]

    @property
    def sampler(self) -> PointSampler:
        """Where the points of the present step are drawn."""
        return self.samplers[self._level_index]

    def terms(self, x: Points, context: Tensor | None = None) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
        """Data terms and raw penalties at points x [N, 3]; the overlap is among the data terms, for the log."""
        level = self.level
        patch = self.similarity.offsets(level.smoothing_mm) is not None
        in_image = [r for r in self.penalties.values() if not isinstance(r, OwnCoordinates)]
        shares_jet = any(r.order == 1 and r.directions == "exact" for r in in_image)
        u = self.displacement_jet(x, 1 if patch or shares_jet else 0, context)
        similarity, overlap, outside = self.compare(x, u, level)
        data = {"similarity": similarity, "outside": outside, "overlap": overlap.detach()}
        return data | self.guides(context), {name: self.penalty(r, x, u, context) for name, r in self.penalties.items()}

    def guides(self, context: Tensor | None = None) -> dict[str, Scalar]:
        """The raw term of the guiding landmarks, ``landmarks``, where the pair has them and they weigh anything."""
        pair = self.pair
        if not self.landmark_weight or pair is None or pair.fixed_guides is None or pair.moving_guides is None:
            return {}
        to_moving = self.start @ self.domain.normalised_to_world
        return {"landmarks": self.guide_distance(pair.fixed_guides, pair.moving_guides, to_moving, context)}

    def conditions(self) -> list[Tensor | None]:
        """The conditions of the map in one step, each for an equal share of the points."""
        return [None]

    def loss_at(self, batch: Points, conditions: Sequence[Tensor | None]) -> dict[str, Scalar]:
        """The terms of the loss at points [N, 3], with the map at the given conditions."""
        raise NotImplementedError

    def draw(self) -> Points:
        """This process's share of the points of a step."""
        return self.sampler(share(self.points), self.device)

    def objective(self, batch: Points) -> dict[str, Scalar]:
        return self.loss_at(batch, self.conditions())

    def weigh(self, data: dict[str, Scalar], raw: dict[str, Scalar]) -> dict[str, Scalar]:
        """Apply every weight, once; log overlap and raw penalties."""
        self._log({"overlap": data["overlap"], **{f"raw/{k}": v.detach() for k, v in raw.items()}})
        terms = {"similarity": data["similarity"], "outside": self.overlap_weight * data["outside"]}
        if "landmarks" in data:
            terms["landmarks"] = self.landmark_weight * data["landmarks"]
        return terms | {k: self.penalties[k].weight * v for k, v in raw.items()}

    # -- optimization --------------------------------------------------------------------------------------------

    def rate(self, step: int, total: int) -> float:
        """Share of the peak learning rate at a step of ``total``: warm-up, then a cosine or a constant."""
        return share_of_rate(step, total, self.warmup, self.cosine)

    def groups(self) -> list[Group]:
        total = self.total_steps
        return [(list(self.parameters()), lambda step: self.lr * self.rate(step, total))]
