"""Published INRs on a pair's folder, at one declared reduced size, through medinr's Python functions.

    python -m tests.benchmarks.comparison_inr idir_published WORK/pairs/popi displacement.nii.gz --seed 0 [--lr 1e-4]

Reduced: 128 units a layer (published: 256), 2,048 points a step (10,000), 1,000 steps (IDIR 2,500, cIDIR 50,000). All
else is as published, as far as that is known: IDIR with global NCC, |det - 1| times 0.05, points in the fixed mask,
axes normalised one by one, no pyramid, output weights that do not start at zero; cIDIR with NCC and alpha times the
bending energy in normalised coordinates, one alpha a step, uniform on [0, 1], chosen by the Dice of the two masks;
cycle-consistent as experiments/ccidir_dirlab.yaml; SINR with a lattice of 8 mm (published: 2 mm; mouse: 8 voxels), NCC
of whole grids of at most 200,000 points, bending energy times 1e-3 in normalised coordinates (weight not printed), and
300 steps, each of which costs as much as four of the others. The masks, which the other tools do not get, are those of
the lungs (CT) or of the brain (mouse).
"""

import argparse
from pathlib import Path

import lightning
import torch

from medinr import io
from medinr.commands.register import fit
from medinr.data.lungs import lung_mask
from medinr.data.pair import Pair
from medinr.fields import SINR, SIREN, HarmonizedSIREN
from medinr.fields.dense import evaluate_dense
from medinr.losses import NCC, Bending, Jacobian, SymmetricJacobian
from medinr.methods import (
    ConditionedRegistration,
    CycleConsistentRegistration,
    PairRegistration,
    RegistrationMethod,
    RegistrationModule,
    VolumeRegistration,
)
from medinr.space import REFERENCE_LENGTH_MM

HIDDEN = (128, 128, 128)
POINTS = 2048
STEPS = 1000


def read_pair(folder: Path) -> Pair:
    """Images and masks of a pair's folder."""
    fixed, moving = (io.read_image(folder / f"{name}.nii.gz") for name in ("fixed", "moving"))
    if folder.name.startswith("mouse"):  # extracted brains: nothing around them
        masks = [image.data[0] > 0 for image in (fixed, moving)]
    else:
        masks = [lung_mask(image) for image in (fixed, moving)]
    return Pair(folder.name, fixed, moving, masks[0], masks[1])


def idir(pair: Pair, lr: float, points: int = POINTS) -> RegistrationMethod:
    """experiments/idir_dirlab.yaml at the reduced size."""
    low, high = (f(i.data.amin() if f is min else i.data.amax() for i in (pair.fixed, pair.moving)) for f in (min, max))
    return PairRegistration(
        SIREN(hidden=HIDDEN, omega=32.0, zero_output=False),
        NCC(),
        {"jacobian": Jacobian(0.05)},
        points=points,
        pyramid_mm=(0.0,),
        lr=lr,
        overlap_weight=0.0,
        window=(float(low), float(high)),
        jitter=False,
        scale="per-axis",
    )


def cidir(pair: Pair, lr: float) -> RegistrationMethod:
    """The paper's losses, prior and choice of alpha at the reduced size."""
    normalised = (pair.domain.unit_mm / REFERENCE_LENGTH_MM) ** 2
    return ConditionedRegistration(
        HarmonizedSIREN(hidden=HIDDEN, log_input=False),
        NCC(),
        {"bending": Bending(normalised)},
        conditioned=["bending"],
        prior="uniform",
        alphas=1,
        select="dice",
        points=POINTS,
        pyramid_mm=(0.0,),
        lr=lr,
    )


def ccidir(pair: Pair, lr: float, points: int = POINTS) -> CycleConsistentRegistration:
    """experiments/ccidir_dirlab.yaml at the reduced size."""
    values = [i.data for i in (pair.fixed, pair.moving)]
    method = PairRegistration(
        SIREN(hidden=HIDDEN, omega=32.0, zero_output=False),
        NCC(),
        {"symmetric_jacobian": SymmetricJacobian(0.05, published=True)},
        points=points,
        pyramid_mm=(0.0,),
        lr=lr,
        overlap_weight=0.0,
        window=(float(min(v.amin() for v in values)), float(max(v.amax() for v in values))),
        jitter=False,
        scale="per-axis",
    )
    return CycleConsistentRegistration(method, weight=1e-3, unit="voxel", inference="second-order")


def sinr(pair: Pair, lr: float) -> RegistrationMethod:
    """SINR at the reduced size."""
    normalised = (pair.domain.unit_mm / REFERENCE_LENGTH_MM) ** 2
    network = SIREN(hidden=HIDDEN, omega=30.0, zero_output=False)
    field = SINR(network, 8.0, "voxel" if pair.name.startswith("mouse") else "mm")
    return VolumeRegistration(field, NCC(), {"bending": Bending(1e-3 * normalised)}, most=200_000, points=POINTS, lr=lr)


METHODS = {"idir_published": idir, "cidir": cidir, "ccidir": ccidir, "sinr": sinr}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pair = read_pair(given.folder)
    lightning.seed_everything(given.seed, verbose=False)
    method: RegistrationModule = METHODS[given.method](pair, given.lr)  # type: ignore[operator]
    fit(method, pair, given.steps, "cpu")
    if isinstance(method, ConditionedRegistration):
        method.settle()
    dense = evaluate_dense(method.transform(), pair.domain)
    io.write_displacement(given.out, dense.displacement, pair.domain)


if __name__ == "__main__":
    main()
