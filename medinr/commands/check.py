"""``medinr check``: what is found under a data folder."""

from pathlib import Path

from medinr.commands import command_parser
from medinr.errors import UserError

EXAMPLE = "medinr check data/dirlab"


def main(args: list[str]) -> int:
    parser = command_parser("check", "Say what is found under a data folder, and what is wrong with it.", EXAMPLE)
    parser.add_argument("root", type=str, help="a DIR-LAB folder, or a folder of 4D-CT phases")
    root = Path(parser.parse_args(args).root)
    if not root.is_dir():
        raise UserError(f"{root}: expected a folder of data, found {'a file' if root.exists() else 'nothing'}")

    from data_modules import check_root

    lines = check_root(root)
    print("\n".join(lines))
    return 2 if any(": problem: " in line for line in lines) else 0
