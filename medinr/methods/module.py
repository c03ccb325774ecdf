"""The base of methods that fit a transform to one pair of images: its evaluation."""

from typing import Any

from medinr.data.pair import Pair
from medinr.fields import Transform
from medinr.methods.method import Method
from medinr.precision import full
from medinr.results import Evaluation, evaluate, landmark_metrics
from medinr.space import Domain


class RegistrationModule(Method):
    """A method that fits a transform to one pair of images.

    Beside what `Method` asks for, a subclass says how the result is read (`transform`).
    """

    domain: Domain

    def __init__(self) -> None:
        super().__init__()
        self.pair: Pair | None = None

    # -- what a subclass defines ---------------------------------------------------------------------------------

    def attach(self, pair: Pair) -> None:
        """Take a pair: all that the steps need of it, on the module's device."""
        raise NotImplementedError

    def size(self, pair: Pair) -> None:
        """Make the parameters whose number depends on the images; called before the optimizer takes them."""
        raise NotImplementedError

    def transform(self) -> Transform:
        """phi, from fixed world to moving world."""
        raise NotImplementedError

    @property
    def subject(self) -> Any:
        """What `size` and `attach` get: the pair that the method was given, or the data module's."""
        return self.pair or self.trainer.datamodule.pair  # type: ignore[attr-defined]

    def settle(self) -> None:
        """Called before results are read: a conditioned method searches its condition here."""

    # -- evaluation ----------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """TRE where landmarks are known (cheap: no image is warped)."""
        assert self.pair is not None
        with full(self.device.type):
            found = landmark_metrics(self.transform(), self.pair)
        self.log_dict({k: v for k, v in found.items() if k != "tre/mean"}, batch_size=1, sync_dist=True)
        if found:
            self.log("tre/mean", found["tre/mean"], prog_bar=True, batch_size=1, sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Every metric on the whole fixed grid."""
        evaluation = self.predict_step(batch, batch_idx)
        self.log_dict(evaluation.metrics, batch_size=1, sync_dist=True)
        return {"evaluation": evaluation}

    def predict_step(self, batch: Any, batch_idx: int) -> Evaluation:
        """The transform on the whole fixed grid; a callback writes it."""
        assert self.pair is not None
        with full(self.device.type):
            self.settle()
            return evaluate(self.transform(), self.pair)
