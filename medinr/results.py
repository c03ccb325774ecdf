"""What a registration is judged by, and the files it leaves."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from medinr import figures, io, metrics
from medinr.data.pair import Pair
from medinr.data.sequence import Sequence as ImageSequence
from medinr.errors import RegistrationWarning
from medinr.fields import Transform
from medinr.fields.dense import evaluate_dense, folded
from medinr.fields.warp import chunks, resample, resample_labels
from medinr.space import Domain
from medinr.types import Matrix, Volume

RESIDUAL_MM = 0.1
"""Points whose inverse leaves more than this are reported: the map is not invertible there."""


@dataclass(frozen=True)
class Evaluation:
    """A transform on the fixed grid.

    Attributes:
        warped: the moving image on the fixed grid [C, X, Y, Z], in its own intensities.
        start: the moving image through the rigid or affine start alone, for comparison.
        displacement: phi(p) - p at voxel centres [X, Y, Z, 3], RAS mm.
        det: det J_phi [X, Y, Z].
        metrics: names and numbers, as logged.
        uncertainty: length of the uncertainty's vector in mm [X, Y, Z]; None: the transform knows of none.
    """

    warped: Volume
    start: Volume
    displacement: Tensor
    det: Tensor
    metrics: dict[str, float]
    uncertainty: Tensor | None = None


def landmark_metrics(transform: Transform, pair: Pair) -> dict[str, float]:
    """TRE in mm, exact and snapped to moving voxels (the DIR-LAB convention), before and after; {} without points."""
    if pair.fixed_points is None or pair.moving_points is None:
        return {}
    fixed, target = pair.fixed_points.double().cpu(), pair.moving_points.double().cpu()
    moved = transform(fixed)
    exact = metrics.tre(moved, target)
    snapped = metrics.snapped_tre(moved, target, pair.moving.domain)
    return {
        "tre/mean": exact.mean().item(),
        "tre/std": exact.std(correction=0).item(),
        "tre/p95": exact.quantile(0.95).item(),
        "tre/max": exact.max().item(),
        "tre/snapped_mean": snapped.mean().item(),
        "tre/snapped_std": snapped.std(correction=0).item(),
        "tre/initial_mean": metrics.tre(fixed, target).mean().item(),
    }


def landmarks_over_time(
    transform_at: Callable[[float], Transform], sequence: ImageSequence
) -> dict[float, tuple[float, float]]:
    """Mean distance in mm of the landmarks before and after, at each time but the reference's that has them."""
    fixed, found = sequence.points[sequence.reference], {}
    for i, (time, points) in enumerate(zip(sequence.times, sequence.points, strict=True)):
        if fixed is not None and points is not None and i != sequence.reference:
            p, q = fixed.double().cpu(), points.double().cpu()
            found[time] = (metrics.tre(p, q).mean().item(), metrics.tre(transform_at(time)(p), q).mean().item())
    return found


def evaluate(transform: Transform, pair: Pair, exact: bool = False) -> Evaluation:
    """The transform on the whole fixed grid, with every metric that the pair's data allow."""
    pair = pair.to("cpu")
    domain, mask = pair.domain, pair.fixed_mask
    dense = evaluate_dense(transform, domain, exact)
    warped = resample(pair.moving, domain, dense.displacement)
    start = resample(pair.moving, domain, start=transform.start)

    region = torch.ones(domain.shape, dtype=torch.bool) if mask is None else mask
    length = dense.displacement.norm(dim=-1)[region]
    found = landmark_metrics(transform, pair)
    written = metrics.finite_difference_jacobian(dense.displacement, domain)
    found |= {
        "folding/percent": folded(transform, domain, dense.det, mask, dense.error_det),
        "folding/written_percent": 100 * (written <= 0)[region].float().mean().item(),
        "folding/sdlogj": metrics.sdlogj(dense.det, mask),
        **({"folding/sdlogj_learn2reg": metrics.sdlogj_learn2reg(written)} if min(domain.shape) > 4 else {}),
        "folding/det_min": dense.det[region].min().item(),
        "folding/det_max": dense.det[region].max().item(),
        "displacement/mean_mm": length.mean().item(),
        "displacement/max_mm": length.max().item(),
        "displacement/lattice_error_mm": dense.error_mm,
        "start/log_det": torch.linalg.det(transform.start[:3, :3]).abs().log().item(),
    }
    found |= uncertainty_metrics(dense.uncertainty, region, transform)
    compared = region if pair.fixed_exclude is None else region & ~pair.fixed_exclude
    found |= image_metrics(pair.fixed.data, start, warped, compared)
    found |= _overlaps(pair, dense.displacement, transform.start)
    return Evaluation(warped, start, dense.displacement, dense.det, found, dense.uncertainty)


def uncertainty_metrics(uncertainty: Tensor | None, region: Tensor, transform: Transform) -> dict[str, float]:
    """Mean and 95th percentile of the uncertainty in mm over a region, and whether the result is to be trusted."""
    if uncertainty is None:
        return {}
    values = uncertainty[region]
    p95 = values[:: max(1, len(values) // 1_000_000)].quantile(0.95).item()
    found = {"uncertainty/mean_mm": values.mean().item(), "uncertainty/p95_mm": p95}
    return found if transform.trust_mm is None else found | {"uncertainty/trusted": float(p95 <= transform.trust_mm)}


def image_metrics(fixed: Volume, start: Volume, warped: Volume, region: Tensor) -> dict[str, float]:
    """Intensity differences of the moving image from the fixed one, in the fixed image's window: means over channels.

    Args:
        fixed: fixed image [C, X, Y, Z].
        start, warped: moving image on its grid before and after.
        region: where they are compared, bool [X, Y, Z] (SSIM: everywhere).
    """
    rows = []
    for f, s, w in zip(fixed, start, warped, strict=True):
        some = f.flatten()[:: max(1, f.numel() // 1_000_000)]
        low, high = torch.quantile(some, torch.tensor([0.005, 0.995])).tolist()
        scale = max(high - low, 1e-12)
        f, s, w = (v.clamp(low, high) for v in (f, s, w))
        rows.append(
            {
                "image/rms_before": metrics.rms_difference(s, f, region),
                "image/rms": metrics.rms_difference(w, f, region),
                "image/psnr": metrics.psnr(w, f, scale, region),
                "image/ssim": metrics.ssim(w, f, scale),
            }
        )
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _overlaps(pair: Pair, displacement: Tensor, start: Matrix) -> dict[str, float]:
    """Dice of labels, or of masks where there are no labels, before and after."""
    fixed, moving = pair.fixed_labels, pair.moving_labels
    if fixed is None or moving is None:
        fixed, moving = pair.fixed_mask, pair.moving_mask
    if fixed is None or moving is None:
        return {}
    source, domain = pair.moving.domain, pair.domain
    per_label = metrics.dice(resample_labels(moving, source, domain, displacement), fixed)
    before = metrics.dice(resample_labels(moving, source, domain, start=start), fixed)
    found = {"dsc/mean": _mean(per_label), "dsc/initial_mean": _mean(before)}
    return found | {f"dsc/label_{k}": v for k, v in per_label.items()}


def _mean(values: dict[int, float]) -> float:
    return sum(values.values()) / max(len(values), 1)


def save_picture(path: Path, evaluation: Evaluation, pair: Pair, title: str = "") -> None:
    """Fixed, moving, warped, differences, grid and Jacobian in three planes, as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = None if pair.fixed_mask is None else pair.fixed_mask.cpu()
    figure = figures.registration_figure(
        pair.fixed.data[0].cpu(), evaluation.start[0], evaluation.warped[0], evaluation.det, evaluation.displacement,
        pair.domain, mask, title,
    )  # fmt: skip
    figures.save_figure(figure, path)


def page(
    evaluation: Evaluation, pair: Pair, start: Matrix, settings: dict[str, Any], warnings: Sequence[str] = ()
) -> str:
    """The report as one self-contained HTML page (`medinr.figures.report_page`), of the first channel."""
    return figures.report_page(_scene(evaluation, pair), evaluation.metrics, start, pair.name, settings, warnings)


def _scene(evaluation: Evaluation, pair: Pair) -> figures.Scene:
    mask = None if pair.fixed_mask is None else pair.fixed_mask.cpu()
    return figures.scene_of(
        pair.fixed.data[0].cpu(), evaluation.start[0], evaluation.warped[0], evaluation.det, evaluation.displacement,
        pair.domain, mask, evaluation.uncertainty,
    )  # fmt: skip


def write_results(
    out: Path,
    method: Any,
    pair: Pair,
    evaluation: Evaluation,
    inverse: bool = False,
    extra: dict[str, Any] | None = None,
    formats: Sequence[str] = (),
    report: bool = False,
    settings: dict[str, Any] | None = None,
    warnings: Sequence[str] = (),
    points_space: io.PointsSpace = "ras",
) -> list[Path]:
    """Write images, fields, carried labels and points, metrics and figures: all of them, or none at all.

    What an earlier run wrote into the folder and this one does not (its ``files.json`` lists it) is removed: an old
    inverse beside a new transform would be taken for its inverse.

    Args:
        out: the folder.
        method: fitted; gives the transform and its checkpoint.
        pair: the images.
        evaluation: of the transform on the fixed grid.
        inverse: also write the inverse displacement, on the moving grid.
        extra: what metrics.json is to say beside the metrics.
        formats: the transform in further forms (`medinr.io.FORMATS`).
        report: also write report.html, one page with everything to look at.
        settings: of the run, for the report (None: ``extra``).
        warnings: that came up on the way, for the report.
        points_space: frame of moved_points.csv, of the moving image.

    Raises:
        UserError: a folder that cannot be written to; a full disk; an unknown format.

    Warns:
        RegistrationWarning: voxels without an inverse.
    """
    formats = io.check_formats(formats)
    with io.staged_folder(out) as staged:
        files = _write_all(staged, method, pair, evaluation, inverse, extra or {}, points_space)
        names = (pair.fixed.source, pair.moving.source)
        files += io.write_transforms(
            staged, formats, evaluation.displacement, method.transform().start, pair.domain, names
        )
        if report:
            told = extra or {} if settings is None else settings
            text = page(evaluation, pair, method.transform().start, told, warnings)
            files.append(staged / "report.html")
            io.write_text(files[-1], text)
        stale = io.replace_listing(Path(out), staged)
    for file in stale:
        file.unlink(missing_ok=True)
    return [Path(out) / file.relative_to(staged) for file in files]


def _write_all(
    out: Path, method: Any, pair: Pair, evaluation: Evaluation, inverse: bool, extra: dict[str, Any],
    points_space: io.PointsSpace,
) -> list[Path]:  # fmt: skip
    (out / "figures").mkdir(parents=True, exist_ok=True)
    domain, transform = pair.domain, method.transform()
    # One file a channel: a 4-D file would be taken for a time series.
    warped = [out / f"warped{f'_channel{c + 1}' if c else ''}.nii.gz" for c in range(len(evaluation.warped))]
    for path, channel in zip(warped, evaluation.warped, strict=True):
        io.write_image(path, channel.float(), domain)
    io.write_displacement(out / "displacement.nii.gz", evaluation.displacement, domain)
    io.write_image(out / "jacobian_determinant.nii.gz", evaluation.det.float(), domain)
    files = [*warped, out / "displacement.nii.gz", out / "jacobian_determinant.nii.gz"]
    if evaluation.uncertainty is not None:
        io.write_image(out / "uncertainty.nii.gz", evaluation.uncertainty.float(), domain)
        files.append(out / "uncertainty.nii.gz")
        figures.save_figure(
            figures.deformation_figure(_scene(evaluation, pair), pair.name), out / "figures" / "uncertainty.png"
        )
        files.append(out / "figures" / "uncertainty.png")
    if pair.moving_labels is not None:
        carried = resample_labels(pair.moving_labels, pair.moving.domain, domain, evaluation.displacement)
        io.write_image(out / "warped_labels.nii.gz", carried, domain)
        files.append(out / "warped_labels.nii.gz")
    if pair.fixed_points is not None:
        io.write_points(out / "moved_points.csv", transform(pair.fixed_points), points_space, pair.moving.domain)
        files.append(out / "moved_points.csv")
    if inverse:
        io.write_displacement(
            out / "inverse_displacement.nii.gz", inverse_displacement(transform, pair.moving.domain), pair.moving.domain
        )
        files.append(out / "inverse_displacement.nii.gz")
    save_picture(out / "figures" / "registration.png", evaluation, pair, pair.name)
    method.save(out / "transform.ckpt")
    files += [out / "transform.ckpt", *method.report(out)]
    record = {"case": pair.name, **evaluation.metrics, **extra}
    write_metrics(out / "metrics.json", record)
    return [*files, out / "metrics.json", out / "figures" / "registration.png"]


def write_metrics(path: Path, record: dict[str, Any]) -> None:
    """A record as JSON, which has no infinity (the PSNR of equal images) and no NaN: null in their place."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    io.write_text(path, json.dumps(plain, indent=2, allow_nan=False) + "\n")


def inverse_displacement(transform: Transform, domain: Domain) -> Tensor:
    """phi^-1(q) - q at the voxel centres q of the moving grid [X, Y, Z, 3], RAS mm; Newton on every voxel in chunks.

    Warns:
        RegistrationWarning: voxels at which the transform has no inverse.
    """
    out, bad, limit = torch.empty(domain.n_voxels, 3), 0, min(RESIDUAL_MM, 0.1 * min(domain.spacing))
    for rows, q in chunks(domain, 200_000):
        p, residual = transform.inverse(q)
        out[rows] = (p - q).float()
        bad += int((residual > limit).sum())
    if bad:
        share = 100 * bad / domain.n_voxels
        message = f"inverse: {bad} of {domain.n_voxels} voxels ({share:.2g} %) have none within {limit:.2g} mm"
        warn(message, RegistrationWarning, stacklevel=2)
    return out.reshape(*domain.shape, 3)


def summary(found: dict[str, float]) -> str:
    """The few numbers that a person wants to see at the end of a run, one line each."""
    lines = []
    if "tre/mean" in found:
        lines.append(
            f"  TRE        {found['tre/initial_mean']:.2f} -> {found['tre/mean']:.2f} mm"
            f" (sd {found['tre/std']:.2f}, 95% {found['tre/p95']:.2f}; snapped {found['tre/snapped_mean']:.2f})"
        )
    if "dsc/mean" in found:
        lines.append(f"  Dice       {found['dsc/initial_mean']:.3f} -> {found['dsc/mean']:.3f}")
    lines += [
        f"  RMS        {found['image/rms_before']:.4g} -> {found['image/rms']:.4g}",
        f"  folding    {found['folding/percent']:.3f} %  (det J {found['folding/det_min']:.2f} to"
        f" {found['folding/det_max']:.2f})",
        f"  motion     mean {found['displacement/mean_mm']:.2f} mm, largest {found['displacement/max_mm']:.2f} mm",
    ]
    if "uncertainty/p95_mm" in found:
        doubt = "" if found.get("uncertainty/trusted", 1.0) else ": not to be trusted"
        mean, most = found["uncertainty/mean_mm"], found["uncertainty/p95_mm"]
        lines.append(f"  uncertain  mean {mean:.2f} mm, 95% below {most:.2f} mm{doubt}")
    return "\n".join(lines)
