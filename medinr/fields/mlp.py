"""Perceptrons of coordinates: plain (ReLU, tanh, softplus), and with random Fourier features."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medinr import jets
from medinr.fields.base import Field
from medinr.jets import Jet
from medinr.types import Features

Activation = Literal["relu", "tanh", "softplus"]
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], jets.Rule]] = {
    "relu": (torch.relu, jets.relu_rule),
    "tanh": (torch.tanh, jets.tanh_rule),
    "softplus": (F.softplus, jets.softplus_rule),
}


class MLP(Field):
    """Multilayer perceptron of the coordinates, h_l = f(W_l h_(l-1) + b_l) with a linear output.

    With ReLU it is the comparator of IDIR (Wolterink et al., MIDL 2022) and of the cycle-consistent INR (van Harten et
    al., IEEE TMI 2024): piecewise linear, so its second derivatives are zero and a bending energy does nothing.
    Weights are drawn as by He et al. (ICCV 2015).

    Args:
        in_features, out_features: dimensions of the point and of the value.
        hidden: units of each hidden layer.
        activation: ``relu``, ``tanh`` or ``softplus``.
        zero_output: start with output 0, the identity deformation.
    """

    def __init__(
        self,
        in_features: int = 3,
        out_features: int = 3,
        hidden: Sequence[int] = (256, 256, 256),
        activation: Activation = "relu",
        zero_output: bool = True,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation}")
        self.in_features, self.out_features = in_features, out_features
        self.activation: Activation = activation
        widths = [self._inputs(), *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(widths[-1], out_features)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        if zero_output:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def _inputs(self) -> int:
        """Features that enter the first layer."""
        return self.in_features

    def forward(self, x: Features, context: Tensor | None = None) -> Features:
        function, _ = ACTIVATIONS[self.activation]
        for layer in self.layers:
            x = function(layer(x))
        out: Tensor = self.head(x)
        return out

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        _, rule = ACTIVATIONS[self.activation]
        for i, layer in enumerate(self.layers):
            jet = jets.activate(jets.linear(jet, layer.weight, layer.bias, hidden=i > 0), rule)  # type: ignore[arg-type]
        return jets.linear(jet, self.head.weight, self.head.bias)


class FourierMLP(MLP):
    """Perceptron of random Fourier features [sin(2 pi B x), cos(2 pi B x)], B drawn once from N(0, scale^2).

    Tancik et al., Fourier Features Let Networks Learn High Frequency Functions, NeurIPS 2020. ``scale`` is the
    bandwidth in periods for each normalised unit.

    Args:
        frequencies: rows of B; twice as many features.
        scale: standard deviation of B.

    Other arguments as for `MLP`.
    """

    features: Tensor
    phases: Tensor

    def __init__(
        self,
        frequencies: int = 64,
        scale: float = 1.0,
        in_features: int = 3,
        out_features: int = 3,
        hidden: Sequence[int] = (256, 256),
        activation: Activation = "relu",
        zero_output: bool = True,
    ) -> None:
        self.frequencies = frequencies
        super().__init__(in_features, out_features, hidden, activation, zero_output)
        angles = 2 * math.pi * scale * torch.randn(frequencies, in_features)
        # sin(z + pi/2) = cos(z): one sine rule serves both halves.
        self.register_buffer("features", torch.cat((angles, angles)))
        self.register_buffer("phases", torch.cat((torch.zeros(frequencies), torch.full((frequencies,), math.pi / 2))))

    def _inputs(self) -> int:
        return 2 * self.frequencies

    def forward(self, x: Features, context: Tensor | None = None) -> Features:
        return super().forward(torch.sin(F.linear(x, self.features, self.phases)), context)

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        return super().jet(jets.sine(jets.linear(jet, self.features, self.phases)), context)
