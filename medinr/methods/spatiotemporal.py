"""Registration of an image sequence: one velocity field of space and time (ST-NeRP)."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from medinr import jets
from medinr.data.pair import Pair
from medinr.data.sequence import Sequence as ImageSequence
from medinr.errors import UserError
from medinr.fields import Field, TimedVelocity, TimeEncoding, Transform
from medinr.fields.base import in_chunks, values_at
from medinr.fields.flow import Flow, Scheme
from medinr.fields.path import PathFlow
from medinr.fields.prior import ImagePrior
from medinr.fields.times import RunningVelocity
from medinr.fields.warp import render
from medinr.losses import Regularizer, Similarity, TemporalSmoothness
from medinr.methods.levels import Level, samplers, windowed
from medinr.methods.method import Group, share_of_rate
from medinr.methods.mixins import INRMixin, RegularizerMixin
from medinr.methods.timed import EYE, SequenceRegistration
from medinr.precision import full
from medinr.ranks import share, world_size
from medinr.sampling import PointSampler, gaussian_smooth, interpolate
from medinr.space import Domain, transform_points
from medinr.types import Points, Scalar, Volume

Batch = tuple[Points, list[int]]
"""Points, and the indices of the times that they are dealt out to."""


class SpatioTemporalRegistration(INRMixin, RegularizerMixin, SequenceRegistration):
    """min over v of the mean over times of S(I_ref, I_t o phi_t) + penalties, phi_t = exp(v(., t)), phi_ref = id.

    Qiu et al., ST-NeRP: Spatial-Temporal Neural Representation Learning with Prior Embedding for Patient-specific
    Imaging Study, arXiv 2410.19283. One network (Def-Net) is the velocity at every time, fitted to all images together;
    phi_t, its inverse and the map between any two times can be read at any time, those of no image too. Another one
    (Ref-Net, ``prior``) is the reference image as a continuous function; it is fitted in the first stage, and with
    ``as_reference`` takes the image's place in the similarity (its rendering on the image's grid). The paper does
    not say how time enters, nor its similarity and penalties; here each is a part. How phi_ref becomes the identity:
    see `TimedVelocity`. Published profile: experiments/stnerp_4dct.yaml; ours: experiments/stnerp_4dct_best.yaml.

    All images share one world: there is no linear start.

    With ``path`` the velocity is integrated along time itself, from the reference time to t (`PathFlow`): the paper's
    is stationary for each t. Where time repeats, ``closure_weight`` draws the end of a whole period back to where it
    began; the closure error in mm is logged, and written with the results.

    Args:
        field: the velocity's network, see `TimedVelocity`, or `RunningVelocity` for a path.
        time: how it sees time.
        similarity: of the reference and each other image; patch similarities get extrapolated patches.
        prior: Ref-Net; None: no first stage.
        regularizers: penalties of u_t = phi_t - id, by name, at the times of the step.
        velocity_regularizers: penalties of v(., t), by name, likewise.
        temporal: penalty of v along time, at random times; None: none.
        points: random points a step.
        times_per_step: random images that they are dealt out to; 0: all.
        steps, scheme: of the integration, see `Flow`.
        time_scale: see `TimedVelocity`.
        path: integrate along time.
        closure_weight: of the mean squared distance to the identity after one period, in (100 mm)^2; of a path alone.
        pyramid_mm: smoothing of the images, one number a level, each for an equal share of the second stage.
        lr: peak learning rate of the second stage.
        warmup, cosine: its schedule (see `RegistrationMethod`).
        overlap_weight: factor of the mean distance outside the grids, in 100 mm.
        window: intensities mapped to 0 and 1 in all images (None: percentiles of the reference's channels).
        jitter: draw points anywhere in a voxel, not at its centre only.
        use_mask: draw points from the reference's mask where there is one.
        background: share of the points drawn from the whole grid in spite of a mask; see `RegistrationMethod` for what
            it means without one.
    """

    def __init__(
        self,
        field: Field,
        time: TimeEncoding,
        similarity: Similarity,
        prior: ImagePrior | None = None,
        regularizers: dict[str, Regularizer] | None = None,
        velocity_regularizers: dict[str, Regularizer] | None = None,
        temporal: TemporalSmoothness | None = None,
        points: int = 2048,
        times_per_step: int = 4,
        steps: int | Literal["auto"] = "auto",
        scheme: Scheme = "rk4",
        time_scale: float = 0.05,
        path: bool = False,
        closure_weight: float = 0.0,
        pyramid_mm: Sequence[float] = (0.0,),
        lr: float = 1e-4,
        warmup: float = 0.0,
        cosine: bool = False,
        overlap_weight: float = 1.0,
        window: tuple[float, float] | None = None,
        jitter: bool = True,
        use_mask: bool = True,
        background: float = 0.1,
    ) -> None:
        super().__init__()
        if points < 1 or times_per_step < 0:
            raise UserError(f"points, times_per_step: expected 1 and 0 or more, found {points} and {times_per_step}")
        if not pyramid_mm:
            raise UserError("pyramid_mm: expected at least one level, [0] for the images as they are")
        if not 0 <= background <= 1:
            raise UserError(f"background: expected a share of the points in [0, 1], found {background}")
        if closure_weight and not path:
            raise UserError("closure_weight: expected path true for it (only a path can fail to close), found false")
        if path:
            self.map = PathFlow(RunningVelocity(field, time, time_scale), steps, scheme)
        else:
            self.map = Flow(TimedVelocity(field, time, time_scale), steps, scheme)
        self.closure_weight = closure_weight
        self.similarity, self.prior = similarity, prior
        self.regularizers = nn.ModuleDict(regularizers or {})
        self.velocity_regularizers = nn.ModuleDict(velocity_regularizers or {})
        self.temporal = temporal
        self.points, self.times_per_step, self.pyramid_mm = points, times_per_step, tuple(pyramid_mm)
        self.lr, self.warmup, self.cosine, self.overlap_weight = lr, warmup, cosine, overlap_weight
        self.window, self.jitter, self.use_mask, self.background = window, jitter, use_mask, background
        self.moving_mask = None
        self._volumes: tuple[tuple[int, bool], dict[int, Volume]] | None = None

    @property
    def penalties(self) -> Mapping[str, Regularizer]:  # type: ignore[override]
        return {k: v for k, v in self.regularizers.items() if isinstance(v, Regularizer)}

    @property
    def velocity_penalties(self) -> Mapping[str, Regularizer]:
        """The regularizers of the velocity by name."""
        return {k: v for k, v in self.velocity_regularizers.items() if isinstance(v, Regularizer)}

    @property
    def cycle(self) -> PathFlow | None:
        """The path, if this is one through times that repeat."""
        found = self.flow
        return found if isinstance(found, PathFlow) and found.velocity.time.period is not None else None

    # -- the sequence --------------------------------------------------------------------------------------------

    def attach(self, pair: Pair | ImageSequence) -> None:
        """Take a sequence: windows, coordinate maps and samplers, all on the method's device."""
        sequence = self.take(pair, self.window)
        channels = len(sequence.images[sequence.reference].data)
        if self.prior is not None and self.prior.field.out_features != channels:
            found = self.prior.field.out_features
            raise UserError(f"prior: expected {channels} outputs, as channels, found {found}; set out_features")
        self._volumes = None
        mask = sequence.masks[sequence.reference] if self.use_mask else None
        if mask is None:
            fixed = [self._prepared(sequence.reference, s) for s in self.pyramid_mm]
            levels = [Level(v, v, s) for v, s in zip(fixed, self.pyramid_mm, strict=True)]
            self.samplers = samplers(levels, self.domain, None, self.similarity, self.jitter, self.background)
        else:
            self.samplers = [PointSampler(self.domain, mask, self.jitter, self.background)] * len(self.pyramid_mm)
        self.everywhere = PointSampler(self.domain)

    # -- reading -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rendering(self, domain: Domain, time: float | None = None) -> Volume | None:
        """The prior's image on a grid [C, X, Y, Z], in the images' intensities: at the reference time, or at ``time``,
        carried there by phi_t^-1. None without a prior."""
        if self.prior is None:
            return None
        back = None if time is None else Transform(self.flow.backward(), self.domain, EYE, self.context(time))
        return render(self.prior.field, self.domain, domain, self.state["windows"], back)

    # -- the images ----------------------------------------------------------------------------------------------

    def _prepared(self, index: int, smoothing_mm: float) -> Volume:
        assert self.sequence is not None
        image = self.sequence.images[index]
        return gaussian_smooth(windowed(image.data, self.state["windows"]), smoothing_mm, image.domain.spacing)

    def _level(self, index: int) -> Level:
        """Reference and image ``index`` at the present level; only one level is in memory."""
        assert self.sequence is not None
        smoothing, key = self.pyramid_mm[self._level_index], (self._level_index, self.in_prior)
        if self._volumes is None or self._volumes[0] != key:
            self._volumes = None
            reference = self.sequence.reference
            volumes = {i: self._prepared(i, smoothing) for i in (reference, *self.trained)}
            if self.prior is not None and self.prior.as_reference and not self.in_prior:
                with full(self.device.type):
                    rendered = self.rendering(self.domain)
                assert rendered is not None
                seen = windowed(rendered.to(self.device), self.state["windows"])
                volumes[reference] = gaussian_smooth(seen, smoothing, self.domain.spacing)
            self._volumes = (key, volumes)
        volumes = self._volumes[1]
        return Level(volumes[self.sequence.reference], volumes[index], float(smoothing))

    def _sequence_metrics(self) -> dict[str, float]:
        """Beside the landmarks: how far a path through a whole period ends from where it began, all over the grid."""
        found = super()._sequence_metrics()
        if self.cycle is not None:
            with torch.no_grad():
                mm = self.domain.unit_mm * self.cycle.closure(self.cycle.probes).norm(dim=-1)
            found |= {"closure_mm/mean": float(mm.mean()), "closure_mm/max": float(mm.max())}
        return found

    # -- stages --------------------------------------------------------------------------------------------------

    @property
    def first_step(self) -> int:
        """The first step of the second stage."""
        return 0 if self.prior is None else self.prior.steps(self.total_steps)

    @property
    def in_prior(self) -> bool:
        """Whether the present step belongs to the prior."""
        return self._trainer is not None and self.trainer.global_step < self.first_step

    @property
    def _level_index(self) -> int:
        if self._trainer is None:
            return len(self.pyramid_mm) - 1
        first = self.first_step
        done = max(0, self.trainer.global_step - first) / max(1, self.total_steps - first)
        return min(int(done * len(self.pyramid_mm)), len(self.pyramid_mm) - 1)

    def groups(self) -> list[Group]:
        first, total = self.first_step, self.total_steps

        def rate(step: int) -> float:
            return self.lr * share_of_rate(max(0, step - first), total - first, self.warmup, self.cosine)

        found: list[Group] = [(list(self.flow.parameters()), rate)]
        if (prior := self.prior) is not None:
            found.append((list(prior.parameters()), lambda step: prior.lr if step < first else 0.0))
        return found

    # -- the loss ------------------------------------------------------------------------------------------------

    def draw(self) -> Batch:
        n = share(self.points)
        if self.in_prior:
            return self.everywhere(n, self.device), []
        order = torch.randperm(len(self.trained)).tolist()
        chosen = [self.trained[k] for k in order[: min(self.times_per_step, n) or None]]
        return self.samplers[self._level_index](n, self.device), chosen

    def objective(self, batch: Batch) -> dict[str, Scalar]:
        x, chosen = batch
        terms = self.prior_terms(x) if self.in_prior else self.motion_terms(x, chosen)
        if world_size() > 1:  # each rank waits for the gradient of every parameter
            terms["all"] = 0 * torch.stack([p.sum() for p in self.parameters()]).sum()
        return terms

    def prior_terms(self, x: Points) -> dict[str, Scalar]:
        """The prior's loss, against the reference image at points."""
        assert self.sequence is not None and self.prior is not None
        image = self.sequence.images[self.sequence.reference]
        with torch.no_grad():
            seen = interpolate(image.data, transform_points(self.domain.normalised_to_voxel, x)).T
            low, high = x.new_tensor(self.state["windows"]).T
        return self.prior.terms(x, ((seen - low) / (high - low)).clamp(0, 1))

    def motion_terms(self, x: Points, chosen: Sequence[int]) -> dict[str, Scalar]:
        """Means over the chosen times of similarity and penalties, each at its share of the points."""
        rows = [self._at_time(some, i) for some, i in zip(x.tensor_split(len(chosen)), chosen, strict=True)]
        mean = {k: torch.stack([row[k] for row in rows]).mean() for k in rows[0]}
        if self.temporal is not None:
            mean["temporal"] = self._roughness(x[: max(1, round(self.temporal.fraction * len(x)))], self.temporal)
        weights = {"similarity": 1.0, "outside": self.overlap_weight}
        if self.cycle is not None:
            some = self.cycle.closure(x[: max(1, len(x) // len(self.clock))])  # as many as each time has
            mean["closure"] = (self.domain.unit_mm / 100.0) ** 2 * some.square().sum(-1).mean()
            weights["closure"] = self.closure_weight
        weights |= {k: r.weight for k, r in self.penalties.items()}
        weights |= {f"velocity/{k}": r.weight for k, r in self.velocity_penalties.items()}
        weights |= {"temporal": self.temporal.weight} if self.temporal is not None else {}
        self._log({"overlap": mean["overlap"], **{f"raw/{k}": v.detach() for k, v in mean.items() if k in weights}})
        if self._trainer is not None and self.global_step % self._log_every == 0:
            self._log({"flow/h_lipschitz": torch.tensor(max(self.flow.check(self.clock[i]) for i in chosen))})
        return {k: weight * mean[k] for k, weight in weights.items()}

    def _at_time(self, x: Points, index: int) -> dict[str, Scalar]:
        level, context = self._level(index), self.clock[index]
        self.to_moving_voxels = self.matrices[index]
        patch = self.similarity.offsets(level.smoothing_mm) is not None
        shares_jet = any(r.order == 1 and r.directions == "exact" for r in self.penalties.values())
        u = self.displacement_jet(x, 1 if patch or shares_jet else 0, context)
        similarity, overlap, outside = self.compare(x, u, level)
        terms = {"similarity": similarity, "outside": outside, "overlap": overlap.detach()}
        terms |= {k: self.penalty(r, x, u, context) for k, r in self.penalties.items()}
        for name, r in self.velocity_penalties.items():
            some = x[: max(1, round(r.fraction * len(x)))]
            seed = jets.probe(some) if r.directions == "probes" else jets.seed(some, r.order)
            v = in_chunks(lambda piece: self.flow.slope(piece, context), seed)
            terms[f"velocity/{name}"] = self._raw(r, v)
        return terms

    def _roughness(self, x: Points, smoothness: TemporalSmoothness) -> Scalar:
        """Of v at points, each quarter at one random time of the sequence's span."""
        times, unit = self.state["times"], self.domain.unit_mm / 100.0
        begin, length = (0.0 if self.state["period"] is not None else min(times)), self.state["span"]
        found = []
        for some in x.tensor_split(min(4, len(x))):
            t = begin + length * float(torch.rand(()))
            shifts = (-smoothness.step, 0.0, smoothness.step)
            v = [unit * values_at(self.flow.velocity, some, self.context(t + s * length)) for s in shifts]
            found.append(smoothness(*v))
        return torch.stack(found).mean()
