"""``medinr adapt checkpoint``: fit a fitted atlas to one new subject: segmentation, reconstruction, age, latents."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medinr import figures, io
from medinr.adaptation import Adapted, adapt_scan
from medinr.atlas_volumes import AtlasVolume, render
from medinr.commands import command_parser
from medinr.commands.atlas import atlas_of, condition_values, named_values
from medinr.commands.checks import check_inputs_stay, check_writable
from medinr.data.cohort import Scan
from medinr.data.encoded import told
from medinr.data.scan_points import brain
from medinr.errors import UserError
from medinr.fields.warp import resample, resample_labels
from medinr.figures.atlas import montage
from medinr.io.images import save_nifti
from medinr.latent_statistics import features, nearest, ridge_predict
from medinr.methods import ConditionalAtlas
from medinr.metrics.intensity import psnr, ssim
from medinr.metrics.overlap import dice
from medinr.precision import full

EXAMPLE = "medinr adapt runs/cinema_dhcp/last.ckpt --image T2w=sub-1_T2w.nii.gz --mask sub-1_mask.nii.gz --out adapted"


def adapt(
    checkpoint: str | Path,
    images: Mapping[str, Any],
    out: str | Path,
    mask: Any = None,
    labels: Any = None,
    conditions: Mapping[str, str | float] | None = None,
    steps: int = 300,
    points: int = 4096,
    restarts: int = 3,
    add: bool = False,
    name: str = "new",
    seed: int = 0,
) -> list[Path]:
    """Fit the atlas to one new scan, by its intensities alone.

    Written are ``<modality>.nii.gz`` (the reconstruction, in the scan's intensities, of all modalities of the atlas),
    ``labels.nii.gz``, ``probabilities.nii.gz``, all on the grid of the first image; ``latent.npz`` (code, pose,
    conditions), ``adapted.png``, and ``adapted.json``: fitted conditions with their standard deviation over the
    restarts, the age that ridge regression on the latents gives, the nearest scans of the atlas, and how well it fits.

    Args:
        checkpoint: of a `ConditionalAtlas`.
        images: by modality, one or more of the atlas's.
        out: a folder of its own.
        mask: the brain; needed where the image shows more than that.
        labels: of the scan: never looked at in the fit, Dice is reported.
        conditions: explicit conditions that are known; the others are estimated.
        steps, points, restarts, seed: of the fit (`medinr.adaptation.adapt_scan`).
        add: also write ``atlas.ckpt``, the atlas with this scan as one of its own.
        name: of the scan in it.

    Raises:
        UserError: a modality that the atlas does not know; a file that cannot be used.
    """
    check_writable(out)
    check_inputs_stay(out, (*images.values(), mask, labels), " ".join([*images, "labels", "probabilities"]))
    if steps < 10 or points < 1 or restarts < 1:
        raise UserError(f"adapt: expected 10 steps or more, points and restarts, found {steps}, {points}, {restarts}")
    method = atlas_of(checkpoint)
    if not images or (unknown := sorted(set(images) - set(method.modalities))):
        found = f"found {unknown[0]}" if images else "found none"
        raise UserError(f"--image: expected MODALITY=FILE of {', '.join(method.modalities)}, {found}")
    values = condition_values(method, conditions or {})
    scan = read_scan(name, images, mask, labels)
    if add and name in method.names:
        raise UserError(f"--name {name}: the atlas has a scan of this name already; give another")
    with full("cpu"):
        found_one = adapt_scan(method, scan, values, steps=steps, points=points, restarts=restarts, seed=seed)
        volume = render(method, found_one.latent, scan.domain)
        with io.staged_folder(out) as staged:
            _write(staged, method, scan, found_one, volume)
            if add:
                method.add(name, found_one.latent, values)
                method.save(staged / "atlas.ckpt")
            stale = io.replace_listing(Path(out), staged)
            files = sorted(f.relative_to(staged) for f in staged.rglob("*") if f.is_file())
    for file in stale:
        file.unlink(missing_ok=True)
    return [Path(out) / file for file in files]


def read_scan(name: str, images: Mapping[str, Any], mask: Any, labels: Any) -> Scan:
    """Files as a `Scan` on the grid of the first image."""
    volumes = {modality: io.as_image(source) for modality, source in images.items()}
    domain = next(iter(volumes.values())).domain
    data = {
        modality: v.data[0] if v.domain.same_grid(domain) else resample(v, domain)[0] for modality, v in volumes.items()
    }
    inside = None if mask is None else io.read_mask(mask, domain)
    told_labels = None
    if labels is not None:
        grid = io.read_domain(labels)
        told_labels = resample_labels(io.read_labels(labels, grid), grid, domain)
    scan = Scan(name, name, domain, data, told_labels, inside)
    if not bool(brain(scan).any()):
        raise UserError(f"{name}: expected a brain, found an empty mask; check --mask")
    return scan


def _write(out: Path, method: ConditionalAtlas, scan: Scan, found: Adapted, volume: AtlasVolume) -> None:
    sampler = method.sampler(scan)
    inside = brain(scan)
    summary: dict[str, Any] = {
        "name": scan.name,
        "conditions": {k: _plain_value(method, k, v) for k, v in found.conditions.items()},
        "spread": {k: round(v, 4) for k, v in found.spread.items()},
        "held_out": found.held_out,
        "steps": found.steps,
    }
    for i, modality in enumerate(method.modalities):
        low, high = sampler.windows[i]
        image = volume.images[modality]
        io.write_image(out / f"{modality}.nii.gz", image * (high - low) + low, scan.domain)
        if modality in scan.images:
            truth = sampler.volume[i]
            summary[f"psnr/{modality}"] = psnr(image, truth, 1.0, inside)
            summary[f"ssim/{modality}"] = ssim(image, truth, 1.0, inside)
    if volume.labels is not None and volume.probabilities is not None:
        io.write_image(out / "labels.nii.gz", volume.labels, scan.domain)
        stored = (volume.probabilities.float() * 255).round().to(torch.uint8).numpy()
        save_nifti(out / "probabilities.nii.gz", stored, scan.domain, slope=1 / 255)
        names = method.state["labels"]
        summary["volumes_ml"] = {names.get(str(k), str(k)): round(v, 3) for k, v in volume.volumes_ml().items()}
        if scan.labels is not None:
            scores = dice(volume.labels.int(), scan.labels.int().clamp(min=0), method.labels[1:])
            summary["dice"] = {names.get(str(k), str(k)): round(v, 4) for k, v in scores.items()}
            summary["dice/mean"] = sum(scores.values()) / max(1, len(scores))
    summary |= from_latents(method, found)
    np.savez(out / "latent.npz", **{k: v.numpy() for k, v in vars(found.latent).items()})
    io.write_text(out / "adapted.json", json.dumps(summary, indent=2) + "\n")
    first = next(iter(scan.images))
    shown = [sampler.volume[method.modalities.index(first)], volume.images[first]]
    title = f"{scan.name}: {first} and its reconstruction; {told(method.told, found.conditions)}"
    figures.save_figure(
        montage(shown, ["scan", "reconstruction"], scan.domain, inside, title=title), out / "adapted.png"
    )
    if volume.labels is not None:
        both = [volume.labels] if scan.labels is None else [volume.labels, scan.labels.to(volume.labels)]
        names_of = ["labels", "given labels"][: len(both)]
        figures.save_figure(montage(both, names_of, scan.domain, inside, True, scan.name), out / "labels.png")


def from_latents(method: ConditionalAtlas, found: Adapted) -> dict[str, Any]:
    """What the latents say beside the fitted conditions: the time by ridge regression, and the nearest scans."""
    rows, own = features(method.members()), features([found.latent])
    order, distance = nearest(rows, own)
    near = [
        {"name": method.names[i], "distance": round(d, 4)}
        for i, d in zip(order[0].tolist(), distance[0].tolist(), strict=True)
    ]
    summary: dict[str, Any] = {"nearest": near}
    known = ~method.times.isnan()
    if method.time is not None and int(known.sum()) > 2:
        age = ridge_predict(rows[known], method.times[known], own)
        summary[f"{method.time.name}_from_latents"] = round(float(age[0]), 4)
    return summary


def _plain_value(method: ConditionalAtlas, name: str, value: float) -> float | str:
    condition = next(c for c in method.told if c.name == name)
    return condition.text(value) if condition.kind == "categorical" and not math.isnan(value) else round(value, 4)


def main(args: list[str]) -> int:
    """Parse the command line, fit, and name the folder."""
    parser = command_parser(
        "adapt",
        "Fit a fitted atlas to one new subject, by its intensities alone: segmentation, reconstruction,\nestimated age "
        "and conditions with their spread, latents.",
        EXAMPLE,
    )
    parser.add_argument("checkpoint", type=str, help="of ConditionalAtlas (last.ckpt of a run)")
    parser.add_argument(
        "--image", type=str, nargs="+", required=True, help="MODALITY=FILE ..., as T2w=sub-1_T2w.nii.gz"
    )
    parser.add_argument("--out", type=str, required=True, help="folder for the results, of their own")
    parser.add_argument("--mask", type=str | None, default=None, help="the brain (default: where the images are not 0)")
    parser.add_argument("--labels", type=str | None, default=None, help="of the scan, for Dice; never used in the fit")
    parser.add_argument(
        "--condition", type=str, nargs="+", default=[], help="NAME=VALUE ...: what is known; the rest is estimated"
    )
    parser.add_argument("--steps", type=int, default=300, help="at most, of each fit")
    parser.add_argument("--points", type=int, default=4096, help="random points a step")
    parser.add_argument("--restarts", type=int, default=3, help="fits, whose spread is reported")
    parser.add_argument(
        "--add", action="store_true", help="also write atlas.ckpt, which has this scan as one of its own"
    )
    parser.add_argument("--name", type=str, default="new", help="of the scan")
    parser.add_argument("--seed", type=int, default=0, help="of the points")
    options = parser.parse_args(args).as_dict()
    options["images"] = named_values(options.pop("image"), "--image", "T2w=FILE")
    options["conditions"] = named_values(options.pop("condition"))
    files = adapt(**options)
    print(f"wrote {len(files)} files to {options['out']}; look at adapted.png and adapted.json first")
    return 0
