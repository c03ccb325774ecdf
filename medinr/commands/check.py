"""``medinr check``: what is found under a data folder."""

from pathlib import Path

from medinr.commands import command_parser
from medinr.errors import UserError

EXAMPLE = "medinr check data/dirlab"


def main(args: list[str]) -> int:
    parser = command_parser("check", "Say what is found under a data folder, and what is wrong with it.", EXAMPLE)
    parser.add_argument(
        "root", type=str, help="a folder (DIR-LAB, 4D-CT phases, dHCP, UK Biobank), or a table of scans"
    )
    root = Path(parser.parse_args(args).root)
    if not root.exists():
        raise UserError(f"{root}: expected a folder of data, found nothing; name a folder, or the table of a cohort")

    from data_modules import check_root

    lines = check_root(root)
    print("\n".join(lines))
    return 2 if any(": problem: " in line for line in lines) else 0
