"""``medinr apply transform.ckpt``: images, labels and points through a saved transform, forward or inverse."""

from pathlib import Path
from typing import Any

import torch

from medinr import io
from medinr.errors import UserError
from medinr.fields import Transform
from medinr.fields.dense import evaluate_dense
from medinr.io import PointsSpace
from medinr.methods import ConditionedRegistration, load_method
from medinr.results import inverse_displacement, resample, resample_labels
from medinr.space import Domain

RESIDUAL_MM = 0.1
"""Points whose inverse leaves more than this are reported: the map is not invertible there."""


def load_transform(checkpoint: str | Path, alpha: list[float] | None = None, device: str = "cpu") -> Transform:
    """phi from a checkpoint; a conditioned one at any ``alpha`` (default: the one that its search chose)."""
    method = load_method(checkpoint, device)
    if alpha is not None:
        if not isinstance(method, ConditionedRegistration):
            raise UserError(f"--alpha: {checkpoint} is not conditioned on a regularization weight; leave --alpha out")
        method.at(alpha)
    return method.transform()


def apply(
    checkpoint: str | Path,
    out: str | Path,
    image: Any = None,
    labels: Any = None,
    points: str | None = None,
    points_space: PointsSpace = "ras",
    reference: Any = None,
    inverse: bool = False,
    alpha: list[float] | None = None,
    exact: bool = False,
    device: str = "cpu",
) -> list[Path]:
    """Carry an image, a label volume or points through a saved transform.

    The transform phi maps *fixed* to *moving* space. Forward, a volume of the moving image is resampled onto the fixed
    grid (or onto ``reference``, a grid in fixed space), and points of the *fixed* image are carried to the moving one.
    Inverse, a volume of the fixed image is resampled onto ``reference``, a grid in moving space, and points of the
    *moving* image are carried to the fixed one.

    Args:
        checkpoint: transform.ckpt, or a checkpoint of a run.
        out: folder for ``image.nii.gz``, ``labels.nii.gz`` and ``points.csv``.
        image, labels: volumes to resample, linearly and by nearest neighbour.
        points: CSV ``x,y,z``.
        points_space: frame of the CSV, in and out; ``voxel`` needs ``reference`` for the grid.
        reference: image whose grid is used.
        inverse: use phi^-1.
        alpha: regularization weight(s) of a conditioned transform, without retraining.
        exact: evaluate the network at every voxel.

    Raises:
        UserError: nothing to do, or a missing reference.
    """
    if image is None and labels is None and points is None:
        raise UserError("apply: nothing to carry; give --image, --labels or --points")
    transform = load_transform(checkpoint, alpha, device)
    out = Path(out)
    grid = io.as_image(reference).domain if reference is not None else None
    files: list[Path] = []
    if image is not None or labels is not None:
        if inverse and grid is None:
            raise UserError(
                "--reference: the inverse needs an image whose grid it is written on; give the moving image"
            )
        domain = grid or transform.domain.with_scale("isotropic")
        if inverse:
            displacement = inverse_displacement(transform, domain)
        else:
            displacement = evaluate_dense(transform, domain, exact).displacement
        if image is not None:
            source = io.as_image(image)
            io.write_image(out / "image.nii.gz", resample(source, domain, displacement)[0], domain)
            files.append(out / "image.nii.gz")
        if labels is not None:
            at: Domain = io.as_image(labels).domain
            carried = resample_labels(io.read_labels(labels, at), at, domain, displacement)
            io.write_image(out / "labels.nii.gz", carried, domain)
            files.append(out / "labels.nii.gz")
    if points is not None:
        world = io.read_points(points, points_space, grid)
        if inverse:
            moved, residual = transform.inverse(world)
            bad = int((residual > RESIDUAL_MM).sum())
            if bad:
                print(f"medinr: warning: {bad} of {len(world)} points have no inverse within {RESIDUAL_MM} mm")
        else:
            moved = transform(world)
        io.write_points(out / "points.csv", torch.as_tensor(moved), points_space, grid)
        files.append(out / "points.csv")
    return files


def main(args: list[str]) -> int:
    """Parse the command line, apply, and name the files."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="medinr apply",
        exit_on_error=False,
        description="Carry images, labels and points through a saved transform. Forward: volumes of the moving image "
        "onto the fixed grid, points of the fixed image to the moving one. --inverse: the other way round.",
        epilog="example: medinr apply result/transform.ckpt --labels moving_labels.nii.gz --out carried",
    )
    parser.add_argument("checkpoint", type=str, help="transform.ckpt of register or predict, or a run's checkpoint")
    parser.add_argument("--out", type=str, required=True, help="folder for the results")
    parser.add_argument("--image", type=str | None, help="volume to resample linearly")
    parser.add_argument("--labels", type=str | None, help="label volume to resample by nearest neighbour")
    parser.add_argument("--points", type=str | None, help="CSV x,y,z")
    parser.add_argument("--points-space", type=PointsSpace, default="ras", help="frame of the CSV, in and out")
    parser.add_argument("--reference", type=str | None, help="image whose grid is used")
    parser.add_argument("--inverse", action="store_true", help="use the inverse transform")
    parser.add_argument("--alpha", type=list[float] | None, help="weight(s) of a conditioned transform, e.g. [0.05]")
    parser.add_argument("--exact", action="store_true", help="evaluate the network at every voxel")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda or mps")
    files = apply(**parser.parse_args(args).as_dict())
    print("\n".join(f"wrote {file}" for file in files))
    return 0
