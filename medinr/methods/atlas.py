"""Conditional spatio-temporal atlases of many scans: one decoder, one code for each scan (CINeMA, CINA)."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medinr.adaptation import adapt_scan, scan_metrics
from medinr.atlas_volumes import decoded_at, render
from medinr.data.cohort import Cohort
from medinr.data.encoded import as_plain, encode
from medinr.data.scan_points import Drawn, ScanPoints, brain, cross_entropy, placement, weighted_l1
from medinr.errors import UserError
from medinr.fields.modulated import ModulatedSIREN
from medinr.fields.poses import AFFINE, RIGID, PoseKind, roughness
from medinr.membership import Members
from medinr.methods.method import Group, Method, share_of_rate
from medinr.precision import full
from medinr.ranks import rank, world_size
from medinr.types import Scalar

LOOKED = 2000
"""Points of a scan at which the progress of a fit is measured."""
CACHED = 2**19
"""Numbers of one layer that are worth having at once on a CPU."""
MARGIN = 1.1
"""The cube of the codes, in the largest distance of any brain's voxel from its centre."""


class ConditionalAtlas(Members, Method):
    """min over decoder, codes z_i, poses P_i of sum_i |f(P_i x, z_i, c_i) - I_i(x)| + CE(labels) on random points.

    An auto-decoder: Dannecker et al., CINeMA, IEEE TMI 2025 (arXiv 2506.09668); with codes of one node, CINA (arXiv
    2403.08550). Every training scan has a code and a pose of its own; the decoder is shared. Nothing is registered. The
    atlas at an age is the decoder at the kernel-weighted mean of the codes (`at`), at any resolution; a new scan is
    fitted with the decoder frozen (`medinr.adapt`), and can be added.

    Modalities and labels that a scan lacks carry no loss; each counts as if all scans had it. Explicit conditions that
    a scan lacks are fitted like its code.

    Differences from the published code: poses are exponentials, with zero mean over the scans after every step, and may
    be affine or splines; the intensity outside the mask is fitted, too, so that the atlas ends where the brain does; a
    weight of the codes, and one of the smoothness of codes and shapes over age (both 0 as published); Adam, with a
    cosine over steps.

    Args:
        decoder: the shared network.
        points: random points a step, over all scans of the step.
        scans: scans a step, at most.
        balance: ``scans``, all scans as often as published, or ``voxels``, each as often as its brain is large: where
            brains grow, late ones are larger and more folded, and otherwise stay blurred longest.
        explicit: names of the conditions that the decoder is told; None: all of the cohort's.
        time: the condition that atlases are made along (None: the first continuous one).
        sigma: standard deviation of the kernel over time, in its units (published 0.5 weeks).
        degree: 0, kernel mean as published, or 1, local linear regression (see `medinr.latents.kernel_weights`).
        effects: let the mean code follow the conditions that are asked for (see `medinr.latents.condition_effects`; as
            published, the decoder alone is told of them).
        pose: ``rigid`` as published, ``affine`` or ``spline``. Affine poses start with the scans' sizes.
        control: control points along each axis of a spline pose.
        label_weight: of the cross-entropy (published 1).
        code_weight: of the codes' mean square.
        smooth_weight: of the mean square by which a scan's code, and the shape in its pose, differ from the line
            through its neighbours in time.
        pose_weight: of the stretches' mean square, and 100 times of the spline's roughness.
        halo, halo_mm: share of the points in the halo around the mask, and its width.
        elsewhere: share of the points in the whole grid.
        jitter: points anywhere in a voxel, not at its centre only.
        strip: count the image outside the mask as 0.
        lr, code_lr, pose_lr, feature_lr: peak learning rates of decoder, codes (and fitted conditions), poses, and of
            the decoder's feature grids, if it has any.
        warmup: share of the steps with a linearly rising learning rate.
        cosine: let the learning rates fall to zero along a cosine.
        condition_scale: what the ends of a condition's range become (published 0.05 to 0.15).
        code_std: standard deviation of the codes at the start.
    """

    amortised = True
    """A checkpoint is not bound to the grid of one image."""

    def __init__(
        self,
        decoder: ModulatedSIREN,
        points: int = 8192,
        scans: int = 16,
        balance: Literal["scans", "voxels"] = "scans",
        explicit: Sequence[str] | None = None,
        time: str | None = None,
        sigma: float = 0.5,
        degree: Literal[0, 1] = 0,
        effects: bool = False,
        pose: PoseKind = "rigid",
        control: int = 5,
        label_weight: float = 1.0,
        code_weight: float = 0.0,
        smooth_weight: float = 0.0,
        pose_weight: float = 0.0,
        halo: float = 0.15,
        halo_mm: float = 5.0,
        elsewhere: float = 0.05,
        jitter: bool = False,
        strip: bool = True,
        lr: float = 1e-4,
        code_lr: float = 5e-4,
        pose_lr: float = 1e-3,
        feature_lr: float = 1e-2,
        warmup: float = 0.0,
        cosine: bool = True,
        condition_scale: float = 0.1,
        code_std: float = 0.01,
    ) -> None:
        super().__init__()
        for name, value, low in (("points", points, 1), ("scans", scans, 1), ("control", control, 4)):
            if value < low:
                raise UserError(f"{name}: expected {low} or more, got {value}")
        if sigma <= 0 or min(halo, elsewhere) < 0 or halo + elsewhere >= 1:
            raise UserError(
                "expected sigma above 0, and shares halo and elsewhere that leave some points for the brain, got sigma "
                f"{sigma}, halo {halo}, elsewhere {elsewhere}"
            )
        self.decoder = decoder
        self.points, self.scans_per_step, self.explicit, self.time_name = points, scans, explicit, time
        self.balance = balance
        self.sigma, self.degree, self.effects, self.pose_kind, self.control = sigma, degree, effects, pose, control
        self.label_weight, self.code_weight, self.smooth_weight = label_weight, code_weight, smooth_weight
        self.pose_weight, self.halo, self.halo_mm, self.elsewhere = pose_weight, halo, halo_mm, elsewhere
        self.jitter, self.strip, self.lr, self.code_lr, self.pose_lr = jitter, strip, lr, code_lr, pose_lr
        self.feature_lr, self.condition_scale, self.code_std = feature_lr, condition_scale, code_std
        self.warmup, self.cosine = warmup, cosine
        self.codes, self.poses, self.fitted = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        self.names: list[str] = []
        self.samplers: list[ScanPoints] = []

    # -- the cohort ----------------------------------------------------------------------------------------------

    @property
    def subject(self) -> Cohort:
        cohort = getattr(self.trainer.datamodule, "cohort", None)  # type: ignore[attr-defined]
        if not isinstance(cohort, Cohort):
            raise UserError(
                f"data: expected a cohort of scans, found {type(self.trainer.datamodule).__name__}; "  # type: ignore[attr-defined]
                "use a data module of cohorts, as CohortDataModule or DHCP"
            )
        return cohort

    def size(self, cohort: Cohort) -> None:
        """Make codes and poses of the training scans, and the decoder's outputs."""
        names = list(cohort.names("train"))
        if self.names:
            if self.names[: len(names)] != names:
                raise UserError(
                    f"data: expected the {len(self.names)} scans that the atlas was trained on, found others"
                )
            return
        masks = [(brain(scan), scan.domain) for scan in map(cohort.scan, names)]
        placed = [placement(mask, domain) for mask, domain in masks]
        stretch = torch.stack([s for _, s, _ in placed]).log()
        state = {
            "cohort": cohort.name,
            "modalities": list(cohort.modalities),
            "labels": {str(k): v for k, v in cohort.label_names.items()},
            "conditions": [as_plain(c) for c in cohort.conditions],
            "unit_mm": MARGIN * max(reach for _, _, reach in placed),
            "spacing": min(min(domain.spacing) for _, domain in masks),
            "seed": torch.initial_seed() % 2**31,
            "names": names,
            "stretch": stretch.mean(0).tolist(),
            "centres": [centre.tolist() for centre, _, _ in placed],
            "known": [dict(cohort.known[n]) for n in names],
        }  # fmt: skip
        # The same weights in every process, whatever else has drawn numbers before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(state["seed"])
            self.remember(state)
        with torch.no_grad():
            for pose, own in zip(self.poses, stretch, strict=True):
                if len(pose) > RIGID:  # a small brain is stretched to the mean of all
                    pose[RIGID : RIGID + 3] = (stretch.mean(0) - own).to(pose)
                    pose[RIGID + 3 : AFFINE] = 0

    @property
    def attached(self) -> bool:
        return bool(self.samplers)

    def attach(self, cohort: Cohort) -> None:
        self.samplers = [self.sampler(cohort.scan(n)).to(self.device) for n in cohort.names("train")]
        self.share = self._shares(self.samplers)
        sizes = [len(s.inside) if self.balance == "voxels" else 1 for s in self.samplers]
        self.turns = [i for i, n in enumerate(sizes) for _ in range(round(n / min(sizes)))]
        told = [encode(self.told, known) for known in self.state["known"]]
        self.encoded = torch.stack(told).to(self.device) if told else torch.zeros(0, 0)
        self.dates = self.times.tolist()
        order = [i for i in self.times.argsort(stable=True).tolist() if not math.isnan(self.dates[i])]
        self.neighbours = {b: (a, c) for a, b, c in zip(order, order[1:], order[2:], strict=False)}

    def _shares(self, samplers: Sequence[ScanPoints]) -> tuple[Tensor, float]:
        """1 / (share of the scans that have it) of each modality, and of labels: a rare one counts no less."""
        modalities = torch.stack([s.present for s in samplers]).float().mean(0)
        labels = sum(s.classes is not None for s in samplers) / len(samplers)
        return 1 / modalities.clamp(min=1 / len(samplers)), 1 / labels if labels else 0.0

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        several = self.trainer.world_size > 1
        if several and stage == "fit" and not getattr(strategy, "_ddp_kwargs", {}).get("find_unused_parameters"):
            raise UserError(
                "trainer.strategy: expected ddp_find_unused_parameters_true with several processes, as a step touches "
                "the codes of its own scans only; set it"
            )
        if several and stage == "fit" and min(self.scans_per_step, len(self.subject.names("train"))) < world_size():
            raise UserError(f"model.scans: expected as many scans a step as processes ({world_size()}) or more")
        super().setup(stage)

    # -- steps ---------------------------------------------------------------------------------------------------

    def chosen(self, step: int) -> list[tuple[int, int]]:
        """The scans of a step, each with how often it came before in the step.

        Every scan has had all its turns before any begins again, in an order that changes every time.
        """
        total, n = len(self.turns), min(self.scans_per_step, len(self.samplers))
        found: list[int] = []
        for place in range(step * n, step * n + n):
            order = torch.Generator().manual_seed(self.state["seed"] + place // total)
            found.append(self.turns[int(torch.randperm(total, generator=order)[place % total])])
        return [(i, found[:k].count(i)) for k, i in enumerate(found)][rank() :: world_size()]

    def draw(self) -> list[tuple[int, Drawn]]:
        """Points of this process's scans of the step. They depend on the step and the scan alone."""
        step = self.global_step if self._trainer is not None else 0
        found = []
        each = max(1, self.points // min(self.scans_per_step, len(self.samplers)))
        for i, before in self.chosen(step):
            seed = (self.state["seed"] * 1_000_003 + step * 10_007 + before * 100_000_007 + i) % 2**62
            generator = torch.Generator(self.device).manual_seed(seed)
            found.append((i, self.samplers[i].draw(each, generator, self.halo, self.elsewhere, self.jitter)))
        return found

    def told_of(self, i: int) -> Tensor:
        """The conditions [q] of a training scan as the decoder gets them: known ones, and fitted ones where missing."""
        return torch.where(self.encoded[i].isnan(), self.fitted[i], self.encoded[i])

    def objective(self, batch: list[tuple[int, Drawn]]) -> dict[str, Scalar]:
        size = len(batch)
        if self.device.type == "cpu":  # as many scans at once as the cache holds activations of
            size = max(1, CACHED // (self.decoder.width * len(batch[0][1].world)))
        found = [self._terms(batch[i : i + size]) for i in range(0, len(batch), size)]
        # Divided by the scans of all processes, over which gradients are averaged: some may have one more.
        scale = world_size() / min(self.scans_per_step, len(self.samplers))
        terms = {k: scale * torch.stack([f[k] for f in found]).sum() for k in found[0]}
        return terms | {k: scale * v for k, v in self._penalties([i for i, _ in batch]).items()}

    def _terms(self, batch: list[tuple[int, Drawn]]) -> dict[str, Scalar]:
        """Sums over some scans of their mean losses."""
        ids = [i for i, _ in batch]
        codes, poses = (torch.stack([p[i] for i in ids]) for p in (self.codes, self.poses))
        encoded = torch.stack([self.told_of(i) for i in ids])
        centres = torch.tensor([self.state["centres"][i] for i in ids], device=self.device)
        out = self.decode(torch.stack([d.world for _, d in batch]), codes, encoded, poses, centres)
        m = len(self.modalities)
        weight, labels = self.share
        sums = [
            weighted_l1(o[:, :m], d.values, weight * self.samplers[i].present / m)
            for o, (i, d) in zip(out, batch, strict=True)
        ]
        terms = {"intensity": torch.stack(sums).sum()}
        if len(self.labels) > 1 and labels:
            entropy = [
                cross_entropy(o[:, m:], d.classes)
                for o, (_, d) in zip(out, batch, strict=True)
                if d.classes is not None
            ]
            total = torch.stack(entropy).sum() if entropy else out.new_zeros(())
            terms["labels"] = self.label_weight * labels * total
        return terms

    def _penalties(self, chosen: list[int]) -> dict[str, Scalar]:
        # The same names in every process, whatever its scans: they log, and wait for each other, by name.
        weights = {"codes": self.code_weight, "smooth": self.smooth_weight, "poses": self.pose_weight}
        found = {k: [torch.zeros((), device=self.device)] for k, weight in weights.items() if weight}
        for i in chosen:
            if self.code_weight:
                found["codes"].append(self.code_weight * self.codes[i].square().mean())
            if self.smooth_weight and i in self.neighbours:
                found["smooth"].append(self.smooth_weight * self._bend(i))
            if self.pose_weight and self.pose_kind != "rigid":
                pose = self.poses[i][None]
                bent = pose[:, RIGID:AFFINE].square().mean() + 100 * roughness(pose, self.control)
                found["poses"].append(self.pose_weight * bent)
        return {k: torch.stack(v).sum() for k, v in found.items()}

    def _bend(self, i: int) -> Tensor:
        """Mean square of the difference of code and shape from the line in time through the neighbours'."""
        before, after = self.neighbours[i]
        gap = self.dates[after] - self.dates[before]
        share = (self.dates[i] - self.dates[before]) / gap if gap > 0 else 0.5
        bend = torch.zeros((), device=self.device)
        for part in (self.codes, [pose[RIGID:] for pose in self.poses] if self.pose_kind != "rigid" else None):
            if part is not None:
                bend = bend + (part[i] - torch.lerp(part[before], part[after], share)).square().mean()
        return bend

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Poses have zero mean over the scans: otherwise all of them and the decoder could move together."""
        with torch.no_grad():
            mean = torch.stack(list(self.poses)).mean(0)
            for pose in self.poses:
                pose -= mean

    def groups(self) -> list[Group]:
        total = self.total_steps
        features = list(self.decoder.features)
        network = [p for p in self.decoder.parameters() if not any(p is f for f in features)]
        rates: list[tuple[list[Any], float]] = [
            (network, self.lr),
            ([*self.codes, *self.fitted], self.code_lr),
            (list(self.poses), self.pose_lr),
        ]
        rates.append((features, self.feature_lr))

        def rate(peak: float) -> Any:
            return lambda step: peak * share_of_rate(step, total, self.warmup, self.cosine)

        return [(part, rate(peak)) for part, peak in rates if part]

    # -- evaluation ----------------------------------------------------------------------------------------------

    def on_train_epoch_end(self) -> None:
        """PSNR of some training scans at points of their masks: what the atlas has learned so far."""
        errors = []
        for i, sampler in list(enumerate(self.samplers))[:: max(1, len(self.samplers) // 4)]:
            flat = sampler.inside[:: max(1, len(sampler.inside) // LOOKED)].long()
            drawn = sampler.at(flat)
            out = decoded_at(self, self.member(i), drawn.world, self.device)[:, : len(self.modalities)].clamp(0, 1)
            seen = sampler.present.cpu()
            errors.append((out - drawn.values.cpu())[:, seen].square().mean())
        psnr = -10 * torch.stack(errors).clamp(min=1e-10).log10().mean()
        self.log("image/psnr", psnr, prog_bar=True, sync_dist=True)

    def validation_step(self, batch: int, batch_idx: int) -> None:
        """How well a scan of the validation split can be fitted, in a short fit."""
        cohort = self.subject
        name = cohort.names("val")[int(batch)]
        with torch.inference_mode(False), torch.enable_grad(), full(self.device.type):
            found = adapt_scan(self, cohort.scan(name), cohort.known[name], steps=60, points=2048)
        self.log("adapt/held_out", found.held_out, prog_bar=True, batch_size=1, sync_dist=True)

    def test_step(self, batch: int, batch_idx: int) -> dict[str, Any]:
        """PSNR, SSIM and Dice of a scan of the test split, fitted by its intensities; the time is not told."""
        cohort = self.subject
        name = cohort.names("test")[int(batch)]
        scan, known = cohort.scan(name), dict(cohort.known[name])
        time = self.time.name if self.time is not None else ""
        with torch.inference_mode(False), torch.enable_grad(), full(self.device.type):
            told = {k: v for k, v in known.items() if k != time}
            found = adapt_scan(self, scan, told)
        metrics = scan_metrics(self, scan, found, render(self, found.latent, scan.domain, self.device))
        if time in found.conditions and not math.isnan(known.get(time, math.nan)):
            metrics[f"{time}/error"] = abs(found.conditions[time] - known[time])
        self.log_dict(metrics, batch_size=1, sync_dist=True)
        return {"row": {"case": name, **metrics}}

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """An atlas is asked for ages, not for cases.

        Raises:
            UserError: always.
        """
        raise UserError(
            "predict: an atlas is written by `medinr atlas CKPT --ages ...`, a new scan fitted by `medinr adapt`"
        )
