"""What may steer a fit beside the images: guiding landmarks, excluded regions, several channels, the foreground."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import medinr
from medinr import cli, io
from medinr.commands.presets import PRESETS, Preset
from medinr.commands.register import fit
from medinr.data.pair import Pair
from medinr.data.report import check_pair
from medinr.errors import UserError
from medinr.fields import SIREN
from medinr.losses import MSE, Barrier, LocalNCC
from medinr.methods import PairRegistration
from medinr.methods.levels import robust_windows, windowed
from medinr.methods.mixins import robust_distance
from medinr.sampling import PointSampler, informative
from medinr.space import Domain, Image, transform_points
from tests.medinr import pairs
from tests.medinr.tolerances import assert_close

SMALL = Domain.of((24, 24, 24), [[4, 0, 0, -46], [0, 4, 0, -46], [0, 0, 4, -46], [0, 0, 0, 1]])


def method(**options: object) -> PairRegistration:
    arguments = {"points": 256, "lr": 2e-3, "warmup": 0.05, "cosine": True, "pyramid_mm": (4.0,), **options}
    return PairRegistration(
        SIREN(hidden=(24, 24), omega=8.0, first_omega=4.0), LocalNCC(), {"fold": Barrier(10.0)}, **arguments
    )  # type: ignore[arg-type]


def noise(seed: int) -> Image:
    data = torch.rand(1, *SMALL.shape, generator=torch.Generator().manual_seed(seed))
    return Image(data, SMALL, "noise")


def shifted(points: Tensor) -> Tensor:
    return points + torch.tensor([6.0, -4.0, 2.0]).double()


def mean_gap(fitted: PairRegistration, fixed: Tensor, moving: Tensor) -> float:
    return (fitted.transform()(fixed) - moving).norm(dim=1).mean().item()


# -- guides --------------------------------------------------------------------------------------------------------


def test_robust_distance_is_quadratic_then_linear() -> None:
    gaps = torch.tensor([[0.01, 0, 0], [0, 100.0, 0]], dtype=torch.float64)
    assert_close(robust_distance(gaps), torch.tensor([0.01**2 / 2, 99.005]), 1e-5)


def test_guide_distance_is_that_of_the_whole_transform() -> None:
    """In 100 mm, through the start and the displacement, with a gradient that closes the gap."""
    found = pairs.plain_method()
    fixed = pairs.points()
    moving = shifted(fixed)
    want = robust_distance(found.transform()(fixed) - moving).mean() / 100
    to_moving = found.start @ found.domain.normalised_to_world
    distance = found.guide_distance(fixed, moving, to_moving)
    assert_close(distance.double(), want, 1e-5)
    distance.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in found.parameters())


def test_guides_pull_where_images_say_nothing() -> None:
    fixed = pairs.points(20, 40.0)
    other = pairs.points(60, 40.0)[20:]
    pair = Pair("noise", noise(1), noise(2), fixed_guides=fixed, moving_guides=shifted(fixed))
    guided, free = method(landmark_weight=10.0), method()
    fit(guided, pair, 120)
    fit(free, replace(pair, fixed_guides=None, moving_guides=None), 120)
    assert mean_gap(guided, fixed, shifted(fixed)) < 1
    assert mean_gap(guided, other, shifted(other)) < 3, "between the guides too"
    assert mean_gap(free, fixed, shifted(fixed)) > 4


def test_landmarks_of_the_evaluation_never_enter_the_fit(capsys: pytest.CaptureFixture[str]) -> None:
    fixed = pairs.points(20, 40.0)
    plain = Pair("noise", noise(1), noise(2))
    judged = replace(plain, fixed_points=fixed, moving_points=shifted(fixed))
    weights = []
    for pair in (plain, judged):
        torch.manual_seed(0)
        found = method(landmark_weight=10.0)
        fit(found, pair, 5)
        assert "landmarks do not guide this fit: expected guiding landmarks" in capsys.readouterr().err
        weights.append(torch.cat([p.flatten() for p in found.parameters()]))
    assert torch.equal(*weights)


def test_guides_without_a_weight_are_told() -> None:
    fixed = pairs.points(20, 40.0)
    with pytest.warns(UserWarning, match="expected a landmark_weight above 0, found none"):
        method().attach(Pair("noise", noise(1), noise(2), fixed_guides=fixed, moving_guides=fixed))
    with pytest.raises(UserError, match="landmark_weight: expected 0 or more"):
        method(landmark_weight=-1.0)


# -- excluded regions ----------------------------------------------------------------------------------------------


def ball(centre: tuple[float, float, float], radius: float) -> Tensor:
    world = transform_points(SMALL.voxel_to_world, SMALL.voxels().double())
    return ((world - torch.tensor(centre)).norm(dim=1) < radius).reshape(SMALL.shape)


@pytest.mark.parametrize("side", ["fixed", "moving"])
def test_a_lesion_distorts_the_map_unless_it_is_excluded(side: str) -> None:
    """Equal images but for a bright ball in one of them: the map is the identity only where the ball is excluded."""
    images = {s: pairs.sampled(SMALL, pairs.texture) for s in ("fixed", "moving")}
    lesion = ball((0, 0, 0), 14)
    images[side].data[0][lesion] += 1500
    pair = Pair("lesion", images["fixed"], images["moving"])
    largest, near = {}, ball((0, 0, 0), 30)
    for excluded in (False, True):
        torch.manual_seed(0)
        found = method()
        fit(found, replace(pair, **({f"{side}_exclude": ball((0, 0, 0), 20)} if excluded else {})), 60)
        moved = found.transform()
        world = transform_points(SMALL.voxel_to_world, near.nonzero().double())
        largest[excluded] = (moved(world) - world).norm(dim=1).mean().item()
    assert largest[True] < 0.25 * largest[False], largest
    assert largest[False] > 0.4


def test_excluded_voxels_carry_no_weight_and_are_still_regularised() -> None:
    pair = pairs.pair()
    half = torch.zeros(pairs.CUBE.shape, dtype=torch.bool)
    half[:16] = True
    found = PairRegistration(SIREN(hidden=(8,)), MSE(), points=64)
    shares = {}
    for name, both in {
        "none": (None, None),
        "fixed": (half, None),
        "moving": (None, half),
        "both": (half, ~half),
    }.items():
        found.levels = []
        found.attach(replace(pair, fixed_exclude=both[0], moving_exclude=both[1]))
        x = found.sampler(2000, "cpu", torch.Generator().manual_seed(0))
        assert x[:, 0].min() < -0.9, "points are drawn in the excluded half too"
        shares[name] = float(found.compare(x, found.displacement_jet(x, 0), found.levels[0])[1])
    assert shares["none"] == 1 and shares["both"] == 0
    assert shares["fixed"] == pytest.approx(0.5, abs=0.05) and shares["moving"] == pytest.approx(0.5, abs=0.05)


def test_an_exclusion_of_everything_is_one_line() -> None:
    pair = pairs.pair()
    mask = torch.zeros(pairs.CUBE.shape, dtype=torch.bool)
    mask[:5] = True
    for some in ({"fixed_exclude": torch.ones_like(mask)}, {"moving_mask": mask, "moving_exclude": mask}):
        with pytest.raises(UserError, match=r"exclude: expected some voxels .* to be left"):
            check_pair(replace(pair, **some))


# -- channels ------------------------------------------------------------------------------------------------------


def second(world: Tensor) -> Tensor:
    """Another texture, at another scale of intensities."""
    return 5000 + 40 * pairs.texture(world.double() + 37)


def two_channels(through: pairs.Warp | None) -> Image:
    images = [pairs.sampled(SMALL, f, through, "image") for f in (pairs.texture, second)]
    return io.stack_channels(images)


def test_each_channel_has_its_own_window_and_counts_the_same() -> None:
    image = two_channels(None)
    values = windowed(image.data, robust_windows(image))
    assert values.shape == image.data.shape
    assert_close(values.flatten(1).amin(1), torch.zeros(2))
    assert_close(values.flatten(1).amax(1), torch.ones(2))
    found = PairRegistration(SIREN(hidden=(8,)), MSE(), points=64)
    found.attach(Pair("two", two_channels(pairs.warp), image))
    x = found.sampler(500, "cpu")
    u = found.displacement_jet(x, 0)
    both = found.compare(x, u, found.levels[0])[0]
    alone = [
        found.compare(x, u, found.levels[0]._replace(fixed=f[None], moving=m[None]))[0]
        for f, m in zip(found.levels[0].fixed, found.levels[0].moving, strict=True)
    ]
    assert_close(both, sum(alone) / 2)
    assert len(found.state["windows"]) == 4


def test_images_of_different_channels_are_one_line() -> None:
    with pytest.raises(UserError, match="as many channels in both images, found 2 in the fixed and 1"):
        check_pair(Pair("two", two_channels(None), pairs.sampled(SMALL, pairs.texture)))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "fast", Preset((16, 16), 128, 4))


def test_the_command_takes_channels_guides_and_exclusions(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for side, image in (("fixed", two_channels(pairs.warp)), ("moving", two_channels(None))):
        for c, data in enumerate(image.data):
            io.write_image(tmp_path / f"{side}{c}.nii.gz", data, SMALL)
        io.write_image(tmp_path / f"{side}_lesion.nii.gz", ball((0, 0, 0), 15), SMALL)
    guides = pairs.points(8)
    io.write_points(tmp_path / "fixed.csv", guides)
    io.write_points(tmp_path / "moving.csv", pairs.warp(guides))
    options = ["--fixed-channel", "fixed1.nii.gz", "--moving-channel", "moving1.nii.gz"]
    options += [v for s in ("fixed", "moving") for v in (f"--{s}-exclude", f"{s}_lesion.nii.gz")]
    options += ["--fixed-guides", "fixed.csv", "--moving-guides", "moving.csv", "--landmark-weight", "3"]
    options = [str(tmp_path / o) if "." in o else o for o in options]
    images = [str(tmp_path / f"{side}0.nii.gz") for side in ("fixed", "moving")]
    out = tmp_path / "out"
    assert cli.main(["register", *images, "--out", str(out), "--preset", "fast", "--init", "none", *options]) == 0
    warped = [io.read_image(out / f"{name}.nii.gz").data for name in ("warped", "warped_channel2")]
    assert warped[0].mean().abs() < 500 < warped[1].mean()
    capsys.readouterr()
    fewer = [*options, "--moving-guides", str(tmp_path / "few.csv")]
    io.write_points(tmp_path / "few.csv", guides[:3])
    assert cli.main(["register", *images, "--out", str(tmp_path / "no"), *fewer]) == 2
    assert "as many fixed as moving guides, row by row, found 8 and 3" in capsys.readouterr().err
    io.write_points(tmp_path / "few.csv", guides + 500)
    assert cli.main(["register", *images, "--out", str(tmp_path / "no"), *fewer]) == 2
    assert "few.csv: expected points inside the image" in capsys.readouterr().err
    assert not (tmp_path / "no").exists() or not list((tmp_path / "no").iterdir())


def test_register_follows_its_guides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "fast", Preset((32, 32), 128, 60))
    fixed = pairs.points(20, 40.0)
    arguments = {"preset": "fast", "init": "none", "fixed_points": fixed, "moving_points": shifted(fixed)}
    guided = medinr.register(noise(1), noise(2), fixed_guides=fixed, moving_guides=shifted(fixed), **arguments)  # type: ignore[arg-type]
    free = medinr.register(noise(1), noise(2), **arguments)  # type: ignore[arg-type]
    assert guided.metrics["tre/mean"] < 0.6 * free.metrics["tre/mean"]


# -- the foreground ------------------------------------------------------------------------------------------------


def test_informative_is_what_a_patch_can_see() -> None:
    """All voxels whose box holds a contrast are found, and few others."""
    domain = Domain.of((40, 30, 20), torch.diag(torch.tensor([1.0, 1.5, 2.0, 1.0])))
    volume = torch.zeros(2, *domain.shape)
    volume[1, 20, 15, 10] = 1
    reach = 5.0
    found = informative(volume, domain, reach)
    gap = (domain.voxels().view(*domain.shape, 3) - torch.tensor([20.0, 15, 10])).abs() * torch.tensor(domain.spacing)
    assert found[(gap <= reach).all(-1)].all()
    assert not found[(gap > reach + 2 * 2.0 + 1).any(-1)].any()
    assert not informative(volume * 1e-4, domain, reach).any()


def test_points_are_drawn_where_patches_say_something() -> None:
    """9 in 10 in and around the body; everywhere with a mask of everything, or for a similarity of single points."""
    data = torch.zeros(1, 40, 40, 40)
    data[:, 16:24, 16:24, 16:24] = torch.rand(8, 8, 8)
    image = Image(data, Domain.of((40, 40, 40), torch.diag(torch.tensor([2.0, 2, 2, 1]))), "body")
    pair = Pair("body", image, image)

    def share(similarity: LocalNCC | MSE, pair: Pair = pair, **options: float) -> float:
        found = PairRegistration(SIREN(hidden=(8,)), similarity, points=64, **options)  # type: ignore[arg-type]
        found.attach(pair)
        voxels = transform_points(found.domain.normalised_to_voxel, found.sampler(4000, "cpu"))
        return ((voxels - 19.5).abs().amax(1) < 4 + 2 + 1 + 1).float().mean().item()  # the body and a patch around it

    by_volume = (16 / 40) ** 3
    assert share(LocalNCC()) == pytest.approx(0.9 + 0.1 * by_volume, abs=0.03)
    assert share(LocalNCC(), background=1.0) == pytest.approx(by_volume, abs=0.03)
    assert share(MSE()) == pytest.approx(by_volume, abs=0.03)
    everything = replace(pair, fixed_mask=torch.ones(40, 40, 40, dtype=torch.bool))
    assert share(LocalNCC(), everything) == pytest.approx(by_volume, abs=0.03)


def test_some_points_are_drawn_elsewhere() -> None:
    mask = torch.zeros(SMALL.shape, dtype=torch.bool)
    mask[:2] = True
    x = PointSampler(SMALL, mask, elsewhere=0.25)(8000, "cpu", torch.Generator().manual_seed(0))
    inside = transform_points(SMALL.normalised_to_voxel, x)[:, 0] < 1.5
    assert inside.float().mean().item() == pytest.approx(0.75 + 0.25 * 2 / 24, abs=0.02)
