"""Images as fields: a SIREN of random Fourier features."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from medinr import jets
from medinr.fields.siren import SIREN
from medinr.jets import Jet
from medinr.types import Features


class FourierSIREN(SIREN):
    """SIREN of random Fourier features [sin(2 pi B x), cos(2 pi B x)], B drawn once from N(0, scale^2): an image.

    The prior network of NeRP (Shen, Pauly and Xing, IEEE TNNLS 2022), which ST-NeRP's Ref-Net builds on. The authors'
    code has 256 frequencies, scale 4 for coordinates in [0, 1], 7 sine layers of 256 units, omega 30, a linear output.
    Normalised coordinates have two units along the longest side of the image: the same bandwidth is scale 2 here. It
    normalises each axis on its own, so that shorter sides have a higher one there.

    Args:
        frequencies: rows of B; twice as many features.
        scale: standard deviation of B, periods for each normalised unit.
        in_features, out_features: dimensions of the point and of the value (the channels of the image).
        hidden: units of each sine layer.
        omega: frequency factor of all sine layers.
    """

    features: Tensor
    phases: Tensor

    def __init__(
        self,
        frequencies: int = 256,
        scale: float = 2.0,
        in_features: int = 3,
        out_features: int = 1,
        hidden: Sequence[int] = (256, 256, 256, 256, 256, 256, 256),
        omega: float = 30.0,
    ) -> None:
        super().__init__(2 * frequencies, out_features, hidden, omega, None, zero_output=False)
        self.in_features = in_features
        angles = 2 * math.pi * scale * torch.randn(frequencies, in_features)
        # sin(z + pi/2) = cos(z): one sine rule serves both halves.
        self.register_buffer("features", torch.cat((angles, angles)))
        self.register_buffer("phases", torch.cat((torch.zeros(frequencies), torch.full((frequencies,), math.pi / 2))))

    def forward(self, x: Features, context: Tensor | None = None) -> Features:
        return super().forward(torch.sin(F.linear(x, self.features, self.phases)), context)

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        return super().jet(jets.sine(jets.linear(jet, self.features, self.phases)), context)
