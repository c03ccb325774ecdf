"""Single slices: the map stays in the plane, and all that is measured of it is two-dimensional."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

import medinr
from medinr import io, jets
from medinr.commands.presets import PRESETS, Preset
from medinr.data.report import check_pair
from medinr.errors import UserError
from medinr.fields import SIREN, as_map
from medinr.fields.dense import evaluate_dense
from medinr.fields.planar import PlanarMap, within
from medinr.fields.transform import Transform
from medinr.losses import LocalNCC
from medinr.methods import PairRegistration
from medinr.sampling import PointSampler, fitted_offsets, patch_offsets
from medinr.space import Domain, transform_points
from tests.medinr import grids, pairs
from tests.medinr.tolerances import assert_close

FLAT = Domain.of((40, 36, 1), [[2, 0, 0, -39], [0, 2, 0, -35], [0, 0, 5, 10], [0, 0, 0, 1]])


def tilted(axis: int, kind: str = "oblique") -> Domain:
    """A single slice across any array axis, turned in space."""
    shape = [18, 22, 15]
    shape[axis] = 1
    return grids.domain(kind, (shape[0], shape[1], shape[2]))


def wild_map(seed: int = 0) -> SIREN:
    torch.manual_seed(seed)
    return pairs.gentle(SIREN(hidden=(16, 16), omega=4.0, zero_output=False), 0.5)


def warp(world: Tensor) -> Tensor:
    """phi in the plane: up to some 5 mm."""
    x, y, z = world.double().unbind(-1)
    return torch.stack((x + 4 * torch.sin(y / 18 + 0.5), y + 3 * torch.cos(x / 16), z), dim=-1)


@pytest.mark.parametrize("kind", grids.ALL)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_plane_is_that_of_the_slice(axis: int, kind: str) -> None:
    domain = tilted(axis, kind)
    assert domain.flat_axis == axis
    plane = domain.in_plane
    assert plane is not None
    x = transform_points(domain.voxel_to_normalised, domain.voxels().double())
    assert_close(x @ plane, x)
    assert_close(plane @ plane, plane)
    assert float(plane.trace()) == pytest.approx(2)
    assert grids.domain(kind).flat_axis is None and grids.domain(kind).in_plane is None


def test_jets_of_a_planar_map_are_torch_funcs() -> None:
    domain = tilted(1)
    field = within(as_map(wild_map()).double(), domain)
    assert isinstance(field, PlanarMap) and within(field, domain) is field
    x = torch.rand(5, 3, dtype=torch.float64) - 0.5

    def at(p: Tensor) -> Tensor:
        return field.displacement(p[None])[0]

    found = field.displacement_jet(jets.seed(x, 2))
    assert_close(found.value, field.displacement(x))
    assert_close(found.jacobian, torch.func.vmap(torch.func.jacrev(at))(x), 1e-10)
    hessian = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(at)))(x)
    assert found.second is not None
    for k, (a, b) in enumerate(found.pairs):
        assert_close(found.second[k], hessian[:, :, a, b], 1e-9)
    assert_close(field.jet(jets.seed(x, 1)).value, field(x))


def test_displacement_and_determinant_are_of_the_plane() -> None:
    """u has no normal part and no derivative across; det J is that of the 2 x 2 Jacobian; the inverse undoes phi."""
    domain = tilted(0)
    transform = Transform(as_map(wild_map()), domain, torch.eye(4))
    dense = evaluate_dense(transform, domain, exact=True)
    linear = domain.voxel_to_world[:3, :3]
    normal = torch.linalg.cross(linear[:, 1], linear[:, 2])
    normal = normal / normal.norm()
    u = dense.displacement.double()
    assert u.norm(dim=-1).max() > 1
    assert (u @ normal).abs().max() < 1e-4 * u.norm(dim=-1).max()
    world = transform_points(domain.voxel_to_world, domain.voxels().double())
    j = transform.jacobian(world)
    assert_close(j @ normal, normal.expand(len(world), 3), 1e-5)
    frame = torch.linalg.qr(linear[:, 1:]).Q
    assert_close(torch.linalg.det(frame.T @ j @ frame), jets.det(j), 1e-5)
    assert_close(dense.det.flatten().double(), jets.det(j), 1e-4)
    back, residual = transform.inverse(transform(world))
    assert residual.max() < 2e-3 and (back - world).norm(dim=1).max() < 1e-2


@pytest.mark.parametrize("mask", [None, "half"])
def test_points_are_drawn_in_the_plane(mask: str | None) -> None:
    domain = tilted(1)
    half = torch.zeros(domain.shape, dtype=torch.bool)
    half[: domain.shape[0] // 2] = True
    x = PointSampler(domain, None if mask is None else half)(500, "cpu")
    voxels = transform_points(domain.normalised_to_voxel, x.double())
    assert voxels[:, 1].abs().max() < 1e-4
    assert voxels[:, 0].std() > 1 and voxels[:, 2].std() > 1


def test_patches_fit_into_thin_images() -> None:
    """In the plane of one slice, inside a few slices, unchanged in a volume."""
    offsets = patch_offsets(8.0)
    assert torch.equal(fitted_offsets(offsets, Domain.of((20, 20, 20), torch.eye(4))), offsets)
    domain = tilted(2)
    across = domain.world_to_voxel[2, :3].float()
    flat = fitted_offsets(offsets, domain)
    assert len(flat) == 27 and (flat @ across).abs().max() < 1e-5
    assert len(fitted_offsets(offsets, domain, distinct=True)) == 9
    thin = grids.domain("oblique", (18, 22, 3))
    voxels = fitted_offsets(offsets, thin) @ thin.world_to_voxel[:3, :3].T.float()
    assert voxels[:, 2].abs().max() == pytest.approx(1, abs=1e-5)
    assert voxels[:, 0].abs().max() == pytest.approx(8 / 1.5, abs=1e-4)


@pytest.mark.parametrize("slices", [1, 2, 3])
def test_thin_images_keep_their_samples(slices: int) -> None:
    """Of a patch drawn inside, all of a slice counts, and most of a few slices."""
    domain = Domain.of((40, 36, slices), FLAT.affine)
    pair = pairs.pair()
    pair = type(pair)("thin", *(pairs.sampled(domain, pairs.texture) for _ in range(2)))
    method = PairRegistration(SIREN(hidden=(8,)), LocalNCC(), points=64, pyramid_mm=(8.0,))
    method.attach(pair)
    x = method.sampler(400, "cpu")
    similarity, overlap, outside = method.compare(x, method.displacement_jet(x, 1), method.levels[0])
    assert float(overlap) > (0.75 if slices == 1 else 0.5)  # what is lost, is lost at the four sides, and half a slice
    assert similarity < 0.1 and outside == 0


def test_a_slice_that_moves_away_is_pulled_back() -> None:
    """The start of every point counts as inside: rounding across the slice must not switch the term off."""
    pair = type(pairs.pair())("flat", *(pairs.sampled(tilted(2), pairs.texture) for _ in range(2)))
    method = PairRegistration(SIREN(hidden=(8,)), LocalNCC(), points=64)
    method.attach(pair)
    x = method.sampler(400, "cpu")
    away = (100 * pair.domain.voxel_to_normalised[:3, 0]).float()
    _, overlap, outside = method.compare(
        x, jets.Jet(torch.cat((away.expand(1, 400, 3), torch.zeros(3, 400, 3))), 3), method.levels[0]
    )
    assert overlap == 0 and float(outside) == pytest.approx((100 - 8.5) * 1.5 / 100, rel=0.15)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[medinr.Result, Path]:
    out = tmp_path_factory.mktemp("flat")
    patch = pytest.MonkeyPatch()
    patch.setitem(PRESETS, "fast", Preset((64, 64), 768, 220))
    points = torch.cartesian_prod(torch.linspace(-26, 26, 6), torch.linspace(-24, 24, 6), torch.tensor([10.0])).double()
    fixed, moving = pairs.sampled(FLAT, pairs.texture, warp), pairs.sampled(FLAT, pairs.texture)
    for name, image in (("fixed", fixed), ("moving", moving)):
        nib.save(nib.Nifti1Image(image.data[0, :, :, 0].numpy(), np.array(FLAT.affine)), out / f"{name}.nii.gz")
    result = medinr.register(
        out / "fixed.nii.gz", out / "moving.nii.gz", out / "result", fixed_points=points, moving_points=warp(points),
        preset="fast", init="none", inverse=True,
    )  # fmt: skip
    patch.undo()
    return result, out / "result"


def test_a_known_deformation_of_a_slice_is_found(fitted: tuple[medinr.Result, Path]) -> None:
    result, out = fitted
    assert result.metrics["tre/initial_mean"] > 3
    assert result.metrics["tre/mean"] < 0.6
    assert result.metrics["folding/percent"] == 0
    assert float(result.evaluation.displacement[..., 2].abs().max()) == 0
    assert json.loads((out / "metrics.json").read_text(encoding="utf-8"))["tre/mean"] == result.metrics["tre/mean"]


def test_files_of_a_slice(fitted: tuple[medinr.Result, Path]) -> None:
    result, out = fitted
    assert nib.load(out / "warped.nii.gz").shape == FLAT.shape
    field, domain = io.read_displacement(out / "displacement.nii.gz")
    assert domain.shape == FLAT.shape
    assert_close(field, result.evaluation.displacement, 1e-4)
    inverse, _ = io.read_displacement(out / "inverse_displacement.nii.gz")
    assert float(inverse[..., 2].abs().max()) == 0
    centre = torch.tensor([[18, 16, 0]]).double()
    there = transform_points(FLAT.voxel_to_world, centre)
    back = there + inverse[18, 16, 0].double()
    assert (result.transform(back) - there).norm() < 0.01
    assert (out / "figures" / "registration.png").stat().st_size > 10_000


def test_slices_that_cannot_be_compared_are_one_line() -> None:
    flat, volume = pairs.sampled(FLAT, pairs.texture), pairs.sampled(pairs.CUBE, pairs.texture)
    across = pairs.sampled(Domain.of((40, 1, 36), FLAT.affine), pairs.texture)
    line = pairs.sampled(Domain.of((40, 1, 1), FLAT.affine), pairs.texture)
    make = type(pairs.pair())
    for fixed, moving, message in (
        (flat, volume, "two volumes or two single slices"),
        (volume, flat, "two volumes or two single slices"),
        (flat, across, "planes at 90 degrees"),
        (line, line, "a volume or a slice"),
    ):
        with pytest.raises(UserError, match=message):
            check_pair(make("pair", fixed, moving))
