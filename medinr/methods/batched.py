"""Several pairs in one process: B pairwise fits whose networks are evaluated, and stepped, as one."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.nn import functional as F

from medinr import jets
from medinr.callbacks.streams import Stream
from medinr.configured import spec
from medinr.data.pair import Pair
from medinr.errors import UserError
from medinr.fields import DisplacementMap
from medinr.fields.batched import BatchedSIREN, batched_seed, joined
from medinr.jets import Jet
from medinr.losses import OwnCoordinates, Regularizer
from medinr.methods.method import PRECISIONS, fuses
from medinr.methods.pair import PairRegistration
from medinr.precision import full, mixed
from medinr.results import landmark_metrics
from medinr.sampling import fitted_offsets, interpolate, nearest
from medinr.space import REFERENCE_LENGTH_MM

ALONE = "fit such pairs one by one"


def check_batch(methods: Sequence[Any]) -> list[PairRegistration]:
    """The methods, if they can be fitted as one.

    Raises:
        UserError: names what cannot be batched; nothing is fitted one by one in silence.
    """
    found: list[PairRegistration] = []
    for method in methods:
        if type(method) is not PairRegistration:
            raise UserError(f"model: expected PairRegistration in a batch, found {type(method).__name__}; {ALONE}")
        if spec(method) != spec(methods[0]):
            raise UserError(f"model: expected one configuration for all pairs of a batch, found two; {ALONE}")
        found.append(method)
    if not found:
        raise UserError("model: expected one pair or more in a batch, found none")
    first = found[0]
    if first.landmark_weight:
        raise UserError(f"model.landmark_weight: expected 0 in a batch, found {first.landmark_weight}; {ALONE}")
    if any(isinstance(r, OwnCoordinates) for r in first.penalties.values()):
        raise UserError(f"model.regularizers: expected no OwnCoordinates in a batch, found one; {ALONE}")
    if any(p.requires_grad for part in (first.similarity, first.regularizers) for p in part.parameters()):
        raise UserError(f"model: expected no parameters but the network's in a batch, found some; {ALONE}")
    BatchedSIREN(_fields(found))
    return found


def check_trainer(given: Mapping[str, Any]) -> None:
    """Whether a batch can be fitted with these settings of the trainer.

    Raises:
        UserError: one that would act on all pairs together.
    """
    usual = {
        "gradient_clip_val": (None, 0, 0.0),
        "accumulate_grad_batches": (None, 1),
        "devices": (None, 1, "1", [0]),
        "num_nodes": (None, 1),
        "precision": (None, *PRECISIONS, "32", 32),
        "callbacks": (None, []),
        "logger": (None, True, False, []),
    }
    for key, values in usual.items():
        if given.get(key) not in values:
            raise UserError(f"trainer.{key}: expected its default in a batch, found {given[key]}; {ALONE}")


def _fields(methods: Sequence[PairRegistration]) -> list[Any]:
    for method in methods:
        if type(method.map) is not DisplacementMap:
            raise UserError(f"field: expected a plain SIREN in a batch, found {type(method.map).__name__}; {ALONE}")
    return [method.map.field for method in methods]


class BatchedRegistration(lightning.LightningModule):
    """B fits of `PairRegistration` in one: the same configuration, other pairs or seeds.

    Every layer of the B networks is one batched product. On a GPU penalties and similarity are computed for all pairs
    at once, and so are the images' values where all grids have one size; on a CPU, where that would only leave the
    cache, pair by pair. Each pair keeps what is its own: images, masks, intensity windows, coordinate maps, and the
    random numbers of its seed, so that its points, losses and weights are those of a fit of its own up to rounding
    (float32: sums in another order). One Adam steps all: its arithmetic is elementwise. A pair whose loss is no number
    any more is taken out with its reason; the others do not see it.

    The activations of all pairs are held at once (3 x 256 units, 10,000 points, a Jacobian: 0.3 GB each).

    Args:
        methods: one a pair, as they would be fitted alone. `give_back` brings their weights up to date.
        pairs: of each method.
        streams: the random numbers of each fit; None: all go on from torch's present state.

    Attributes:
        failed: number of the pair -> why it was taken out.

    Raises:
        UserError: what cannot be batched (`check_batch`).
    """

    def __init__(
        self, methods: Sequence[PairRegistration], pairs: Sequence[Pair], streams: Sequence[Stream] | None = None
    ) -> None:
        super().__init__()
        self.fits = check_batch(methods)
        if len(pairs) != len(self.fits):
            raise UserError(f"pairs: expected one for each of {len(self.fits)} methods, got {len(pairs)}")
        self.pairs = list(pairs)
        self.streams = [Stream() for _ in pairs] if streams is None else list(streams)
        self.failed: dict[int, str] = {}
        self.field = BatchedSIREN(_fields(self.fits))
        self._first = self.fits[0]
        self._attached = False
        self._found: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.fits)

    def give_back(self) -> list[PairRegistration]:
        """The methods, with the present weights."""
        self.field.give_back(_fields(self.fits))
        return self.fits

    # -- the pairs -----------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Take the pairs to this device; what is the same in kind for all is stacked."""
        if self._attached:
            return
        for method, pair, stream in zip(self.fits, self.pairs, self.streams, strict=True):
            if pair.domain.flat_axis is not None:
                raise UserError(f"{pair.name}: expected a volume in a batch, found a single slice; {ALONE}")
            if pair.fixed_guides is not None:
                raise UserError(f"{pair.name}: expected no guiding landmarks in a batch, found some; {ALONE}")
            method.to(self.device)
            method.attach(pair)
            stream.to(self.device)
        channels = {len(level.fixed) for method in self.fits for level in method.levels}
        if len(channels) > 1:
            raise UserError(f"images: expected as many channels in all of a batch, found {sorted(channels)}; {ALONE}")

        def stacked(values: Sequence[Any]) -> Tensor:
            each = [torch.as_tensor(v, dtype=torch.float64).cpu() for v in values]
            return torch.stack(each).to(self.device, self.field.stacked[0].dtype)

        domains = [method.domain for method in self.fits]
        self.to_moving = stacked([method.to_moving_voxels for method in self.fits])
        self.to_fixed = stacked([d.normalised_to_voxel for d in domains])
        self.to_normalised = stacked([d.world_to_normalised for d in domains])
        self.unit_mm = stacked([d.unit_mm for d in domains])
        self.unit = torch.where(
            stacked([d.scale != "per-axis" for d in domains]) > 0, self.unit_mm / REFERENCE_LENGTH_MM, 1
        )
        self.fixed_size = stacked([d.shape for d in domains])
        self.moving_size = stacked([method.levels[0].moving.shape[1:] for method in self.fits])
        levels = range(len(self._first.levels))
        self.fixed = [_volumes([m.levels[i].fixed for m in self.fits]) for i in levels]
        self.moving = [_volumes([m.levels[i].moving for m in self.fits]) for i in levels]
        self._attached = True

    # -- the loss ------------------------------------------------------------------------------------------------

    def level_index(self) -> int:
        """Of the pyramid, at the present step."""
        share = self.global_step / max(self.total_steps, 1) if self._trainer is not None else 1.0
        levels = len(self._first.levels)
        return min(int(share * levels), levels - 1)

    def draw(self) -> Tensor:
        """The points [B, N, 3] of a step, each pair's from its own random numbers."""
        i, n = self.level_index(), self._first.points
        each = zip(self.fits, self.streams, strict=True)
        return torch.stack([m.samplers[i](n, self.device, s.generator) for m, s in each]).to(self.unit)

    def terms(self, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted terms of the loss, [B] each, and what is logged beside them; see `RegistrationMethod.terms`."""
        penalties = self._first.penalties
        level = self._first.levels[self.level_index()]
        patch = self._first.similarity.offsets(level.smoothing_mm) is not None
        shares_jet = any(r.order == 1 and r.directions == "exact" for r in penalties.values())
        u = self.field.jet(batched_seed(x, 1 if patch or shares_jet else 0))
        found = [self.compare(x[part], Jet(c, u.k, u.pairs), part) for part, c in self._parts(u.channels)]
        similarity, overlap, outside = (torch.cat(values) for values in zip(*found, strict=True))
        raw = {name: self.penalty(r, x, u) for name, r in penalties.items()}
        terms = {"similarity": similarity, "outside": self._first.overlap_weight * outside}
        terms |= {name: penalties[name].weight * value for name, value in raw.items()}
        return terms, {"overlap": overlap, **{f"raw/{k}": v.detach() for k, v in raw.items()}}

    def _parts(self, channels: Tensor) -> list[tuple[slice, Tensor]]:
        """Pairs that are compared at once, and their channels: all; on a CPU one, whose samples stay in the cache."""
        size = 1 if self.device.type == "cpu" else len(self)
        return [(slice(i * size, (i + 1) * size), c) for i, c in enumerate(channels.split(size, dim=1))]

    def compare(self, x: Tensor, u: Jet, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Similarity, overlap and distance outside of some pairs, as `INRMixin.compare` has them."""
        i, similarity = self.level_index(), self._first.similarity
        offsets = similarity.offsets(self._first.levels[i].smoothing_mm)
        to_moving, to_fixed = self.to_moving[part], self.to_fixed[part]
        target, source = _apply(to_moving, x + u.value), _apply(to_fixed, x)
        outside = self._outside(target, _apply(to_moving, x), part)
        if offsets is not None:
            d = self._patches(i, offsets)[part]
            source = source[:, :, None] + (d @ to_fixed[:, :3, :3].mT)[:, None]
            assert u.first is not None
            carried = d[:, None] + torch.einsum("ibnc,bpi->bnpc", u.first, d)
            target = target[:, :, None] + carried @ to_moving[:, None, :3, :3].mT
        weight = self._weight(source, target, part)
        with torch.no_grad():
            fixed = _sampled(self.fixed[i][part], source)
        moved = _sampled(self.moving[i][part], target)
        score = torch.vmap(lambda f, m, w: similarity(f, m, w))
        losses = [score(f, m, weight) for f, m in zip(fixed.unbind(1), moved.unbind(1), strict=True)]
        return torch.stack(losses).mean(0), weight.flatten(1).mean(1), outside

    def _patches(self, i: int, offsets: Tensor) -> Tensor:
        """Offsets of the patches in each image at level i, [B, P, 3] in normalised units; found once."""
        if i not in self._found:
            unordered = self._first.similarity.unordered
            each = [fitted_offsets(offsets.to(self.unit), m.domain, unordered) for m in self.fits]
            if len({len(d) for d in each}) > 1:
                raise UserError(f"images: expected patches of one size in a batch, found an image too thin; {ALONE}")
            self._found[i] = torch.stack(each) @ self.to_normalised[:, :3, :3].mT
        return self._found[i]

    @torch.no_grad()
    def _weight(self, source: Tensor, target: Tensor, part: slice) -> Tensor:
        weight = _inside(source, self.fixed_size[part]) & _inside(target, self.moving_size[part])
        for b, method in enumerate(self.fits[part]):
            if method.moving_mask is not None:
                weight[b] &= nearest(method.moving_mask, target[b])
            for excluded, voxels in ((method.fixed_exclude, source), (method.moving_exclude, target)):
                if excluded is not None:
                    weight[b] &= ~nearest(excluded, voxels[b])
        return weight.to(target.dtype)

    def _outside(self, target: Tensor, start: Tensor, part: slice) -> Tensor:
        upper = self.moving_size[part, None] - 1
        step = self.to_moving[part, :3, :3].norm(dim=2).reciprocal() * self.unit_mm[part, None]
        beyond = ((-target).clamp(min=0) + (target - upper).clamp(min=0)) * step[:, None]
        slack = torch.where(upper > 0, 0.0, 0.5).to(upper)
        was_inside = ((start >= -slack) & (start <= upper + slack)).all(-1)
        outside: Tensor = (beyond.sum(-1) * was_inside).mean(1) / REFERENCE_LENGTH_MM
        return outside

    def penalty(self, regularizer: Regularizer, x: Tensor, u: Jet) -> Tensor:
        """Raw penalties [B], each at its own share of the points, as `RegularizerMixin.penalty`."""
        n = max(1, round(regularizer.fraction * x.shape[1]))
        if regularizer.directions == "probes":
            probes = [jets.probe(p, s.generator) for p, s in zip(x[:, :n], self.streams, strict=True)]
            u = self.field.jet(joined(probes))
        elif regularizer.order > u.order:
            u = self.field.jet(batched_seed(x[:, :n], regularizer.order))
        else:
            u = Jet(u.channels[:, :, :n], u.k, u.pairs, u.basis)
        ones = torch.ones_like(self.unit)
        factors = [self.unit, *[ones] * u.k, *[1 / self.unit] * len(u.pairs)][: len(u.channels)]
        scaled = u.channels * torch.stack(factors)[..., None, None]
        k, pairs, basis = u.k, u.pairs, u.basis
        each = torch.vmap(lambda c: regularizer(Jet(c, k, pairs, basis)), in_dims=1)
        return torch.cat([each(c) for _, c in self._parts(scaled)])

    # -- Lightning's hooks ---------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        return int(self.trainer.estimated_stepping_batches)

    def on_fit_start(self) -> None:
        self.attach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with mixed(self.device.type):
            terms, more = self.terms(self.draw())
            losses = torch.stack(list(terms.values())).sum(0)
        self._take_out(losses.detach())
        values = {"loss": losses.detach(), **more, **{f"loss/{k}": v.detach() for k, v in terms.items()}}
        every = int(getattr(self.trainer, "log_every_n_steps", 50)) or 50
        if self.global_step % every == 0:
            self._log({k: v.tolist() for k, v in values.items()})
        return losses[[b for b in range(len(self)) if b not in self.failed]].sum() if self.failed else losses.sum()

    def _take_out(self, losses: Tensor) -> None:
        """Note the pairs whose loss is no number; their weights become zero, and stay so."""
        for b in (~torch.isfinite(losses)).nonzero()[:, 0].tolist():
            if b not in self.failed:
                self.failed[b] = (
                    f"the loss is {losses[b].item()} at step {self.global_step}: lower the learning rate "
                    f"(lr: {self._first.lr}) or look for invalid intensities"
                )
        if len(self.failed) == len(self):
            raise UserError(self.failed[0])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        out = list(self.failed)
        if out:
            with torch.no_grad():
                for p in self.field.stacked:
                    p[out] = 0
                    if p.grad is not None:
                        p.grad[out] = 0

    def _log(self, values: Mapping[str, Sequence[float]], **how: Any) -> None:
        """Values of all pairs under the names ``0/loss``, ``1/loss``, ..."""
        named = {f"{b}/{k}": v[b] for k, v in values.items() for b in range(len(self)) if b not in self.failed}
        self.log_dict(named, **how)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """TRE of each pair, where landmarks are known."""
        self.attach()
        with full(self.device.type):
            for b, method in enumerate(self.give_back()):
                assert method.pair is not None
                found = landmark_metrics(method.transform(), method.pair)
                if b not in self.failed:
                    self.log_dict({f"{b}/{k}": v for k, v in found.items()}, batch_size=1)

    def configure_optimizers(self) -> Any:
        """Adam as each fit's own has it, with the same schedule."""
        total, first = self.total_steps, self._first
        parameters = [{"params": list(self.field.parameters()), "lr": 1.0}]
        optimizer = torch.optim.Adam(parameters, lr=1.0, fused=fuses(self))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: first.lr * first.rate(step, total)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def split_checkpoint(checkpoint: Mapping[str, Any], batch: BatchedRegistration, b: int) -> dict[str, Any]:
    """The checkpoint that fit b would have written alone, from the batch's own (as Lightning made it)."""
    method = batch.give_back()[b]
    found = {k: copy.deepcopy(v) for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
    found["state_dict"] = {k: v.detach().cpu().clone() for k, v in method.state_dict().items()}
    found["optimizer_states"] = [
        {
            **copy.deepcopy({k: v for k, v in optimizer.items() if k != "state"}),
            "state": {
                i: {k: v[b].clone() if isinstance(v, Tensor) and v.ndim else copy.deepcopy(v) for k, v in state.items()}
                for i, state in optimizer["state"].items()
            },
        }
        for optimizer in checkpoint["optimizer_states"]
    ]
    found["callbacks"] = {"RandomStates": {"ranks": [batch.streams[b].present()]}}
    method.on_save_checkpoint(found)
    return found


# -- what the steps are made of ------------------------------------------------------------------------------------


def _volumes(each: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """[B, C, X, Y, Z] where that pays, on a GPU, and all have one size; else as they are."""
    alike = len({v.shape for v in each}) == 1
    return torch.stack(list(each)) if alike and each[0].device.type != "cpu" else list(each)


def _apply(matrix: Tensor, points: Tensor) -> Tensor:
    """Homogeneous matrices [B, 4, 4] on points [B, N, 3]."""
    return points @ matrix[:, :3, :3].mT + matrix[:, None, :3, 3]


def _inside(voxels: Tensor, size: Tensor) -> Tensor:
    """Whether voxel coordinates [B, ..., 3] lie in grids of sizes [B, 3]."""
    upper = size.view(len(size), *[1] * (voxels.ndim - 2), 3) - 0.5
    return ((voxels >= -0.5) & (voxels <= upper)).all(-1)


def _sampled(volumes: Tensor | list[Tensor], voxels: Tensor) -> Tensor:
    """Trilinear values [B, C, ...] at voxel coordinates [B, ..., 3], as `medinr.sampling.interpolate`."""
    if isinstance(volumes, list):
        return torch.stack([interpolate(v, at) for v, at in zip(volumes, voxels, strict=True)])
    size = torch.tensor(volumes.shape[2:], device=voxels.device, dtype=voxels.dtype)
    grid = (voxels * (2 / (size - 1).clamp(min=1)) - 1).flip(-1).reshape(len(voxels), 1, 1, -1, 3)
    values = F.grid_sample(volumes, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return values.reshape(*volumes.shape[:2], *voxels.shape[1:-1])
