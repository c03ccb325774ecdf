"""The files of an atlas over age: volumes, tissue maps, a 4-D series, montage, animation, curves of volumes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from medinr import figures, io
from medinr.atlas_volumes import AtlasVolume, Decodes, atlas_domain, render
from medinr.errors import UserError
from medinr.figures.atlas import montage, volume_figure
from medinr.io.images import save_nifti
from medinr.latents import Latent
from medinr.space import Domain


class Atlas(Decodes, Protocol):
    """A decoder that knows the mean brain at any age."""

    state: dict[str, Any]

    def at(self, time: float | None, values: Mapping[str, float] | None = None) -> Latent:
        """The mean brain at a time."""
        ...


def write_atlas(
    out: str | Path,
    atlas: Atlas,
    ages: Sequence[float],
    values: Mapping[str, float] | None = None,
    spacing: float | None = None,
    domain: Domain | None = None,
    fps: float = 4.0,
    unit: str = "age",
) -> list[Path]:
    """Write an atlas at any ages: all files, or none.

    For each age ``<modality>_t<age>.nii.gz`` (0 to 1), ``labels_t<age>.nii.gz`` and ``probabilities_t<age>.nii.gz``
    (4-D, the classes of atlas.json in order); ``<modality>_4d.nii.gz``, ``montage.png``, ``labels.png``,
    ``animation.gif``, ``volumes.csv`` (ml) and ``.png``; ``atlas.json`` says what the files mean.

    Args:
        out: folder of its own.
        atlas: what was fitted.
        ages: where.
        values: explicit conditions by name.
        spacing: mm; None: that of the finest training scan.
        domain: the grid in the atlas's space; None: one that holds it.
        fps: images a second of the animation.
        unit: name of the ages on axes.

    Raises:
        UserError: no ages, one twice; a spacing of 0; a folder that cannot be written to.
    """
    if not ages or len(set(ages)) < len(ages):
        raise UserError(f"--ages: expected one or more different ages, found {list(ages)}")
    if spacing is not None and spacing <= 0:
        raise UserError(f"--spacing: expected a length in mm above 0, found {spacing}")
    whole = atlas_domain(atlas.unit_mm, spacing or float(atlas.state["spacing"])) if domain is None else domain
    names = time_names(ages)
    with io.staged_folder(out) as staged:
        volumes = []
        for age, name in zip(ages, names, strict=True):
            volumes.append(render(atlas, atlas.at(age, values), whole))
            _write_volume(staged, volumes[-1], name)
        _write_series(staged, volumes, ages)
        _write_pictures(staged, atlas, volumes, ages, fps, unit)
        known = {
            "ages": list(ages), "conditions": dict(values or {}), "classes": list(atlas.labels),
            "label_names": atlas.state["labels"], "modalities": list(atlas.modalities),
            "spacing_mm": list(whole.spacing), "cohort": atlas.state["cohort"], "scans": len(atlas.state["names"]),
        }  # fmt: skip
        io.write_text(staged / "atlas.json", json.dumps(known, indent=2) + "\n")
        stale = io.replace_listing(Path(out), staged)
        files = sorted(f.relative_to(staged) for f in staged.rglob("*") if f.is_file())
    for file in stale:
        file.unlink(missing_ok=True)
    return [Path(out) / file for file in files]


def _write_volume(out: Path, volume: AtlasVolume, name: str) -> None:
    for modality, image in volume.images.items():
        io.write_image(out / f"{modality}_{name}.nii.gz", image, volume.domain)
    if volume.labels is not None and volume.probabilities is not None:
        io.write_image(out / f"labels_{name}.nii.gz", volume.labels, volume.domain)
        bytes_of = (volume.probabilities.float() * 255).round().to(torch.uint8).numpy()
        save_nifti(out / f"probabilities_{name}.nii.gz", bytes_of, volume.domain, slope=1 / 255)


def _write_series(out: Path, volumes: Sequence[AtlasVolume], ages: Sequence[float]) -> None:
    if len(ages) < 2:
        return
    domain = volumes[0].domain
    for modality in volumes[0].images:
        series = np.stack([v.images[modality].numpy() for v in volumes], -1)
        save_nifti(out / f"{modality}_4d.nii.gz", series, domain)
    if volumes[0].labels is not None:
        series = np.stack([v.labels.numpy() for v in volumes if v.labels is not None], -1)
        save_nifti(out / "labels_4d.nii.gz", series, domain)


def _write_pictures(
    out: Path, atlas: Atlas, volumes: Sequence[AtlasVolume], ages: Sequence[float], fps: float, unit: str
) -> None:
    domain, titles = volumes[0].domain, [f"{age:g}" for age in ages]
    inside = torch.stack([v.inside for v in volumes]).any(0)
    for i, modality in enumerate(atlas.modalities):
        figure = montage([v.images[modality] for v in volumes], titles, domain, inside, title=f"{modality}, {unit}")
        figures.save_figure(figure, out / ("montage.png" if i == 0 else f"montage_{modality}.png"))
    labels = [v.labels for v in volumes if v.labels is not None]
    if labels:
        figures.save_figure(montage(labels, titles, domain, inside, True, f"labels, {unit}"), out / "labels.png")
        by_label = {k: [v.volumes_ml()[k] for v in volumes] for k in atlas.labels[1:]}
        named = {atlas.state["labels"].get(str(k), str(k)): v for k, v in by_label.items()}
        rows = [",".join([unit, *named])]
        rows += [",".join(f"{x:.6g}" for x in (age, *(v[i] for v in named.values()))) for i, age in enumerate(ages)]
        io.write_text(out / "volumes.csv", "\n".join(rows) + "\n")
        figures.save_figure(volume_figure(ages, named, unit), out / "volumes.png")
    if len(ages) > 1:
        frames = [(v.images[atlas.modalities[0]], None) for v in volumes]
        figures.save_animation(out / "animation.gif", frames, list(ages), domain, inside, fps)


def time_names(times: Sequence[float]) -> list[str]:
    """``t24.5``: of one width, so that files sort as ages do."""
    decimals = max(len(f"{t:.4f}".rstrip("0").partition(".")[2]) for t in times)
    width = max(len(f"{t:.{decimals}f}") for t in times)
    return [f"t{t:0{width}.{decimals}f}" for t in times]
