"""Registration by a trained network: identity at the start, learning, checkpoints, pairs of any grid, mistakes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from medinr import io
from medinr.data.pair import Pair
from medinr.data.working import on_grid, working_grid
from medinr.errors import UserError
from medinr.fields.gridded import GridTransform
from medinr.fields.squaring import control_shape, dense_spline
from medinr.fields.unet import MIDIRNetwork, PairNetwork, VoxelMorphNetwork
from medinr.losses import MSE, Bending, Diffusion, LocalNCC
from medinr.methods import LearnedRegistration, load_method
from medinr.results import evaluate, write_results
from medinr.space import Domain, Image, transform_points

SIZE = (24, 20, 16)
SPACING = [2.0, 2.0, 2.0]
EYE = torch.eye(4, dtype=torch.float64)


def networks() -> dict[str, PairNetwork]:
    return {
        "dense": VoxelMorphNetwork([8, 8, 8], [8, 8, 8, 8]),
        "svf": VoxelMorphNetwork([8, 8, 8], [8, 8, 8, 8], squarings=7),
        "midir": MIDIRNetwork([8, 8, 8], [8], [8]),
        "plain": VoxelMorphNetwork([8, 8], [8, 8], strides=[[2, 2, 1], [2, 2, 2]], normalise=False),
    }


def blobs(domain: Domain, shift_mm: torch.Tensor, seed: int = 0) -> Image:
    """Some Gaussians of 5 mm in the middle of the grid's box, moved by a shift in world mm."""
    draw = torch.Generator().manual_seed(seed)
    world = transform_points(domain.voxel_to_world, domain.voxels().double())
    centre = domain.normalised_to_world[:3, 3]
    places = centre + (torch.rand(12, 3, generator=draw).double() - 0.5) * torch.tensor(domain.sides_mm) * 0.7
    near = torch.cdist(world, places + shift_mm)
    weights = 0.5 + torch.rand(12, generator=draw).double()
    values = (weights * torch.exp(-0.5 * (near / 5) ** 2)).sum(1)
    return Image(values.float().reshape(1, *domain.shape), domain)


def grid_of(size: tuple[int, int, int] = SIZE) -> Domain:
    return Domain.of(size, torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])))


class Shifted(lightning.LightningDataModule):
    """Pairs of one scene each, the moving one shifted by 4 mm along x."""

    spacing = SPACING

    def __init__(self, n: int = 8) -> None:
        super().__init__()
        self.grid, shift = grid_of(), torch.tensor([4.0, 0.0, 0.0]).double()
        self.items = [
            {"fixed": blobs(self.grid, 0 * shift, k).data, "moving": blobs(self.grid, shift, k).data} for k in range(n)
        ]

    def train_dataloader(self) -> Any:
        return DataLoader(self.items, batch_size=2, shuffle=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader(self.items[:2], batch_size=1)  # type: ignore[arg-type]


def trained(method: LearnedRegistration, steps: int, root: Path) -> lightning.Trainer:
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=1, num_sanity_val_steps=0, default_root_dir=root,
    )  # fmt: skip
    trainer.fit(method, datamodule=Shifted())
    return trainer


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[LearnedRegistration, dict[str, float]]:
    """A method that has seen shifts of 4 mm, and what validation said after the last step."""
    lightning.seed_everything(0, verbose=False)
    network = MIDIRNetwork([8, 16, 16], [16], [16])
    method = LearnedRegistration(network, MSE(), {"diffusion": Diffusion(0.001)}, lr=3e-3)
    trainer = trained(method, 80, tmp_path_factory.mktemp("learned"))
    return method.eval(), {k: float(v) for k, v in trainer.callback_metrics.items()}


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("size", [(16, 16, 16), (19, 13, 5), (7, 6, 3)])
def test_starts_at_the_identity_on_any_size(name: str, size: tuple[int, int, int]) -> None:
    u = networks()[name](torch.rand(2, 2, *size))
    assert u.shape == (2, 3, *size) and u.abs().max() == 0 and u.dtype == torch.float32


@pytest.mark.parametrize("name", networks())
def test_every_weight_of_a_moved_network_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    network = networks()[name]
    torch.nn.init.normal_(network.out.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    network(torch.rand(1, 2, 16, 16, 16)).square().sum().backward()
    dead = [k for k, p in network.named_parameters() if p.grad is None]
    assert not dead
    assert float(network.encoder.layers[0].conv.weight.grad.abs().max()) > 0  # type: ignore[union-attr, index, operator]


def test_control_points_of_the_network_are_those_of_the_spline() -> None:
    torch.manual_seed(0)
    network = MIDIRNetwork([8, 8, 8], [8], [8], squarings=0)
    torch.nn.init.normal_(network.out.weight)
    images = torch.rand(1, 2, 17, 12, 9)
    control = network.control(images)
    assert list(control.shape[2:]) == control_shape((17, 12, 9), 4)
    assert torch.allclose(network(images), dense_spline(control, (17, 12, 9), 4))


def test_shifting_both_images_by_a_control_cell_shifts_the_control_points() -> None:
    """Features and control points are aligned: without pads and normalisation the network commutes with shifts."""
    torch.manual_seed(0)
    network = MIDIRNetwork([4, 4], [], [4], normalise=False)
    torch.nn.init.normal_(network.out.weight)
    images = torch.rand(1, 2, 48, 16, 16)
    a, b = network.control(images), network.control(images.roll(4, 2))
    assert torch.allclose(a[:, :, 5:8], b[:, :, 6:9], atol=1e-4)
    assert not torch.allclose(a[:, :, 5:8], b[:, :, 5:8], atol=1e-2)


def test_training_recovers_a_known_shift(taught: tuple[LearnedRegistration, dict[str, float]]) -> None:
    """On scenes that it has not seen: u is 2 voxels along x where there is something to see."""
    method, said = taught
    grid, shift = grid_of(), torch.tensor([4.0, 0.0, 0.0]).double()
    fixed, moving = blobs(grid, 0 * shift, 99), blobs(grid, shift, 99)
    with torch.no_grad():
        u = method(torch.cat((fixed.data, moving.data))[None])
    seen = (fixed.data > 0.3)[0]
    assert seen.sum() > 100
    mean = u[0, :, seen].mean(1)
    assert mean.tolist() == pytest.approx([2.0, 0.0, 0.0], abs=0.5)
    before = MSE()(fixed.data.flatten(), moving.data.flatten())
    assert said["val/similarity"] < 0.4 * float(before)
    assert {"val/loss", "val/folding_percent"} <= set(said)


def test_a_pair_of_another_grid_orientation_and_start(taught: tuple[LearnedRegistration, dict[str, float]]) -> None:
    """The displacement is in world mm: axes permuted and flipped, other voxels, and an affine start change nothing."""
    method, _ = taught
    affine = torch.tensor([[0, 0, -1.5, 30], [1.0, 0, 0, -5], [0, -2.0, 0, 10], [0, 0, 0, 1]], dtype=torch.float64)
    domain = Domain.of((40, 16, 32), affine)
    shift = torch.tensor([4.0, 0.0, 0.0]).double()
    turn = torch.tensor([[0, -1, 0, 3], [1, 0, 0, -4], [0, 0, 1, 2], [0, 0, 0, 1]], dtype=torch.float64)
    moving = blobs(domain, shift, 5)
    turned = replace(moving, domain=Domain.of(domain.shape, turn @ affine))
    for image, start in ((moving, EYE), (turned, turn)):
        pair = Pair("tiny", blobs(domain, 0 * shift, 5), image, start=start)
        method.attach(pair)
        found = evaluate(method.transform(), pair)
        residual = method.transform()(transform_points(domain.voxel_to_world, domain.voxels().double()))
        d = transform_points(torch.linalg.inv(start), residual).reshape(*domain.shape, 3)
        d = d - transform_points(domain.voxel_to_world, domain.voxels().double()).reshape(*domain.shape, 3)
        seen = pair.fixed.data[0] > 0.4
        assert d[seen].mean(0).tolist() == pytest.approx([4.0, 0.0, 0.0], abs=1.0)
        assert found.metrics["image/rms"] < 0.6 * found.metrics["image/rms_before"]


def test_checkpoint_round_trip(taught: tuple[LearnedRegistration, dict[str, float]], tmp_path: Path) -> None:
    """A trained network registers after loading; what a registration writes holds its own transform."""
    method, _ = taught
    method.state.pop("displacement", None)
    method.save(tmp_path / "net.ckpt")
    loaded = load_method(tmp_path / "net.ckpt")
    assert isinstance(loaded, LearnedRegistration)
    with pytest.raises(UserError, match="trained network alone"):
        loaded.transform()
    grid, shift = grid_of((30, 20, 18)), torch.tensor([4.0, 0.0, 0.0]).double()
    pair = Pair("tiny", blobs(grid, 0 * shift), blobs(grid, shift))
    loaded.attach(pair)
    evaluation = evaluate(loaded.transform(), pair)
    files = write_results(tmp_path / "out", loaded, pair, evaluation)
    assert tmp_path / "out" / "transform.ckpt" in files
    again = load_method(tmp_path / "out" / "transform.ckpt").transform()
    points = transform_points(grid.voxel_to_world, grid.voxels().double())[::17]
    assert torch.equal(again(points), loaded.transform()(points))
    written, _ = io.read_displacement(tmp_path / "out" / "displacement.nii.gz")
    assert torch.allclose(written, evaluation.displacement, atol=1e-4)
    assert evaluation.displacement.abs().max() > 1


def test_working_grid_keeps_box_centre_and_directions() -> None:
    affine = torch.tensor([[0, 0, 1, -89], [-1, 0, 0, 117], [0, 1, 0, 2], [0, 0, 0, 1]], dtype=torch.float64)
    domain = Domain.of((217, 18, 182), affine)
    grid = working_grid(domain, [2.0, 2.0, 1.0])
    assert grid.shape == (91, 108, 18) and grid.spacing == pytest.approx((2, 2, 1))
    assert torch.equal(grid.voxel_to_world[:3, :3], torch.diag(torch.tensor([2.0, 2.0, 1.0]).double()))
    assert torch.allclose(grid.normalised_to_world[:3, 3], domain.normalised_to_world[:3, 3])
    # A linear ramp in world coordinates stays what it is, whatever the axes.
    world = transform_points(domain.voxel_to_world, domain.voxels().double())
    image = Image((world @ torch.tensor([1.0, 2.0, 3.0]).double()).float().reshape(1, *domain.shape), domain)
    expected = transform_points(grid.voxel_to_world, grid.voxels().double()) @ torch.tensor([1.0, 2.0, 3.0]).double()
    gap = (on_grid(image, grid, EYE)[0] - expected.float().reshape(grid.shape)).abs()
    assert gap[3:-3, 3:-3, 1:-1].max() < 1e-2


def mistakes() -> dict[str, Any]:
    method = LearnedRegistration(networks()["midir"])
    image = blobs(grid_of(), torch.zeros(3).double())
    pair = Pair("tiny", image, image)
    known = LearnedRegistration(networks()["midir"])
    known.remember(grid_of(), EYE, SPACING)
    two = replace(image, data=image.data.expand(2, -1, -1, -1))
    flat = Image(image.data[..., :1], Domain.of((*SIZE[:2], 1), grid_of().affine))
    return {
        "one volume alone": (lambda: networks()["dense"](torch.rand(1, 1, 8, 8, 8)), r"images: expected .*\(1, 1, 8"),
        "no batch": (lambda: networks()["midir"](torch.rand(2, 8, 8, 8)), "images: expected"),
        "untrained": (lambda: method.attach(pair), "ckpt_path"),
        "two channels": (lambda: known.attach(replace(pair, moving=two)), "moving: expected an image of one channel"),
        "single slice": (lambda: known.attach(Pair("flat", flat, flat)), "two voxels or more"),
        "patches": (lambda: LearnedRegistration(networks()["midir"], LocalNCC()), "similarity: expected .* LocalNCC"),
        "probes": (
            lambda: LearnedRegistration(
                networks()["midir"], regularizers={"bending": Bending(1.0, directions="probes")}
            ),
            "regularizers.bending",
        ),
        "window": (lambda: LearnedRegistration(networks()["midir"], radius=0), "radius"),
        "strides": (lambda: VoxelMorphNetwork(strides=[[2, 2, 2]]), "strides: expected three numbers"),
        "decoder": (lambda: MIDIRNetwork(decoder=[32]), "decoder: expected 2 levels"),
        "spacing": (lambda: MIDIRNetwork(spacing=3), "spacing: expected that of a level"),
        "short decoder": (lambda: VoxelMorphNetwork(decoder=[8]), "decoder: expected at least"),
    }


@pytest.mark.parametrize("what", mistakes())
def test_mistakes_are_one_line(what: str) -> None:
    call, expected = mistakes()[what]
    with pytest.raises(UserError, match=expected) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_pair_is_no_cohort(tmp_path: Path) -> None:
    method = LearnedRegistration(networks()["midir"])
    data = lightning.LightningDataModule.from_datasets(train_dataset=[1], val_dataset=[1])  # type: ignore[arg-type]
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(UserError, match="cohort of pairs"):
        trainer.fit(method, datamodule=data)


def test_grid_transform_is_what_a_result_is() -> None:
    known = LearnedRegistration(networks()["svf"])
    known.remember(grid_of(), EYE, SPACING)
    image = blobs(grid_of(), torch.zeros(3).double())
    known.attach(Pair("tiny", image, image))
    transform = known.transform()
    assert isinstance(transform, GridTransform)
    points = torch.rand(5, 3).double() * 20
    assert torch.equal(transform(points), points), "a network that starts at the identity"
