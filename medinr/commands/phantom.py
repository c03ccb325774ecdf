"""``medinr phantom``: synthetic data sets with known truth, in the layouts of the real ones."""

import sys
import time
from pathlib import Path

from medinr.commands import command_parser
from medinr.commands.checks import check_writable
from medinr.errors import UserError

EXAMPLE = "medinr phantom dirlab --out data/phantom --cases 1-5 --size 96"
LAYOUT_OPTIONS = {"cases": ("dirlab",), "phases": ("dirlab",), "subjects": ("dhcp", "ukb"), "template": ("ukb",)}
"""Options that belong to some layouts only."""


def case_numbers(text: str) -> list[int]:
    """``"1-3,5"`` -> [1, 2, 3, 5].

    Raises:
        UserError: anything but numbers and ranges between 1 and 10.
    """
    found: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"--cases: expected numbers and ranges such as 1-3,5, got {text}")
        found += range(int(first), int(last if dash else first) + 1)
    if not found or min(found) < 1 or max(found) > 10:
        raise UserError(f"--cases: expected cases from 1 to 10, got {text}")
    return sorted(set(found))


def main(args: list[str]) -> int:
    parser = command_parser("phantom", "Write a synthetic data set with known truth.", EXAMPLE)
    parser.add_argument(
        "layout",
        choices=["dirlab", "tube", "longitudinal", "dhcp", "ukb"],
        help="dirlab: breathing thorax in the layout of DIR-LAB 4DCT; tube: a bowel that contracts, rests or is moved; "
        "longitudinal: a thorax at six dates, with a tumour that shrinks and loss of weight; "
        "dhcp: perinatal brains of 28 to 44 weeks in the layout of dHCP; ukb: adult brains of 45 to 80 years in the "
        "layout of UK Biobank",
    )
    parser.add_argument("--out", type=str, required=True, help="folder to write into")
    parser.add_argument("--cases", type=str, default=None, help="dirlab: cases to write (default: 1-5)")
    parser.add_argument("--subjects", type=int, default=None, help="dhcp, ukb: how many (default: 20)")
    parser.add_argument(
        "--template", type=str, default=None, help="ukb: the brain that is deformed: auto, nilearn or synthetic"
    )
    parser.add_argument(
        "--size",
        type=int,
        default=None,
        help="voxels in plane (dirlab: 256 or 512; dhcp: 95, 304 is real; ukb: 109, 218 is real; others: 96)",
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same data")
    parser.add_argument(
        "--phases", choices=["all", "extremes"], default=None, help="dirlab: T00 to T90, or T00 and T50"
    )
    given = parser.parse_args(args)
    if given.size is not None and given.size < 16:
        raise UserError(f"--size: expected at least 16 voxels in plane, got {given.size}")
    for name, layouts in LAYOUT_OPTIONS.items():
        if getattr(given, name) is not None and given.layout not in layouts:
            expected = " or ".join(layouts)
            raise UserError(f"--{name}: expected with the layout {expected} only, got {given.layout}; leave it out")
    cases = case_numbers(given.cases or "1-5")
    check_writable(given.out)

    begin = time.perf_counter()
    if given.layout == "tube":
        from medinr.phantoms.tube import KINDS, write_tube_phantom

        files = write_tube_phantom(Path(given.out), size=given.size, seed=given.seed)
        what, truth = f"the tubes {', '.join(KINDS)}", "in the folder truth of each (fields, parameters)"
    elif given.layout == "longitudinal":
        from medinr.phantoms.longitudinal import write_longitudinal_phantom

        files = write_longitudinal_phantom(Path(given.out), given.size, given.seed)
        what, truth = "a series.tsv", f"(fields, curves of the tumour) in {Path(given.out) / 'truth'}"
    elif given.layout == "dhcp":
        from medinr.phantoms.perinatal_cohort import write_dhcp_phantom

        subjects = 20 if given.subjects is None else given.subjects
        files = write_dhcp_phantom(Path(given.out), subjects, given.size, given.seed, tell=_tell)
        what, truth = f"{subjects} subjects", f"(maturation, volumes, clean labels) in {Path(given.out) / 'truth'}"
    elif given.layout == "ukb":
        from medinr.phantoms.adult_cohort import write_ukb_phantom

        subjects = 20 if given.subjects is None else given.subjects
        files = write_ukb_phantom(Path(given.out), subjects, given.size, given.seed, given.template or "auto", _tell)
        what, truth = f"{subjects} subjects", f"(volumes, labels in MNI space) in {Path(given.out) / 'truth'}"
    else:
        from medinr.phantoms.thorax import write_dirlab_phantom

        phases = (0, 50) if given.phases == "extremes" else None
        files = write_dirlab_phantom(Path(given.out), cases, given.size, given.seed, phases=phases)
        what = f"{len(cases)} case(s)"
        truth = f"(fields, masks, landmarks at every phase) in {Path(given.out) / 'truth'}"
    _tell("")
    print(f"wrote {len(files)} files of {what} to {given.out} in {time.perf_counter() - begin:.0f} s")
    print(f"the truth is {truth}")
    return 0


def _tell(line: str) -> None:
    """Where the work is, on one line of a terminal that is written over."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
