"""``medinr evaluate data results``: displacement fields of any tool, measured in mm and as Learn2Reg measures."""

import csv
import io as text_io
import json
import math
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from medinr import io, metrics
from medinr.commands import command_parser
from medinr.commands.cases import Case, find_cases, find_results
from medinr.commands.checks import check_writable
from medinr.errors import RegistrationWarning, UserError
from medinr.fields.warp import resample_labels
from medinr.io import PointsSpace
from medinr.space import Domain, transform_points
from medinr.types import Mask

EXAMPLE = "medinr evaluate data results --out table"
Row = dict[str, Any]

ABOUT = """\
Measure displacement fields (fixed to moving) of several cases, true and as Learn2Reg does.

DATA     one folder a case: fixed.nii.gz and moving.nii.gz, with fixed_labels and moving_labels,
         fixed_points.csv and moving_points.csv, fixed_mask as far as they are there;
         or Learn2Reg's layout: dataset.json, imagesTr, labelsTr, masksTr, landmarksTr (voxels).
RESULTS  for case NAME (the folder's name; in Learn2Reg's layout 0001_0002, the subjects) the first
         of NAME/displacement.nii.gz (what `medinr register --out RESULTS/NAME` writes), NAME.nii.gz
         and disp_NAME.nii.gz; .nii, .mha, .mhd, .nrrd as well. 5-D NIfTI of intent 1007 and ITK's
         vector images are LPS mm; 4-D NIfTI (X, Y, Z, 3) is Learn2Reg's, in voxels.

tre/, hd95/mm, sdlogj, dsc/ are true: mm in the world, all labels of either image, det J inside the mask.
*_learn2reg are the challenge's own formulas, for tables that stand beside its figures."""


def evaluate(
    data: str | Path,
    results: str | Path,
    out: str | Path | None = None,
    cases: Sequence[str] = (),
    pairs: str | None = None,
    points_space: PointsSpace = "ras",
) -> list[dict[str, Any]]:
    """Measure written displacement fields against landmarks and labels, and write a table.

    What is measured is the file, not the transform that it came from: fields of all tools are read alike.

    Args:
        data: folder of cases (`medinr.commands.cases.find_cases` has the rules).
        results: folder of displacement fields.
        out: folder for ``evaluation.csv``, ``evaluation.json`` and ``evaluation.md`` (None: nothing is written).
        cases: names of those to measure (default: all).
        pairs: key of dataset.json that lists the pairs.
        points_space: of landmarks in CSV.

    Returns:
        A row of names and numbers for each case; a column is absent where the case has not got what it needs.

    Raises:
        UserError: a case without its displacement; files that do not fit each other.
    """
    if out is not None:
        check_writable(out)
    found = find_cases(data, pairs, points_space)
    unknown = [name for name in cases if name not in {c.name for c in found}]
    if unknown:
        raise UserError(f"--cases: expected some of {', '.join(c.name for c in found)}, got {', '.join(unknown)}")
    chosen = [c for c in found if not cases or c.name in cases]
    files = find_results(results, chosen)
    rows = [{"case": case.name, **measure(case, file)} for case, file in zip(chosen, files, strict=True)]
    if out is not None:
        with io.staged_folder(out) as staged:
            for suffix, text in (("csv", csv_table(rows)), ("json", json_table(rows)), ("md", markdown_table(rows))):
                io.write_text(staged / f"evaluation.{suffix}", text)
    return rows


def measure(case: Case, file: Path) -> dict[str, float]:
    """All that a case's files say about a displacement file, true and as Learn2Reg has it."""
    domain, moving = io.read_domain(case.fixed), io.read_domain(case.moving)
    if io.is_learn2reg(file):
        displacement, one_grid = io.read_learn2reg(file, domain), Domain.of(moving.shape, domain.affine)
        if not moving.same_grid(one_grid, 1e-2):
            warnings.warn(
                f"{file}: voxels of {case.moving} are taken to lie on the fixed image's affine, as in the challenge, "
                "and not where its own has them",
                RegistrationWarning,
                stacklevel=2,
            )
    else:
        displacement, grid = io.read_displacement(file)
        one_grid = moving
        if not grid.same_grid(domain, 1e-2):
            raise UserError(
                f"{file}: expected displacements on the grid of {case.fixed}, shape {domain.shape}, found {grid.shape} "
                "or another affine; resample them onto the fixed image"
            )
    mask = None if case.fixed_mask is None else io.read_mask(case.fixed_mask, domain)
    found = _points(case, displacement, domain, moving, one_grid) | _labels(case, displacement, domain, one_grid)
    return found | _field(displacement, domain, mask)


def _points(case: Case, displacement: Tensor, domain: Domain, moving: Domain, one_grid: Domain) -> dict[str, float]:
    """``moving`` is the moving image's own grid, ``one_grid`` the one on which the displacement file sees it."""
    if case.fixed_points is None or case.moving_points is None:
        return {}
    fixed = io.read_points(case.fixed_points, case.points_space, domain)
    target = io.read_points(case.moving_points, case.points_space, moving)
    if len(fixed) != len(target):
        raise UserError(
            f"{case.moving_points}: expected {len(fixed)} points, as many as {case.fixed_points}, found {len(target)}"
        )
    io.check_points_inside(fixed, domain, str(case.fixed_points))
    voxels = transform_points(moving.world_to_voxel, target)
    target = transform_points(one_grid.voxel_to_world, voxels)
    moved = metrics.displaced(displacement, domain)(fixed)
    error, snapped = metrics.tre(moved, target), metrics.snapped_tre(moved, target, one_grid)
    found = {
        "tre/initial_mean": metrics.tre(fixed, target).mean().item(),
        "tre/mean": error.mean().item(),
        "tre/std": error.std(correction=0).item(),
        "tre/p95": error.quantile(0.95).item(),
        "tre/max": error.max().item(),
        "tre/snapped_mean": snapped.mean().item(),
    }
    if one_grid.same_grid(domain, 1e-2):
        voxel = displacement.double() @ domain.world_to_voxel[:3, :3].T
        at = transform_points(domain.world_to_voxel, fixed)
        theirs = metrics.tre_learn2reg(at, voxels, voxel, moving.spacing)
        found["tre_learn2reg"] = theirs.mean().item()
    return found


def _labels(case: Case, displacement: Tensor, domain: Domain, one_grid: Domain) -> dict[str, float]:
    if case.fixed_labels is None or case.moving_labels is None:
        return {}
    fixed = io.read_labels(case.fixed_labels, domain)
    moving = io.read_labels(case.moving_labels, io.read_domain(case.moving))
    warped = resample_labels(moving, one_grid, domain, displacement)
    distances = list(metrics.hd95(warped, fixed, domain).values())
    seen = [d for d in distances if math.isfinite(d)]
    found = {
        "dsc/initial_mean": _mean(metrics.dice(resample_labels(moving, one_grid, domain), fixed).values()),
        "dsc/mean": _mean(metrics.dice(warped, fixed).values()),
        "hd95/mm": _mean(seen),
        "hd95/without": float(len(distances) - len(seen)),
    }
    common = metrics.common_labels(fixed, moving)
    if common and min(domain.shape) > 1:
        found["dsc_learn2reg"] = _mean(metrics.dice(warped, fixed, common).values())
        found["hd95_learn2reg"] = _mean(metrics.hd95_learn2reg(warped, fixed, common).values())
    return found


def _field(displacement: Tensor, domain: Domain, mask: Mask | None) -> dict[str, float]:
    det = metrics.finite_difference_jacobian(displacement.double(), domain)
    length = displacement.norm(dim=-1)
    inside = torch.ones(domain.shape, dtype=torch.bool) if mask is None else mask
    found = {
        "folding/written_percent": metrics.folding_percent(det, mask),
        "folding/det_min": det[inside].min().item(),
        "folding/det_max": det[inside].max().item(),
        "sdlogj": metrics.sdlogj(det, mask),
        "displacement/mean_mm": length[inside].mean().item(),
        "displacement/max_mm": length[inside].max().item(),
    }
    return found | ({"sdlogj_learn2reg": metrics.sdlogj_learn2reg(det)} if min(domain.shape) > 4 else {})


def _mean(values: Any) -> float:
    some = list(values)
    return sum(some) / len(some) if some else math.nan


# -- tables ----------------------------------------------------------------------------------------------------------


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The names that any case has, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row if name != "case"))


def aggregates(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation (over n, as Learn2Reg's) and n of each column, over the cases that have a number.

    An infinite distance, of a label that is lost, makes the mean infinite: a failure must not improve it.
    """
    found: dict[str, dict[str, float]] = {"mean": {}, "sd": {}, "n": {}}
    for name in columns_of(rows):
        values = [float(row[name]) for row in rows if not math.isnan(row.get(name, math.nan))]
        if values:
            finite = all(map(math.isfinite, values))
            found["mean"][name] = statistics.fmean(values)
            found["sd"][name] = statistics.pstdev(values) if finite else math.nan
            found["n"][name] = len(values)
    return found


def table(rows: Sequence[Row]) -> list[Row]:
    """The cases and what they have in common."""
    return [*rows, *({"case": name, **values} for name, values in aggregates(rows).items())]


def csv_table(rows: Sequence[Row]) -> str:
    out = text_io.StringIO()
    writer = csv.DictWriter(out, ["case", *columns_of(rows)], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table(rows))
    return out.getvalue()


def json_table(rows: Sequence[Row]) -> str:
    """JSON has no NaN and no infinity: null."""

    def plain(row: Row) -> Row:
        return {k: v if isinstance(v, str) or math.isfinite(v) else None for k, v in row.items()}

    content = {"cases": [plain(r) for r in rows], **{k: plain(v) for k, v in aggregates(rows).items()}}
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def markdown_table(rows: Sequence[Row]) -> str:
    names = columns_of(rows)
    lines = [["case", *names], ["---"] + ["---:"] * len(names)]
    lines += [[str(row["case"]), *(_shown(row.get(n)) for n in names)] for row in table(rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def main(args: list[str]) -> int:
    """Parse the command line, evaluate, and show the main columns."""
    parser = command_parser("evaluate", ABOUT, EXAMPLE)
    parser.add_argument("data", type=str, help="folder of cases")
    parser.add_argument("results", type=str, help="folder of displacement fields")
    parser.add_argument("--out", type=str | None, help="folder for evaluation.csv, .json and .md (default: RESULTS)")
    parser.add_argument("--cases", type=str, default="", help="names of those to evaluate, separated by commas")
    parser.add_argument("--pairs", type=str | None, help="list of pairs in dataset.json, e.g. registration_val")
    parser.add_argument(
        "--points-space", choices=get_args(PointsSpace), default="ras", help="frame of CSV landmarks (not Learn2Reg's)"
    )
    options = parser.parse_args(args).as_dict()
    options["out"] = options["out"] or options["results"]
    options["cases"] = tuple(name.strip() for name in options["cases"].split(",") if name.strip())
    rows = evaluate(**options)
    found = aggregates(rows)
    for name, mean in found["mean"].items():
        print(f"  {name:<24} {mean:.4g} (sd {found['sd'][name]:.3g})")
    print(f"{len(rows)} case(s); wrote {Path(options['out']) / 'evaluation'}.csv, .json and .md")
    return 0
