"""The base of the pairwise methods: points, pyramid, loss bookkeeping, optimizer, checkpoints."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import lightning
import torch
from torch import Tensor, nn

from medinr.configured import Configured, build, spec
from medinr.data.pair import Pair
from medinr.errors import UserError
from medinr.fields import Field, Transform, as_map
from medinr.io import atomic_path
from medinr.losses import Regularizer, Similarity
from medinr.methods.levels import Level, Window, pyramid, robust_windows, samplers
from medinr.methods.mixins import INRMixin, RegularizerMixin
from medinr.precision import full, mixed
from medinr.ranks import any_rank, rank, share
from medinr.results import Evaluation, evaluate, landmark_metrics
from medinr.sampling import PointSampler
from medinr.space import Domain
from medinr.types import Points, Scalar

PRECISIONS = ("32-true", "bf16-mixed")


class RegistrationMethod(INRMixin, RegularizerMixin, Configured, lightning.LightningModule):
    """Fits a map to one pair of images.

    A subclass says what its loss is (`objective`) and at which condition its result is read (`context`).

    With ``trainer.precision: bf16-mixed`` products between hidden layers are rounded to bfloat16 in training, all else
    is float32 (`medinr.precision`). With several processes each draws its share of the points from a random stream of
    its own, and the losses are those of all points together (`medinr.ranks`); metrics are computed by each.

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
        scale: str = "isotropic",
        landmark_weight: float = 0.0,
        background: float = 0.1,
    ) -> None:
        super().__init__()
        if points < 1:
            raise UserError(f"points: expected at least one point a step, got {points}")
        if not pyramid_mm:
            raise UserError("pyramid_mm: expected at least one level, [0] for the images as they are")
        if scale not in ("isotropic", "per-axis"):
            raise UserError(f"scale: expected isotropic or per-axis, got {scale}")
        if landmark_weight < 0:
            raise UserError(f"landmark_weight: expected 0 or more, got {landmark_weight}")
        if not 0 <= background <= 1:
            raise UserError(f"background: expected a share of the points in [0, 1], got {background}")
        self.map = as_map(field)
        self.similarity = similarity
        self.regularizers = nn.ModuleDict(regularizers or {})
        self.points, self.pyramid_mm, self.lr = points, tuple(pyramid_mm), lr
        self.warmup, self.cosine, self.overlap_weight = warmup, cosine, overlap_weight
        self.window, self.jitter, self.scale = window, jitter, scale
        self.use_mask, self.use_moving_mask = use_mask, use_moving_mask
        self.landmark_weight, self.background = landmark_weight, background
        self.pair: Pair | None = None
        self.levels: list[Level] = []
        self.state: dict[str, Any] = {}

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

    def cover(self, domain: Domain) -> Domain:
        """Let the map take its size from the image; returns the domain as the method normalises it."""
        scaled = domain.with_scale("per-axis" if self.scale == "per-axis" else "isotropic")
        self.map.cover(scaled)
        return scaled

    def context(self) -> Tensor | None:
        """The condition at which the result is read."""
        return None

    def transform(self) -> Transform:
        """phi, from fixed world to moving world."""
        return Transform(self.map, self.domain, self.start, self.context())

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

    @property
    def total_steps(self) -> int:
        return int(self.trainer.estimated_stepping_batches)

    def terms(self, x: Points, context: Tensor | None = None) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
        """Data terms and raw penalties at points x [N, 3]; the overlap is among the data terms, for the log."""
        level = self.level
        patch = self.similarity.offsets(level.smoothing_mm) is not None
        shares_jet = any(r.order == 1 and r.directions == "exact" for r in self.penalties.values())
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

    def objective(self, batch: Points) -> dict[str, Scalar]:
        """Named terms whose sum is the loss, at points [N, 3]; raw values for the log are kept out of the sum."""
        raise NotImplementedError

    def weigh(self, data: dict[str, Scalar], raw: dict[str, Scalar]) -> dict[str, Scalar]:
        """Apply every weight, once; log overlap and raw penalties."""
        self._log({"overlap": data["overlap"], **{f"raw/{k}": v.detach() for k, v in raw.items()}})
        terms = {"similarity": data["similarity"], "outside": self.overlap_weight * data["outside"]}
        if "landmarks" in data:
            terms["landmarks"] = self.landmark_weight * data["landmarks"]
        return terms | {k: self.penalties[k].weight * v for k, v in raw.items()}

    @property
    def _log_every(self) -> int:
        return int(getattr(self.trainer, "log_every_n_steps", 50)) or 50

    def _log(self, values: dict[str, Tensor], **how: Any) -> None:
        if self._trainer is not None and self.global_step % self._log_every == 0:
            self.log_dict(values, sync_dist=True, **how)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with mixed(self.device.type):
            terms = self.objective(self.sampler(share(self.points), self.device))
            loss = torch.stack(list(terms.values())).sum()
        if any_rank(not bool(torch.isfinite(loss)), self.device):  # all stop, or those who go on wait for ever
            raise UserError(
                f"the loss is {loss.item()} at step {self.global_step}: lower the learning rate (lr: {self.lr}) "
                "or look for invalid intensities"
            )
        self._log({"loss": loss.detach()}, prog_bar=True)
        self._log({f"loss/{k}": v.detach() for k, v in terms.items()})
        return loss

    # -- optimization --------------------------------------------------------------------------------------------

    def rate(self, step: int, total: int) -> float:
        """Share of the peak learning rate at a step of ``total``: warm-up, then a cosine or a constant."""
        rise = max(1, round(self.warmup * total))
        if step < rise:
            return (step + 1) / rise
        if not self.cosine:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, fused=self.device.type in ("cpu", "cuda"))
        if not (self.warmup or self.cosine):
            return optimizer
        total = self.total_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rate(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- evaluation ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Called before results are read: a conditioned method searches its condition here."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """TRE where landmarks are known (cheap: no image is warped)."""
        assert self.pair is not None
        with full(self.device.type):
            found = landmark_metrics(self.transform(), self.pair)
        self.log_dict({k: v for k, v in found.items() if k != "tre/mean"}, batch_size=1, sync_dist=True)
        if found:
            self.log("tre/mean", found["tre/mean"], prog_bar=True, batch_size=1, sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Every metric on the whole fixed grid."""
        evaluation = self.predict_step(batch, batch_idx)
        self.log_dict(evaluation.metrics, batch_size=1, sync_dist=True)
        return {"evaluation": evaluation}

    def predict_step(self, batch: Any, batch_idx: int) -> Evaluation:
        """The transform on the whole fixed grid; a callback writes it."""
        assert self.pair is not None
        with full(self.device.type):
            self.settle()
            return evaluate(self.transform(), self.pair)

    # -- Lightning's hooks ---------------------------------------------------------------------------------------

    def _ready(self) -> None:
        """Take the pair, once, and after Lightning has moved the method to its device."""
        if not self.levels:
            self.attach(self.pair or self.trainer.datamodule.pair)  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        if self.trainer.precision not in PRECISIONS:
            raise UserError(
                f"trainer.precision: expected {' or '.join(PRECISIONS)}, got {self.trainer.precision}: coordinates and "
                "second derivatives need float32, and float16 has too small a range for derivatives"
            )
        pair = self.pair or self.trainer.datamodule.pair  # type: ignore[attr-defined]
        self.domain = self.cover(pair.domain)  # the parameters must exist before the optimizer takes them

    def on_fit_start(self) -> None:
        self._ready()
        if rank():  # weights are rank 0's; from here on each rank draws numbers of its own
            torch.manual_seed(torch.initial_seed() + rank())

    def on_validation_start(self) -> None:
        self._ready()

    def on_test_start(self) -> None:
        self._ready()

    def on_predict_start(self) -> None:
        self._ready()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["medinr"] = {"method": spec(self), **self.state}

    def save(self, path: str | Path) -> None:
        """Write the weights and all that is needed to use the transform again; no optimizer, no images."""
        checkpoint: dict[str, Any] = {
            "state_dict": {k: v.detach().cpu() for k, v in self.state_dict().items()},
            "pytorch-lightning_version": lightning.__version__,
        }
        self.on_save_checkpoint(checkpoint)
        with atomic_path(path) as part:
            torch.save(checkpoint, part)

    def report(self, out: Path) -> list[Path]:
        """Write what the method has to say beside the usual results; returns the files."""
        return []

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = "cpu", **kwargs: Any) -> Self:  # type: ignore[override]
        """Rebuild a method with its weights, domain, start and window; no further argument is needed."""
        method = load_method(checkpoint_path, map_location)
        if not isinstance(method, cls):
            raise UserError(
                f"{checkpoint_path}: expected a checkpoint of {cls.__name__}, found {type(method).__name__}"
            )
        return method


def load_method(path: str | Path, map_location: Any = "cpu") -> RegistrationMethod:
    """Any method from its checkpoint.

    Raises:
        UserError: no such file, not a checkpoint, or not one of medinr's.
    """
    file = Path(path)
    if not file.is_file():
        inside = file / "transform.ckpt"
        hint = f"; did you mean {inside}?" if inside.is_file() else ""
        raise UserError(f"{path}: no such checkpoint; expected a .ckpt file that medinr wrote{hint}")
    try:
        checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except Exception:  # torch raises many kinds: pickle, zip, runtime and key errors
        raise UserError(f"{path}: not a readable checkpoint; expected a .ckpt file that medinr wrote") from None
    if not isinstance(checkpoint, dict) or "medinr" not in checkpoint:
        raise UserError(f"{path}: a checkpoint of another program; expected a .ckpt file that medinr wrote")
    kept = checkpoint["medinr"]
    try:
        method = build(kept["method"])
        if not isinstance(method, RegistrationMethod):
            raise UserError(f"{path}: holds {type(method).__name__}, which is no registration method")
        start = torch.tensor(kept["start"], dtype=torch.float64)
        method.remember(Domain.from_dict(kept["domain"]), start, kept["windows"])
        method.load_state_dict(checkpoint["state_dict"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        what = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path}: an incomplete or changed checkpoint ({what}); expected one that medinr wrote"
        ) from None
    method.state = {k: v for k, v in kept.items() if k != "method"}
    return method.to(map_location).eval()
