"""``medinr atlas checkpoint``: the atlas at any ages, as volumes, tissue maps, pictures and curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medinr.atlas_files import write_atlas
from medinr.commands import command_parser
from medinr.commands.checks import DEVICES, check_device, check_writable
from medinr.commands.messages import did_you_mean
from medinr.data.cohort import Condition
from medinr.errors import UserError
from medinr.methods import ConditionalAtlas, load_method
from medinr.precision import full
from medinr.timeline import parse_times

EXAMPLE = "medinr atlas runs/cinema_dhcp/last.ckpt --ages 28:44:1 --condition sex=female --spacing 0.5 --out atlas"


def atlas(
    checkpoint: str | Path,
    out: str | Path,
    ages: str | Sequence[float],
    conditions: Mapping[str, str | float] | None = None,
    spacing: float | None = None,
    sigma: float | None = None,
    degree: int | None = None,
    fps: float = 4.0,
    device: str = "cpu",
) -> list[Path]:
    """Write the atlas at any ages (`medinr.atlas_files.write_atlas` says what is written).

    Args:
        checkpoint: of a `ConditionalAtlas`.
        out: a folder of its own.
        ages: numbers, or ``FIRST:LAST:STEP``, in the units of the cohort's time.
        conditions: values of explicit conditions by name; a level by its name. Others are as is usual at the age.
        spacing: of the volumes, mm; None: that of the finest training scan.
        sigma: standard deviation of the kernel over age; None: as fitted.
        degree: 0, kernel mean, or 1, local linear regression; None: as fitted.
        fps: images a second of the animation.
        device: where the decoder runs.

    Raises:
        UserError: a checkpoint that is no atlas; an unknown condition; no ages.
    """
    check_writable(out)
    method = atlas_of(checkpoint, device)
    if sigma is not None:
        if sigma <= 0:
            raise UserError(f"--sigma: expected a width above 0, found {sigma}")
        method.sigma = sigma
    if degree is not None:
        if degree not in (0, 1):
            raise UserError(f"--degree: expected 0 or 1, found {degree}")
        method.degree = 1 if degree else 0
    chosen = parse_times(ages, "--ages") if isinstance(ages, str) else [float(a) for a in ages]
    values = condition_values(method, conditions or {})
    unit = method.time.name if method.time is not None else "age"
    with full(method.device.type):
        return write_atlas(out, method, chosen, values, spacing, fps=fps, unit=unit)


def atlas_of(checkpoint: str | Path, device: str = "cpu") -> ConditionalAtlas:
    """The atlas in a checkpoint.

    Raises:
        UserError: the checkpoint holds something else.
    """
    method = load_method(checkpoint, check_device(device))
    if not isinstance(method, ConditionalAtlas):
        raise UserError(
            f"{checkpoint}: expected an atlas, found {type(method).__name__}; give a checkpoint of ConditionalAtlas"
        )
    return method


def condition_values(method: ConditionalAtlas, given: Mapping[str, Any]) -> dict[str, float]:
    """Values of explicit conditions, from numbers or from what a person writes.

    Raises:
        UserError: a condition that the decoder was not told; no value of it.
    """
    known = {c.name: c for c in method.told}
    found = {}
    for name, value in given.items():
        condition: Condition | None = known.get(name)
        if condition is None:
            names = ", ".join(known) or "none"
            raise UserError(
                f"--condition {name}: expected one that the atlas was told ({names}){did_you_mean(name, known)}"
            )
        found[name] = condition.value(value) if isinstance(value, str) else float(value)
    return found


def named_values(texts: Sequence[str], option: str = "--condition", example: str = "sex=female") -> dict[str, str]:
    """``name=value`` as a dict.

    Raises:
        UserError: no ``=``.
    """
    found = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name or not value:
            raise UserError(f"{option}: expected NAME=VALUE, as {example}, found {text!r}")
        found[name.strip()] = value.strip()
    return found


def main(args: list[str]) -> int:
    """Parse the command line, write, and name the folder."""
    parser = command_parser(
        "atlas",
        "Write a fitted atlas at any ages: one volume for each modality, tissue maps and probabilities,\na 4-D series, "
        "a montage, an animation, and curves of tissue volumes.",
        EXAMPLE,
    )
    parser.add_argument("checkpoint", type=str, help="of ConditionalAtlas (last.ckpt of a run)")
    parser.add_argument("--ages", type=str, required=True, help="24:40:1 (first, last, step) or 24,30.5,40")
    parser.add_argument("--out", type=str, required=True, help="folder for the results, of their own")
    parser.add_argument(
        "--condition", type=str, nargs="+", default=[], help="NAME=VALUE ...: explicit conditions (default: usual)"
    )
    parser.add_argument("--spacing", type=float | None, default=None, help="of the volumes, mm (default: as trained)")
    parser.add_argument("--sigma", type=float | None, default=None, help="width of the kernel over age")
    parser.add_argument("--degree", type=int | None, default=None, help="0: kernel mean; 1: local linear regression")
    parser.add_argument("--fps", type=float, default=4.0, help="images a second of the animation")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where the decoder runs")
    options = parser.parse_args(args).as_dict()
    options["conditions"] = named_values(options.pop("condition"))
    files = atlas(**options)
    print(f"wrote {len(files)} files to {options['out']}; look at montage.png and animation.gif first")
    return 0
