"""``medinr register fixed moving``: two images in, results out, no YAML."""

import itertools
import signal
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import lightning
import torch
from torch import Tensor

from data_modules.pair import read_matrix
from medinr import io
from medinr.callbacks import RunProgress
from medinr.commands import command_parser
from medinr.commands.checks import DEVICES, check_device, check_writable
from medinr.commands.quiet import quiet
from medinr.data.base import step_loader
from medinr.data.lungs import lung_mask
from medinr.data.pair import Pair
from medinr.data.report import check_pair
from medinr.errors import RegistrationWarning, UserError
from medinr.fields import SIREN, Transform
from medinr.io import PointsSpace
from medinr.losses import MSE, NCC, Barrier, LocalNCC, Similarity
from medinr.methods import PairRegistration
from medinr.methods.base import robust_window
from medinr.results import Evaluation, evaluate, summary, write_results
from medinr.sampling import PointSampler, nearest
from medinr.space import transform_points
from medinr.start import MINIMAL_OVERLAP, find_start

SimilarityName = Literal["lncc", "ncc", "mse"]
PresetName = Literal["fast", "accurate"]
STARTS = ("none", "rigid", "affine")
EXAMPLE = "medinr register fixed.nii.gz moving.nii.gz --out result --fixed-mask lungs"


@dataclass(frozen=True)
class Preset:
    """Sizes of a registration; chosen for 2 cores and images of a hundred to two hundred voxels a side."""

    hidden: tuple[int, ...]
    points: int
    steps: int


PRESETS: dict[str, Preset] = {
    "fast": Preset((128, 128, 128), 2048, 400),
    "accurate": Preset((128, 128, 128), 4096, 600),
}
SIMILARITIES: dict[str, type[Similarity]] = {"lncc": LocalNCC, "ncc": NCC, "mse": MSE}


@dataclass(frozen=True)
class Result:
    """What `register` returns.

    Attributes:
        transform: phi, callable on points: fixed world to moving world (RAS mm); has ``inverse`` and ``jacobian``.
        evaluation: warped image, displacement, Jacobian determinant (tensors on the fixed grid) and ``metrics``.
        method: the fitted method, which a checkpoint rebuilds.
        pair: the images as they were registered.
        seconds: of the start, the fit and the evaluation.
        files: what was written.
    """

    transform: Transform
    evaluation: Evaluation
    method: PairRegistration
    pair: Pair
    seconds: dict[str, float]
    files: list[Path] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        return self.evaluation.metrics


def recommended(preset: PresetName = "accurate", similarity: SimilarityName = "lncc") -> PairRegistration:
    """The method that `register` fits: experiments/idir_dirlab_best.yaml has the same settings.

    A SIREN that starts at the identity, local NCC on extrapolated patches, a pyramid of 8, 4, 2 and 0 mm, warm-up and
    cosine, and a folding barrier.
    """
    sizes = PRESETS[preset]
    return PairRegistration(
        SIREN(hidden=sizes.hidden, omega=30.0, first_omega=15.0),
        SIMILARITIES[similarity](),
        {"barrier": Barrier(10.0)},
        points=sizes.points,
        pyramid_mm=(8.0, 4.0, 2.0, 0.0),
        lr=3e-4,
        warmup=0.05,
        cosine=True,
        use_moving_mask=True,
    )


def make_pair(
    fixed: Any,
    moving: Any,
    fixed_mask: Any = None,
    moving_mask: Any = None,
    fixed_points: Any = None,
    moving_points: Any = None,
    points_space: PointsSpace = "ras",
    fixed_labels: Any = None,
    moving_labels: Any = None,
) -> Pair:
    """A pair from paths, nibabel or SimpleITK images, or `Image`s; the mask ``"lungs"`` is computed from CT in HU."""
    images = [io.as_image(source) for source in (fixed, moving)]
    f, m = images

    def mask(source: Any, image: Any) -> Tensor | None:
        if source is None:
            return None
        return lung_mask(image) if isinstance(source, str) and source == "lungs" else io.read_mask(source, image.domain)

    def points(source: Any, image: Any, name: str) -> Tensor | None:
        if source is None:
            return None
        found = source if isinstance(source, Tensor) else io.read_points(source, points_space, image.domain)
        io.check_points_inside(found, image.domain, str(source) if isinstance(source, str | Path) else name)
        return found.double()

    pair = Pair(
        Path(f.source).name.split(".")[0] or "pair",
        f,
        m,
        mask(fixed_mask, f),
        mask(moving_mask, m),
        points(fixed_points, f, "fixed points"),
        points(moving_points, m, "moving points"),
        None if fixed_labels is None else io.read_labels(fixed_labels, f.domain),
        None if moving_labels is None else io.read_labels(moving_labels, m.domain),
    )
    check_pair(pair)
    if fixed_labels is not None and moving_labels is None:
        warnings.warn(
            "--fixed-labels: not used; give --moving-labels to compare with", RegistrationWarning, stacklevel=3
        )
    return pair


def register(
    fixed: Any,
    moving: Any,
    out: str | Path | None = None,
    fixed_mask: Any = None,
    moving_mask: Any = None,
    fixed_points: Any = None,
    moving_points: Any = None,
    points_space: PointsSpace = "ras",
    fixed_labels: Any = None,
    moving_labels: Any = None,
    similarity: SimilarityName = "lncc",
    preset: PresetName = "accurate",
    init: str = "affine",
    seed: int = 0,
    device: str = "auto",
    inverse: bool = False,
    exact: bool = False,
    progress: bool = False,
) -> Result:
    """Register ``moving`` onto ``fixed``: the function behind the command of the same name.

    Args:
        fixed, moving: path, nibabel or SimpleITK image, or `Image`; grids, orientations, fields of view may differ.
        out: folder for the results (None: nothing is written).
        fixed_mask: where the fixed image counts: a file, an array-like image on the same grid, or ``"lungs"``.
        moving_mask: samples that map outside it carry no weight.
        fixed_points, moving_points: landmarks (CSV ``x,y,z`` or tensor [n, 3]), only to measure the error.
        points_space: of CSV files: ``ras`` or ``lps`` mm, or ``voxel`` (0-based).
        fixed_labels, moving_labels: label volumes: carried along, and compared.
        similarity: ``lncc`` (local NCC on extrapolated patches), ``ncc`` or ``mse``.
        preset: ``fast`` or ``accurate``.
        init: ``none``, ``rigid``, ``affine``, or a text file with the 4 x 4 matrix fixed to moving (RAS mm).
        seed: of weights and points; on a CPU the same seed gives the same result.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        inverse: also write the inverse displacement, on the moving grid.
        exact: evaluate the network at every voxel instead of a lattice with a measured error below 0.05 mm.
        progress: show a progress bar.

    Raises:
        UserError: a file or value that cannot be used.
    """
    for name, value, known in (("preset", preset, PRESETS), ("similarity", similarity, SIMILARITIES)):
        if value not in known:
            raise UserError(f"{name}: expected one of {', '.join(known)}, got {value}")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed: expected a whole number from 0 to 4294967295, got {seed}")
    if init not in STARTS and not Path(init).exists():
        raise UserError(f"--init: expected {', '.join(STARTS)} or a file with a 4 x 4 matrix, got {init}")
    check_device(device)
    if out is not None:
        check_writable(out)
    pair = make_pair(
        fixed, moving, fixed_mask, moving_mask, fixed_points, moving_points, points_space, fixed_labels, moving_labels
    )
    clock = [time.perf_counter()]
    lightning.seed_everything(seed, verbose=False)
    pair = replace(pair, start=initial(pair, init, seed))
    check_overlap(pair)
    clock.append(time.perf_counter())
    method = recommended(preset, similarity)
    fit(method, pair, PRESETS[preset].steps, device, progress)
    clock.append(time.perf_counter())
    evaluation = evaluate(method.transform(), pair, exact)
    clock.append(time.perf_counter())
    seconds = dict(zip(("start", "fit", "evaluation"), (b - a for a, b in itertools.pairwise(clock)), strict=True))
    files: list[Path] = []
    if out is not None:
        record = {"seed": seed, "preset": preset, "similarity": similarity, "init": init}
        extra = {**record, **{f"seconds/{k}": round(v, 2) for k, v in seconds.items()}}
        files = write_results(Path(out), method, pair, evaluation, inverse, extra)
    return Result(method.transform(), evaluation, method, pair, seconds, files)


def initial(pair: Pair, init: str, seed: int = 0) -> Tensor:
    """The start A of a pair by name, or from a file."""
    if init in STARTS:
        windows = [robust_window(i) for i in (pair.fixed, pair.moving)]
        return find_start(pair.fixed, pair.moving, init, windows, pair.fixed_mask, pair.moving_mask, seed=seed)  # type: ignore[arg-type]
    return read_matrix(init)


def fit(method: PairRegistration, pair: Pair, steps: int, device: str = "auto", progress: bool = False) -> None:
    """Fit a method to a pair with Lightning's loop; leaves it on the CPU, in evaluation mode."""
    with quiet():
        trainer = lightning.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="gpu" if device == "cuda" else device,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
            callbacks=[RunProgress()] if progress else [],
            log_every_n_steps=10,
        )
        method.pair = pair
        on_interrupt = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(method, train_dataloaders=step_loader(100))
        except SystemExit:  # Lightning ends the process on Ctrl-C with code 1, and ignores Ctrl-C from then on
            signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from None
    method.cpu().eval()


def check_overlap(pair: Pair) -> None:
    """Refuse images that share nothing, warn where they share little: no similarity can bring them together.

    Raises:
        UserError: the start maps none of the fixed points into the moving image, or none into its mask.
    """
    generator = torch.Generator().manual_seed(0)
    x = PointSampler(pair.domain, pair.fixed_mask)(10_000, "cpu", generator)
    target = transform_points(pair.moving.domain.world_to_voxel @ pair.start @ pair.domain.normalised_to_world, x)
    share = pair.moving.domain.contains_voxels(target).float().mean().item()
    advice = "look at the affines of both headers, or at --init"
    if share == 0:
        raise UserError(f"{pair.name}: expected images that overlap, found no common point after the start; {advice}")
    if pair.moving_mask is not None and not bool(nearest(pair.moving_mask, target).any()):
        raise UserError(
            f"{pair.name}: the start maps no fixed point into the moving mask; look at the mask, or {advice}"
        )
    if share < MINIMAL_OVERLAP:
        warnings.warn(
            f"{pair.name}: the start maps only {100 * share:.0f}% of the fixed points into the moving image; {advice}",
            RegistrationWarning,
            stacklevel=3,
        )


def main(args: list[str]) -> int:
    """Parse the command line, register, and say where the results are."""
    parser = command_parser(
        "register", "Register a moving image onto a fixed one and write the results into a folder.", EXAMPLE
    )
    parser.add_argument("fixed", type=str, help="image whose grid the results are on")
    parser.add_argument("moving", type=str, help="image that is warped onto it")
    parser.add_argument("--out", type=str, required=True, help="folder for the results")
    parser.add_argument("--fixed-mask", type=str | None, help="where the fixed image counts: a file, or 'lungs' (CT)")
    parser.add_argument("--moving-mask", type=str | None, help="as above, of the moving image")
    parser.add_argument("--fixed-points", type=str | None, help="CSV x,y,z of landmarks, to measure the error")
    parser.add_argument("--moving-points", type=str | None, help="CSV of the corresponding moving landmarks")
    parser.add_argument("--points-space", choices=get_args(PointsSpace), default="ras", help="frame of the CSV files")
    parser.add_argument("--fixed-labels", type=str | None, help="label volume of the fixed image, for Dice")
    parser.add_argument("--moving-labels", type=str | None, help="label volume to carry onto the fixed grid")
    parser.add_argument("--similarity", choices=list(SIMILARITIES), default="lncc", help="what is compared")
    parser.add_argument("--preset", choices=list(PRESETS), default="accurate", help="size of network and fit")
    parser.add_argument("--init", type=str, default="affine", help="none, rigid, affine or a file with a 4 x 4 matrix")
    parser.add_argument("--seed", type=int, default=0, help="of weights and points")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where the fit runs")
    parser.add_argument("--inverse", action="store_true", help="also write inverse_displacement.nii.gz")
    parser.add_argument("--exact", action="store_true", help="evaluate the network at every voxel")
    options = parser.parse_args(args).as_dict()
    begin = time.perf_counter()
    result = register(**options, progress=True)
    print(summary(result.metrics))
    print(f"  time       {time.perf_counter() - begin:.1f} s (fit {result.seconds['fit']:.1f} s)")
    print(f"results in {options['out']}")
    return 0
