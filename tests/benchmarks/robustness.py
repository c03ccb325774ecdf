"""How far a registration holds when the moving image is cropped, turned, resampled or inverted.

    python -m tests.benchmarks.robustness --shared ../shared --work /tmp/medinr_robustness [--preset fast] [--only popi]

Every row is a JSON line in tests/benchmarks/robustness.jsonl: one pair in one variant, registered by the real command
with its own start, from the images alone. Rows that are there are not run again.

The error of a variant is measured where the truth is: a variant changes the moving image by a known map V of its world
(a turn, or nothing), so V^-1 o phi is compared with the truth of the plain pair, at the same points in all variants.
After a crop these are the points that the crop leaves; `plain_error` is then the plain pair's at those points alone.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from medinr import io
from medinr.commands.apply import load_transform
from medinr.metrics import dice
from medinr.sampling import gaussian_smooth, nearest
from medinr.space import Domain, Image, transform_points
from medinr.start import rotation
from tests.benchmarks.tables import ROOT, known_warp, medinr

ROWS = Path(__file__).parent / "robustness.jsonl"
Row = dict[str, Any]
Warp = Callable[[Tensor], Tensor]
CROP = 0.3
DEGREES = 30.0
COARSER = (1.6, 1.6, 1.0)
"""Voxel sizes of the resampled moving image, in units of its own: coarser and anisotropic."""
MULTIMODAL = "multimodal"
"""The similarity that the inverted contrast is registered with."""
VARIANTS = ("plain", "crop", "turn", "turn_header", "voxels", "inverted")


# -- variants of the moving image ------------------------------------------------------------------------------------


def cropped(image: Image, axis: int) -> Image:
    """Without the first 30 % of the slices along an array axis."""
    first = round(CROP * image.domain.shape[axis])
    affine = image.domain.voxel_to_world.clone()
    affine[:3, 3] += first * affine[:3, axis]
    data = image.data.narrow(axis + 1, first, image.domain.shape[axis] - first).contiguous()
    return Image(data, Domain.of(data.shape[1:], affine))


def turn(image: Image, axis: tuple[float, float, float]) -> Tensor:
    """Rotation by 30 degrees about a world axis through the middle of the image [4, 4]."""
    direction = torch.tensor(axis).double()
    matrix = torch.eye(4).double()
    matrix[:3, :3] = rotation(direction / direction.norm() * np.deg2rad(DEGREES))
    centre = image.domain.normalised_to_world[:3, 3]
    matrix[:3, 3] = centre - matrix[:3, :3] @ centre
    return matrix


def resampled(image: Image, domain: Domain, back: Tensor, order: int = 3) -> Image:
    """The image at ``back`` of the voxel centres of ``domain``; its smallest value where it has none."""
    voxels = transform_points(image.domain.world_to_voxel @ back @ domain.voxel_to_world, domain.voxels().double())
    values = ndimage.map_coordinates(
        image.data[0].numpy(), voxels.T.numpy(), order=order, mode="constant", cval=float(image.data.min())
    )
    low, high = float(image.data.min()), float(image.data.max())
    return Image(torch.tensor(values).float().clamp(low, high).reshape(1, *domain.shape), domain)


def coarser(image: Image) -> Image:
    """On larger voxels, smoothed as a scanner would before."""
    shape = [max(1, round(n / c)) for n, c in zip(image.domain.shape, COARSER, strict=True)]
    factor = torch.tensor([n / m for n, m in zip(image.domain.shape, shape, strict=True)]).double()
    affine = image.domain.voxel_to_world.clone()
    affine[:3, 3] += affine[:3, :3] @ ((factor - 1) / 2)  # outer edges stay where they are
    affine[:3, :3] *= factor
    sigma = [0.4 * c if c > 1 else 0.0 for c in COARSER]
    smooth = torch.tensor(ndimage.gaussian_filter(image.data[0].numpy(), sigma))[None]
    return resampled(Image(smooth, image.domain), Domain.of(shape, affine), torch.eye(4).double(), order=1)


def inverted(image: Image) -> Image:
    """Bright for dark, within the 0.5th and 99.5th percentile."""
    low, high = np.percentile(image.data.numpy(), (0.5, 99.5))
    return Image(low + high - image.data.clamp(float(low), float(high)), image.domain)


def variants(image: Image, crop_axis: int, turn_axis: tuple[float, float, float]) -> dict[str, tuple[Image, Tensor]]:
    """By name: the changed moving image, and V from the plain moving world to its own."""
    identity, matrix = torch.eye(4).double(), turn(image, turn_axis)
    domain = image.domain
    return {
        "plain": (image, identity),
        "crop": (cropped(image, crop_axis), identity),
        "turn": (resampled(image, domain, torch.linalg.inv(matrix)), matrix),
        "turn_header": (Image(image.data, Domain.of(domain.shape, matrix @ domain.voxel_to_world)), matrix),
        "voxels": (coarser(image), identity),
        "inverted": (inverted(image), identity),
    }


# -- pairs and their errors -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """A pair with the means to judge a map of its fixed onto its moving world.

    Attributes:
        points: where in the fixed world the error is taken [n, 3].
        error: of a map, at those of the points that are marked [n]: mm, or 1 - Dice.
    """

    fixed: Image
    moving: Image
    points: Tensor
    error: Callable[[Warp, Tensor], float]
    crop_axis: int
    turn_axis: tuple[float, float, float]


def popi_warp(shared: Path, work: Path) -> Truth:
    """POPI T10 seen through a known map of at most 15 mm; mean TRE in mm of 1,000 lung points."""
    folder, phi = known_warp(shared, work, 0)
    fixed, moving = (io.read_image(folder / f"{name}.nii.gz") for name in ("fixed", "moving"))
    points = io.read_points(folder / "fixed.csv", "ras", fixed.domain).double()
    truth = torch.tensor(phi(points.numpy()))

    def error(warp: Warp, marked: Tensor) -> float:
        return (warp(points) - truth)[marked].norm(dim=1).mean().item()

    return Truth(fixed, moving, points, error, crop_axis=2, turn_axis=(0.0, 0.0, 1.0))


def mouse(shared: Path, index: int) -> Truth:
    """Mouse brain ``index`` onto the next; 1 - mean Dice of the structures."""
    root = shared / "data" / "mouse_fvb"
    names = sorted(f.name for f in (root / "template").glob("*.nii.gz"))
    pair = [names[index % len(names)], names[(index - 1) % len(names)]]
    images, labels = [], []
    for name in pair:
        image = io.read_image(root / "template" / name)
        images.append(Image(image.data * io.read_mask(root / "mask" / name, image.domain), image.domain))
        labels.append(io.read_labels(root / "label" / name, image.domain))
    fixed, moving = images
    near = gaussian_smooth((labels[0] > 0)[None].float(), 0.6, fixed.domain.spacing)[0] > 0.01
    points = transform_points(fixed.domain.voxel_to_world, near.nonzero().double())
    truth = labels[0][near]

    def error(warp: Warp, marked: Tensor) -> float:
        found = nearest(labels[1], transform_points(moving.domain.world_to_voxel, warp(points[marked])))
        scores = dice(found, truth[marked])
        return 1 - float(np.mean(list(scores.values())))

    return Truth(fixed, moving, points, error, crop_axis=1, turn_axis=(1.0, 1.0, 1.0))


# -- rows -------------------------------------------------------------------------------------------------------------


def inside(domain: Domain, world: Tensor) -> Tensor:
    """Which of the points lie in a grid."""
    return domain.contains_voxels(transform_points(domain.world_to_voxel, world))


def measure(truth: Truth, name: str, folder: Path, preset: str, seed: int) -> Row:
    """Register one variant by the command, or read the result that is there, and compare it with the plain one."""
    image, change = variants(truth.moving, truth.crop_axis, truth.turn_axis)[name]
    out = folder / f"{name}_{preset}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in ((folder / "fixed.nii.gz", truth.fixed), (folder / f"{name}.nii.gz", image)):
        io.write_image(file, data.data[0], data.domain)
    options: list[str | Path] = ["--out", out, "--preset", preset, "--seed", str(seed)]
    options += ["--similarity", MULTIMODAL] if name == "inverted" else []
    command, seconds = medinr("register", folder / "fixed.nii.gz", folder / f"{name}.nii.gz", *options)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))

    back = torch.linalg.inv(change)
    plain = load_transform(folder / f"plain_{preset}_{seed}" / "transform.ckpt")
    transform = load_transform(out / "transform.ckpt")
    marked = torch.ones(len(truth.points), dtype=torch.bool)
    if name == "crop":
        marked = inside(image.domain, plain(truth.points))
    error = truth.error(lambda p: transform_points(back, transform(p)), marked)
    reference = truth.error(plain, marked)
    return {
        "error": error,
        "ratio": error / reference,
        "plain_error": reference,
        "initial_error": truth.error(lambda p: transform_points(back, p), marked),
        "start_error": truth.error(lambda p: transform_points(back @ transform.start, p), marked),
        "points": int(marked.sum()),
        "folding/percent": metrics["folding/percent"],
        "seconds": seconds,
        "seconds/start": metrics["seconds/start"],
        "command": command,
    }


def plan(shared: Path, work: Path, preset: str, seed: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    """All rows in order, the plain pair before its variants: name and how to measure it."""
    pairs: dict[str, Callable[[], Truth]] = {"popi_warp": lambda: popi_warp(shared, work)}
    pairs |= {f"mouse_{i}": lambda i=i: mouse(shared, i) for i in (1, 2)}  # type: ignore[misc]
    for pair, make in pairs.items():
        for name in VARIANTS:
            yield (
                f"{pair} {name} {preset} seed {seed}",
                lambda p=pair, m=make, n=name: measure(m(), n, work / p, preset, seed),  # type: ignore[misc]
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("MEDINR_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="beginnings of row names, comma-separated")
    parser.add_argument("--rows", type=Path, default=ROWS)
    given = parser.parse_args()
    shared, work = given.shared.resolve(), given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    done = (
        {json.loads(line)["row"] for line in given.rows.read_text(encoding="utf-8").splitlines()}
        if given.rows.exists()
        else set()
    )
    wanted = tuple(given.only.split(","))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    for name, measure_row in plan(shared, work, given.preset, given.seed):
        if name in done or not name.startswith(wanted):
            continue
        begin = time.perf_counter()
        row = {"row": name, **measure_row(), "commit": commit.stdout.strip(), "machine": machine}
        row["load"] = round(os.getloadavg()[0], 2)
        row["command"] = row["command"].replace(str(work), "WORK").replace(str(shared), "SHARED")
        row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        with given.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = {k: row[k] for k in ("error", "ratio", "initial_error", "start_error", "seconds")}
        print(name, shown, f"{time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
