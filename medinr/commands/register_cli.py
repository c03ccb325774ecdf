"""The options of ``medinr register``, and what it says at the end."""

import time
from typing import Any, get_args

from medinr.commands import command_parser
from medinr.commands.checks import DEVICES
from medinr.commands.presets import PRESETS, SIMILARITIES
from medinr.commands.register import register
from medinr.io import PointsSpace
from medinr.results import summary

EXAMPLE = "medinr register fixed.nii.gz moving.nii.gz --out result --fixed-mask lungs"


def register_parser() -> Any:
    """The parser: options bear the names of `register`'s arguments, in groups."""
    parser = command_parser(
        "register", "Register a moving image onto a fixed one and write the results into a folder.", EXAMPLE
    )
    parser.usage = "medinr register FIXED MOVING --out FOLDER [OPTIONS]"
    parser.add_argument("fixed", type=str, help="image whose grid the results are on")
    parser.add_argument("moving", type=str, help="image that is warped onto it")
    for side in ("fixed", "moving"):
        parser.add_argument(
            f"--{side}-channel", action="append", type=str, metavar="FILE",
            help=f"a further channel of the {side} image, on its grid; once for each",
        )  # fmt: skip
    parser.add_argument("--multichannel", action="store_true", help="the last axis of the 4-D images holds channels")
    parser.add_argument("--out", type=str, required=True, help="folder for the results")

    fit = parser.add_argument_group("how it is fitted")
    fit.add_argument(
        "--preset", choices=list(PRESETS), default="accurate", help="length of the fit, and what is compared"
    )
    fit.add_argument("--similarity", choices=list(SIMILARITIES), help="what is compared (default: the preset's; lncc)")
    fit.add_argument("--init", type=str, default="affine", help="none, rigid, affine, or a transform's file")
    fit.add_argument("--seed", type=int, default=0, help="of weights and points")
    fit.add_argument("--device", choices=DEVICES, default="auto", help="where the fit runs")

    masks = parser.add_argument_group("what counts, and what slides")
    masks.add_argument(
        "--sliding", type=str, default="auto",
        help="regions that slide along each other: lungs (CT), a label file, none (default: the lungs of chest CT)",
    )  # fmt: skip
    masks.add_argument("--fixed-mask", type=str | None, help="where the fixed image counts: a file, or 'lungs' (CT)")
    masks.add_argument("--moving-mask", type=str | None, help="as above, of the moving image")

    for side in ("fixed", "moving"):
        masks.add_argument(f"--{side}-exclude", type=str | None, help=f"{side} region that is not compared: a lesion")
    masks.add_argument("--fixed-guides", type=str | None, help="CSV x,y,z of landmarks that the result is to follow")
    masks.add_argument("--moving-guides", type=str | None, help="CSV of the corresponding moving landmarks")
    masks.add_argument("--landmark-weight", type=float, default=10.0, help="how strongly it follows them")

    measured = parser.add_argument_group("what the result is measured by")
    measured.add_argument(
        "--fixed-points", type=str | None, help="landmarks (CSV, .fcsv, .mrk.json), to measure the error"
    )
    measured.add_argument("--moving-points", type=str | None, help="CSV of the corresponding moving landmarks")
    measured.add_argument("--points-space", choices=get_args(PointsSpace), default="ras", help="frame of the CSV files")
    measured.add_argument("--fixed-labels", type=str | None, help="label volume of the fixed image, for Dice")
    measured.add_argument("--moving-labels", type=str | None, help="label volume to carry onto the fixed grid")

    written = parser.add_argument_group("what is written")
    written.add_argument("--report", action="store_true", help="also write report.html: one page to look at and send")
    written.add_argument("--uncertainty", action="store_true", help="fit both ways; also write uncertainty.nii.gz")
    written.add_argument("--inverse", action="store_true", help="also write inverse_displacement.nii.gz")
    written.add_argument("--write", type=str, default="", help="further forms of the transform: h5,affine,l2r")
    written.add_argument("--exact", action="store_true", help="evaluate the map at every voxel")
    return parser


def main(args: list[str]) -> int:
    """Parse the command line, register, and say where the results are."""
    options = register_parser().parse_args(args).as_dict()
    for side in ("fixed", "moving"):
        channels = options.pop(f"{side}_channel")
        if channels:
            options[side] = [options[side], *channels]
    options["write"] = tuple(name.strip() for name in options["write"].split(",") if name.strip())
    begin = time.perf_counter()
    result = register(**options, progress=True, keep_interrupted=True)
    print(summary(result.metrics))
    print(f"  time       {time.perf_counter() - begin:.1f} s (fit {result.seconds['fit']:.1f} s)")
    print(f"results in {options['out']}")
    return 130 if result.interrupted else 0
