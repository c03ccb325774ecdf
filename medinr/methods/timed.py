"""The base of methods that fit one velocity field to a sequence: its times, its transforms, its evaluation."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medinr import io
from medinr.data.pair import Pair
from medinr.data.sequence import Sequence as ImageSequence
from medinr.data.sequence import span
from medinr.data.series import extremes
from medinr.errors import UserError
from medinr.fields import Map, Transform
from medinr.fields.chained import Chained
from medinr.fields.flow import Flow, FlowTransform
from medinr.methods.levels import Window, robust_windows
from medinr.methods.module import RegistrationModule
from medinr.precision import full
from medinr.results import Evaluation, landmarks_over_time
from medinr.space import Domain

EYE = torch.eye(4, dtype=torch.float64)


class SequenceRegistration(RegistrationModule):
    """phi_t = exp(v(., t)), phi_ref = id, for all times of a sequence; a subclass says how v is fitted.

    All images share one world: there is no linear start.

    Attributes:
        map: the flow; its velocity has `set_times`.
        trained: indices of the images that are fitted, without the reference.
        matrices: from normalised coordinates to the voxels of each image.
        clock: each time as the field takes it.
    """

    map: Map

    def __init__(self) -> None:
        super().__init__()
        self.sequence: ImageSequence | None = None
        self.clock: list[Tensor] = []
        self.trained: list[int] = []
        self.matrices: list[Tensor] = []

    @property
    def flow(self) -> Flow:
        assert isinstance(self.map, Flow)
        return self.map

    # -- the sequence --------------------------------------------------------------------------------------------

    @property
    def subject(self) -> Any:
        found = self.sequence or getattr(self.trainer.datamodule, "sequence", None)  # type: ignore[attr-defined]
        if not isinstance(found, ImageSequence):
            kind = type(self.trainer.datamodule).__name__  # type: ignore[attr-defined]
            raise UserError(f"data: expected an image sequence, found {kind}; give FourDCTSequence or another one")
        return found

    def size(self, pair: Pair | ImageSequence) -> None:
        self._take_domain(pair.domain.with_scale("oriented"))

    def take(self, pair: Pair | ImageSequence, window: Window | None) -> ImageSequence:
        """Take a sequence, on the method's device: what a checkpoint keeps of it, and the coordinate maps.

        Args:
            pair: the sequence.
            window: of all channels (None: percentiles of the reference's).
        """
        if isinstance(pair, Pair):
            raise UserError(f"data: expected an image sequence, found the pair {pair.name}; give a Sequence")
        sequence = pair.to(self.device)
        image = sequence.images[sequence.reference]
        extreme, trained = extremes(sequence), [i for i in sequence.training if i != sequence.reference]
        windows = [window] * len(image.data) if window else robust_windows(image)
        self.remember(
            {
                "domain": sequence.domain.with_scale("oriented").to_dict(),
                "start": EYE.tolist(),
                "windows": [[float(v) for v in w] for w in windows],
                "times": list(sequence.times),
                "held_out": list(sequence.held_out),
                "reference": sequence.reference_time,
                "period": sequence.period,
                "span": span(sequence.times, sequence.period),
                "view": sequence.times[next(i for i in trained if sequence.images[i] is extreme.moving)],
            }
        )
        self.sequence, self.pair, self.trained = sequence, extreme, trained
        self.clock = [self.context(t) for t in sequence.times]
        self.matrices = [i.domain.world_to_voxel @ self.domain.normalised_to_world for i in sequence.images]
        return sequence

    def remember(self, state: dict[str, Any]) -> None:
        """Keep what a checkpoint must carry for the transforms to be read again without the images."""
        self._take_domain(Domain.from_dict(state["domain"]))
        held = state["held_out"]
        seen = [t for i, t in enumerate(state["times"]) if i not in held and t != state["reference"]]
        self.flow.velocity.set_times(state["reference"], state["span"], state["period"], seen)  # type: ignore[operator]
        self.state = state

    def restore(self, kept: Any) -> None:
        self.remember({k: v for k, v in kept.items() if k != "method"})

    def _take_domain(self, domain: Domain) -> None:
        self.domain = domain
        self.flow.cover(domain)

    @property
    def attached(self) -> bool:
        return bool(self.clock)

    # -- reading -------------------------------------------------------------------------------------------------

    def context(self, time: float) -> Tensor:
        """A time as the field takes it, [1]."""
        return torch.tensor([float(time)], device=self.device)

    def transform(self, time: float | None = None) -> Transform:
        """phi_t, from the world at the reference time to the world at ``time`` (None: that of the evaluated pair)."""
        return FlowTransform(self.flow, self.domain, self.context(self.state["view"] if time is None else time))

    def transform_at(self, time: float) -> Transform:
        """phi_t at any time."""
        return self.transform(time)

    def transform_between(self, source: float, target: float) -> Transform:
        """phi_t o phi_s^-1, from the world at time s to that at time t."""
        if source == self.state["reference"]:
            return self.transform(target)
        back = FlowTransform(self.flow.backward(), self.domain, self.context(source))
        return back if target == self.state["reference"] else Chained(back, self.transform(target))

    # -- evaluation ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Warn where the integration's steps are too long."""
        for t in self.state["times"]:
            self.flow.check(self.context(t))

    def _errors(self) -> dict[float, tuple[float, float]]:
        assert self.sequence is not None
        return landmarks_over_time(self.transform_at, self.sequence)

    def _sequence_metrics(self) -> dict[str, float]:
        errors = self._errors()
        held = {self.state["times"][i] for i in self.state["held_out"]}
        groups = {"sequence": list(errors), "held_out": [t for t in errors if t in held]}
        return {f"tre/{name}": sum(errors[t][1] for t in ts) / len(ts) for name, ts in groups.items() if ts}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """TRE at all times that have landmarks, and that of the held-out ones."""
        with full(self.device.type):
            found = self._sequence_metrics()
        self.log_dict(found, prog_bar=True, batch_size=1, sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Evaluation:
        """The reference with the image farthest from it in time, as any pair; landmarks at all times beside it."""
        found = super().predict_step(batch, batch_idx)
        with full(self.device.type):
            found.metrics.update(self._sequence_metrics())
        return found

    def report(self, out: Path) -> list[Path]:
        """A table of the times: landmarks before and after, and the integration."""
        errors = self._errors()
        lines = ["time,held_out,tre_before_mm,tre_mm,steps,h_lipschitz"]
        for i, t in enumerate(self.state["times"]):
            before, after = errors.get(t, (float("nan"), float("nan")))
            context = self.context(t)
            flow = f"{self.flow.count(context)},{self.flow.stepping(context):.4g}"
            lines.append(f"{t:g},{int(i in self.state['held_out'])},{before:.4g},{after:.4g},{flow}")
        io.write_text(out / "times.csv", "\n".join(lines) + "\n")
        return [out / "times.csv"]
