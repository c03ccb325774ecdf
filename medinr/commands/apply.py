"""``medinr apply transform``: images, labels and points through a saved transform, forward or inverse."""

import warnings
from pathlib import Path
from typing import Any, get_args

from medinr import io
from medinr.commands import command_parser
from medinr.commands.checks import APPLY_WRITES, DEVICES, check_device, check_inputs_stay, check_writable
from medinr.errors import RegistrationWarning, UserError
from medinr.fields import Transform
from medinr.fields.dense import evaluate_dense
from medinr.fields.stored import StoredTransform, is_stored
from medinr.fields.warp import resample, resample_labels
from medinr.io import PointsSpace
from medinr.io.slicer import slicer_suffix
from medinr.methods import ConditionedRegistration, RegistrationModule, load_method
from medinr.results import RESIDUAL_MM, inverse_displacement
from medinr.space import Domain
from medinr.types import Points

EXAMPLE = "medinr apply result/transform.ckpt --labels moving_labels.nii.gz --out carried"


def load_transform(
    checkpoint: str | Path,
    alpha: list[float] | None = None,
    device: str = "cpu",
    reference: Domain | None = None,
) -> Transform:
    """phi from a checkpoint, a displacement field or a transform of ITK (`StoredTransform`).

    A conditioned checkpoint is taken at any ``alpha`` (default: the one that its search chose).
    """
    if is_stored(checkpoint):
        if alpha is not None:
            raise UserError(
                f"--alpha: {checkpoint} holds one transform and no regularization weight; leave --alpha out"
            )
        return StoredTransform(checkpoint, reference)
    method = load_method(checkpoint, device)
    if not isinstance(method, RegistrationModule):
        raise UserError(
            f"{checkpoint}: expected a transform of a pair of images, found a {type(method).__name__}, which has none; "
            "give the checkpoint of a registration"
        )
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
    points: str | Path | None = None,
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
        checkpoint: transform.ckpt, a checkpoint of a run, a displacement field (5-D NIfTI, MetaImage, NRRD, Learn2Reg's
            in voxels of ``reference``), or a transform of ITK, ANTs or Slicer (.tfm, .txt, .mat, .h5). All map fixed to
            moving.
        out: folder for ``image.nii.gz``, ``labels.nii.gz`` and ``points.csv`` (or .fcsv, .mrk.json).
        image, labels: volumes to resample, linearly and by nearest neighbour.
        points: CSV ``x,y,z``, or a file of Slicer (.fcsv, .mrk.json), which says its own frame; they are written in
            the same form.
        points_space: frame of the CSV, in and out; ``voxel`` needs ``reference`` for the grid.
        reference: image whose grid is used; its voxels do not matter. A transform of ITK has no grid of its own.
        inverse: use phi^-1.
        alpha: regularization weight(s) of a conditioned transform, without retraining.
        exact: evaluate the network at every voxel.

    Raises:
        UserError: nothing to do, a missing reference, or a file that cannot be used.

    Warns:
        RegistrationWarning: points or voxels at which the transform has no inverse.
    """
    if image is None and labels is None and points is None:
        raise UserError("apply: nothing to carry; give --image, --labels or --points")
    if points is not None and points_space == "voxel" and reference is None:
        raise UserError("--points-space voxel: needs --reference, the image whose voxels are meant")
    if inverse and (image is not None or labels is not None) and reference is None:
        raise UserError("--reference: the inverse needs an image whose grid it is written on; give the moving image")
    check_writable(out)
    check_inputs_stay(out, (checkpoint, image, labels, points, reference), APPLY_WRITES)
    grid = io.read_domain(reference) if reference is not None else None
    transform = load_transform(checkpoint, alpha, check_device(device), grid)
    # Everything is read before anything is written: a mistake in the last file must not leave half of the results.
    source = None if image is None else io.as_image(image)
    labels_domain = None if labels is None else io.read_domain(labels)
    given = None if labels_domain is None else io.read_labels(labels, labels_domain)
    world = None if points is None else io.read_points(points, points_space, grid)

    displacement = domain = None
    if source is not None or given is not None:
        domain = grid or _own_grid(transform, checkpoint)
        if inverse:
            displacement = inverse_displacement(transform, domain)
        elif isinstance(transform, StoredTransform):
            displacement = transform.displacement(domain)
        else:
            displacement = evaluate_dense(transform, domain, exact).displacement
    moved = None if world is None else _moved(transform, world, inverse, str(points))

    files: list[str] = []
    with io.staged_folder(out) as staged:
        if source is not None and domain is not None:
            files.append("image.nii.gz")
            io.write_image(staged / files[-1], resample(source, domain, displacement)[0], domain)
        if given is not None and labels_domain is not None and domain is not None:
            files.append("labels.nii.gz")
            io.write_image(staged / files[-1], resample_labels(given, labels_domain, domain, displacement), domain)
        if moved is not None:
            files.append(f"points{slicer_suffix(str(points)) or '.csv'}")
            io.write_points(staged / files[-1], moved, points_space, grid)
    return [Path(out) / name for name in files]


def _moved(transform: Transform, world: Points, inverse: bool, name: str) -> Points:
    """Points through phi or its inverse; warns of those that have no inverse."""
    if not inverse:
        return transform(world)
    moved, residual = transform.inverse(world)
    bad = int((residual > RESIDUAL_MM).sum())
    if bad:
        warnings.warn(
            f"{name}: {bad} of {len(world)} points have no inverse within {RESIDUAL_MM} mm",
            RegistrationWarning,
            stacklevel=3,
        )
    return moved


def _own_grid(transform: Transform, name: str | Path) -> Domain:
    grid = transform.grid if isinstance(transform, StoredTransform) else transform.domain
    if grid is None:
        raise UserError(f"--reference: {name} has no grid of its own; give the fixed image, or any image on its grid")
    return grid.with_scale("isotropic")


def main(args: list[str]) -> int:
    """Parse the command line, apply, and name the files."""
    parser = command_parser(
        "apply",
        "Carry images, labels and points through a saved transform. Forward: volumes of the\nmoving image onto the "
        "fixed grid, points of the fixed image to the moving one.\n--inverse: the other way round.",
        EXAMPLE,
    )
    parser.add_argument("checkpoint", type=str, help="transform.ckpt, displacement field or transform of ITK")
    parser.add_argument("--out", type=str, required=True, help="folder for the results")
    parser.add_argument("--image", type=str | None, help="volume to resample linearly")
    parser.add_argument("--labels", type=str | None, help="label volume to resample by nearest neighbour")
    parser.add_argument("--points", type=str | None, help="CSV x,y,z, or .fcsv or .mrk.json of Slicer")
    parser.add_argument(
        "--points-space", choices=get_args(PointsSpace), default="ras", help="frame of the CSV, in and out"
    )
    parser.add_argument("--reference", type=str | None, help="image whose grid is used")
    parser.add_argument("--inverse", action="store_true", help="use the inverse transform")
    parser.add_argument("--alpha", type=float | list[float] | None, help="weight(s), e.g. 0.05 or [0.05,0.1]")
    parser.add_argument("--exact", action="store_true", help="evaluate the network at every voxel")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where the network runs")
    options = parser.parse_args(args).as_dict()
    if isinstance(options["alpha"], float):
        options["alpha"] = [options["alpha"]]
    files = apply(**options)
    print("\n".join(f"wrote {file}" for file in files))
    return 0
