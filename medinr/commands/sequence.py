"""``medinr sequence checkpoint``: a fitted image sequence at any times."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from medinr import io
from medinr.commands import command_parser
from medinr.commands.checks import DEVICES, check_device, check_inputs_stay, check_writable
from medinr.data.sequence import Sequence as ImageSequence
from medinr.errors import UserError
from medinr.fields.warp import resample_labels
from medinr.io import PointsSpace
from medinr.methods import Method, load_method
from medinr.precision import full
from medinr.timeline import Subject, best_compensation, default_times, parse_times
from medinr.timeline_files import write_timeline

EXAMPLE = "medinr sequence runs/stnerp_4dct/last.ckpt --image popi_T60.nii.gz --times 0:95:5 --out sequence"
SEQUENCE_WRITES = "amplitude animation curves interpolation_error maps metrics timeline ventilation"


def sequence(
    checkpoint: str | Path,
    out: str | Path,
    times: str | Sequence[float] | None = None,
    image: Any = None,
    images: Mapping[float, Any] | None = None,
    labels: Any = None,
    points: str | Path | None = None,
    points_space: PointsSpace = "ras",
    mask: Any = None,
    between: Sequence[tuple[float, float]] = (),
    extremes: tuple[float, float] | None = None,
    exact: bool = False,
    fps: float = 8.0,
    device: str = "cpu",
) -> list[Path]:
    """Read a fitted sequence at any times (`medinr.timeline_files.write_timeline` says what is written).

    Args:
        checkpoint: of a method that knows time (`SpatioTemporalRegistration`).
        out: a folder of its own.
        times: numbers, or ``FIRST:LAST:STEP``, in the units of the sequence; None: 20 of one period, or from the first
            to the last.
        image: the reference image, to be warped.
        images: the images of the sequence by their times, the reference's among them: those of other times are then
            interpolated between the neighbours, as `medinr predict --times` does, in place of the warped reference.
        labels, points, mask: of the reference image: carried along, and the region that motion is summarised in.
        points_space: frame of a CSV of points.
        between: pairs of times (s, t) whose displacement is written, on the reference grid.
        extremes: the two times of the ventilation; None: those of the smallest and largest volume of mask or labels.
        exact: evaluate the network at every voxel.
        fps: images a second of the animation.

    Raises:
        UserError: a checkpoint that knows no time, or a file that cannot be used.
    """
    check_writable(out)
    check_inputs_stay(out, (image, *(images or {}).values(), labels, points, mask), SEQUENCE_WRITES)
    method = timed(load_method(checkpoint, check_device(device)), str(checkpoint))
    chosen = chosen_times(method, times)
    domain = method.domain.with_scale("isotropic")
    known = None if images is None else known_images(method, images)
    source = None if image is None else io.as_image(image)
    if source is None and known is not None:
        source = known.images[known.reference]
    regions = []
    for given, read in ((labels, io.read_labels), (mask, io.read_mask)):
        grid = None if given is None else io.read_domain(given)
        regions.append(None if grid is None else resample_labels(read(given, grid), grid, domain))
    world = (
        None if points is None else io.read_points(points, points_space, domain if source is None else source.domain)
    )
    share = 0.5 if known is None else best_compensation(method, known)
    subject = Subject(domain, source, regions[0], world, regions[1], known, share)
    return write_timeline(out, method, subject, chosen, between, extremes, exact, fps)


def known_images(method: Any, images: Mapping[float, Any]) -> ImageSequence:
    """The images of a fitted sequence.

    Raises:
        UserError: none of the reference time, or what makes no sequence.
    """
    times = sorted(images)
    if method.state["reference"] not in times:
        found = ", ".join(f"{t:g}" for t in times)
        raise UserError(
            f"--images: expected an image of the reference time {method.state['reference']:g}, found {found}; add it"
        )
    read = tuple(io.as_image(images[t]) for t in times)
    none = (None,) * len(times)
    reference = times.index(method.state["reference"])
    return ImageSequence("images", tuple(times), read, reference, method.state["period"], none, none, none)


def images_by_time(text: str | None) -> dict[float, str] | None:
    """``0=a_T00.nii.gz,50=a_T50.nii.gz`` as files by time.

    Raises:
        UserError: another form, or a time twice.
    """
    if text is None:
        return None
    found: dict[float, str] = {}
    for part in text.split(","):
        time, equals, file = part.partition("=")
        try:
            if not equals or not file or float(time) in found:
                raise ValueError
            found[float(time)] = file.strip()
        except ValueError:
            raise UserError(f"--images: expected TIME=FILE,TIME=FILE with every time once, found {part!r}") from None
    return found


def timed(method: Method, name: str) -> Any:
    """The method, if it knows time.

    Raises:
        UserError: it does not.
    """
    if not hasattr(method, "transform_at"):
        raise UserError(
            f"{name}: expected a method of sequences, found {type(method).__name__}, which knows no time; give a "
            "checkpoint of SpatioTemporalRegistration, or use `medinr apply`"
        )
    return method


def chosen_times(method: Any, times: str | Sequence[float] | None) -> list[float]:
    """Times as numbers; without any, even ones of the period or range that the method was fitted to."""
    if isinstance(times, str):
        return parse_times(times)
    if times is not None:
        return [float(t) for t in times]
    return default_times(method.state["times"], method.state["period"])


def times_of_run(command: str, given: str | None, method: Any, datamodule: Any) -> list[float] | None:
    """The times of an experiment's ``--times``; ``auto``: `default_times`.

    Raises:
        UserError: no times, or nothing that knows of any.
    """
    if given is None:
        return None
    if command != "predict":
        raise UserError(f"--times: {command} reads no sequence; it belongs to predict")
    if not hasattr(method, "transform_at") or not hasattr(datamodule, "sequence"):
        raise UserError(
            f"--times: expected a method and data of sequences, found {type(method).__name__} and "
            f"{type(datamodule).__name__}; leave --times out"
        )
    if given != "auto":
        return parse_times(given)
    return default_times(datamodule.sequence.times, datamodule.sequence.period)


def write_sequence(out: Path, method: Any, datamodule: Any, times: Sequence[float]) -> list[Path]:
    """`write_timeline` of a method that has been evaluated on its data, with the reference's labels and landmarks."""
    method.cpu().eval()
    with full("cpu"):
        subject = Subject.of(datamodule.sequence)
        known = subject.sequence
        share = 0.5 if known is None else best_compensation(method, known)
        return write_timeline(out, method, replace(subject, compensation=share), times)


def time_pair(text: str | None, name: str) -> list[tuple[float, float]]:
    """``0,50`` or ``0,50;50,0`` as pairs.

    Raises:
        UserError: not two times each.
    """
    found = []
    for part in (text or "").split(";"):
        values = parse_times(part, name) if part.strip() else []
        if len(values) not in (0, 2):
            raise UserError(f"{name}: expected two times with a comma, as 0,50, found {part!r}")
        found += [(values[0], values[1])] if values else []
    return found


def main(args: list[str]) -> int:
    """Parse the command line, write, and name the folder."""
    parser = command_parser(
        "sequence",
        "Read a fitted image sequence at any times: warped images, displacements, carried labels and\npoints, curves "
        "of their volume and centre of mass, maps of motion and ventilation, animation.",
        EXAMPLE,
    )
    parser.add_argument("checkpoint", type=str, help="of a method of sequences (transform.ckpt or of a run)")
    parser.add_argument("--out", type=str, required=True, help="folder for the results, of their own")
    parser.add_argument("--times", type=str | None, help="0:95:5 (first, last, step) or 0,12.5,50 (default: 20)")
    parser.add_argument("--image", type=str | None, help="the reference image, to be warped")
    parser.add_argument("--images", type=str | None, help="all images, 0=T00.nii.gz,50=T50.nii.gz: to interpolate")
    parser.add_argument("--labels", type=str | None, help="label volume of the reference")
    parser.add_argument("--points", type=str | None, help="points of the reference: CSV x,y,z, .fcsv or .mrk.json")
    parser.add_argument("--points-space", choices=get_args(PointsSpace), default="ras", help="frame of the CSV")
    parser.add_argument("--mask", type=str | None, help="region that motion is summarised and shown in")
    parser.add_argument("--between", type=str | None, help="displacement from time to time: 0,50 or 0,50;50,0")
    parser.add_argument("--extremes", type=str | None, help="the two times of the ventilation, e.g. 60,10")
    parser.add_argument("--exact", action="store_true", help="evaluate the network at every voxel")
    parser.add_argument("--fps", type=float, default=8.0, help="images a second of the animation")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where the network runs")
    options = parser.parse_args(args).as_dict()
    options["between"] = time_pair(options["between"], "--between")
    options["images"] = images_by_time(options["images"])
    pairs = time_pair(options["extremes"], "--extremes")
    options["extremes"] = pairs[0] if pairs else None
    files = sequence(**options)
    print(f"wrote {len(files)} files to {options['out']}; look at animation.gif and maps.png first")
    return 0
