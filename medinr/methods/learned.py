"""Registration by a trained network: one pass instead of a fit (VoxelMorph, MIDIR)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medinr import metrics
from medinr.data.pair import Pair
from medinr.data.working import on_grid, working_grid
from medinr.errors import UserError
from medinr.fields import Transform
from medinr.fields.gridded import GridTransform
from medinr.fields.squaring import grid_jet, inside, warp, warp_labels
from medinr.fields.unet import PairNetwork
from medinr.losses import Regularizer, Similarity
from medinr.losses.volumes import VolumeNCC
from medinr.methods.levels import robust_windows, windowed
from medinr.methods.method import Group, check_precision
from medinr.methods.module import RegistrationModule
from medinr.precision import full
from medinr.ranks import any_rank
from medinr.results import Evaluation
from medinr.space import REFERENCE_LENGTH_MM, Domain
from medinr.types import Scalar

CONTRAST = 1e-6
"""Windows of the fixed image with a smaller variance say nothing, and do not count."""


class LearnedRegistration(RegistrationModule):
    """min over the network's weights of the mean over pairs of similarity + sum_k weight_k R_k; labels are never used.

    Amortised registration: Balakrishnan et al., VoxelMorph, IEEE TMI 38(8), 2019; Qiu et al., MIDIR, MIDL 2021. It is
    trained on a cohort of pairs (`CohortPairs`), on a grid of the data module's spacing; afterwards ``attach(pair)``
    registers a pair of any grid in one pass: both images are resampled to a grid of that spacing, the moving one
    through the pair's start. A training checkpoint serves every pair; one that ``save`` wrote after `attach` holds the
    displacement of its pair, too.

    Regularizers get the jet of the displacement by finite differences in mm; for a velocity network too.

    Args:
        network: from both images to the displacement in voxels.
        similarity: of points, over all voxels of the grid; None: local NCC in windows of ``radius`` voxels.
        regularizers: penalties by name.
        radius: half side of the windows, in voxels of the grid (4: windows of 9^3, as VoxelMorph has them).
        signed: False compares the square of the local NCC, as VoxelMorph does.
        lr: peak learning rate of Adam.
        warmup: share of the steps with a linearly rising learning rate.
        cosine: let the learning rate fall to zero along a cosine after the warm-up.
    """

    amortised = True
    """A checkpoint is not bound to the grid of a pair."""

    def __init__(
        self,
        network: PairNetwork,
        similarity: Similarity | None = None,
        regularizers: dict[str, Regularizer] | None = None,
        radius: int = 4,
        signed: bool = True,
        lr: float = 1e-3,
        warmup: float = 0.0,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        if radius < 1:
            raise UserError(f"radius: expected windows of 1 voxel or more to each side, found {radius}")
        if similarity is not None and similarity.offsets(0.0) is not None:
            raise UserError(
                f"similarity: expected one of points (MSE, NCC, NMI), found {type(similarity).__name__} with patches; "
                "leave it out for the local NCC of volumes"
            )
        for name, part in (regularizers or {}).items():
            if part.directions == "probes" or part.fraction != 1:
                raise UserError(
                    f"regularizers.{name}: expected exact derivatives of all voxels, found directions "
                    f"{part.directions} and fraction {part.fraction}; leave them out"
                )
        self.network, self.similarity = network, similarity
        self.regularizers = nn.ModuleDict(regularizers or {})
        self.radius, self.signed, self.lr, self.warmup, self.cosine = radius, signed, lr, warmup, cosine

    @property
    def penalties(self) -> Mapping[str, Regularizer]:
        """The regularizers by name."""
        return {k: v for k, v in self.regularizers.items() if isinstance(v, Regularizer)}

    # -- training ------------------------------------------------------------------------------------------------

    def size(self, pair: Pair) -> None:
        """Nothing depends on the images."""

    def setup(self, stage: str) -> None:
        check_precision(self.trainer.precision)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage in ("fit", "validate"):
            if not hasattr(data, "spacing") or not hasattr(data, "grid"):
                raise UserError(
                    f"data: expected a cohort of pairs to learn from, found {type(data).__name__}; "
                    "give AdultSlabs or another CohortPairs"
                )
            if stage == "fit":
                self.remember(data.grid, torch.eye(4, dtype=torch.float64), data.spacing)

    def remember(self, domain: Domain, start: Tensor, spacing: Sequence[float]) -> None:
        """Keep what a checkpoint must carry: the spacing that was trained at, and the grid and start of the present
        pair (in training, the common grid and the identity)."""
        self.domain, self.start = domain, start.double().cpu()
        self.state |= {
            "domain": domain.to_dict(),
            "start": self.start.tolist(),
            "spacing": [float(s) for s in spacing],
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        self.domain = Domain.from_dict(kept["domain"])
        self.start = torch.tensor(kept["start"], dtype=torch.float64)
        self.state = {k: v for k, v in kept.items() if k != "method"}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.restore(checkpoint["medinr"])

    def groups(self) -> list[Group]:
        total = self.total_steps
        rise = max(1, round(self.warmup * total))

        def rate(step: int) -> float:
            if step < rise or not self.cosine:
                return self.lr * min(1.0, (step + 1) / rise)
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))))

        return [(list(self.parameters()), rate)]

    def forward(self, images: Tensor) -> Tensor:
        """Displacement [B, 3, X, Y, Z] in voxels, of fixed and moving image [B, 2, X, Y, Z] in [0, 1]."""
        u: Tensor = self.network(images)
        return u

    def compare(self, fixed: Tensor, moving: Tensor, u: Tensor) -> Scalar:
        """Similarity of fixed [B, 1, X, Y, Z] and moving image through u; what maps outside the grid does not count."""
        moved, weight = warp(moving, u)[:, 0], inside(u).float()
        losses = []
        for f, m, w in zip(fixed[:, 0], moved, weight, strict=True):
            if self.similarity is not None:
                losses.append(self.similarity(f.flatten(), m.flatten(), w.flatten()))
            else:
                local = VolumeNCC(f, self.radius, signed=self.signed)
                losses.append(local(m, w * (local.variance > CONTRAST)))
        return torch.stack(losses).mean()

    def objective(self, batch: Mapping[str, Tensor]) -> dict[str, Scalar]:
        return self.terms(batch, self(torch.cat((batch["fixed"], batch["moving"]), dim=1)))

    def terms(self, batch: Mapping[str, Tensor], u: Tensor) -> dict[str, Scalar]:
        """Weighted terms of the loss for displacements [B, 3, X, Y, Z] in voxels."""
        with full(self.device.type):
            terms = {"similarity": self.compare(batch["fixed"], batch["moving"], u)}
            raw = self.penalize(u)
            self._log({f"raw/{k}": v.detach() for k, v in raw.items()})
            return terms | {k: self.penalties[k].weight * v for k, v in raw.items()}

    def penalize(self, u: Tensor) -> dict[str, Scalar]:
        """Raw penalties of displacements [B, 3, X, Y, Z] in voxels of a grid of the trained spacing."""
        if not self.penalties:
            return {}
        spacing = self.state["spacing"]
        mm = u * torch.tensor(spacing, device=u.device).view(3, 1, 1, 1)
        order = max(r.order for r in self.penalties.values())
        jets = [grid_jet(each, spacing, REFERENCE_LENGTH_MM, order) for each in mm]
        return {k: torch.stack([r(jet) for jet in jets]).mean() for k, r in self.penalties.items()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        terms = self.objective(batch)
        loss = torch.stack(list(terms.values())).sum()
        if any_rank(not bool(torch.isfinite(loss)), self.device):  # all stop, or those who go on wait for ever
            raise UserError(f"the loss is {loss.item()} at step {self.global_step}: lower the learning rate (lr)")
        self._log({"loss": loss.detach()}, prog_bar=True)
        self._log({f"loss/{k}": v.detach() for k, v in terms.items()})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Similarity, loss, folding and, with labels, Dice on the common grid, before and after."""
        with full(self.device.type):
            u = self(torch.cat((batch["fixed"], batch["moving"]), dim=1))
            terms = self.terms(batch, u)
        found = {"val/loss": torch.stack(list(terms.values())).sum(), "val/similarity": terms["similarity"]}
        spacing = torch.tensor(self.state["spacing"], device=u.device)
        for k, each in enumerate(u):
            grid = Domain.of(each.shape[1:], torch.diag(torch.tensor([*self.state["spacing"], 1.0])))
            det = metrics.finite_difference_jacobian((each.movedim(0, -1) * spacing).cpu(), grid)
            found["val/folding_percent"] = 100 * (det <= 0).float().mean()
            if "fixed_labels" in batch:
                fixed, moving = batch["fixed_labels"][k], batch["moving_labels"][k]
                for name, labels in (("val/dice", warp_labels(moving, each)), ("val/dice_initial", moving)):
                    scores = metrics.dice(labels.cpu(), fixed.cpu())
                    found[name] = torch.tensor(sum(scores.values()) / max(len(scores), 1))
        self.log_dict(found, batch_size=1, sync_dist=True)

    # -- a pair --------------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        return self.pair is not None

    @torch.no_grad()
    def attach(self, pair: Pair) -> None:
        """Register a pair: its displacement becomes the result.

        Raises:
            UserError: an untrained network, images of several channels, or a single slice.
        """
        if "spacing" not in self.state:
            raise UserError("model: expected a trained network, found one without a checkpoint; give --ckpt_path FILE")
        for side, image in (("fixed", pair.fixed), ("moving", pair.moving)):
            if len(image.data) != 1:
                raise UserError(f"{side}: expected an image of one channel, found {len(image.data)}; give one of them")
        spacing = self.state["spacing"]
        grid = working_grid(pair.domain, spacing)
        if min(grid.shape) < 2:
            raise UserError(
                f"fixed: expected two voxels or more along each axis at the trained spacing {spacing} mm, found "
                f"{grid.shape}; give a larger image"
            )
        starts = (torch.eye(4, dtype=torch.float64), pair.start)
        images = [
            on_grid(type(image)(windowed(image.data.cpu(), robust_windows(image)), image.domain), grid, start)
            for image, start in zip((pair.fixed, pair.moving), starts, strict=True)
        ]
        with full(self.device.type):
            u = self(torch.stack([i[0] for i in images])[None].to(self.device))[0].float().cpu()
        mm = torch.einsum("ij,j...->i...", grid.voxel_to_world[:3, :3].float(), u)
        self.pair = pair
        self.remember(pair.domain, pair.start, spacing)
        self.state |= {"displacement": mm.contiguous(), "grid": grid.to_dict()}

    def transform(self) -> Transform:
        """phi of the attached pair, or of the one whose result the checkpoint holds."""
        if "displacement" not in self.state:
            raise UserError(
                "checkpoint: expected the result of a pair, found a trained network alone; register a pair with "
                "`medinr predict --ckpt_path FILE`"
            )
        return GridTransform(self.state["displacement"], Domain.from_dict(self.state["grid"]), self.start)

    def predict_step(self, batch: Any, batch_idx: int) -> Evaluation:
        """Register the pair of this number, and evaluate it on its own fixed grid."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.attach(data.test_pair(int(batch)) if hasattr(data, "test_pair") else data.pair)
        return super().predict_step(batch, batch_idx)

    # The network is trained on many pairs, so none is attached before a stage.

    def on_fit_start(self) -> None:
        """Nothing to attach."""

    def on_validation_start(self) -> None:
        """Nothing to attach."""

    def on_test_start(self) -> None:
        """Pairs are attached one by one."""

    def on_predict_start(self) -> None:
        """Pairs are attached one by one."""
