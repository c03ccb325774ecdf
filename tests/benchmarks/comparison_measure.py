"""One evaluator for all tools: what a written displacement is worth on a pair's folder.

python -m tests.benchmarks.comparison_measure WORK/pairs/NAME displacement.nii.gz
"""

import json
import math
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from medinr import io
from medinr.metrics.jacobian import finite_difference_jacobian, folding_percent
from medinr.metrics.overlap import dice, hd95
from medinr.space import Domain, transform_points

WINDOW_HU = (-1000.0, 200.0)
LARGE_TRE_MM = 5.0
Found = dict[str, float]


def measure(folder: Path, displacement: torch.Tensor, domain: Domain) -> Found:
    """Errors, folding and size of a displacement, RAS mm [X, Y, Z, 3], on the fixed grid.

    Folding is that of the written field by central differences: inside the region of the landmarks or labels, and on
    the whole grid. A displacement at a landmark is read trilinearly.
    """
    fixed = io.read_image(folder / "fixed.nii.gz")
    if not domain.same_grid(fixed.domain, tolerance_mm=1e-2):
        raise ValueError(f"{folder.name}: the displacement is not on the fixed grid")
    region = io.read_mask(folder / "region.nii.gz", fixed.domain)
    det = finite_difference_jacobian(displacement.double(), fixed.domain)
    length = displacement.norm(dim=-1)
    found: Found = {
        "folding_percent": folding_percent(det, region),
        "folding_grid_percent": folding_percent(det),
        "det_min": det[region].min().item(),
        "displacement_max_mm": length.max().item(),
        "displacement_mean_mm": length[region].mean().item(),
    }
    if (folder / "fixed.csv").exists():
        found |= _landmarks(folder, displacement, fixed.domain)
    elif (folder / "fixed_labels.nii.gz").exists():
        found |= _labels(folder, displacement, fixed.domain)
    else:
        found |= _intensities(folder, displacement, fixed.domain, region.numpy())
    return found


def failure(found: Found) -> str:
    """Why the registration counts as failed; empty where it does not."""
    if "tre_mean" in found:
        if found["tre_mean"] > LARGE_TRE_MM:
            return f"TRE above {LARGE_TRE_MM:g} mm"
        return "no better than the start" if found["tre_mean"] >= found["tre_initial"] else ""
    if "dice" in found:
        return "no better than the start" if found["dice"] <= found["dice_initial"] else ""
    return "no better than the start" if found["rms"] >= found["rms_initial"] else ""


def _landmarks(folder: Path, displacement: torch.Tensor, domain: Domain) -> Found:
    fixed, moving = (io.read_points(folder / f"{n}.csv") for n in ("fixed", "moving"))
    at = transform_points(domain.world_to_voxel, fixed).numpy().T
    moved = [
        ndimage.map_coordinates(c, at, order=1, mode="nearest")
        for c in np.moveaxis(displacement.double().numpy(), -1, 0)
    ]
    error = (fixed + torch.tensor(np.stack(moved, -1)) - moving).norm(dim=1)
    start = (fixed - moving).norm(dim=1)
    return {
        "tre_initial": start.mean().item(),
        "tre_mean": error.mean().item(),
        "tre_median": error.median().item(),
        "tre_p95": torch.quantile(error, 0.95).item(),
        "tre_max": error.max().item(),
    }


def _labels(folder: Path, displacement: torch.Tensor, domain: Domain) -> Found:
    """The moving labels, from their own grid, by nearest neighbour through affine o (p + u(p)) in one step."""
    fixed = torch.tensor(np.asarray(nib.load(folder / "fixed_labels.nii.gz").dataobj).astype(np.int64))  # type: ignore[attr-defined]
    image = nib.load(folder / "moving_labels.nii.gz")  # type: ignore[attr-defined]
    moving = np.asarray(image.dataobj).astype(np.int16)
    to_moving = torch.tensor(np.linalg.inv(image.affine) @ np.loadtxt(folder / "affine.txt"))
    points = transform_points(domain.voxel_to_world, domain.voxels().double())
    judged = torch.ones(domain.shape, dtype=torch.bool)
    if (folder / "judged.nii.gz").exists():
        judged = io.read_mask(folder / "judged.nii.gz", domain)
    fixed = fixed * judged
    found: Found = {}
    for name, u in (("_initial", torch.zeros_like(displacement)), ("", displacement)):
        at = transform_points(to_moving, points + u.reshape(-1, 3).double()).numpy()
        carried = ndimage.map_coordinates(moving, at.T, order=0, cval=0).reshape(domain.shape)
        warped = torch.tensor(carried.astype(np.int64)) * judged
        names = [k for k in fixed.unique().tolist() if k]
        overlap = dice(warped, fixed, names)
        distance = [v for v in hd95(warped, fixed, domain, names).values() if not math.isnan(v)]
        found |= {
            f"dice{name}": float(np.mean([overlap[k] for k in names])),
            f"dice_worst{name}": min(overlap.values()),
            f"hd95_mm{name}": float(np.mean(distance)),
            f"labels{name}": float(len(distance)),
        }
    return found


def _intensities(folder: Path, displacement: torch.Tensor, domain: Domain, region: NDArray[np.bool_]) -> Found:
    """RMS difference in HU inside the region, both images clipped to the window."""
    fixed, moving = (io.read_image(folder / f"{n}.nii.gz") for n in ("fixed", "moving"))
    points = transform_points(domain.voxel_to_world, domain.voxels().double()) + displacement.reshape(-1, 3).double()
    at = transform_points(moving.domain.world_to_voxel, points).numpy()
    warped = ndimage.map_coordinates(moving.data[0].double().numpy(), at.T, order=1, mode="nearest").reshape(
        domain.shape
    )
    target, start = (i.data[0].double().numpy().clip(*WINDOW_HU) for i in (fixed, moving))
    inside = region

    def rms(values: NDArray[np.float64]) -> float:
        return float(np.sqrt(np.mean((values - target)[inside] ** 2)))

    return {"rms_initial": rms(start), "rms": rms(warped.clip(*WINDOW_HU))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    values = measure(Path(sys.argv[1]), *io.read_displacement(sys.argv[2]))
    print(json.dumps({**{k: round(v, 5) for k, v in values.items()}, "failure": failure(values)}, indent=1))
