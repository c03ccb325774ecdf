"""A whole fit of an atlas, of the diffusion or of a pair, in one process or two. Run by test_ranks_methods.py.

    python fit_worker.py METHOD DEVICES OUT [--same] [--noise EPS] [--fail RANK] [--poison RANK]

Writes OUT/<rank>.pt: the weights of each rank after the fit. ``--same``: all ranks draw the same random numbers.
``--noise``: weights are multiplied by 1 + EPS times a normal number before the first step. ``--fail``: this rank raises
an error in the sixth step. ``--poison``: this rank's weights are no numbers in the second step.
"""

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch

from medinr.commands.quiet import quiet
from medinr.data.base import step_loader
from tests.medinr import pairs, test_diffusion, tiny_atlas

ATLAS_STEPS = 30
RATES = {
    # experiments/cina_dhcp.yaml and cinema_dhcp.yaml
    "published": {"lr": 1e-4, "code_lr": 5e-4, "pose_lr": 7.5e-3, "condition_scale": 0.1},
    # cinema_dhcp_best.yaml
    "best": {"lr": 2e-3, "code_lr": 2e-3, "pose_lr": 1e-3, "feature_lr": 1e-2, "code_weight": 0.1, "label_weight": 0.2},
}
DECODERS: dict[str, dict[str, Any]] = {
    "published": {"omega": 30.0, "nodes": 3, "unit_gain": False},
    "best": {"omega": 30.0, "grids": [3, 5], "features": 8},
}


class Heads(lightning.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.cohort = tiny_atlas.cohort()

    def train_dataloader(self) -> Any:
        return step_loader(10)


class Before(lightning.Callback):
    """Does what the arguments say."""

    def __init__(self, same: bool, noise: float, fail: int | None, poison: int | None) -> None:
        self.same, self.noise, self.fail, self.poison = same, noise, fail, poison

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        # Lightning seeds anew when it starts several processes; parts that are made now would have other weights.
        torch.manual_seed(5)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in pl_module.parameters():
                p.mul_(1 + self.noise * torch.randn(p.shape, generator=generator))
        if self.same:
            torch.manual_seed(11)

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        if trainer.global_rank == self.poison and trainer.global_step == 1:
            with torch.no_grad():
                for p in pl_module.parameters():
                    p.fill_(torch.nan)
        if trainer.global_rank == self.fail and trainer.global_step == 5:
            raise RuntimeError("a fault of this rank alone")


def made(name: str) -> tuple[lightning.LightningModule, lightning.LightningDataModule, int]:
    """Method, data and number of steps."""
    lightning.seed_everything(0, verbose=False)
    if name == "diffusion":
        diffusion = test_diffusion.method()
        return diffusion, test_diffusion.Heads(), sum(diffusion.steps.values())
    if name == "pair":
        registration = pairs.plain_method()
        registration.pair = pairs.pair()
        return registration, Heads(), 100_000
    pose = "affine" if name == "best" else "rigid"
    torch.manual_seed(3)
    decoder = tiny_atlas.decoder(**DECODERS[name])
    return tiny_atlas.atlas(decoder=decoder, scans=5, pose=pose, **RATES[name]), Heads(), ATLAS_STEPS


def fit(
    name: str,
    devices: int = 1,
    same: bool = False,
    noise: float = 0.0,
    fail: int | None = None,
    poison: int | None = None,
) -> Any:
    """The weights after the fit, and the rank that this process was."""
    method, data, steps = made(name)
    with quiet():
        trainer = lightning.Trainer(
            accelerator="cpu", devices=devices, max_steps=steps, max_epochs=-1, logger=False,
            strategy="ddp_find_unused_parameters_true" if devices > 1 else "auto", enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
            use_distributed_sampler=False, callbacks=[Before(same, noise, fail, poison)],
        )  # fmt: skip
        trainer.fit(method, data)
    return {k: v.detach() for k, v in method.state_dict().items()}, trainer.global_rank


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=("diffusion", "pair", *RATES))
    parser.add_argument("devices", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--same", action="store_true")
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--fail", type=int)
    parser.add_argument("--poison", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    weights, rank = fit(given.method, given.devices, given.same, given.noise, given.fail, given.poison)
    torch.save(weights, given.out / f"{rank}.pt")


if __name__ == "__main__":
    main()
