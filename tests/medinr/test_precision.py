"""Mixed precision: which products are rounded, and that a fit does not suffer from it."""

from collections.abc import Callable
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from medinr import jets
from medinr.callbacks import EndStages
from medinr.commands.quiet import quiet
from medinr.data.base import step_loader
from medinr.errors import UserError
from medinr.fields import MLP, SIREN, Field, HarmonizedSIREN
from medinr.fields.diffusion import Denoiser
from medinr.fields.latent import Autoencoder
from medinr.fields.unet import VoxelMorphNetwork
from medinr.losses import NCC, Barrier, Bending, LocalNCC, Regularizer, Similarity
from medinr.losses.regularizers import bending
from medinr.methods import ConditionedRegistration, PairRegistration, RefinedRegistration, Refinement
from medinr.methods.base import RegistrationMethod
from medinr.methods.method import PRECISIONS, check_precision
from medinr.precision import convolutions, full, mixed, product
from tests.medinr import pairs

BF16 = torch.bfloat16


class Products(TorchDispatchMode):
    """Records the type and the shared dimension of every matrix product, and the types of all that is sampled."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, torch.dtype]] = set()
        self.sampled: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            a = args[1] if name in ("addmm", "baddbmm") else args[0]
            self.seen.add((a.shape[-1], a.dtype))
        if name.startswith("grid_sampler"):
            self.sampled |= {t.dtype for t in args if isinstance(t, Tensor)}
        return func(*args, **(kwargs or {}))

    def types(self, inner: int) -> set[torch.dtype]:
        return {dtype for n, dtype in self.seen if n == inner}


FIELDS = [SIREN(hidden=(40, 41, 42)), MLP(hidden=(40, 41, 42)), HarmonizedSIREN(1, hidden=(40, 41, 42))]


def method(field: Field, regularizers: dict[str, Regularizer], similarity: Similarity | None = None) -> Any:
    given = similarity or LocalNCC()
    if isinstance(field, HarmonizedSIREN):
        made: RegistrationMethod = ConditionedRegistration(field, given, regularizers, ["bend"], points=200)
    else:
        made = PairRegistration(field, given, regularizers, points=200)
    made.attach(pairs.pair())
    return made


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: type(f).__name__)
def test_only_products_between_hidden_layers_are_rounded(field: Field) -> None:
    host = method(field, {"bend": Bending(1.0), "fold": Barrier(1.0)})
    with torch.autocast("cpu", BF16), Products() as products:
        loss = host.training_step(None, 0)
    assert loss.dtype == torch.float32
    assert products.types(3) == {torch.float32}, "coordinates and first layer"
    assert products.types(40) == products.types(41) == {BF16, torch.float32}, "first and second derivatives"
    assert products.types(42) == {torch.float32}, "the displacement"
    assert {n for n, dtype in products.seen if dtype == BF16} == {40, 41}
    assert products.sampled == {torch.float32}
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in host.parameters())


def test_without_autocast_nothing_is_rounded() -> None:
    host = method(FIELDS[0], {"bend": Bending(1.0)})
    with Products() as products:
        host.training_step(None, 0)
    assert {dtype for _, dtype in products.seen} <= {torch.float32, torch.float64}, "matrices of spaces are float64"


def test_evaluation_is_not_rounded() -> None:
    pair = pairs.pair()
    host = pairs.conditioned_method()
    host.attach(pair)
    plain = host.predict_step(None, 0)
    with torch.autocast("cpu", BF16):
        assert torch.equal(host.predict_step(None, 0).displacement, plain.displacement)


def test_bending_is_that_of_float32() -> None:
    host = method(FIELDS[0], {"bend": Bending(1.0), "probed": Bending(1.0, directions="probes")})
    torch.nn.init.normal_(host.map.field.head.weight, std=0.1)
    x = host.sampler(100, "cpu")

    def raw() -> dict[str, Tensor]:
        torch.manual_seed(1)
        return host.terms(x)[1]  # type: ignore[no-any-return]

    exact = raw()
    with torch.autocast("cpu", BF16), mixed("cpu"):
        rounded = raw()
    for name, value in exact.items():
        assert rounded[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_a_jet_is_right_under_plain_autocast_too() -> None:
    """A caller's own autocast, without `mixed`, and the backward pass after it: as torch prescribes."""
    field = SIREN(hidden=(16, 16), omega=4.0, zero_output=False)
    x = 2 * torch.rand(50, 3) - 1

    def run(autocast: bool) -> tuple[Tensor, Tensor]:
        field.zero_grad()
        with torch.autocast("cpu", BF16, enabled=autocast):
            jet = field.jet(jets.seed(x, 2))
            loss = bending(jet) + jet.value.square().mean()
        loss.backward()
        grad = field.layers[1].weight.grad
        assert isinstance(grad, Tensor)
        return jet.channels.detach(), grad.clone()

    channels, grad = run(autocast=False)
    found, found_grad = run(autocast=True)
    assert torch.equal(found, channels) and torch.equal(found_grad, grad)


def test_rounded_derivatives_are_close() -> None:
    field = SIREN(hidden=(64, 64), omega=8.0, zero_output=False)
    x = 2 * torch.rand(200, 3) - 1
    exact = field.jet(jets.seed(x, 1)).channels
    with torch.autocast("cpu", BF16), mixed("cpu"):
        rounded = field.jet(jets.seed(x, 1)).channels
    error = (rounded - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    assert rounded.dtype == torch.float32
    assert 1e-5 < error.max() < 0.02


def test_mixed_and_full() -> None:
    x, w = torch.rand(8, 16), torch.rand(4, 16)
    rounded = (x.to(BF16) @ w.to(BF16).T).float()
    with torch.autocast("cpu", BF16):
        with mixed("cpu"):
            assert torch.equal(product(x, w, hidden=True), rounded)
            assert torch.equal(product(x, w), x @ w.T) and (x @ w.T).dtype == torch.float32
            with full("cpu"):
                assert torch.equal(product(x, w, hidden=True), torch.nn.functional.linear(x, w))
        assert product(x, w, hidden=True).dtype == torch.float32
    assert torch.equal(product(x, w, hidden=True), torch.nn.functional.linear(x, w)), "nothing stays behind"


def trainer(precision: Any, steps: int) -> lightning.Trainer:
    """On a CPU Lightning offers float16 to who brings the scaler alone."""
    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    return lightning.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, limit_val_batches=0, **options,
    )  # fmt: skip


def fit(host: PairRegistration, precision: Any, steps: int) -> None:
    with quiet():
        trainer(precision, steps).fit(host, train_dataloaders=step_loader(steps))


def test_a_fit_finds_the_deformation_as_well() -> None:
    """TRE 0.36 mm in all; measured at three sizes, bfloat16 and float32 differ by less than 3 %."""
    error = {}
    for precision in PRECISIONS:
        torch.manual_seed(0)
        host = PairRegistration(
            SIREN(hidden=(32, 32, 32), omega=30.0, first_omega=10.0), LocalNCC(), {"fold": Barrier(10.0)},
            points=300, pyramid_mm=(4.0, 0.0), lr=1e-3, warmup=0.05, cosine=True,
        )  # fmt: skip
        pair = host.pair = pairs.pair()
        assert pair.fixed_points is not None and pair.moving_points is not None
        fit(host, precision, 100)
        error[precision] = (host.transform()(pair.fixed_points) - pair.moving_points).norm(dim=1).mean().item()
    before = (pair.fixed_points - pair.moving_points).norm(dim=1).mean().item()
    assert before > 4 and error["32-true"] < 0.5
    assert error["bf16-mixed"] == pytest.approx(error["32-true"], rel=0.1)
    assert error["16-mixed"] == pytest.approx(error["32-true"], rel=0.03), "three bits more than bfloat16"
    assert len(set(error.values())) == 3, "so they were used"


def test_of_scaled_gradients_neither_lattices_nor_their_stages_know() -> None:
    """Lattices round nothing: with float16 they are those of float32, ended stages and all."""
    found = []
    for precision in ("32-true", "16-mixed"):
        method = RefinedRegistration(None, Refinement((4.0, 2.0), (60, 15)), LocalNCC())
        method.pair = pairs.pair()
        host = trainer(precision, 75)
        host.callbacks.append(EndStages(tolerance=0.05))  # type: ignore[attr-defined]
        with quiet():
            host.fit(method, train_dataloaders=step_loader(75))
        found.append((method.transform()(pairs.points()), method.ended))
    (one, ended), (other, others) = found
    assert ended == others and ended
    assert float((one - other).norm(dim=1).max()) < 1e-3 < float((one - pairs.points()).abs().max())


def test_float16_needs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        for accelerator in ("auto", "gpu", "cuda", "cpu", "mps"):
            if there and accelerator in ("auto", "gpu", "cuda"):
                check_precision("16-mixed", accelerator)
                continue
            with pytest.raises(UserError, match="expected a CUDA device for 16-mixed, found none; use bf16-mixed"):
                check_precision("16-mixed", accelerator)
        check_precision("bf16-mixed", "cpu")


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_other_precisions_are_refused(precision: str) -> None:
    host = PairRegistration(SIREN(hidden=(8,)), NCC())
    host.pair = pairs.pair()
    with pytest.raises(UserError, match=r"trainer.precision: expected 32-true, bf16-mixed or 16-mixed, got"):
        fit(host, precision, 1)


def thin_network(name: str) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """A network whose coarsest level has two voxels along an axis, and a call of it."""
    latents = torch.randn(4, 4, 4, 3, 2)
    if name == "VoxelMorphNetwork":
        network = VoxelMorphNetwork([16, 32, 32], [32, 32, 16])
        torch.nn.init.normal_(network.out.weight)
        images = torch.rand(1, 2, 16, 12, 8)
        return network, lambda: network(images)
    if name == "Denoiser":
        denoiser, context = Denoiser(4, [16, 16], [False, True], 8, 1, 8), torch.randn(4, 1, 8)
        return denoiser, lambda: denoiser(latents, torch.full((4,), 400), context)
    autoencoder = Autoencoder(3, 4, [16, 16], stride=1)
    return autoencoder, lambda: autoencoder.decode(autoencoder.encode(latents[:, :3])[0], (4, 3, 2))


@pytest.mark.parametrize("name", ["VoxelMorphNetwork", "Denoiser", "Autoencoder"])
def test_thin_volumes_have_a_gradient(name: str) -> None:
    """The bfloat16 gradient of convolutions on them holds what memory held: NaN here in most calls without care."""
    network, call = thin_network(name)
    for _ in range(20):
        freed = [torch.full((n,), torch.nan) for n in range(100, 20000, 500)]
        del freed
        with torch.autocast("cpu", BF16):
            loss = call().float().square().mean()
        found = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
        assert all(bool(g.isfinite().all()) for g in found if g is not None)


def test_thick_volumes_are_rounded() -> None:
    with torch.autocast("cpu", BF16):
        with convolutions("cpu", [3, 3, 3]):
            assert torch.is_autocast_enabled("cpu")
        with convolutions("cpu", [9, 2, 9]):
            assert not torch.is_autocast_enabled("cpu")
    with convolutions("cpu", [3, 3, 3]):
        assert not torch.is_autocast_enabled("cpu")
