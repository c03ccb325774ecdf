"""The pairs of the comparison of tools, as plain folders that any program can read.

    python tests/benchmarks/pairs.py --shared ../shared --work WORK [--pairs mouse_1,popi]

Writes WORK/pairs/NAME/ with

    fixed.nii.gz, moving.nii.gz    the images that every tool gets
    region.nii.gz                  lungs or labelled brain of the fixed image: where folding is counted
    fixed.csv, moving.csv          landmarks, RAS mm                                     (warps and phantom)
    fixed_labels.nii.gz, moving_labels.nii.gz, affine.txt                                (mouse, adult and fetal)
    judged.nii.gz                  where labels are compared; without it, everywhere                     (adult)
    pair.json                      where it comes from, its split, what was checked

Brains: ``moving.nii.gz`` has been resampled once through ``affine.txt`` (4 x 4, RAS mm, fixed to moving); the labels of
the moving brain are on its own grid and are carried through the affine and the displacement in one step. Everything is
fixed by the seeds below; a folder that is complete is left alone.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from data_modules.dirlab import DIRLab
from medinr import io
from medinr.data.lungs import lung_mask
from medinr.space import Domain, Image, transform_points
from tests.benchmarks import pairs_warps

Floats = NDArray[np.float64]
ROOT = Path(__file__).resolve().parents[2]
PHANTOM_SIZE = 96
"""Voxels in plane of the phantom, as in `make demo`: a fifth to a quarter of the real number of voxels."""
NOISE_HU = 20.0
N_POINTS = 1000

MICE = [f"mouse_{i}" for i in range(1, 9)]
WARPS = [f"{kind}_{size}" for kind in pairs_warps.KINDS for size in (10, 20)]
PHANTOMS = [f"phantom_{i}" for i in range(1, 6)]
ADULTS = {"adult_1": (34, 36), "adult_2": (36, 39), "adult_3": (39, 34), "adult_4": (32, 38)}
"""Scans of two persons each, moving onto fixed; the first three persons are those that no learned method has seen."""
FETUSES = {"fetal_1": (23, 26), "fetal_2": (27, 24), "fetal_3": (25, 30), "fetal_4": (30, 27), "fetal_5": (24, 29)}
"""Weeks of pregnancy, moving onto fixed."""
NAMES = [*WARPS, "sliding_14", "popi", *MICE, *PHANTOMS, *ADULTS, *FETUSES]
TUNING = (
    *("mouse_1", "mouse_2", "mouse_3", "phantom_1", "phantom_2", "bspline_10", "sliding_14"),
    *("adult_4", "fetal_4", "fetal_5"),
)
"""Settings are chosen on these; all other pairs are test pairs."""


def split_of(name: str) -> str:
    return "tuning" if name in TUNING else "test"


def mouse(name: str, shared: Path, folder: Path) -> dict[str, Any]:
    """Brain i (moving) onto brain i + 1 (fixed, cyclic), by name; both without skull, on one intensity scale.

    ``mouse_3_7`` is brain 3 onto brain 7.
    """
    root = shared / "data" / "mouse_fvb"
    files = sorted(f.name for f in (root / "template").glob("*.nii.gz"))
    i, *other = (int(n) - 1 for n in name.split("_")[1:])
    names = files[other[0] if other else (i + 1) % len(files)], files[i]
    fixed, moving = (_brain(root / "template" / n, root / "mask" / n) for n in names)
    labels = [_labels_of(root / "label" / n) for n in names]
    return {"fixed": names[0], "moving": names[1]} | _write_brains(folder, fixed, moving, labels)


def adult(name: str, shared: Path, folder: Path) -> dict[str, Any]:
    """Slabs of 18 slices of two persons, skulls and all.

    Only 10 slices are labelled. Labels are compared in the fixed image's inner 6 of them, so that no label is missing
    where a displacement of up to two slices leads.
    """
    moving, fixed = (shared / "data" / "adult_t1_slabs" / f"sub-{n:02d}" for n in ADULTS[name])
    images = [io.read_image(Path(f"{f}_T1w.nii.gz")) for f in (fixed, moving)]
    labels = [_labels_of(Path(f"{f}_dseg.nii.gz")) for f in (fixed, moving)]
    found = _write_brains(folder, images[0], images[1], labels)
    slices = np.flatnonzero((labels[0] > 0).any((0, 2)))[2:-2]
    judged = np.zeros(labels[0].shape, bool)
    judged[:, slices] = True
    io.write_image(folder / "judged.nii.gz", judged, images[0].domain)
    return {"fixed": fixed.name, "moving": moving.name, "judged_slices": slices.tolist()} | found


def fetal(name: str, shared: Path, folder: Path) -> dict[str, Any]:
    """Two weeks of the CRL templates, brains extracted; labels are the regions of cortex and white matter."""
    root = shared / "data" / "fetal_crl"
    moving, fixed = (f"STA{week}" for week in FETUSES[name])
    images = [_brain(root / f"{n}.nii.gz", root / f"{n}_mask.nii.gz") for n in (fixed, moving)]
    labels = [_labels_of(root / f"{n}_WMZparc.nii.gz") for n in (fixed, moving)]
    return {"fixed": fixed, "moving": moving} | _write_brains(folder, images[0], images[1], labels)


def _write_brains(folder: Path, fixed: Image, moving: Image, labels: list[NDArray[np.int16]]) -> dict[str, Any]:
    """The files of a pair with labels, the moving image through the common affine start."""
    affine = affine_start(fixed, moving)
    grid = transform_points(fixed.domain.voxel_to_world, fixed.domain.voxels().double()).numpy()
    target = to_voxels(moving.domain, transform_points(torch.tensor(affine), torch.tensor(grid)).numpy())
    resampled = sample(moving.data[0].numpy(), target, outside=0.0).reshape(fixed.domain.shape)
    io.write_image(folder / "fixed.nii.gz", fixed.data[0], fixed.domain)
    io.write_image(folder / "moving.nii.gz", resampled.astype(np.float32), fixed.domain)
    io.write_image(folder / "fixed_labels.nii.gz", labels[0], fixed.domain)
    io.write_image(folder / "moving_labels.nii.gz", labels[1], moving.domain)
    io.write_image(folder / "region.nii.gz", labels[0] > 0, fixed.domain)
    np.savetxt(folder / "affine.txt", affine, fmt="%.9f")
    carried = ndimage.map_coordinates(labels[1], target.T, order=0, cval=0).reshape(fixed.domain.shape)
    both = np.intersect1d(*labels)[1:]
    before = np.mean([_dice(labels[1] == k, labels[0] == k) for k in both])
    after = np.mean([_dice(carried == k, labels[0] == k) for k in both])
    return {
        "intensities": "99th percentile inside the mask is 1000",
        "affine": "SimpleITK, correlation, centres of mass, 4-2-1 pyramid",
        "dice_header": float(before),
        "dice_affine": float(after),
    }


def affine_start(fixed: Image, moving: Image) -> Floats:
    """The affine map, fixed to moving, RAS mm [4, 4]: correlation of all voxels of a pyramid, on one thread.

    One for all tools, by a program that is none of those compared.
    """
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    images = [_to_sitk(sitk, i) for i in (fixed, moving)]
    start = sitk.CenteredTransformInitializer(
        *images, sitk.AffineTransform(3), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(0.25, 1)  # by default the samples are jittered by the clock
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-4, 200)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([2.0, 1.0, 0.0])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    method.SetInitialTransform(start, inPlace=False)
    found = method.Execute(*images)
    corners = np.vstack((np.zeros(3), np.eye(3)))
    mapped = np.array([found.TransformPoint(tuple(c)) for c in corners])
    lps = np.eye(4)
    lps[:3, :3] = (mapped[1:] - mapped[0]).T
    lps[:3, 3] = mapped[0]
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    return np.asarray(flip @ lps @ flip)


def popi(name: str, shared: Path, folder: Path) -> dict[str, Any]:
    """T60 (end-exhale, moving) onto T10 (end-inhale, fixed); no landmarks."""
    fixed, moving = (io.read_image(shared / "data" / "popi_4dct" / f"popi_T{p}.nii.gz") for p in (10, 60))
    io.write_image(folder / "fixed.nii.gz", fixed.data[0], fixed.domain)
    io.write_image(folder / "moving.nii.gz", moving.data[0], moving.domain)
    io.write_image(folder / "region.nii.gz", lung_mask(fixed), fixed.domain)
    return {"fixed": "popi_T10", "moving": "popi_T60"}


def warp(name: str, shared: Path, folder: Path) -> dict[str, Any]:
    """T10 (moving) seen through a known phi, with noise of its own (fixed); 1000 points in the lungs."""
    kind, size = name.split("_")
    moving = io.read_image(shared / "data" / "popi_4dct" / "popi_T10.nii.gz")
    domain = moving.domain
    lungs = lung_mask(moving).numpy()
    grid = transform_points(domain.voxel_to_world, domain.voxels().double()).numpy()
    field = pairs_warps.make(kind, float(size), domain, lungs)
    through = to_voxels(domain, field.phi(grid))
    rng = np.random.default_rng([7, pairs_warps.KINDS.index(kind), int(size)])
    values = sample(moving.data[0].numpy(), through) + rng.normal(0, NOISE_HU, len(grid))
    inside = field.inside(grid)
    # A voxel's place and a shift within it; drawn again where the shift leaves the lungs.
    voxels = grid[inside]
    points = np.empty((0, 3))
    half = np.array(domain.spacing) / 2
    while len(points) < N_POINTS:
        drawn = voxels[rng.choice(len(voxels), N_POINTS)] + rng.uniform(-half, half, (N_POINTS, 3))
        points = np.vstack((points, drawn[field.inside(drawn)]))[:N_POINTS]
    io.write_image(folder / "fixed.nii.gz", values.reshape(domain.shape).astype(np.float32), domain)
    io.write_image(folder / "moving.nii.gz", moving.data[0], domain)
    io.write_image(folder / "region.nii.gz", inside.reshape(domain.shape), domain)
    io.write_points(folder / "fixed.csv", torch.tensor(points))
    io.write_points(folder / "moving.csv", torch.tensor(field.phi(points)))
    motion = np.linalg.norm(field.phi(points) - points, axis=1)
    return {"moving": "popi_T10", "noise_hu": NOISE_HU, **field.checked, "points_mean_mm": float(motion.mean())}


def phantom(name: str, shared: Path, folder: Path) -> dict[str, Any]:
    """T50 onto T00 of a generated thorax in DIR-Lab's layout, at the reduced size; 300 landmarks."""
    root = folder.parents[1] / "phantom"
    case = int(name.split("_")[1])
    if not (root / "truth" / "case5").exists():
        options = ["--cases", "1-5", "--size", str(PHANTOM_SIZE), "--phases", "extremes"]
        subprocess.run([sys.executable, "-m", "medinr.cli", "phantom", "dirlab", "--out", root, *options], check=True)
    pair = DIRLab(root=str(root), case=case, masks="none").pair
    assert pair.fixed_points is not None and pair.moving_points is not None
    io.write_image(folder / "fixed.nii.gz", pair.fixed.data[0], pair.fixed.domain)
    io.write_image(folder / "moving.nii.gz", pair.moving.data[0], pair.moving.domain)
    io.write_image(folder / "region.nii.gz", lung_mask(pair.fixed), pair.fixed.domain)
    io.write_points(folder / "fixed.csv", pair.fixed_points)
    io.write_points(folder / "moving.csv", pair.moving_points)
    motion = (pair.fixed_points - pair.moving_points).norm(dim=1)
    return {"case": case, "size": PHANTOM_SIZE, "points_mean_mm": float(motion.mean())}


def to_voxels(domain: Domain, points: Floats) -> Floats:
    """World points [n, 3] as voxel coordinates."""
    return np.asarray(transform_points(domain.world_to_voxel, torch.tensor(points)).numpy())


def sample(volume: NDArray[Any], voxels: Floats, outside: float | None = None) -> Floats:
    """Trilinear values [n]; beyond the grid the nearest voxel's, or ``outside``."""
    how: dict[str, Any] = {"mode": "nearest"} if outside is None else {"mode": "constant", "cval": outside}
    return np.asarray(ndimage.map_coordinates(volume.astype(np.float64), voxels.T, order=1, **how))


def _brain(path: Path, path_of_mask: Path) -> Image:
    image = io.read_image(path)
    mask = io.read_mask(path_of_mask, image.domain)
    # The scanner's gain differs by up to 1.7 between these scans: no tool is to fail for that alone.
    full = np.percentile(image.data[0][mask].numpy(), 99)
    return Image(image.data * mask * (1000 / full), image.domain, path.name)


def _labels_of(path: Path) -> NDArray[np.int16]:
    return np.asarray(nib.load(path).dataobj).astype(np.int16)  # type: ignore[attr-defined]


def _dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def _to_sitk(sitk: Any, image: Image) -> Any:
    """An LPS image of the same voxels."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.domain.voxel_to_world.numpy()
    out = sitk.GetImageFromArray(np.ascontiguousarray(image.data[0].numpy().T))
    out.SetSpacing(image.domain.spacing)
    out.SetOrigin(lps[:3, 3].tolist())
    out.SetDirection((lps[:3, :3] / np.array(image.domain.spacing)).ravel().tolist())
    return out


MAKERS = {"mouse": mouse, "adult": adult, "fetal": fetal, "popi": popi, "phantom": phantom} | dict.fromkeys(
    pairs_warps.KINDS, warp
)


def make_pair(name: str, shared: Path, work: Path) -> Path:
    """The folder of a pair; made where it is not there or not complete."""
    folder = work / "pairs" / name
    if not (folder / "pair.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        family = name.split("_")[0]
        found = MAKERS[family](name, shared, folder)
        info = {"name": name, "family": family, "split": split_of(name), **found}
        io.files.write_text(folder / "pair.json", json.dumps(info, indent=2) + "\n")  # last: what is there is complete
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("MEDINR_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pairs", default=",".join(NAMES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.pairs.split(","):
        folder = make_pair(name, given.shared.resolve(), given.work.resolve())
        print((folder / "pair.json").read_text(encoding="utf-8").replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
