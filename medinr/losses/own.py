"""Penalties in the coordinates of the field itself."""

from medinr.jets import Jet
from medinr.losses.regularizers import Regularizer
from medinr.types import Scalar


class OwnCoordinates(Regularizer):
    """Another penalty, taken of each network in its own coordinates instead of the displacement in image space.

    For `medinr.fields.TangentField` that is the map r -> r + net(r) of tangent space, as published (mean |det - 1|,
    weight 0.05). Of a `Sum` each part has its own penalty, and they are added. Where the coordinates are those of the
    image, the penalty is the plain one.

    Args:
        regularizer: the penalty, with its weight, share of the points and directions.
    """

    def __init__(self, regularizer: Regularizer) -> None:
        self.order, self.quadratic = regularizer.order, regularizer.quadratic
        super().__init__(regularizer.weight, regularizer.fraction, regularizer.directions)
        self.regularizer = regularizer

    def forward(self, displacement_jet: Jet) -> Scalar:
        return self.regularizer(displacement_jet)  # type: ignore[no-any-return]
