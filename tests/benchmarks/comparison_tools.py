"""The compared tools: how each is called on one thread, with which settings, and where the settings come from.

Every tool reads fixed.nii.gz and moving.nii.gz and writes a displacement (5-D NIfTI, LPS mm, on the fixed grid). The
rivals run through the scripts in SHARED/peers, in environments of their own, as peers/README.md installs them.

Lengths in mm come from documents on human anatomy. The mouse brains have voxels of 0.15 mm, where human brains have
1 mm: the two tools whose settings are in mm (elastix: grid and bending weight; plastimatch: grid and smoothness) get
the mouse images with headers that say 1 mm, and their field is scaled back. All others count in voxels.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ONE_CORE = (
    "import os, runpy, sys; os.cpu_count = lambda: 1; sys.argv = sys.argv[1:]; "
    "sys.path.insert(0, os.path.dirname(sys.argv[0])); runpy.run_path(sys.argv[0], run_name='__main__')"
)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1",
    "MPLBACKEND": "Agg",
}


@dataclass(frozen=True)
class Setting:
    """Arguments after the files, environment variables, and the document that gives them."""

    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Tool:
    """A script of SHARED/peers with its environment, or (``script`` empty) one of our own commands."""

    settings: dict[str, Setting]
    script: str = ""
    environment: str = ""
    packages: tuple[str, ...] = ()
    in_mm: bool = False
    repeats: int = 1
    """Runs of a rival whose result is not the same every time and that takes no seed."""


RIVALS = {
    "greedy": Tool(
        {
            "ncc2": Setting(("NCC 2x2x2", "100x50x10"), {}, "as in published greedy scripts"),
            "ncc4": Setting(("NCC 4x4x4", "100x60x40"), {}, "larger window, more fine steps: peers/run_greedy.py"),
            "ssd": Setting(("SSD", "100x100"), {}, "greedy's defaults of -m and -n (its reference page)"),
        },
        "run_greedy.py",
        "peers-env",
        ("picsl_greedy",),
        repeats=3,  # its NCC adds random noise to the images
    ),
    "plastimatch": Tool(
        {
            "mse15": Setting(("mse", "15"), {}, "peers/run_plastimatch.py: three stages to 15 mm, lambda 0.005"),
            "mse30": Setting(("mse", "30"), {}, "plastimatch's registration guide: 30 mm, lambda 0.005"),
            "mi15": Setting(("mi", "15"), {}, "as mse15 with the script's other metric, mutual information"),
        },
        "run_plastimatch.py",
        "peers-env",
        ("plastimatch",),
        in_mm=True,
    ),
    "elastix": Tool(
        {
            "grid10": Setting(("10", "1000"), {}, "model zoo Par0011 (EMPIRE10): NCC, bending 0.05, 10 mm, 1000 steps"),
            "grid32": Setting(("32", "500"), {}, "500 steps; 32 mm (at 5 mm a row took over 10 CPU minutes)"),
            "grid16": Setting(("16", "500"), {}, "elastix's recommended 500 steps; coarser grid, 16 mm"),
        },
        "run_elastix.py",
        "peers-env",
        ("itk-elastix",),
        in_mm=True,
    ),
    "convexadam": Tool(
        {
            "default": Setting(("4", "6"), {}, "convex_adam_pt's defaults"),
            "lung": Setting(("6", "4"), {"LAMBDA": "0.65", "SMOOTH": "3"}, "authors' Learn2Reg 2021 code for lung CT"),
            "brain": Setting(("3", "2"), {"LAMBDA": "1.25"}, "authors' Learn2Reg 2021 code for brain MR"),
        },
        "run_convexadam.py",
        "peers-torch",
        ("convexAdam", "torch"),
    ),
    "ants": Tool(
        {
            "quick": Setting(("antsRegistrationSyNQuick[so]",), {}, "antsRegistrationSyNQuick.sh: MI, 100x70x50x0"),
            "syn": Setting(("antsRegistrationSyN[so]",), {}, "antsRegistrationSyN.sh: CC, 100x70x50x20"),
            "ccdefault": Setting(("SyNOnly", "CC"), {"ITERS": "40,20,0"}, "ANTsPy's default reg_iterations, CC"),
        },
        "run_antspy.py",
        "peers-env",
        ("antspyx",),
    ),
}  # fmt: skip
OURS = {
    "medinr_fast": Tool({"preset": Setting(("--preset", "fast"))}),
    "medinr_accurate": Tool({"preset": Setting(("--preset", "accurate"))}),
    "idir_published": Tool(
        {
            "lr1e-5": Setting(("--lr", "1e-5"), {}, "the released code"),
            "lr1e-4": Setting(("--lr", "1e-4"), {}, "later work with the same network; fewer steps need it"),
        }
    ),
    "cidir": Tool({"reduced": Setting(("--lr", "1e-4"), {}, "the paper")}),
    "ccidir": Tool({"reduced": Setting(("--lr", "1e-4"), {}, "the paper")}),
    "sinr": Tool({"reduced": Setting(("--lr", "3e-4", "--steps", "300"), {}, "fewer, larger steps: each costs four")}),
}
TOOLS = RIVALS | OURS


def command(name: str, setting: Setting, files: tuple[Path, Path, Path], folder: Path, peers: Path, environments: Path,
            seed: int, extra: tuple[str, ...] = ()) -> list[str]:  # fmt: skip
    """The words that register ``files`` (fixed, moving, displacement); ``folder`` is that of the pair."""
    tool = TOOLS[name]
    fixed, moving, out = map(str, files)
    if tool.script:
        python = environments / tool.environment / "bin" / "python"
        return [str(python), "-c", ONE_CORE, str(peers / tool.script), fixed, moving, out, *setting.arguments]
    if name.startswith("medinr"):
        results = str(files[2].parent / "results")
        words = ["register", fixed, moving, "--out", results, "--init", "none", "--seed", str(seed)]
        return [sys.executable, "-m", "medinr.cli", *words, *setting.arguments, *extra]
    words = [sys.executable, "-m", "tests.benchmarks.comparison_inr", name]
    return [*words, str(folder), out, "--seed", str(seed), *setting.arguments, *extra]


def field_file(name: str, out: Path) -> Path:
    """Where the tool leaves its displacement."""
    return out.parent / "results" / "displacement.nii.gz" if name.startswith("medinr") else out
