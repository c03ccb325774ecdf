"""``medinr register fixed moving``: two images in, results out, no YAML."""

import itertools
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from medinr import io
from medinr.callbacks import BestState, EndStages, RunProgress, StopOnInterrupt
from medinr.commands.checks import REGISTER_WRITES, check_device, check_inputs_stay, check_writable
from medinr.commands.pairs import check_overlap, make_pair, sliding_regions
from medinr.commands.presets import (
    ACROSS_CONTRASTS,
    BOTH_WAYS_VOXELS,
    ON_GRIDS,
    PRESETS,
    SIMILARITIES,
    PresetName,
    SimilarityName,
    recommended,
)
from medinr.commands.quiet import noted, quiet
from medinr.data.base import step_loader
from medinr.data.pair import Pair
from medinr.errors import RegistrationWarning, UserError
from medinr.fields import Transform
from medinr.io import PointsSpace
from medinr.losses import LocalNCC
from medinr.methods import CycleConsistentRegistration, RefinedRegistration, Refinement, RegistrationModule
from medinr.methods.levels import robust_window, robust_windows, windowed
from medinr.results import Evaluation, evaluate, write_results
from medinr.start import find_start

STARTS = ("none", "rigid", "affine")


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
        interrupted: Ctrl-C ended the fit early; ``method`` holds the best state until then.
        step: the step that the state is of.
    """

    transform: Transform
    evaluation: Evaluation
    method: RegistrationModule
    pair: Pair
    seconds: dict[str, float]
    files: list[Path] = field(default_factory=list)
    interrupted: bool = False
    step: int = 0

    @property
    def metrics(self) -> dict[str, float]:
        return self.evaluation.metrics


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
    fixed_guides: Any = None,
    moving_guides: Any = None,
    landmark_weight: float = 10.0,
    fixed_exclude: Any = None,
    moving_exclude: Any = None,
    multichannel: bool = False,
    similarity: SimilarityName | None = None,
    preset: PresetName = "accurate",
    init: str = "affine",
    sliding: str | Path = "auto",
    seed: int = 0,
    device: str = "auto",
    inverse: bool = False,
    uncertainty: bool = False,
    exact: bool = False,
    write: Sequence[str] = (),
    report: bool = False,
    progress: bool = False,
    keep_interrupted: bool = False,
) -> Result:
    """Register ``moving`` onto ``fixed``: the function behind the command of the same name.

    Args:
        fixed, moving: path, nibabel or SimpleITK image, or `Image`; grids, orientations, fields of view may differ. A
            list of these: the channels of one image, on one grid. 2-D images and single slices move in their plane.
        out: folder for the results (None: nothing is written).
        fixed_mask: where the fixed image counts: a file, an array-like image on the same grid, or ``"lungs"``.
        moving_mask: samples that map outside it carry no weight.
        fixed_points, moving_points: landmarks (CSV ``x,y,z`` or tensor [n, 3]), only to measure the error.
        points_space: of CSV files, in and out: ``ras`` or ``lps`` mm, or ``voxel`` (0-based).
        fixed_labels, moving_labels: label volumes: carried along, and compared.
        fixed_guides, moving_guides: landmarks as above that the registration is to follow; no error is measured there.
        landmark_weight: how strongly; at 10, a mean distance of 10 mm left counts as much as images that do not
            correlate at all.
        fixed_exclude, moving_exclude: masks of regions that are not compared (a lesion); the map stays smooth there.
        multichannel: the last axis of 4-D images holds channels (without it a 4-D image is an error).
        similarity: ``lncc`` (local NCC), ``ncc`` or ``mse``; ``multimodal`` (squared local NCC), ``nmi`` or ``mind``
            (MIND-SSC) for images of different contrast. Default: the preset's.
        preset: ``fast``, ``accurate``, or ``multimodal``: as accurate, with the similarity of that name. The latter two
            fit the lattices in both directions, as with ``uncertainty``, where the images show different bodies
            (`Refinement.agreement`), nothing slides, and the fixed image has at most 2 million voxels.
        init: ``none``, ``rigid``, ``affine``, or a file with a transform from fixed to moving: 4 x 4 numbers (RAS mm),
            or one of ITK, ANTs or Slicer (.tfm, .txt, .mat, .h5), or a displacement field (5-D NIfTI, Learn2Reg). What
            is not linear in it is where the lattice starts.
        sliding: what slides along what: ``lungs`` (of a CT) along all else, a label volume of regions on the fixed
            grid, ``none``; ``auto`` is ``lungs`` where both images are chest CT without masks. Each region then has a
            smooth map of its own, and the displacement may jump between them. With local NCC, not with ``uncertainty``.
        seed: of weights and points; on a CPU the same seed gives the same result.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        inverse: also write the inverse displacement, on the moving grid.
        uncertainty: fit both directions (`CycleConsistentRegistration`): the result is the midpoint of the forward map
            and the inverse of the backward one, and the gap between them is written in mm; over twice the time.
        exact: evaluate the network at every voxel instead of a lattice with a measured error below 0.05 mm.
        write: the transform in further forms: ``h5`` (composite of ITK, one file), ``affine`` (affine.tfm and residual
            displacement), ``l2r`` (Learn2Reg's displacement in voxels).
        report: also write report.html: one page, complete in itself, with all that is to be looked at.
        progress: show a progress bar.
        keep_interrupted: Ctrl-C in the fit ends it, and the best state so far is evaluated, written and returned (the
            command does this); False lets KeyboardInterrupt pass and writes nothing.

    Raises:
        UserError: a file or value that cannot be used.
        KeyboardInterrupt: Ctrl-C, or with ``keep_interrupted`` the second one; nothing is written then.
    """
    for name, value, known in (("preset", preset, PRESETS), ("similarity", similarity, SIMILARITIES)):
        if value is not None and value not in known:
            raise UserError(f"{name}: expected one of {', '.join(known)}, got {value}")
    similarity = similarity or PRESETS[preset].similarity
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed: expected a whole number from 0 to 4294967295, got {seed}")
    if init not in STARTS and not Path(init).exists():
        raise UserError(f"--init: expected {', '.join(STARTS)} or a file with a transform, got {init}")
    if landmark_weight < 0:
        raise UserError(f"--landmark-weight: expected 0 or more, got {landmark_weight}")
    check_device(device)
    write = io.check_formats(write)
    if out is not None:
        check_writable(out)
        given = (fixed, moving, fixed_mask, moving_mask, fixed_points, moving_points, fixed_labels, moving_labels,
                 fixed_guides, moving_guides, fixed_exclude, moving_exclude, init, sliding)  # fmt: skip
        check_inputs_stay(out, given, REGISTER_WRITES)
    with noted() as said:
        pair = make_pair(
            fixed, moving, fixed_mask, moving_mask, fixed_points, moving_points, points_space, fixed_labels,
            moving_labels, fixed_guides, moving_guides, fixed_exclude, moving_exclude, multichannel,
        )  # fmt: skip
        if "l2r" in write:
            io.check_learn2reg_grids(pair.domain, pair.moving.domain)
        clock = [time.perf_counter()]
        lightning.seed_everything(seed, verbose=False)
        matrix, residual = initial(pair, init, seed, similarity in ACROSS_CONTRASTS)
        pair = replace(pair, start=matrix)
        check_overlap(pair)
        with_lattice = PRESETS[preset].refines(similarity) and residual is None and not uncertainty
        pair = replace(pair, fixed_regions=sliding_regions(pair, sliding, with_lattice))
    clock.append(time.perf_counter())
    weight = 0.0 if pair.fixed_guides is None else landmark_weight
    regions = 1 if pair.fixed_regions is None else 1 + int(pair.fixed_regions.max())
    forward = recommended(preset, similarity, weight, pair.domain, regions)
    if residual is not None:
        if not isinstance(forward, RefinedRegistration):
            raise UserError(
                f"--init {init}: expected a linear transform with --similarity {similarity}, found displacements; "
                f"use --similarity {' or '.join(ON_GRIDS)}"
            )
        if uncertainty:
            raise UserError(f"--init {init}: expected a linear transform with --uncertainty, found displacements")
        forward.begin_at(residual, pair.domain)
    both = uncertainty
    if not both and PRESETS[preset].both_ways and isinstance(forward, RefinedRegistration):
        affordable = regions == 1 and residual is None and pair.domain.n_voxels <= BOTH_WAYS_VOXELS
        both = affordable and unlike(forward.refinement, pair, device)
    method: RegistrationModule = CycleConsistentRegistration(forward, unit="voxel") if both else forward
    steps = sum(forward.steps) if isinstance(forward, RefinedRegistration) else PRESETS[preset].steps
    step, interrupted = fit(method, pair, steps, device, progress, keep_interrupted)
    clock.append(time.perf_counter())
    evaluation = evaluate(method.transform(), pair, exact)
    clock.append(time.perf_counter())
    seconds = dict(zip(("start", "fit", "evaluation"), (b - a for a, b in itertools.pairwise(clock)), strict=True))
    files: list[Path] = []
    if out is not None:
        settings: dict[str, Any] = {"fixed": pair.fixed.source, "moving": pair.moving.source}
        masks = {"fixed mask": fixed_mask, "moving mask": moving_mask}
        settings |= {k: str(v) if isinstance(v, str | Path) else "given" for k, v in masks.items() if v is not None}
        settings["method"] = type(method).__name__
        record: dict[str, Any] = {"seed": seed, "preset": preset, "similarity": similarity, "init": init}
        record["sliding_regions"] = regions
        record |= {"interrupted": interrupted, "step": step}
        extra = {**record, **{f"seconds/{k}": round(v, 2) for k, v in seconds.items()}}
        if interrupted:
            said.append(f"The fit was interrupted: this is the best state until then, of step {step} of {steps}.")
        files = write_results(
            Path(out), method, pair, evaluation, inverse, extra, write, report, settings | extra, said, points_space
        )
    return Result(method.transform(), evaluation, method, pair, seconds, files, interrupted, step)


def unlike(refinement: Refinement, pair: Pair, device: str = "auto") -> bool:
    """Whether two images show different bodies, by the first stage of a registration (`Refinement.agreement`)."""
    short = refinement.changed(shrinks=refinement.shrinks[:2], steps=(refinement.steps[0], 1)[: len(refinement.steps)])
    probe = RefinedRegistration(None, short, LocalNCC())
    fit(probe, pair, sum(short.steps), device)
    return bool(probe.unlike[0] > 0)


def initial(pair: Pair, init: str, seed: int = 0, multimodal: bool = False) -> tuple[Tensor, Tensor | None]:
    """The start phi_0(p) = A(p + d(p)) of a pair by name, or from a file (`medinr.io.read_start`); d may be None.

    ``multimodal``: a start by name expects no like intensities of the two images.
    """
    if init in STARTS:
        # Each channel in its own window; the start looks at their mean.
        fixed, moving = (
            replace(i, data=windowed(i.data, robust_windows(i))) if len(i.data) > 1 else i
            for i in (pair.fixed, pair.moving)
        )
        windows = [(0.0, 1.0) if len(i.data) > 1 else robust_window(i) for i in (fixed, moving)]
        masks = (pair.fixed_mask, pair.moving_mask)
        return find_start(fixed, moving, init, windows, *masks, multimodal=multimodal, seed=seed), None  # type: ignore[arg-type]
    matrix, residual = io.read_start(init, pair.domain)
    if float(torch.linalg.det(matrix[:3, :3])) < 0:
        warnings.warn(f"--init {init}: it mirrors the image; is it of these two?", RegistrationWarning, stacklevel=2)
    return matrix, residual


def fit(
    method: RegistrationModule,
    pair: Pair,
    steps: int,
    device: str = "auto",
    progress: bool = False,
    keep_interrupted: bool = False,
) -> tuple[int, bool]:
    """Fit a method to a pair with Lightning's loop; leaves it on the CPU, in evaluation mode.

    Stages on whole grids end when they have converged (`EndStages`).

    Returns:
        The step that the weights are of, and whether Ctrl-C ended the fit before its time (``keep_interrupted``).

    Raises:
        KeyboardInterrupt: Ctrl-C, or the second one with ``keep_interrupted``.
    """
    best, stop = BestState(), StopOnInterrupt()
    callbacks: list[Callback] = [RunProgress()] if progress else []
    if isinstance(method, RefinedRegistration):
        callbacks.append(EndStages())
    if keep_interrupted:
        callbacks += [best, stop]
    with quiet(), stop if keep_interrupted else nullcontext():
        trainer = lightning.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="gpu" if device == "cuda" else device,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
            callbacks=callbacks,
            log_every_n_steps=10,
        )
        method.pair = pair
        on_interrupt = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(method, train_dataloaders=step_loader(100))
        except SystemExit:  # Lightning ends the process on Ctrl-C with code 1, and ignores Ctrl-C from then on
            signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from None
    step = trainer.global_step
    end = method.schedule()[-1] if isinstance(method, RefinedRegistration) else steps
    interrupted = stop.interrupted and step < end
    if interrupted:
        step = best.restore(trainer, method)
        print(
            f"medinr: interrupted at step {trainer.global_step} of {steps}: the best state so far, of step {step}, is "
            "evaluated and written; Ctrl-C again ends at once",
            file=sys.stderr,
        )
    method.cpu().eval()
    return step, interrupted
