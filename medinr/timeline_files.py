"""The files of a fitted sequence at any times: images, fields, labels, points, curves, maps of motion, an animation."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medinr import figures, io
from medinr.errors import UserError
from medinr.fields.chained import Inverted
from medinr.fields.dense import evaluate_dense, folded
from medinr.fields.warp import resample, resample_labels
from medinr.space import Domain, Image, transform_points
from medinr.timeline import (
    Curve,
    Moving,
    Subject,
    between,
    curves_of,
    displacement_on,
    extremes_of,
    interpolation_error,
    label_state,
    motion_amplitude,
    predicted,
)
from medinr.types import Volume

PROBES = 2000
"""Voxel centres at which phi_t^-1 o phi_t is held against the identity."""


def write_timeline(
    out: str | Path,
    moving: Moving,
    subject: Subject,
    times: Sequence[float],
    pairs: Iterable[tuple[float, float]] = (),
    extremes: tuple[float, float] | None = None,
    exact: bool = False,
    fps: float = 8.0,
) -> list[Path]:
    """Write a fitted sequence at any times: all files, or none.

    ``image_tT.nii.gz`` (the reference image warped to time T; where ``subject`` knows the sequence, between the images
    before and after), ``rendering_tT.nii.gz`` (the prior's, where ``moving`` has one), ``labels_tT.nii.gz``,
    ``points_tT.csv``; ``displacement_S_to_T.nii.gz`` for each of ``pairs``, on the
    reference grid; ``timeline.csv`` (motion, det J and the gap of phi_t^-1 o phi_t at each time); ``curves.csv`` and
    ``.png`` (volume and centre of mass of each label); ``amplitude.nii.gz`` (largest distance between two places of a
    voxel, mm), ``ventilation.nii.gz`` (change of volume from the first of the extremes to the second, relative to the
    first), ``interpolation_error.nii.gz`` (see `interpolation_error`, where the method knows it), ``maps.png`` and
    ``animation.gif``; ``metrics.json``.

    Args:
        out: folder of its own.
        moving: gives phi_t, and where it can ``transform_between`` and ``rendering(domain, time)``.
        subject: what is carried along.
        times: where.
        pairs: times (s, t) between which the displacement is written.
        extremes: times of the ventilation; None: those of the smallest and largest volume of mask or labels.
        exact: visit every voxel (see `evaluate_dense`).
        fps: images a second of the animation.

    Raises:
        UserError: no times; a folder that cannot be written to.
    """
    if not times:
        raise UserError("times: expected one or more, found none; give --times")
    names = _names(times)
    with io.staged_folder(out) as staged:
        found = _Timeline(staged, moving, subject, exact)
        for time, name in zip(times, names, strict=True):
            found.add(time, name)
        found.finish(times, list(pairs), extremes, fps)
        stale = io.replace_listing(Path(out), staged)
        files = sorted(f.relative_to(staged) for f in staged.rglob("*") if f.is_file())
    for file in stale:
        file.unlink(missing_ok=True)
    return [Path(out) / file for file in files]


class _Timeline:
    """The files of `write_timeline`, time by time; keeps what curves, maps and animation need."""

    def __init__(self, out: Path, moving: Moving, subject: Subject, exact: bool) -> None:
        self.out, self.moving, self.subject, self.exact = out, moving, subject, exact
        self.displacements: list[Tensor] = []
        self.dets: list[Tensor] = []
        self.states: list[dict[int, tuple[float, Tensor]]] = []
        self.frames: list[tuple[Tensor, Tensor | None]] = []
        self.rows: list[list[float]] = []
        size = torch.tensor(subject.domain.shape)
        voxels = (torch.rand(PROBES, 3, generator=torch.Generator().manual_seed(0)) * size).long()
        self.probes = transform_points(subject.domain.voxel_to_world, voxels.double())
        self.inside = torch.ones(subject.domain.shape, dtype=torch.bool)
        if subject.mask is not None or subject.labels is not None:
            self.inside = subject.mask if subject.mask is not None else subject.labels != 0  # type: ignore[assignment]

    def add(self, time: float, name: str) -> None:
        subject, domain = self.subject, self.subject.domain
        transform = self.moving.transform_at(time)
        dense = evaluate_dense(transform, domain, self.exact)
        # Half precision is 0.01 mm at 20 mm; a breath at full resolution would not fit otherwise.
        self.displacements.append(dense.displacement.half())
        self.dets.append(dense.det.half())
        length = dense.displacement.norm(dim=-1)[self.inside]
        gap = (transform.inverse(transform(self.probes))[0] - self.probes).norm(dim=1).max()
        det = dense.det[self.inside]
        folds = folded(transform, domain, dense.det, self.inside, dense.error_det)
        self.rows.append([time, *(float(v) for v in (length.mean(), length.max(), det.min(), det.max(), folds, gap))])
        shown = labels = None
        if subject.image is not None or subject.labels is not None:
            back = displacement_on(Inverted(transform), domain, self.exact)
            if subject.image is not None:
                shown = self._image(subject.image, time, back)
                io.write_image(self.out / f"image_{name}.nii.gz", shown.float(), domain)
            if subject.labels is not None:
                labels = resample_labels(subject.labels, domain, domain, back)
                io.write_image(self.out / f"labels_{name}.nii.gz", labels, domain)
                self.states.append(label_state(subject.labels, domain, dense.displacement, dense.det))
        rendering: Callable[[Domain, float], Volume | None] | None = getattr(self.moving, "rendering", None)
        rendered = None if rendering is None else rendering(domain, time)
        if rendered is not None:
            io.write_image(self.out / f"rendering_{name}.nii.gz", rendered[0].float(), domain)
            shown = rendered[0] if shown is None else shown
        if subject.points is not None:
            io.write_points(self.out / f"points_{name}.csv", transform(subject.points))
        if shown is not None:
            self.frames.append((shown.half(), labels))

    def _image(self, image: Image, time: float, back: Tensor) -> Tensor:
        """The image of a time: between its neighbours where the sequence is known, else the reference's, warped."""
        subject, domain = self.subject, self.subject.domain
        if subject.sequence is None:
            return resample(image, domain, back, order=3)[0]
        share = subject.compensation
        return predicted(self.moving, subject.sequence, time, domain, True, share, self.exact)[0]

    def finish(
        self, times: Sequence[float], pairs: list[tuple[float, float]], extremes: tuple[float, float] | None, fps: float
    ) -> None:
        domain, inside, summary = self.subject.domain, self.inside, dict[str, Any]()
        for source, target in pairs:
            field = displacement_on(between(self.moving, source, target), domain, self.exact)
            io.write_displacement(self.out / f"displacement_{source:g}_to_{target:g}.nii.gz", field, domain)
        header = "time,displacement_mean_mm,displacement_max_mm,det_min,det_max,folded_percent,inverse_gap_mm"
        lines = [",".join(f"{v:.6g}" for v in row) for row in self.rows]
        io.write_text(self.out / "timeline.csv", "\n".join([header, *lines]) + "\n")
        summary["folding/percent"] = max(row[5] for row in self.rows)
        summary["inverse/gap_mm"] = max(row[6] for row in self.rows)
        curves = curves_of(self.states)
        if curves:
            self._write_curves(times, curves)
        amplitude = motion_amplitude(self.displacements)
        first, last = extremes or extremes_of(times, self.dets, inside)
        one, other = (self._det(times, t) for t in (first, last))
        ventilation = other / one.clamp(min=1e-6) - 1
        io.write_image(self.out / "amplitude.nii.gz", amplitude, domain)
        io.write_image(self.out / "ventilation.nii.gz", ventilation, domain)
        summary |= {
            "amplitude/mean_mm": float(amplitude[inside].mean()),
            "amplitude/max_mm": float(amplitude[inside].max()),
            "ventilation/from": first,
            "ventilation/to": last,
            "ventilation/mean": float((other[inside].sum() / one[inside].sum()) - 1),
        }
        error = interpolation_error(self.moving, domain)
        if error is not None:
            io.write_image(self.out / "interpolation_error.nii.gz", error, domain)
            summary["interpolation_error/mean_mm"] = float(error[inside].mean())
        background = self.subject.image.data[0] if self.subject.image is not None else None
        if background is not None and self.subject.image is not None:
            background = resample(self.subject.image, domain)[0]
            title = f"motion over {len(times)} times; ventilation from {first:g} to {last:g}"
            figure = figures.motion_figure(background, amplitude, ventilation, domain, inside, title)
            figures.save_figure(figure, self.out / "maps.png")
        if len(self.frames) > 1:
            region = inside if self.subject.mask is not None else None
            figures.save_animation(self.out / "animation.gif", self.frames, list(times), domain, region, fps)
        io.write_text(self.out / "metrics.json", json.dumps(summary, indent=2) + "\n")

    def _det(self, times: Sequence[float], time: float) -> Tensor:
        """det J at a time; that of the loop where it was one of them."""
        if time in times:
            return self.dets[list(times).index(time)].float()
        return evaluate_dense(self.moving.transform_at(time), self.subject.domain, self.exact).det

    def _write_curves(self, times: Sequence[float], curves: dict[int, Curve]) -> None:
        lines = ["time,label,volume_ml,x,y,z"]
        for label, curve in curves.items():
            for time, volume, centre in zip(times, curve.volumes, curve.centres, strict=True):
                lines.append(",".join([f"{time:g}", str(label), *(f"{v:.6g}" for v in (volume, *centre))]))
        io.write_text(self.out / "curves.csv", "\n".join(lines) + "\n")
        series = {}
        for label, curve in list(curves.items())[:4]:
            series[f"label {label}: volume [ml]"] = curve.volumes
            start = torch.tensor(curve.centres[0])
            series[f"label {label}: centre's shift [mm]"] = [
                float((torch.tensor(c) - start).norm()) for c in curve.centres
            ]
        figures.save_figure(figures.curve_figure(list(times), series, xlabel="time"), self.out / "curves.png")


def _names(times: Sequence[float]) -> list[str]:
    """``t005``, ``t012.5``: of one width, so that files sort as times do."""
    decimals = max(len(f"{t:.4f}".rstrip("0").partition(".")[2]) for t in times)
    width = max(len(f"{t:.{decimals}f}") for t in times)
    names = [f"t{t:0{width}.{decimals}f}" for t in times]
    if len(set(names)) < len(names):
        raise UserError("times: expected every time once, found one twice; remove it")
    return names
