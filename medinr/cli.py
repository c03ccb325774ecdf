"""The command `medinr`: picks the subcommand, and turns a user's mistake into one line and exit code 2.

Subcommands are imported when they are called, so that ``medinr --help`` does not wait for PyTorch.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version

from medinr.commands.messages import did_you_mean, explain
from medinr.commands.quiet import quiet

COMMANDS = {
    "fit": "run an experiment: optimise its method on its data",
    "validate": "evaluate the newest run of an experiment, quickly",
    "test": "evaluate the newest run of an experiment with every metric",
    "predict": "write warped images, fields and figures of the newest run",
    "register": "register two image files, without any YAML",
    "apply": "carry an image, labels or points through a saved transform",
    "sequence": "read a fitted image sequence at any times: images, curves, maps, animation",
    "atlas": "write a fitted atlas at any ages: volumes, tissues, pictures, curves",
    "generate": "generate the atlas of requested conditions by a trained diffusion model",
    "adapt": "fit an atlas to one new subject: segmentation, reconstruction, estimated age, latents",
    "cohort": "fit many cases with many seeds, here, on SLURM or on Ray, into one table",
    "evaluate": "measure displacement fields of several cases, in mm and as Learn2Reg does",
    "dashboard": "show the runs of experiments: a page, and a workspace in Weights & Biases",
    "phantom": "write a synthetic data set with known truth",
    "check": "say what is found under a data folder, and what is wrong with it",
}
RUNNERS = ("fit", "validate", "test", "predict")

EXAMPLES = """\
medinr fit --config experiments/idir_dirlab.yaml --data.root data/dirlab
medinr predict --config experiments/idir_dirlab.yaml --data.root data/dirlab --out results
medinr register fixed.nii.gz moving.nii.gz --out results"""


def overview() -> str:
    """The help of the bare command: every subcommand in one line."""
    width = max(map(len, COMMANDS))
    lines = [
        "medinr: implicit neural representations for medical image registration",
        "usage: medinr COMMAND [ARGUMENTS]      medinr COMMAND --help for its arguments",
        "",
        *(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items()),
        "",
        "examples:",
        *(f"  {line}" for line in EXAMPLES.splitlines()),
        "MEDINR_DEBUG=1 shows tracebacks and the libraries' warnings.",
    ]
    return "\n".join(lines)


def dispatch(name: str, args: list[str]) -> int:
    """Run one subcommand."""
    if name in RUNNERS:
        return int(importlib.import_module("medinr.commands.experiment").main(name, args))
    module = f"{name}_cli" if name == "register" else name
    return int(importlib.import_module(f"medinr.commands.{module}").main(args))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit code: 0, 2 for a user's mistake, 130 for Ctrl-C.

    Whoever closes the pipe that it prints to has seen enough: 141, as shells have it, and not a word.
    """
    try:
        code = run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def run(argv: Sequence[str] | None = None) -> int:
    """The command line, to its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if len(args) == 2 and args[0] == "help":  # as git and others have it
        args = [args[1], "--help"]
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if args[0] in ("-V", "--version"):
        print(version("medinr"))
        return 0
    name, rest = args[0], args[1:]
    if name.startswith("-"):
        return _fail(f"{name}: expected a command first, found an option; medinr COMMAND {name} ..., see medinr --help")
    if name not in COMMANDS:
        return _fail(f"{name}: no such command{did_you_mean(name, COMMANDS)}; see medinr --help")
    try:
        with quiet():
            return dispatch(name, rest)
    except SystemExit as stop:  # --help and --print_config end this way
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except KeyboardInterrupt:
        print("medinr: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        line = explain(error, name, rest)
        if line is None:
            raise
        if os.environ.get("MEDINR_DEBUG"):
            traceback.print_exc()
        return _fail(line)


def _fail(line: str) -> int:
    print(f"medinr: error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
