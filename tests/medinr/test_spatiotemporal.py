"""One velocity field of space and time, fitted to a sequence: a known periodic motion comes back."""

import copy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from medinr.callbacks import RandomStates
from medinr.commands.quiet import quiet
from medinr.data.base import step_loader
from medinr.data.series import SequenceDataModule
from medinr.errors import UserError
from medinr.fields import SIREN, FourierSIREN, ImagePrior, LinearTime, PhaseTime
from medinr.fields.dense import evaluate_dense
from medinr.jets import det
from medinr.losses import MSE, NCC, Barrier, Bending, LocalNCC, TemporalSmoothness
from medinr.losses.temporal import temporal_roughness
from medinr.methods import SpatioTemporalRegistration, load_method
from medinr.results import evaluate, landmarks_over_time
from medinr.space import transform_points
from tests.medinr import breathing, pairs
from tests.medinr.tolerances import assert_close


def method(**arguments: Any) -> SpatioTemporalRegistration:
    options: dict[str, Any] = {
        "field": SIREN(3, 12, (32, 32), omega=15.0, first_omega=6.0),
        "time": PhaseTime(2),
        "similarity": LocalNCC(6.0),
        "velocity_regularizers": {"bending": Bending(1e-3, fraction=0.25, directions="probes")},
        "temporal": TemporalSmoothness(1e-3),
        "points": 384,
        "pyramid_mm": (4.0, 0.0),
        "lr": 2e-3,
        "warmup": 0.1,
        "cosine": True,
    }
    return SpatioTemporalRegistration(**(options | arguments))


class Quiet:
    """Lightning's trainer, without what it says of missing loaders."""

    def __init__(self, steps: int, **options: Any) -> None:
        with quiet():
            self.inner = lightning.Trainer(
                max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                enable_model_summary=False, enable_progress_bar=False, log_every_n_steps=10, **options,
            )  # fmt: skip

    def fit(self, *args: Any, **options: Any) -> None:
        with quiet():
            self.inner.fit(*args, **options)


def fit(some: SpatioTemporalRegistration, sequence: Any, steps: int) -> SpatioTemporalRegistration:
    some.sequence = sequence
    Quiet(steps).fit(some, step_loader(steps))
    return some.eval()


@pytest.fixture(scope="module")
def fitted() -> SpatioTemporalRegistration:
    """Four phases of five are trained on; 40 is held out."""
    torch.manual_seed(0)
    return fit(method(), breathing.sequence((0, 15, 40, 60, 80), held_out=(2,)), 100)


# -- a known motion -----------------------------------------------------------------------------------------------


def test_a_known_periodic_motion_is_recovered(fitted: SpatioTemporalRegistration) -> None:
    assert fitted.sequence is not None
    errors = landmarks_over_time(fitted.transform_at, fitted.sequence)
    assert list(errors) == [15.0, 40.0, 60.0, 80.0]
    for time in (15.0, 60.0, 80.0):
        before, after = errors[time]
        assert before > 1.5 and after < 0.4, time
    before, after = errors[40.0]
    assert before > 3.5 and after < 1.2, "a time that was never trained on"
    p = pairs.points()
    for time, bound in ((7.0, 0.5), (70.0, 0.8)):  # no images there
        moved = breathing.motion(p, time)
        assert (fitted.transform_at(time)(p) - moved).norm(dim=1).mean() < bound


def test_inhaling_and_exhaling_take_different_paths(fitted: SpatioTemporalRegistration) -> None:
    p = pairs.points()
    found = fitted.transform_at(75.0)(p) - fitted.transform_at(25.0)(p)
    truth = breathing.motion(p, 75.0) - breathing.motion(p, 25.0)
    assert truth.norm(dim=1).mean() > 2.5
    assert (found - truth).norm(dim=1).mean() < 0.25 * truth.norm(dim=1).mean()


def test_identity_at_the_reference(fitted: SpatioTemporalRegistration) -> None:
    p = pairs.points()
    for time in (0.0, 100.0):
        assert (fitted.transform_at(time)(p) - p).norm(dim=1).max() < 1e-3
    found = evaluate_dense(fitted.transform_at(0.0), pairs.CUBE)
    assert found.displacement.abs().max() < 1e-5 and (found.det - 1).abs().max() < 1e-5


def test_motion_is_continuous_in_time(fitted: SpatioTemporalRegistration) -> None:
    p = pairs.points()
    path = torch.stack([fitted.transform_at(float(t))(p) for t in range(0, 101, 2)])
    steps = path.diff(dim=0).norm(dim=-1)
    assert steps.max() < 1.2, "mm in 2 % of the cycle"
    assert path.diff(n=2, dim=0).norm(dim=-1).max() < 0.4


def test_inverse_and_between(fitted: SpatioTemporalRegistration) -> None:
    p = pairs.points()
    for time in (15.0, 40.0, 60.0):
        phi = fitted.transform_at(time)
        moved = phi(p)
        back, residual = phi.inverse(moved)
        assert (back - p).norm(dim=1).max() < 0.01 and residual.max() < 0.01
        alone = fitted.transform_between(time, 0.0)(moved)
        assert (alone - p).norm(dim=1).max() < 0.1, "the flow backwards without Newton's help"
    between = fitted.transform_between(60.0, 15.0)
    assert (between(fitted.transform_at(60.0)(p)) - fitted.transform_at(15.0)(p)).norm(dim=1).max() < 0.1
    chain = det(fitted.transform_at(15.0).jacobian(p)) / det(fitted.transform_at(60.0).jacobian(p))
    assert torch.allclose(det(between.jacobian(fitted.transform_at(60.0)(p))), chain, atol=5e-3)


def test_nothing_folds(fitted: SpatioTemporalRegistration) -> None:
    for time in (15.0, 40.0, 60.0):
        assert evaluate_dense(fitted.transform_at(time), pairs.CUBE).det.min() > 0.2
        assert fitted.flow.stepping(fitted.context(time)) <= 0.5


def test_evaluation_and_report(fitted: SpatioTemporalRegistration, tmp_path: Path) -> None:
    metrics = fitted.predict_step(0, 0).metrics
    assert metrics["tre/initial_mean"] > 3.5 and metrics["tre/mean"] < 0.4, "of the time that is farthest and trained"
    assert metrics["tre/mean"] < metrics["tre/sequence"] < metrics["tre/held_out"] < 1.2
    [table] = fitted.report(tmp_path)
    rows = [line.split(",") for line in table.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == ["time", "held_out", "tre_before_mm", "tre_mm", "steps", "h_lipschitz"]
    assert [row[:2] for row in rows[1:]] == [["0", "0"], ["15", "0"], ["40", "1"], ["60", "0"], ["80", "0"]]
    assert rows[1][2] == "nan" and float(rows[3][3]) == pytest.approx(metrics["tre/held_out"], rel=1e-3)


# -- checkpoints --------------------------------------------------------------------------------------------------


def test_checkpoint_rebuilds_every_time(fitted: SpatioTemporalRegistration, tmp_path: Path) -> None:
    fitted.save(tmp_path / "transform.ckpt")
    again = load_method(tmp_path / "transform.ckpt")
    assert isinstance(again, SpatioTemporalRegistration)
    p = pairs.points()
    for time in (0.0, 33.0, 60.0):
        assert_close(again.transform_at(time)(p), fitted.transform_at(time)(p))
    assert_close(again.transform()(p), fitted.transform_at(60.0)(p))
    assert again.state["times"] == [0.0, 15.0, 40.0, 60.0, 80.0] and again.state["held_out"] == [2]
    assert again.flow.count(again.context(60.0)) == fitted.flow.count(fitted.context(60.0))


class SaveAt(Callback):
    """Keeps the state of a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [2, 6])
def test_a_continued_fit_ends_as_an_unbroken_one(step: int, tmp_path: Path) -> None:
    """Broken in the stage of the prior, and in that of the motion."""
    sequence = breathing.sequence((0, 30, 60))

    def make() -> SpatioTemporalRegistration:
        torch.manual_seed(4)
        prior = ImagePrior(FourierSIREN(8, 1.0, hidden=(8,)), 0.4, as_reference=True)
        some = method(points=32, prior=prior, similarity=MSE(), times_per_step=1)
        some.sequence = sequence
        return some

    whole, rest = make(), make()
    Quiet(10, callbacks=[RandomStates(), SaveAt(step, tmp_path / "half.ckpt")]).fit(whole, step_loader(10))
    Quiet(10, callbacks=[RandomStates()]).fit(
        rest, step_loader(10), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    moved = whole.flow.lipschitz(whole.context(30.0))
    assert float(moved) > 1e-4
    for name, value in whole.state_dict().items():
        assert_close(rest.state_dict()[name], value, 1e-6)


# -- the prior ----------------------------------------------------------------------------------------------------


def test_the_prior_learns_the_image_first_and_then_rests() -> None:
    domain = pairs.CUBE
    sequence = breathing.sequence((0, 50))
    field = FourierSIREN(48, 1.0, hidden=(48, 48), omega=15.0)
    some = method(prior=ImagePrior(field, 0.97, 2e-3, as_reference=True), points=1500, similarity=NCC())
    before = copy.deepcopy(field.state_dict())
    fit(some, sequence, 100)
    rendered = some.rendering(domain)
    assert rendered is not None
    image = sequence.images[0].data
    residual = (rendered - image).square().mean().sqrt() / image.std()
    assert residual < 0.35
    assert any(not torch.equal(field.state_dict()[k], v) for k, v in before.items() if k.startswith("layers"))
    assert float(some.flow.lipschitz(some.context(50.0))) > 0, "the last steps were the motion's"
    # At another time the rendering is that of the reference, carried by the inverse.
    later = some.rendering(domain, 50.0)
    assert later is not None
    world = transform_points(domain.voxel_to_world, domain.voxels().double())[5000:5100]
    back, _ = some.transform_at(50.0).inverse(world)
    x = transform_points(domain.world_to_normalised, back).float()
    low, high = some.state["windows"][0]
    with torch.no_grad():
        expected = low + (high - low) * field(x)[:, 0]
    assert_close(later.flatten()[5000:5100], expected, 1e-3)


def test_the_prior_takes_the_place_of_the_image() -> None:
    some = method(prior=ImagePrior(FourierSIREN(8, 1.0, hidden=(8,)), 0.5, as_reference=True), pyramid_mm=(0.0,))
    some.attach(breathing.sequence((0, 50)))
    level = some._level(1)
    rendered = some.rendering(pairs.CUBE)
    assert rendered is not None
    low, high = some.state["windows"][0]
    assert_close(level.fixed, ((rendered - low) / (high - low)).clamp(0, 1), 1e-4)
    plain = method(pyramid_mm=(0.0,))
    plain.attach(breathing.sequence((0, 50)))
    assert (plain._level(1).fixed - level.fixed).abs().max() > 0.1


def test_decay_is_that_of_adam() -> None:
    field, x = FourierSIREN(4, 1.0, hidden=(8,)), torch.rand(9, 3)
    with_term, with_adam = ImagePrior(copy.deepcopy(field), decay=0.1), ImagePrior(copy.deepcopy(field))
    for prior, decay in ((with_term, 0.0), (with_adam, 0.1)):
        optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2, weight_decay=decay)
        for _ in range(3):
            optimizer.zero_grad()
            torch.stack(list(prior.terms(x, torch.ones(9, 1)).values())).sum().backward()
            optimizer.step()
    for a, b in zip(with_term.parameters(), with_adam.parameters(), strict=True):
        assert_close(a, b, 1e-5)


# -- the loss -----------------------------------------------------------------------------------------------------


def test_held_out_times_are_never_looked_at() -> None:
    losses = []
    for other in (0.0, 1e6):
        sequence = breathing.sequence((0, 20, 40, 60), held_out=(2,))
        sequence.images[2].data[0, ::2] = other
        torch.manual_seed(3)
        some = method(points=16, times_per_step=0)
        some.attach(sequence)
        x, chosen = some.draw()
        assert sorted(chosen) == [1, 3]
        losses.append(some.objective((x, chosen))["similarity"].detach())
    assert_close(losses[0], losses[1])


def test_times_take_turns() -> None:
    some = method(points=16, times_per_step=2)
    some.attach(breathing.sequence((0, 20, 40, 60, 80)))
    seen = [some.draw()[1] for _ in range(30)]
    assert {i for chosen in seen for i in chosen} == {1, 2, 3, 4} and all(len(set(c)) == 2 for c in seen)


def test_images_may_have_grids_of_their_own() -> None:
    """The second image on a finer, shifted grid: similarity at the true motion is near its best."""
    other = type(pairs.CUBE).of((50, 48, 46), [[2, 0, 0, -50], [0, 2, 0, -46], [0, 0, 2, -44], [0, 0, 0, 1]])
    one, two = breathing.sequence((0, 50)), breathing.sequence((0, 50), domain=other)
    mixed = type(one)(
        "mixed", one.times, (one.images[0], two.images[1]), 0, 100.0, (None, None), one.points, (None, None)
    )
    values = []
    for sequence in (one, mixed):
        some = method(points=400, pyramid_mm=(0.0,), background=1.0)
        some.attach(sequence)
        torch.manual_seed(1)
        values.append(float(some.objective((some.draw()[0], [1]))["similarity"].detach()))
    assert values[0] == pytest.approx(values[1], rel=0.03)


def test_penalties_of_velocity_and_displacement() -> None:
    """For a short motion u = v: the same penalty of both is the same number; each has its weight once."""
    field = pairs.gentle(SIREN(3, 6, (16,), omega=6.0, zero_output=False), 0.02)
    some = method(
        field=field, time=PhaseTime(1), points=200, temporal=None, times_per_step=1,
        regularizers={"bending": Bending(2.0), "barrier": Barrier(1.0)},
        velocity_regularizers={"bending": Bending(3.0)},
    )  # fmt: skip
    some.attach(breathing.sequence((0, 50)))
    terms = {k: v.detach() for k, v in some.objective(some.draw()).items()}
    assert float(terms["bending"]) > 0 and float(terms["barrier"]) == 0
    assert float(terms["velocity/bending"]) / float(terms["bending"]) == pytest.approx(1.5, rel=0.05)


def test_temporal_roughness_of_a_sine() -> None:
    """v = A sin(2 pi t): mean squares over a cycle are A^2 / 2 times (2 pi)^2 and (2 pi)^4."""
    t = torch.arange(0, 1, 0.01, dtype=torch.float64)
    step = 0.01

    def v(shift: float) -> torch.Tensor:
        return 3 * torch.sin(6.283185307 * (t + shift))[:, None] * torch.tensor([1.0, 0, 0]).double()

    for order, truth in ((1, 9 / 2 * 6.2832**2), (2, 9 / 2 * 6.2832**4)):
        found = temporal_roughness(v(-step), v(0), v(step), step, order)
        assert float(found) == pytest.approx(truth, rel=0.01)
    uniform = torch.outer(t, torch.tensor([1.0, 2, 0]).double())
    assert float(temporal_roughness(uniform - 0.1, uniform, uniform + 0.1, 0.1)) < 1e-20


def test_linear_time() -> None:
    """Dates, irregular and not periodic; the reference is the first."""
    some = method(field=SIREN(3, 3, (32, 32), omega=15.0, first_omega=6.0), time=LinearTime(), temporal=None)
    fit(some, breathing.sequence((3, 7, 20), period=None), 60)
    assert some.sequence is not None
    p = pairs.points()
    assert (some.transform_at(3.0)(p) - p).norm(dim=1).max() < 1e-3
    back = breathing.unmoved(p, 3.0)
    errors = [(some.transform_at(t)(p) - breathing.motion(back, t)).norm(dim=1).mean() for t in (7.0, 20.0)]
    assert max(errors) < 1.0 < (breathing.motion(back, 20.0) - p).norm(dim=1).mean()


# -- mistakes -----------------------------------------------------------------------------------------------------


def test_wrong_arguments() -> None:
    for wrong, message in (
        ({"points": 0}, "points, times_per_step: expected 1 and 0 or more"),
        ({"pyramid_mm": ()}, "pyramid_mm: expected at least one level"),
        ({"background": 2.0}, "background: expected a share of the points"),
        ({"time": PhaseTime(1)}, "field: expected 6 outputs"),
    ):
        with pytest.raises(UserError, match=message):
            method(**wrong)
    with pytest.raises(UserError, match=r"prior\.share: expected a share of the steps"):
        ImagePrior(FourierSIREN(4), 1.0)


def test_data_of_another_kind() -> None:
    some = method(time=LinearTime(4))
    with pytest.raises(UserError, match="found a period of 100; give PhaseTime"):
        some.attach(breathing.sequence((0, 50)))
    with pytest.raises(UserError, match="expected an image sequence, found the pair cube"):
        some.attach(pairs.pair())
    with pytest.raises(UserError, match="prior: expected 1 outputs, as channels, found 2"):
        method(prior=ImagePrior(FourierSIREN(4, out_features=2, hidden=(8,)))).attach(breathing.sequence((0, 50)))
    assert hasattr(SequenceDataModule, "sequence"), "what the method asks the data module for"
    data = lightning.LightningDataModule()
    with pytest.raises(UserError, match="expected an image sequence, found LightningDataModule"):
        Quiet(1).fit(some, datamodule=data)


def test_evaluation_of_a_pair_is_the_usual_one(fitted: SpatioTemporalRegistration) -> None:
    assert fitted.pair is not None
    found = evaluate(fitted.transform(), fitted.pair)
    assert found.metrics["folding/percent"] == 0
    inner = (slice(None), *(slice(4, -4),) * 3)  # the border's voxels come from outside
    before, after = ((v - fitted.pair.fixed.data)[inner].square().mean() for v in (found.start, found.warped))
    assert after < 0.1 * before
