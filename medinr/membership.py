"""The scans that an atlas knows, its mean at any time, and the decoder's answer for any of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medinr.data.cohort import Condition, Scan
from medinr.data.encoded import encode, encoded_size, from_plain
from medinr.data.scan_points import ScanPoints
from medinr.errors import UserError
from medinr.fields.modulated import ModulatedSIREN
from medinr.fields.poses import PoseKind, move, pose_size
from medinr.latents import Latent, condition_effects, kernel_weights, mean_latent


class Members:
    """Behaviour of an atlas towards its scans; the host holds the parameters.

    One parameter for each scan: the optimizer then leaves alone those that a step did not touch, so that the cost of a
    step does not grow with the cohort.
    """

    decoder: ModulatedSIREN
    codes: nn.ParameterList
    poses: nn.ParameterList
    fitted: nn.ParameterList
    state: dict[str, Any]
    explicit: Sequence[str] | None
    time_name: str | None
    sigma: float
    degree: Literal[0, 1]
    effects: bool
    pose_kind: PoseKind
    control: int
    code_std: float
    condition_scale: float
    halo_mm: float
    strip: bool
    names: list[str]

    def remember(self, state: dict[str, Any]) -> None:
        """Keep what a checkpoint must carry, and make the parameters that it asks for."""
        self.state = state
        self.modalities = tuple(state["modalities"])
        self.labels = (0, *(int(v) for v in state["labels"])) if state["labels"] else (0,)
        self.conditions = tuple(from_plain(c) for c in state["conditions"])
        self.told = self._explicit()
        self.unit_mm = float(state["unit_mm"])
        self.names = list(state["names"])
        classes = len(self.labels) if len(self.labels) > 1 else 0
        self.decoder.size(len(self.modalities) + classes, self.told_size)
        while len(self.codes) < len(self.names):
            self._new_member()

    def _explicit(self) -> tuple[Condition, ...]:
        if self.explicit is None:
            return self.conditions
        names = [c.name for c in self.conditions]
        if missing := [n for n in self.explicit if n not in names]:
            raise UserError(f"model.explicit: expected some of {', '.join(names) or 'none'}; found {missing[0]}")
        return tuple(c for c in self.conditions if c.name in self.explicit)

    @property
    def told_size(self) -> int:
        """Numbers of the explicit conditions."""
        return sum(encoded_size(c) for c in self.told)

    def _new_member(self) -> None:
        nodes, device = self.decoder.nodes, self.decoder.first.weight.device
        code = self.code_std * torch.randn(self.decoder.code, nodes, nodes, nodes)
        self.codes.append(nn.Parameter(code.to(device)))
        self.poses.append(nn.Parameter(torch.zeros(pose_size(self.pose_kind, self.control), device=device)))
        self.fitted.append(nn.Parameter(torch.zeros(self.told_size, device=device)))

    def restore(self, kept: Mapping[str, Any]) -> None:
        self.remember({k: v for k, v in kept.items() if k != "method"})

    @property
    def time(self) -> Condition | None:
        """The condition that atlases are made along."""
        if self.time_name is not None:
            found = next((c for c in self.conditions if c.name == self.time_name), None)
            if found is None:
                names = ", ".join(c.name for c in self.conditions) or "none"
                raise UserError(f"model.time: expected one of {names}; found {self.time_name}")
            return found
        return next((c for c in self.conditions if c.kind == "continuous"), None)

    @property
    def times(self) -> Tensor:
        """The time of each scan [S], NaN where unknown."""
        name = self.time.name if self.time is not None else ""
        return torch.tensor([known.get(name, float("nan")) for known in self.state["known"]], dtype=torch.float32)

    def decode(self, world: Tensor, codes: Tensor, encoded: Tensor, poses: Tensor, centres: Tensor) -> Tensor:
        """Intensities and logits [S, n, M + K] at world points [S, n, 3] of S brains."""
        x = ((world - centres[:, None]) / self.unit_mm).float()
        table = self.decoder.table(codes, self.condition_scale * encoded)
        out: Tensor = self.decoder(move(poses, x, self.control), table)
        return out

    def sampler(self, scan: Scan) -> ScanPoints:
        return ScanPoints(scan, self.modalities, self.labels, self.halo_mm, self.strip)

    def member(self, i: int) -> Latent:
        """A training scan, or one that was added, as it lies in its own space."""
        known = encode(self.told, self.state["known"][i])
        fitted = self.fitted[i].detach().cpu()
        centre = torch.tensor(self.state["centres"][i])
        code, pose = self.codes[i].detach().cpu(), self.poses[i].detach().cpu()
        return Latent(code, torch.where(known.isnan(), fitted, known), pose, centre)

    def at(self, time: float | None, values: Mapping[str, float] | None = None) -> Latent:
        """The atlas at a time: kernel-weighted mean of the codes, and the conditions that are asked for.

        Args:
            time: in the units of the condition `time`; None: the mean of all scans.
            values: of explicit conditions by name (a level by its index); others are the weighted mean.

        Raises:
            UserError: a condition that the decoder was not told.
        """
        times = self.times
        if time is None:
            weights = torch.full_like(times, 1 / len(times))
        else:
            weights = kernel_weights(times, time, self.sigma, self.degree)
        members = self.members()
        found = mean_latent(members, weights)
        asked = dict(values or {})
        if unknown := [k for k in asked if k not in [c.name for c in self.told]]:
            names = ", ".join(c.name for c in self.told) or "none"
            raise UserError(f"--condition {unknown[0]}: expected one of the explicit conditions ({names})")
        if time is not None and self.time in self.told and self.time is not None:
            asked.setdefault(self.time.name, time)
        given = encode(self.told, asked)
        encoded = torch.where(given.isnan(), found.encoded, given)
        code, pose = found.code, found.pose
        if self.effects and set(asked) & set(self._others):
            columns = self._columns(self._others)
            dates = torch.zeros_like(times) if time is None else times
            codes, poses = condition_effects(members, dates, self.sigma, self.degree, columns)
            # A condition that was not asked for is the weighted mean: its change is 0.
            change = (encoded - found.encoded)[columns]
            code, pose = code + torch.tensordot(change, codes, 1), pose + change @ poses
        return Latent(code, encoded, pose, found.centre)

    def _columns(self, names: Iterable[str]) -> list[int]:
        """Where explicit conditions lie among their numbers."""
        found: list[int] = []
        at = 0
        for condition in self.told:
            size = encoded_size(condition)
            if condition.name in names:
                found += range(at, at + size)
            at += size
        return found

    @property
    def _others(self) -> list[str]:
        """The explicit conditions but the time."""
        return [c.name for c in self.told if c != self.time]

    def members(self) -> list[Latent]:
        """All scans that the atlas knows."""
        return [self.member(i) for i in range(len(self.names))]

    def add(self, name: str, latent: Latent, known: Mapping[str, float] | None = None) -> None:
        """Make a fitted scan (`medinr.adaptation.adapt_scan`) one of the atlas's own: it counts in every later mean.

        Args:
            name: which no other scan has.
            latent: as it was fitted.
            known: its conditions; those that are missing, and explicit, stay as they were fitted.

        Raises:
            UserError: the name is taken.
        """
        if name in self.names:
            raise UserError(f"{name}: expected a name that the atlas does not have; give another")
        values = {c.name: float((known or {}).get(c.name, float("nan"))) for c in self.conditions}
        self.names.append(name)
        kept = {"names": list(self.names), "centres": [*self.state["centres"], latent.centre.tolist()]}
        self.state = {**self.state, **kept, "known": [*self.state["known"], values]}
        self._new_member()
        with torch.no_grad():
            for own, value in ((self.codes, latent.code), (self.poses, latent.pose), (self.fitted, latent.encoded)):
                own[-1].copy_(value)
