"""Sequences of images, and what is read of a fitted one: images, labels, points, curves and maps at any time."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image as Picture
from torch import Tensor

from medinr import cli, io, metrics
from medinr.commands.sequence import time_pair, times_of_run
from medinr.data.lungs import body_mask
from medinr.data.sequence import Sequence, require_one_grid, wrapped
from medinr.data.series import cropped, extremes
from medinr.errors import UserError
from medinr.fields import SIREN, LinearTime, PhaseTime, Transform
from medinr.fields.chained import Chained, Inverted
from medinr.fields.warp import resample
from medinr.losses import MSE
from medinr.methods import PairRegistration, SpatioTemporalRegistration, load_method
from medinr.space import Domain, Image, transform_points
from medinr.timeline import (
    Subject,
    between,
    default_times,
    displacement_on,
    held_out_scores,
    label_state,
    motion_amplitude,
    parse_times,
    predicted,
)
from medinr.timeline_files import write_timeline

EYE = torch.eye(4, dtype=torch.float64)
DOMAIN = Domain.of((20, 18, 16), [[-3, 0, 0, 30], [0, 3, 0, -25], [0, 0, 4, -30], [0, 0, 0, 1]])
CENTRE = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)


class Known(Transform):
    """A transform of two functions that undo each other."""

    def __init__(self, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        self.there, self.back, self.domain, self.start = there, back, DOMAIN, EYE

    def __call__(self, world: Tensor) -> Tensor:
        return self.there(world.double())

    def jacobian(self, world: Tensor) -> Tensor:
        steps = 1e-3 * torch.eye(3, dtype=torch.float64)
        return torch.stack([(self(world + d) - self(world - d)) / 2e-3 for d in steps], dim=-1)

    def inverse(self, world: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.back(world.double()), torch.zeros(len(world), dtype=torch.float64)


class Breathing:
    """A body that swells about a point by 20% half a period after the reference, and sways along y on the way."""

    domain = DOMAIN

    def size(self, time: float) -> float:
        return 1 + 0.1 * (1 - math.cos(2 * math.pi * time / 100))

    def sway(self, time: float) -> Tensor:
        return torch.tensor([0.0, 3.0 * math.sin(2 * math.pi * time / 100), 0.0], dtype=torch.float64)

    def transform_at(self, time: float) -> Transform:
        s, d = self.size(time), self.sway(time)
        return Known(lambda p: CENTRE + s * (p - CENTRE) + d, lambda q: CENTRE + (q - d - CENTRE) / s)


def texture(world: Tensor) -> Tensor:
    """Smooth structures, in HU."""
    x, y, z = world.double().unbind(-1)
    return (400 * torch.sin(x / 6) * torch.cos(y / 7) + 300 * torch.sin(z / 8 + x / 11)).float()


def image(values: Callable[[Tensor], Tensor] = texture, domain: Domain = DOMAIN) -> Image:
    world = transform_points(domain.voxel_to_world, domain.voxels().double())
    return Image(values(world).reshape(1, *domain.shape).float(), domain, "drawn")


def ball(domain: Domain = DOMAIN, radius: float = 12.0) -> Tensor:
    """1 inside a ball about the centre, 2 elsewhere in a larger one."""
    world = transform_points(domain.voxel_to_world, domain.voxels().double())
    r = (world - CENTRE).norm(dim=1).reshape(domain.shape)
    return (r < radius).int() + (r < 1.6 * radius).int() * 2 - (r < radius).int() * 2


def breath(
    instants: tuple[float, ...] = (0, 20, 40, 60, 80), held_out: tuple[int, ...] = (), **changes: Any
) -> Sequence:
    body = Breathing()
    images = [image(lambda q, t=t: texture(body.transform_at(t).inverse(q)[0])) for t in instants]
    points = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).double() * 8
    n = len(instants)
    values: dict[str, Any] = {
        "name": "breath", "times": instants, "images": tuple(images), "reference": 0, "period": 100.0,
        "masks": (None,) * n, "points": tuple(body.transform_at(t)(points) for t in instants),
        "labels": (ball(), *[None] * (n - 1)), "held_out": held_out,
    }  # fmt: skip
    return Sequence(**(values | changes))


# -- the data class ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": (0.0, 20.0, 20.0)}, "every time once, found 20 twice"),
        ({"times": (0.0, 40.0, 20.0)}, "ascending order, found 20 after 40"),
        ({"times": (0.0, 20.0, math.nan)}, "finite times, found nan"),
        ({"times": (0.0, 20.0, 100.0)}, "within one period of 100, found 0 to 100"),
        ({"period": 0.0}, "a period above 0"),
        ({"reference": 3}, "a reference index from 0 to 2, found 3"),
        ({"held_out": (0,)}, "a reference that is trained on, found time 0 held out"),
        ({"held_out": (5,)}, "a held-out index from 0 to 2"),
        ({"held_out": (1, 1)}, "every held-out time once"),
        ({"held_out": (1, 2)}, "two or more times to train on, found 1 of 3"),
        ({"masks": (None,)}, "one entry for each of 3 times, found 1 masks"),
        ({"labels": (torch.zeros(2, 2, 2), None, None)}, "labels of shape .20, 18, 16. as the image"),
        ({"masks": (torch.zeros(20, 18, 16, dtype=torch.bool), None, None)}, "a mask with voxels inside"),
        ({"points": (torch.zeros(3, 3), torch.zeros(4, 3), None)}, "as many landmarks at all times"),
        ({"points": (torch.full((3, 3), math.nan), None, None)}, "finite landmarks"),
    ],
)
def test_wrong_sequences_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        breath(**({"instants": (0, 20, 40)} | changes))
    assert "\n" not in str(raised.value) and str(raised.value).startswith("breath")


def test_images_are_checked() -> None:
    good = breath((0, 20, 40))
    bad = good.images[1].data.clone()
    bad[0, 3, 3, 3] = math.nan
    with pytest.raises(UserError, match="time 20: expected finite values, found NaN"):
        replace(good, images=(good.images[0], Image(bad, DOMAIN), good.images[2]))
    with pytest.raises(UserError, match="time 20: expected 1 channels as the reference, found 2"):
        replace(good, images=(good.images[0], Image(bad.nan_to_num().repeat(2, 1, 1, 1), DOMAIN), good.images[2]))
    with pytest.raises(UserError, match="two or more times, found 1"):
        breath((0,))
    other = Domain.of((20, 18, 16), DOMAIN.voxel_to_world + 0.5 * EYE)
    moved = replace(good, images=(*good.images[:2], image(domain=other)))  # grids may differ
    assert good.one_grid and not moved.one_grid
    with pytest.raises(UserError, match=r"images on the grid of time 0 .*found time 40 on another"):
        require_one_grid(moved)


def test_times_are_found_modulo_the_period() -> None:
    sequence = breath(held_out=(2,))
    assert sequence.index(120) == 1 and sequence.index(-20) == 4
    assert sequence.training == (0, 1, 3, 4) and len(sequence) == 5
    assert wrapped(90, 100) == -10 and wrapped(90, None) == 90
    with pytest.raises(UserError, match="a time of 0, 20, 40, 60, 80, found 30"):
        sequence.index(30)
    pair = extremes(sequence)  # 40 and 60 are equally far; 40 is held out
    assert pair.name == "breath_0_60" and pair.fixed_labels is not None and pair.moving_labels is None
    assert pair.moving_points is not None and torch.equal(pair.moving_points, sequence.points[3])  # type: ignore[arg-type]


def test_cropping_keeps_one_grid_and_the_world() -> None:
    sequence = breath((0, 20, 40))
    masks = tuple(ball(radius=r) == 1 for r in (6.0, 9.0, 12.0))
    cut = cropped(replace(sequence, masks=masks), 3.0)
    assert cut.one_grid and cut.domain.shape != DOMAIN.shape
    for before, after in zip(sequence.images, cut.images, strict=True):
        assert torch.allclose(resample(before, cut.domain), after.data, atol=1e-2)
    assert [int(m.sum()) for m in cut.masks if m is not None] == [int(m.sum()) for m in masks]
    with pytest.raises(UserError, match="expected masks of all times"):
        cropped(sequence, 3.0)


# -- predictions without registration, and their scores ------------------------------------------------------------


@pytest.mark.parametrize(
    ("time", "period", "expected"),
    [
        (30, 100, (0, 1, 0.5)),
        (20, 100, (0, 1, 0.25)),
        (90, 100, (2, 0, 0.5)),  # from 80 to 100, which is 10 - 100
        (0, 100, (2, 0, 2 / 3)),
        (110, 100, (0, 1, 0.0)),
        (30, None, (0, 1, 0.5)),
        (95, None, (2, 2, 0.0)),
        (5, None, (0, 0, 0.0)),
    ],
)
def test_the_images_before_and_after(time: float, period: float | None, expected: tuple[int, int, float]) -> None:
    times = (10.0, 50.0, 80.0) if (time, period) != (90, 100) else (0.0, 50.0, 80.0)
    before, after, w = metrics.bracket(times, time, period)
    assert (before, after) == expected[:2] and w == pytest.approx(expected[2])


def test_nearest_and_weighted_image() -> None:
    images = [torch.full((1, 2, 2, 2), v) for v in (0.0, 10.0, 20.0)]
    times = (0.0, 40.0, 80.0)
    assert metrics.nearest_image(images, times, 55, 100).mean() == 10
    assert metrics.nearest_image(images, times, 93, 100).mean() == 0
    assert metrics.weighted_image(images, times, 50, 100).mean() == 12.5
    assert metrics.weighted_image(images, times, 90, 100).mean() == 10
    assert metrics.weighted_image(images, times, 90, None).mean() == 20


def test_scores_look_at_their_region_only() -> None:
    truth = image().data
    other = truth + 20
    other[:, 15:] += 500
    near, all_ = torch.zeros(DOMAIN.shape, dtype=torch.bool), torch.ones(DOMAIN.shape, dtype=torch.bool)
    near[:8] = True
    found = metrics.scores(other, truth, {"near": near, "all": all_})
    assert found["psnr/near"] == pytest.approx(20 * math.log10(2000 / 20), abs=1e-4)
    assert found["psnr/all"] < found["psnr/near"] - 10 and found["ssim/all"] < found["ssim/near"]
    assert metrics.ssim(other, truth, 2000, all_) == pytest.approx(metrics.ssim(other, truth, 2000), abs=1e-9)
    assert metrics.ssim(truth, truth, 2000, near) == pytest.approx(1)


def test_the_body_is_without_table_and_with_lungs() -> None:
    domain = Domain.of((40, 36, 20), [[-8, 0, 0, 160], [0, -8, 0, 144], [0, 0, 10, -100], [0, 0, 0, 1]])
    x, y, z = transform_points(domain.voxel_to_world, domain.voxels().double()).unbind(-1)
    body = (x / 140) ** 2 + (y / 100) ** 2 < 1
    lungs = (((x.abs() - 65) / 45) ** 2 + (y / 65) ** 2 + (z / 75) ** 2) < 1
    table = ((y + 125).abs() < 8) & (x.abs() < 100)
    hu = torch.full_like(x, -1000.0).where(~body, 40.0)
    hu[lungs], hu[table] = -820.0, -100.0
    found = body_mask(Image(hu.float().reshape(1, *domain.shape), domain)).flatten()
    assert (found != body).float().mean() < 0.02 and found[lungs].all() and not found[table].any()


def test_known_motion_predicts_better_than_no_motion() -> None:
    """Held-out images: the warped reference and both warped neighbours, each by itself, against no registration."""
    sequence = breath((0, 10, 30, 50, 70, 90), held_out=(2,))
    inside = {"inside": ball() > 0}
    rows = {r["prediction"]: r for r in held_out_scores(Breathing(), sequence, lambda image: inside)}
    assert rows["reference"]["tre/mean"] < 1e-6 < 1 < rows["reference"]["tre/initial_mean"]
    psnr = {name: row["psnr/inside"] for name, row in rows.items()}
    assert min(psnr["reference"], psnr["neighbours"]) > max(psnr["linear"], psnr["nearest"]) + 10
    exact = predicted(Breathing(), sequence, 70.0, DOMAIN, neighbours=True)  # an image that is there
    assert (exact - sequence.images[4].data)[0][2:-2, 2:-2, 2:-2].abs().max() < 1e-2


class Shifting(Breathing):
    """All moves by 1 mm a percent along z, out of the grid."""

    def transform_at(self, time: float) -> Any:
        move = torch.tensor([0.0, 0.0, float(time)]).double()
        return Known(lambda p: p + move, lambda q: q - move)


def test_at_the_border_the_image_that_is_seen_counts() -> None:
    """Voxels whose motion leaves one image are those of the other, and where it leaves both stay as they are."""
    sequence = breath((0, 10, 20), held_out=(1,))
    flat = [
        replace(one, data=torch.full_like(one.data, v)) for one, v in zip(sequence.images, (0, 0, 100), strict=True)
    ]
    sequence = replace(sequence, images=tuple(flat))
    made = predicted(Shifting(), sequence, 10.0, DOMAIN, True, 1.0)[0]
    upward = made if float(DOMAIN.voxel_to_world[2, 2]) > 0 else made.flip(2)
    assert torch.allclose(upward[:, :, :2], torch.tensor(100.0)) and torch.allclose(
        upward[:, :, -2:], torch.tensor(0.0)
    )
    assert torch.allclose(upward[:, :, 6:9], torch.tensor(50.0))


# -- transforms of transforms ----------------------------------------------------------------------------------------


def wavy() -> Known:
    def there(p: Tensor) -> Tensor:
        return torch.stack((p[:, 0] + 2 * torch.sin(p[:, 1] / 5), p[:, 1] * 1.1, p[:, 2] - 1), dim=1)

    def back(q: Tensor) -> Tensor:
        y = q[:, 1] / 1.1
        return torch.stack((q[:, 0] - 2 * torch.sin(y / 5), y, q[:, 2] + 1), dim=1)

    return Known(there, back)


def test_inverse_and_chain_have_exact_derivatives() -> None:
    points = 10 * torch.randn(50, 3, generator=torch.Generator().manual_seed(1)).double()
    phi, other = wavy(), Breathing().transform_at(30)
    inverse, chain = Inverted(phi), Chained(phi, other)
    assert torch.allclose(inverse(phi(points)), points) and torch.allclose(phi(inverse(points)), points)
    assert torch.allclose(inverse.jacobian(phi(points)) @ phi.jacobian(points), torch.eye(3).double(), atol=1e-6)
    assert torch.allclose(chain(points), other(phi(points)))
    h = 1e-4 * torch.eye(3).double()
    numeric = torch.stack([(chain(points + d) - chain(points - d)) / 2e-4 for d in h], dim=-1)
    assert torch.allclose(chain.jacobian(points), numeric, atol=1e-6)
    assert torch.allclose(chain.inverse(chain(points))[0], points)
    assert torch.allclose(Inverted(inverse)(points), phi(points))


def test_points_alone_cost_no_derivatives() -> None:
    class Proud(Known):
        def jacobian(self, world: Tensor) -> Tensor:
            raise AssertionError("asked for derivatives")

    phi = wavy()
    found = displacement_on(Proud(phi.there, phi.back), DOMAIN).reshape(-1, 3)
    world = transform_points(DOMAIN.voxel_to_world, DOMAIN.voxels().double())
    assert (found - (phi(world) - world)).norm(dim=1).max() < 0.1
    back = displacement_on(Inverted(Proud(phi.there, phi.back)), DOMAIN).reshape(-1, 3)
    assert (back - (phi.back(world) - world)).norm(dim=1).max() < 0.1


def test_between_two_times_is_the_one_after_the_inverse_of_the_other() -> None:
    body = Breathing()
    points = 10 * torch.randn(50, 3, generator=torch.Generator().manual_seed(1)).double()
    moved = between(body, 20, 70)(body.transform_at(20)(points))
    assert torch.allclose(moved, body.transform_at(70)(points))


# -- curves and maps --------------------------------------------------------------------------------------------------


def test_volumes_and_centres_by_change_of_variables() -> None:
    labels = ball()
    world = transform_points(DOMAIN.voxel_to_world, DOMAIN.voxels().double()).reshape(*DOMAIN.shape, 3)
    shift = torch.tensor([4.0, 0, -2])
    displacement = (0.2 * (world - CENTRE)).float() + shift
    state = label_state(labels, DOMAIN, displacement, torch.full(DOMAIN.shape, 1.2**3))
    assert set(state) == {1, 2}
    volume, centre = state[1]
    assert volume == pytest.approx(1.2**3 * int((labels == 1).sum()) * 36 / 1000)
    start = world[labels == 1].mean(0)
    assert torch.allclose(centre, CENTRE + 1.2 * (start - CENTRE) + shift, atol=1e-5)


def test_amplitude_is_the_largest_distance_of_two_places() -> None:
    """On a circle of radius 3 about another place than the reference, the diameter."""
    angles = torch.arange(8) * math.pi / 4
    fields = [(torch.tensor([3 * a.cos() - 3, 3 * a.sin(), 0.0])).expand(2, 3, 4, 3) for a in angles]
    assert torch.allclose(motion_amplitude(fields), torch.full((2, 3, 4), 6.0))


def test_times_in_words() -> None:
    assert parse_times("0:95:5") == [5.0 * i for i in range(20)] and parse_times("[0, 12.5,50]") == [0, 12.5, 50]
    assert parse_times("0:1:0.1")[-1] == pytest.approx(1.0) and parse_times("7") == [7]
    assert default_times((0, 50), 100.0, 4) == [0, 25, 50, 75] and default_times((3, 9), None, 3) == [3, 6, 9]
    assert time_pair("0,50;50,0", "--between") == [(0, 50), (50, 0)] and time_pair(None, "--between") == []
    for wrong in ("a", "0:10", "0:10:0", "5:0:1", "", "nan"):
        with pytest.raises(UserError, match="--times: expected FIRST:LAST:STEP"):
            parse_times(wrong)
    with pytest.raises(UserError, match="--between: expected two times with a comma"):
        time_pair("0,10,20", "--between")


# -- the files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("timeline")
    subject = Subject.of(breath())
    write_timeline(out, Breathing(), subject, [0, 25, 50, 87.5], pairs=[(25, 50)], fps=5)
    return out


def test_images_labels_and_points_are_carried(written: Path) -> None:
    body = Breathing()
    inner = (slice(4, -4),) * 3
    for name, time in (("t00.0", 0.0), ("t25.0", 25.0), ("t87.5", 87.5)):
        shown = io.read_image(written / f"image_{name}.nii.gz").data[0]
        truth = image(lambda q, t=time: texture(body.transform_at(t).inverse(q)[0])).data[0]
        assert (shown - truth)[inner].abs().mean() < 12  # of +-700: the error of trilinear interpolation
        points = io.read_points(written / f"points_{name}.csv")
        assert torch.allclose(points, body.transform_at(time)(Subject.of(breath()).points), atol=1e-5)  # type: ignore[arg-type]
    swollen = io.read_labels(written / "labels_t50.0.nii.gz", DOMAIN)
    ratio = int((swollen == 1).sum()) / int((ball() == 1).sum())
    assert ratio == pytest.approx(1.2**3, rel=0.1)


def test_curves_and_maps_are_the_truth(written: Path) -> None:
    with (written / "curves.csv").open(encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["label"] == "1"]
    body = Breathing()
    start = float(rows[0]["volume_ml"])
    for row in rows:
        time = float(row["time"])
        assert float(row["volume_ml"]) == pytest.approx(start * body.size(time) ** 3, rel=1e-3)
        expected = CENTRE[1] + body.size(time) * (float(rows[0]["y"]) - CENTRE[1]) + body.sway(time)[1]
        assert float(row["y"]) == pytest.approx(float(expected), abs=1e-2)
    ventilation = nib.load(written / "ventilation.nii.gz").get_fdata()  # from 0 to 50
    assert ventilation.mean() == pytest.approx(1.2**3 - 1, abs=5e-3)
    summary = json.loads((written / "metrics.json").read_text())
    assert summary["ventilation/from"] == 0 and summary["ventilation/to"] == 50
    assert summary["folding/percent"] == 0 and summary["inverse/gap_mm"] < 1e-6
    amplitude = nib.load(written / "amplitude.nii.gz").get_fdata()
    at = transform_points(DOMAIN.world_to_voxel, CENTRE[None])[0].round().long()
    sways = [float(body.sway(t)[1]) for t in (0, 25, 50, 87.5)]
    assert amplitude[tuple(at.tolist())] == pytest.approx(max(sways) - min(sways), abs=0.4)
    field, domain = io.read_displacement(written / "displacement_25_to_50.nii.gz")
    world = transform_points(DOMAIN.voxel_to_world, DOMAIN.voxels().double())
    truth = between(body, 25, 50)(world) - world
    assert domain.same_grid(DOMAIN) and torch.allclose(field.reshape(-1, 3).double(), truth, atol=0.05)


def test_the_animation_moves(written: Path) -> None:
    with Picture.open(written / "animation.gif") as film:
        assert film.n_frames == 4  # type: ignore[attr-defined]
        frames = []
        for k in range(4):
            film.seek(k)
            frames.append(torch.from_numpy(np.asarray(film.convert("L")).astype(np.float32)))
    assert all((frames[k] - frames[0]).abs().mean() > 1 for k in (1, 2, 3))
    for name in ("maps.png", "curves.png"):
        with Picture.open(written / name) as picture:
            assert min(picture.size) > 300


def test_a_second_time_leaves_nothing_stale_and_a_mistake_nothing_new(tmp_path: Path) -> None:
    subject = replace(Subject.of(breath()), labels=None, points=None)
    (tmp_path / "mine.txt").write_text("kept")
    write_timeline(tmp_path, Breathing(), subject, [0, 50])
    assert (tmp_path / "image_t50.nii.gz").exists() and not (tmp_path / "curves.csv").exists()
    write_timeline(tmp_path, Breathing(), replace(subject, image=None), [0, 30])
    left = {f.name for f in tmp_path.iterdir()}
    assert "image_t50.nii.gz" not in left and {"mine.txt", "amplitude.nii.gz", "timeline.csv"} <= left
    assert "animation.gif" not in left
    before = sorted(left)
    for wrong in ([], [10.0, 10.0]):
        with pytest.raises(UserError, match="times: expected"):
            write_timeline(tmp_path, Breathing(), subject, wrong)
    assert sorted(f.name for f in tmp_path.iterdir()) == before


# -- the command ---------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, period: float | None = 100.0) -> Path:
    """A method that was not fitted but moves: the last layer has weights."""
    torch.manual_seed(0)
    time = LinearTime() if period is None else PhaseTime(1)
    network = SIREN(3, 3 * time.size, (16, 16), omega=6.0, first_omega=3.0)
    method = SpatioTemporalRegistration(network, time, MSE())
    for p in method.parameters():
        p.data += 0.02 * torch.randn_like(p)
    method.attach(breath(period=period))
    method.save(folder / "moving.ckpt")
    return folder / "moving.ckpt"


def test_the_command_reads_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(tmp_path)
    subject = Subject.of(breath())
    assert subject.image is not None and subject.points is not None
    io.write_image(tmp_path / "reference.nii.gz", subject.image.data, DOMAIN)
    io.write_image(tmp_path / "labels.nii.gz", ball(), DOMAIN)
    io.write_points(tmp_path / "points.csv", subject.points)
    given = [str(tmp_path / f) for f in ("reference.nii.gz", "labels.nii.gz", "points.csv")]
    arguments = ["sequence", str(path), "--out", str(tmp_path / "out"), "--times", "0,30,50", "--between", "30,50"]
    assert cli.main([*arguments, "--image", given[0], "--labels", given[1], "--points", given[2]]) == 0
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert {"image_t00.nii.gz", "labels_t30.nii.gz", "points_t50.csv", "curves.png", "animation.gif"} <= names
    assert "displacement_30_to_50.nii.gz" in names and "look at animation.gif" in capsys.readouterr().out
    method = load_method(path)
    assert isinstance(method, SpatioTemporalRegistration)
    moved = method.transform_at(30.0)(subject.points)
    assert (moved - subject.points).norm(dim=1).max() > 0.2  # it does move
    assert torch.allclose(io.read_points(tmp_path / "out" / "points_t30.csv"), moved, atol=1e-4)
    still = io.read_image(tmp_path / "out" / "image_t00.nii.gz").data
    assert torch.allclose(still, subject.image.data, atol=1.0)  # the reference time is the reference
    field, _ = io.read_displacement(tmp_path / "out" / "displacement_30_to_50.nii.gz")
    world = transform_points(DOMAIN.voxel_to_world, DOMAIN.voxels().double())
    truth = method.transform_between(30.0, 50.0)(world) - world
    assert (field.reshape(-1, 3).double() - truth).norm(dim=1).max() < 0.1


def test_the_command_interpolates_between_given_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, sequence = checkpoint(tmp_path), breath((0, 40))
    for time, one in zip(sequence.times, sequence.images, strict=True):
        io.write_image(tmp_path / f"T{time:02.0f}.nii.gz", one.data, DOMAIN)
    given = f"0={tmp_path / 'T00.nii.gz'},40={tmp_path / 'T40.nii.gz'}"
    arguments = ["sequence", str(path), "--out", str(tmp_path / "out"), "--times", "0,20"]
    assert cli.main([*arguments, "--images", given]) == 0, capsys.readouterr().err
    made = io.read_image(tmp_path / "out" / "image_t20.nii.gz").data
    method = load_method(path)
    assert isinstance(method, SpatioTemporalRegistration)
    expected = predicted(method, sequence, 20.0, DOMAIN, True, 0.5)
    assert torch.allclose(made, expected, atol=1.0)
    assert (made - predicted(method, sequence, 20.0, DOMAIN)).abs().max() > 20
    for wrong, message in ((given.partition(",")[2], "reference time 0"), ("0", "TIME=FILE"), ("0=a,0=b", "once")):
        assert cli.main([*arguments, "--images", wrong]) == 2
        assert message in capsys.readouterr().err


def test_mistakes_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = PairRegistration(SIREN(hidden=(8,)), MSE())
    other.attach(extremes(breath()))
    other.save(tmp_path / "pair.ckpt")
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["sequence", str(tmp_path / "pair.ckpt"), *out]) == 2
    error = capsys.readouterr().err
    assert "expected a method of sequences, found PairRegistration" in error and error.count("\n") == 1
    assert cli.main(["sequence", str(checkpoint(tmp_path)), *out, "--times", "soon"]) == 2
    assert "--times: expected FIRST:LAST:STEP" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_predict_at_any_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The published profile, which has a prior to render, on a tiny folder of phases."""
    for time, scan in zip((0, 30, 60, 80), breath((0, 30, 60, 80)).images, strict=True):
        io.write_image(tmp_path / "4dct" / f"body_T{time:02d}.nii.gz", scan.data[0], DOMAIN)
    config = str(Path(__file__).resolve().parents[2] / "experiments" / "stnerp_4dct.yaml")
    monkeypatch.chdir(tmp_path)
    common = ["--config", config, "--wandb", "false", "--data.root", "4dct", "--data.masks", "none"]
    common += ["--model.window", "null", "--model.points", "64", "--model.field.hidden", "[16, 16]"]
    common += ["--model.prior.field.hidden", "[16, 16]", "--model.prior.field.frequencies", "8"]
    common += ["--data.steps_per_epoch", "2", "--trainer.max_steps", "4", "--data.reference", "60"]
    assert cli.main(["fit", *common, "--times", "0:90:45"]) == 2
    assert "--times: fit reads no sequence; it belongs to predict" in capsys.readouterr().err
    assert cli.main(["fit", *common]) == 0, capsys.readouterr().err
    assert cli.main(["predict", *common, "--out", "out", "--times", "0:90:10:3"]) == 2
    assert not (tmp_path / "out").exists()
    assert cli.main(["predict", *common, "--out", "out", "--times", "0:90:45"]) == 0, capsys.readouterr().err
    names = {f.name for f in (tmp_path / "out" / "sequence").iterdir()}
    assert {"image_t45.nii.gz", "rendering_t45.nii.gz", "animation.gif", "ventilation.nii.gz"} <= names
    assert (tmp_path / "out" / "transform.ckpt").exists()  # beside the usual results


def test_times_need_a_method_of_sequences() -> None:
    with pytest.raises(UserError, match="--times: expected a method and data of sequences, found PairRegistration"):
        times_of_run("predict", "0:90:45", PairRegistration(SIREN(hidden=(8,)), MSE()), None)
    assert times_of_run("predict", None, None, None) is None
