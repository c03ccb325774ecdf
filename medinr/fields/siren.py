"""SIREN, and SIREN whose sine is modulated by a condition (the harmonizer of cIDIR)."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medinr import jets
from medinr.fields.base import Field
from medinr.jets import Jet
from medinr.types import Features


class SIREN(Field):
    """Coordinate network with sine activations: h_l = sin(omega (W_l h_(l-1) + b_l)), linear output.

    Sitzmann et al., Implicit Neural Representations with Periodic Activation Functions, NeurIPS 2020; as a displacement
    field: Wolterink et al., IDIR, MIDL 2022 (3 hidden layers of 256 units, omega 32). First weights are uniform in
    +-1/in_features, later ones in +-sqrt(6/n)/omega, biases as PyTorch's.

    Args:
        in_features, out_features: dimensions of the point and of the value.
        hidden: units of each hidden layer.
        omega: frequency factor of the hidden layers after the first.
        first_omega: that of the first layer (None: as ``omega``). It sets the bandwidth in normalised units.
        zero_output: start with output 0, the identity deformation. IDIR's code does not (its initial displacement has
            a standard deviation of about 0.03 normalised units); NePhi does.
    """

    def __init__(
        self,
        in_features: int = 3,
        out_features: int = 3,
        hidden: Sequence[int] = (256, 256, 256),
        omega: float = 32.0,
        first_omega: float | None = None,
        zero_output: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        widths = [in_features, *hidden]
        self.omegas = [omega if first_omega is None else first_omega] + [omega] * (len(hidden) - 1)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(widths[-1], out_features)
        self.reset(omega, zero_output)

    @torch.no_grad()
    def reset(self, omega: float, zero_output: bool) -> None:
        """Draw the weights."""
        for i, layer in enumerate([*self._linears(), self.head]):
            bound = 1 / layer.in_features if i == 0 else math.sqrt(6 / layer.in_features) / omega
            layer.weight.uniform_(-bound, bound)
        if zero_output:
            self.head.weight.zero_()
            self.head.bias.zero_()

    def _linears(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def scaled(self) -> list[tuple[Tensor, Tensor]]:
        """(omega W, omega b) of the hidden layers: the frequency goes into the small matrix, not the activations."""
        return [(o * layer.weight, o * layer.bias) for o, layer in zip(self.omegas, self._linears(), strict=True)]

    def forward(self, x: Features, context: Tensor | None = None) -> Features:
        for weight, bias in self.scaled():
            x = torch.sin(F.linear(x, weight, bias))
        out: Tensor = self.head(x)
        return out

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        for i, (weight, bias) in enumerate(self.scaled()):
            jet = jets.sine(jets.linear(jet, weight, bias, hidden=i > 0))
        return jets.linear(jet, self.head.weight, self.head.bias)


class Harmonizer(nn.Module):
    """Condition [p] -> (a, b, c, d) of the activation a sin(b z + c) + d, one set for each hidden layer.

    El Hadramy et al., cIDIR, MICCAI 2025 (arXiv 2507.12953): layers of 128, 64 and 32 units with LayerNorm. The paper
    leaves open how the output becomes coefficients; as in INCODE (Kazerouni et al., WACV 2024) a and b are
    exponentials, here of a zero-initialised output, so that training starts at a = b = 1, c = d = 0: a plain SIREN.
    One set for each layer (``shared=False``) is our choice; the paper does not say.
    """

    def __init__(
        self, conditions: int, layers: int, hidden: Sequence[int] = (128, 64, 32), shared: bool = False
    ) -> None:
        super().__init__()
        self.n_layers, self.shared = layers, shared
        blocks: list[nn.Module] = []
        width = conditions
        for h in hidden:
            blocks += [nn.Linear(width, h), nn.LayerNorm(h), nn.SiLU()]
            width = h
        self.body = nn.Sequential(*blocks)
        self.out = nn.Linear(width, 4 if shared else 4 * layers)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, context: Tensor) -> Tensor:
        """[p] -> [layers, 4]."""
        raw = self.out(self.body(context)).reshape(-1, 4)
        coefficients = torch.cat((raw[:, :2].exp(), raw[:, 2:]), dim=1)
        return coefficients.expand(self.n_layers, 4)


class HarmonizedSIREN(SIREN):
    """SIREN with activation a sin(b omega z + c) + d, where (a, b, c, d) come from a condition (cIDIR).

    The condition enters the harmonizer as ``log10(condition + epsilon)`` beside its raw value, because the effect of a
    regularization weight is spread over decades (the paper: the raw value alone).

    Args:
        conditions: length of the condition vector, the number of regularizers that alpha weighs.
        harmonizer: units of the harmonizer's layers.
        shared: one set of coefficients for all hidden layers instead of one for each.
        log_input: add the logarithm of the condition to the harmonizer's input.

    Other arguments as for `SIREN`.
    """

    epsilon = 1e-4

    def __init__(
        self,
        conditions: int = 1,
        in_features: int = 3,
        out_features: int = 3,
        hidden: Sequence[int] = (256, 256, 256),
        omega: float = 32.0,
        first_omega: float | None = None,
        zero_output: bool = True,
        harmonizer: Sequence[int] = (128, 64, 32),
        shared: bool = False,
        log_input: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, hidden, omega, first_omega, zero_output)
        self.conditions, self.log_input = conditions, log_input
        self.harmonizer = Harmonizer(conditions * (2 if log_input else 1), len(hidden), harmonizer, shared)

    def coefficients(self, context: Tensor | None) -> Tensor:
        """(a, b, c, d) [layers, 4] at a condition [conditions]."""
        if context is None or context.shape != (self.conditions,):
            found = None if context is None else tuple(context.shape)
            raise ValueError(f"HarmonizedSIREN: expected a condition of {self.conditions} value(s), got {found}")
        if self.log_input:
            context = torch.cat((context, torch.log10(context + self.epsilon) / 2 + 1))
        out: Tensor = self.harmonizer(context)
        return out

    def modulated(self, context: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Weights and biases of all layers, head included, with (a, b, c, d) folded in.

        The condition is one for all points, so b scales and c shifts a layer's own affine map, and a and d go into the
        next one: the modulation costs nothing per point.
        """
        folded: list[tuple[Tensor, Tensor]] = []
        gain: Tensor | float = 1.0
        shift: Tensor | float = 0.0
        for (weight, bias), (a, b, c, d) in zip(self.scaled(), self.coefficients(context), strict=True):
            folded.append((b * gain * weight, b * (bias + shift * weight.sum(1)) + c))
            gain, shift = a, d
        head = self.head
        folded.append((gain * head.weight, head.bias + shift * head.weight.sum(1)))
        return folded

    def forward(self, x: Features, context: Tensor | None = None) -> Features:
        *layers, (weight, bias) = self.modulated(context)
        for w, b in layers:
            x = torch.sin(F.linear(x, w, b))
        return F.linear(x, weight, bias)

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        *layers, (weight, bias) = self.modulated(context)
        for i, (w, b) in enumerate(layers):
            jet = jets.sine(jets.linear(jet, w, b, hidden=i > 0))
        return jets.linear(jet, weight, bias)
