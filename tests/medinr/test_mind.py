"""MIND-SSC on sparse patches, against descriptors computed on a whole volume; squared local NCC."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medinr.losses import MINDSSC, LocalNCC
from medinr.losses.mind import mind_ssc
from medinr.sampling import interpolate
from tests.medinr.tolerances import assert_close

MEASURE = MINDSSC()


def draw(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def dense_mind(volume: Tensor, floor: float) -> Tensor:
    """MIND-SSC [12, X, Y, Z] of a whole volume by its definition: shift, subtract, square, average over a cross."""
    steps = torch.cat((torch.eye(3), -torch.eye(3))).int()

    def shifted(by: Tensor) -> Tensor:
        return torch.roll(volume, tuple((-by).tolist()), (0, 1, 2))

    distances = []
    for a, b in itertools.combinations(steps, 2):
        if int(a @ b) == 0:
            square = (shifted(a) - shifted(b)) ** 2
            patch = [square] + [torch.roll(square, tuple(s.tolist()), (0, 1, 2)) for s in steps]
            distances.append(torch.stack(patch).mean(0))
    d = torch.stack(distances)
    return torch.exp(-(d - d.min(0).values) / (d.mean(0) + floor))


def sampled(volume: Tensor, voxels: Tensor, measure: MINDSSC, level_mm: float = 0.0) -> Tensor:
    return interpolate(volume[None], voxels[:, None] + measure.offsets(level_mm).to(volume))[0]


@pytest.mark.parametrize("level_mm", [0.0, 2.0])
def test_descriptors_are_those_of_the_dense_definition(level_mm: float) -> None:
    """One voxel is one step, on a volume of 1 mm: at voxel centres both compute the same twelve numbers."""
    measure = MINDSSC(step_mm=1.0, per_level=0.5)
    stride = round(1 + 0.5 * level_mm)
    volume = draw(16, 15, 14)
    voxels = torch.stack([torch.randint(4, n - 4, (60,)) for n in volume.shape], dim=1)
    samples = sampled(volume, voxels.double(), measure, level_mm)
    found = mind_ssc(samples, measure.differences.double(), None, 1e-3)
    wanted = []
    for v in voxels:  # every second voxel around the point, if the step is two
        lattice = volume[tuple(slice(int(i) % stride, None, stride) for i in v)]
        at = tuple(int(i) // stride for i in v)
        wanted.append(dense_mind(lattice, 1e-3)[(slice(None), *at)])
    assert_close(found.sort(1).values, torch.stack(wanted).sort(1).values)
    assert found.std() > 0.05


def test_loss_is_the_mean_difference_of_dense_descriptors() -> None:
    """With the identity as the transform, over voxels whose lattice lies inside."""
    one, other = draw(12, 12, 12), draw(12, 12, 12)
    inner = torch.cartesian_prod(*[torch.arange(2, 10).double()] * 3)
    measure = MINDSSC(step_mm=1.0, floor=1e-3)
    found = measure(sampled(one, inner, measure), sampled(other, inner, measure))
    gap = (dense_mind(one, 1e-3) - dense_mind(other, 1e-3)).abs()
    assert_close(found, gap[:, 2:10, 2:10, 2:10].mean())


@pytest.mark.parametrize(("gain", "shift"), [(-1.0, 1.0), (0.3, 0.2), (-5.0, 0.0)])
def test_contrast_does_not_matter(gain: float, shift: float) -> None:
    measure = MINDSSC(floor=1e-12)
    a, b = draw(50, 25), draw(50, 25)
    assert_close(measure(a, gain * b + shift), measure(a, b), 1e-6)
    assert measure(a, gain * a + shift) < 1e-6 < 0.1 < measure(a, b)


def test_lattice() -> None:
    """25 samples up to two steps away; each of the 12 distances compares 7 with 7, always at a right angle's chord."""
    offsets = MINDSSC(step_mm=2.0, per_level=0.5).offsets(4.0)
    assert offsets.shape == (25, 3)
    assert set((offsets.abs().sum(1) / 4).tolist()) == {0.0, 1.0, 2.0}
    matrix = MEASURE.differences
    assert matrix.shape == (25, 84)
    assert torch.equal(matrix.clamp(min=0).sum(0), torch.ones(84)) and torch.equal(matrix.sum(0), torch.zeros(84))
    assert_close((offsets.T @ matrix).norm(dim=0), torch.full((84,), 4 * 2**0.5))
    with pytest.raises(ValueError, match="step_mm: expected a distance above 0, got 0"):
        MINDSSC(step_mm=0.0)


def test_masked_samples_do_not_count() -> None:
    a, b = draw(40, 25), draw(40, 25)
    mask = (draw(40, 25) > 0.3).double()
    spoiled = torch.where(mask > 0, b, 1e3)
    assert_close(MEASURE(a, spoiled, mask), MEASURE(a, b, mask))
    assert_close(MEASURE(a, b, torch.ones_like(a)), MEASURE(a, b))
    half = torch.cat((torch.ones(20, 25), torch.zeros(20, 25))).double()
    assert_close(MEASURE(a, b, half), MEASURE(a[:20], b[:20]))
    assert MEASURE(a, b, torch.zeros_like(a)) == 0


def test_what_is_left_of_a_masked_patch_by_hand() -> None:
    """All samples of one arm's tip are gone: the distances that need it are means over the others."""
    samples = draw(1, 25)
    measure = MINDSSC(floor=1e-3)
    place = int(measure.offsets(0.0)[:, 0].argmax())
    mask = torch.ones(1, 25, dtype=torch.float64)
    mask[0, place] = 0
    weight = (measure.differences[place] == 0).double().reshape(1, 12, 7)
    assert 0 < (weight == 0).sum() < 12
    square = (samples @ measure.differences.double()).reshape(1, 12, 7) ** 2
    d = (weight * square).sum(-1) / weight.sum(-1)
    wanted = torch.exp(-(d - d.min()) / (d.mean() + 1e-3))
    assert_close(mind_ssc(samples, measure.differences.double(), weight, 1e-3), wanted)


def test_gradient() -> None:
    a, b, mask = draw(4, 25), draw(4, 25).requires_grad_(), (draw(4, 25) > 0.2).double()
    assert torch.autograd.gradcheck(lambda m: MEASURE(a, m, mask), (b,))
    assert torch.autograd.gradcheck(lambda m: MEASURE(a, m), (b,))


def test_constant_patches_are_harmless() -> None:
    flat = torch.full((3, 25), 0.5, requires_grad=True)
    for mask in (None, torch.ones(3, 25), torch.zeros(3, 25)):
        value = MEASURE(torch.full((3, 25), 0.5), flat, mask)
        value.backward()
        assert flat.grad is not None
        assert value == 0 and torch.isfinite(flat.grad).all()


def test_descriptors_find_a_shift_under_inverted_contrast() -> None:
    """The loss over shifts of an inverted image is least at none; the signed local NCC is greatest there."""
    noise = torch.randn(1, 1, 26, 26, 26, dtype=torch.float64)
    volume = F.avg_pool3d(noise, 5, 1, 2)[0, 0]
    volume = (volume - volume.min()) / (volume.max() - volume.min())
    inner = torch.cartesian_prod(*[torch.arange(8, 18, 3).double()] * 3)
    ncc, square = LocalNCC(radius_mm=2.0), LocalNCC(radius_mm=2.0, signed=False)
    found: dict[str, list[float]] = {"mind": [], "signed": [], "square": []}
    mind = MINDSSC(step_mm=1.0)
    for shift in range(-3, 4):
        moved = inner + torch.tensor([shift, 0, 0]).double()
        found["mind"].append(float(mind(sampled(volume, inner, mind), sampled(1 - volume, moved, mind))))
        d = ncc.offsets(0.0).double()
        a, b = (interpolate(v[None], p[:, None] + d)[0] for v, p in ((volume, inner), (1 - volume, moved)))
        found["signed"].append(float(ncc(a, b)))
        found["square"].append(float(square(a, b)))
    for name, values in found.items():
        best = min(values) if name != "signed" else max(values)
        assert values.index(best) == 3, name
    assert found["mind"][3] < 1e-6 and found["square"][3] < 0.05 and found["signed"][3] > 1.95


def test_squared_local_ncc() -> None:
    a, b = draw(30, 27), draw(30, 27)
    measure = LocalNCC(floor=1e-12, signed=False)
    assert_close(measure(a, -3 * b + 1), measure(a, b), 1e-6)
    assert_close(measure(a[:1], b[:1]), 1 - (1 - LocalNCC(floor=1e-12)(a[:1], b[:1])) ** 2)
    mask = (draw(30, 27) > 0.2).double()
    assert torch.autograd.gradcheck(lambda m: measure(a[:3], m, mask[:3]), (b[:3].clone().requires_grad_(),))
