"""Diff-Def on a tiny cohort of known heads: all stages, the chain of checkpoints, generation, mistakes."""

import math
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from medinr.callbacks import LastCheckpoint, RandomStates
from medinr.callbacks.runs import LAST
from medinr.data.base import step_loader
from medinr.data.cohort import Cohort
from medinr.errors import UserError
from medinr.fields.conditions import ConditionEmbedding
from medinr.fields.diffusion import Denoiser
from medinr.fields.latent import Autoencoder
from medinr.fields.unet import VoxelMorphNetwork
from medinr.losses import Diffusion
from medinr.methods import DiffusionDeformation, load_method
from medinr.methods.diffusion_stages import Morphology
from tests.medinr import brains

STEPS = {"registration": 6, "autoencoder": 4, "diffusion": 4, "morphology": 3}


class Heads(lightning.LightningDataModule):
    def __init__(self, cohort: Cohort | None = None) -> None:
        super().__init__()
        self.cohort = cohort or brains.cohort()

    def train_dataloader(self) -> Any:
        return step_loader(4)

    def val_dataloader(self) -> Any:
        return step_loader(len(self.cohort.names("val")))


def method(steps: dict[str, int] | None = None, **more: Any) -> DiffusionDeformation:
    latents = more.get("latents", "deformations")
    channels = 3 if latents == "deformations" else 1
    torch.manual_seed(0)
    return DiffusionDeformation(
        steps or STEPS,
        VoxelMorphNetwork([8, 8], [8, 8], [[2, 2, 2], [2, 2, 1]]),
        Autoencoder(channels, 2, [4, 8], 2, groups=4),
        Denoiser(2, [8, 8], [False, True], 8, 1, 8, groups=4),
        ConditionEmbedding(8),
        {"diffusion": Diffusion(0.01)},
        Morphology(neighbours=4, per_step=2, bandwidth=0.3, steps=2, differentiable=1),
        **{"batch": 2, "radius": 1, "lr": {"registration": 3e-3}} | more,
    )


def fitted(
    made: DiffusionDeformation, folder: Path, data: Heads | None = None, ckpt: Path | None = None, stop: int = 0
) -> Path:
    """Fit; ``stop``: break off after so many steps, as a killed process would. Returns the last checkpoint."""
    lightning.seed_everything(0, verbose=False)

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == stop:
                raise SystemError("killed")

    trainer = lightning.Trainer(
        max_steps=sum(made.steps.values()), accelerator="cpu", logger=False, enable_checkpointing=True,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
        callbacks=[RandomStates(), LastCheckpoint(folder, 1), Stop()], max_epochs=-1,
    )  # fmt: skip
    if stop:
        with pytest.raises(SystemError):
            trainer.fit(made, datamodule=data or Heads(), ckpt_path=ckpt)
    else:
        trainer.fit(made, datamodule=data or Heads(), ckpt_path=ckpt, weights_only=True)
    return folder / LAST


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages in one fit, with velocities refined on images and labels."""
    return fitted(method(refine=2, label_weight=1.0), tmp_path_factory.mktemp("whole"))


def test_a_checkpoint_generates_with_no_further_argument(whole: Path) -> None:
    made = load_method(whole)
    assert isinstance(made, DiffusionDeformation) and made.state["trained"] == STEPS
    wanted = made.wanted({"size": 9.0})
    assert wanted[0] == 9 and wanted[1].isnan()
    one, again, other = (made.generate(wanted, seed=s, steps=4) for s in (0, 0, 1))
    assert torch.equal(one.image, again.image) and not torch.equal(one.image, other.image)
    assert one.image.shape == one.domain.shape == brains.SHAPE
    assert one.displacement is not None and one.displacement.shape == (*brains.SHAPE, 3)
    assert one.probabilities is not None and one.labels is not None and one.det is not None
    assert float(one.det.min()) > 0 and one.spread_mm is None
    assert set(one.labels.unique().tolist()) <= {0, 1, 2} and float(one.probabilities.sum(0).max()) <= 1 + 1e-5
    assert one.volumes_ml[2] == pytest.approx(float(one.probabilities[1].sum()) * brains.SPACING**3 / 1000)
    three = made.generate(wanted, samples=3, guidance=2.0, steps=4)
    assert three.spread_mm is not None and float(three.spread_mm.min()) >= 0 and float(three.spread_mm.max()) > 0


def test_an_identity_leaves_the_general_atlas_as_it_is(whole: Path) -> None:
    made = load_method(whole)
    assert isinstance(made, DiffusionDeformation)
    made.domain = brains.domain()
    found = made.atlas_of(torch.zeros(1, 3, *brains.SHAPE))
    assert torch.allclose(found.image, made.state["template"][0], atol=1e-5)
    assert found.displacement is not None and found.displacement.abs().max() == 0
    shifted = torch.zeros(1, 3, *brains.SHAPE)
    shifted[:, 0] = 1.0  # the atlas at v shows the general one at v + 1
    moved = made.atlas_of(shifted)
    assert torch.allclose(moved.image[:-1], made.state["template"][0, 1:], atol=1e-4)
    assert moved.displacement is not None and torch.allclose(moved.displacement[..., 0], torch.tensor(brains.SPACING))


def test_morphology_reaches_the_denoiser_and_the_embedding() -> None:
    made = method()
    data = brains.cohort()
    made.size(data)
    made.attach(data)
    for part in (made.denoiser, made.network, made.autoencoder):
        for p in part.parameters():  # MONAI starts the last layer of every block at zero, and so does the network
            if not p.any():
                torch.nn.init.normal_(p, std=0.1)
    made.begin("morphology", True)
    terms = made._morphology(2)
    terms["morphology"].backward()
    for part in (made.denoiser, made.embedding):
        assert max(float(p.grad.abs().max()) for p in part.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in [*made.network.parameters(), *made.autoencoder.parameters()])


def test_registration_learns_and_the_template_lies_in_the_middle(tmp_path: Path) -> None:
    made = method({"registration": 60})
    fitted(made, tmp_path)
    data = Heads()
    still = torch.zeros(1, 3, *brains.SHAPE)
    with torch.no_grad():
        found = made._registered("train0", "train5")
        pair = (made.space_.image(n)[None] for n in ("train0", "train5"))
        before = float(made.compare(*pair, still)[1]["similarity"])
    assert float(found["val/similarity"]) < 0.9 * before
    assert data.cohort.names("train") == made.known.names("train")


def test_stages_run_alone_and_chain_by_checkpoints(whole: Path, tmp_path: Path) -> None:
    first = fitted(method({"registration": 6, "autoencoder": 4}, refine=2), tmp_path / "a")
    second = fitted(method({"diffusion": 4}, earlier=str(first), refine=2), tmp_path / "b")
    third = fitted(method({"morphology": 3}, earlier=str(second), refine=2), tmp_path / "c")
    one, two, three = (torch.load(f, weights_only=True) for f in (first, second, third))
    assert three["medinr"]["trained"] == STEPS
    for name, weight in one["state_dict"].items():
        if name.startswith(("network.", "autoencoder.")):
            assert torch.equal(weight, three["state_dict"][name]), name
    moved = [k for k, w in two["state_dict"].items() if not torch.equal(w, three["state_dict"][k])]
    assert moved and all(k.startswith(("denoiser.", "embedding.")) for k in moved)
    assert torch.equal(two["medinr"]["template"], three["medinr"]["template"])


@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint")  # steps are numbers: there is nothing to lose
@pytest.mark.parametrize("stop", [3, 8, 12, 16])
def test_a_killed_fit_goes_on_from_any_stage_as_if_unbroken(whole: Path, tmp_path: Path, stop: int) -> None:
    checkpoint = fitted(method(refine=2, label_weight=1.0), tmp_path, stop=stop)
    last = fitted(method(refine=2, label_weight=1.0), tmp_path, ckpt=checkpoint)
    one, two = (torch.load(f, weights_only=True)["state_dict"] for f in (whole, last))
    for name, weight in one.items():
        assert torch.allclose(weight, two[name], atol=1e-6), name


def test_the_published_arrangement_codes_images(tmp_path: Path) -> None:
    made = method({**STEPS, "morphology": 2}, latents="images", squarings=0)
    loaded = load_method(fitted(made, tmp_path))
    assert isinstance(loaded, DiffusionDeformation)
    wanted = loaded.wanted({})
    image = loaded.generate_image(wanted, steps=2)
    assert image.shape == brains.SHAPE and float(image.min()) >= 0 and float(image.max()) <= 1
    assert (
        loaded.head is not None
        and max(float(p.detach().abs().max()) for p in loaded.head[1].blocks[-1].parameters()) > 0
    )  # type: ignore[index, union-attr]
    assert loaded.generate(wanted, steps=2).displacement is not None
    with pytest.raises(UserError, match="expected images, found deformations"):
        method().generate_image(torch.zeros(2))


def test_missing_sizes_and_no_labels_are_no_obstacle(tmp_path: Path) -> None:
    data = Heads(brains.cohort(missing=("train1", "train2")))
    loaded = load_method(fitted(method(dict.fromkeys(STEPS, 1), template_rounds=0), tmp_path, data))
    assert isinstance(loaded, DiffusionDeformation)
    assert torch.equal(loaded.state["template"], loaded.state["start_atlas"])
    assert math.isfinite(float(loaded.generate(loaded.wanted({"size": 8.0}), steps=2).image.mean()))


def test_a_condition_outside_of_what_was_trained_is_warned_of(whole: Path) -> None:
    made = load_method(whole)
    assert isinstance(made, DiffusionDeformation)
    with pytest.warns(UserWarning, match=r"size 20 is outside of the trained range, 6 to 12"):
        made.wanted({"size": 20.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.wanted({"size": 11.0, "sex": 1.0})
    with pytest.raises(UserError, match="expected any of size, sex, found 'age'"):
        made.wanted({"age": 20.0})


def mistakes(whole: Path) -> dict[str, Any]:
    return {
        "no such stage": (lambda: method({"fusion": 1}), "expected the stages registration"),
        "a gap": (lambda: method({"registration": 1, "diffusion": 1}), "stages that follow each other"),
        "no steps": (lambda: method({"registration": 0}), "1 or more"),
        "channels": (lambda: method(latents="images") and DiffusionDeformation(
            STEPS, VoxelMorphNetwork([8], [8]), Autoencoder(1, 4, [8], 1), Denoiser(), ConditionEmbedding()
        ), "expected 3 for deformations"),
        "denoiser": (lambda: DiffusionDeformation(
            STEPS, VoxelMorphNetwork([8], [8]), Autoencoder(), Denoiser(3), ConditionEmbedding()
        ), "autoencoder's latent_channels"),
        "integrating network": (lambda: DiffusionDeformation(
            STEPS, VoxelMorphNetwork([8], [8], squarings=3), Autoencoder(), Denoiser(), ConditionEmbedding()
        ), "network.squarings"),
        "differentiable": (lambda: Morphology(steps=2, differentiable=3), "no more differentiable steps than 2"),
        "neighbours": (lambda: Morphology(neighbours=0), "neighbours, per_step"),
        "modality": (lambda: method(modality="T2w").attach(brains.cohort()), "expected one of T1w, found 'T2w'|T2w"),
        "untrained": (lambda: method().require("diffusion"), "stage diffusion: expected a checkpoint"),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(mistakes(Path())))
def test_mistakes_are_one_line(name: str) -> None:
    call, words = mistakes(Path())[name]
    with pytest.raises(UserError, match=words) as found:
        call()
    assert "\n" not in str(found.value)


def test_a_chain_with_a_missing_link_is_refused(whole: Path, tmp_path: Path) -> None:
    for made, words in (
        (method({"diffusion": 2}), "stages registration, autoencoder, found none"),
        (method({"diffusion": 2}, earlier=str(tmp_path / "no.ckpt")), "no such checkpoint"),
    ):
        with pytest.raises(UserError, match=words):
            fitted(made, tmp_path / "x")
    first = fitted(method({"registration": 2}), tmp_path / "a")
    with pytest.raises(UserError, match="expected the stage autoencoder in it"):
        fitted(method({"diffusion": 2}, earlier=str(first)), tmp_path / "b")
    wide = method({"diffusion": 2}, earlier=str(whole))
    wide.network = VoxelMorphNetwork([8, 16], [8, 8], [[2, 2, 2], [2, 2, 1]])
    with pytest.raises(UserError, match="expected the same networks"):
        fitted(wide, tmp_path / "c")


def test_other_conditions_than_the_checkpoints_are_refused(whole: Path, tmp_path: Path) -> None:
    cohort = brains.cohort()
    few = Cohort("heads", ["T1w"], brains.LABELS, cohort.conditions[:1], cohort.splits, cohort.scan, cohort.known)
    with pytest.raises(UserError, match="expected size, sex as the checkpoint was trained on, found size"):
        fitted(method({"morphology": 1}, earlier=str(whole)), tmp_path, Heads(few))
