"""A SIREN shared by many scans, modulated at every point by the code of the scan (CINeMA, CINA)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medinr.configured import Configured
from medinr.errors import UserError
from medinr.fields.codes import read_nodes
from medinr.precision import product


class ModulatedSIREN(Configured, nn.Module):
    """Decoder of an atlas: (point, code, conditions) -> intensities and label logits.

    Dannecker et al., CINeMA, IEEE TMI 2025 (arXiv 2506.09668); with one node, CINA (arXiv 2403.08550). A sine layer of
    the point and ``layers`` hidden ones; the layers ``modulated`` (the first hidden one is 1) compute

        h_l = sin(omega_l (W_l h + b_l) (1 + gamma_l) + beta_l),

    where (gamma, beta) is a linear function of the scan's code at the point and of its conditions; the output layer
    sees them, too. The code lives on nodes^3 points of the cube [-1, 1]^3 and is interpolated trilinearly.

    Because modulations are linear in the code, and interpolation is linear, they are computed at the nodes and then
    interpolated: the same numbers as the other way round, without a product of code x width for each point.

    Differences from the published code: 1 + gamma in place of gamma (``unit_gain=False``: as published, where gamma
    starts near 0 and the modulated layers with it), a zero output of conditions at the start, a frequency that may rise
    from layer to layer (MedFuncta), and, on request, ``grids``: features of the atlas's own space, shared by all scans,
    on dense grids of rising resolution (as in Mueller et al., Instant NGP, SIGGRAPH 2022, without its hashing), which
    enter the first hidden layer. They hold the detail, so that a narrow network suffices and learns in fewer steps.

    Args:
        width: units of each layer (published 1024).
        layers: hidden layers after the first.
        modulated: which of them the code modulates.
        code: numbers in the code of each node (published 256).
        nodes: nodes along each axis (published 3); 1: one code for the whole scan, as CINA.
        omega: frequency factor of the hidden layers.
        first_omega: that of the first layer (None: as ``omega``).
        omega_step: added to omega from each hidden layer to the next.
        unit_gain: 1 + gamma in place of gamma.
        code_in_output: the output layer sees the code.
        grids: points along each axis of the feature grids (none as published).
        features: numbers at each of their points.

    Raises:
        UserError: a layer to modulate that is not there; sizes below 1.
    """

    def __init__(
        self,
        width: int = 256,
        layers: int = 5,
        modulated: Sequence[int] = (1, 3, 5),
        code: int = 256,
        nodes: int = 3,
        omega: float = 30.0,
        first_omega: float | None = None,
        omega_step: float = 0.0,
        unit_gain: bool = True,
        code_in_output: bool = True,
        grids: Sequence[int] = (),
        features: int = 8,
    ) -> None:
        super().__init__()
        if min(width, layers, code, nodes) < 1:
            raise UserError(f"decoder: expected sizes of 1 or more, got width {width}, layers {layers}, code {code}")
        if not set(modulated) <= set(range(1, layers + 1)):
            raise UserError(f"decoder.modulated: expected layers from 1 to {layers}, got {list(modulated)}")
        self.width, self.code, self.nodes = width, code, nodes
        self.modulated = tuple(sorted(set(modulated)))
        self.unit_gain, self.code_in_output = unit_gain, code_in_output
        self.omegas = [omega + i * omega_step for i in range(layers)]
        self.first_omega = omega if first_omega is None else first_omega
        self.first = nn.Linear(3, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 1)
        self.modulation = nn.Linear(code, 1)
        self.grids = tuple(grids)
        self.features = nn.ParameterList(nn.Parameter(1e-2 * torch.randn(n**3, features)) for n in grids)
        self.read = nn.Linear(features * len(grids), width, bias=False) if grids else None
        self.outputs = 0

    def size(self, outputs: int, conditions: int) -> None:
        """Draw all weights for so many outputs and condition numbers; those of another size are forgotten."""
        if self.outputs:
            return
        self.outputs, device = outputs, self.first.weight.device
        self.head = nn.Linear(self.width, outputs, device=device)
        columns = 2 * self.width * len(self.modulated) + (outputs if self.code_in_output else 0)
        self.modulation = nn.Linear(self.code + conditions, columns, device=device)
        with torch.no_grad():
            self.first.weight.uniform_(-1 / 3, 1 / 3)
            for omega, layer in zip(self.omegas, self._linears(), strict=True):
                bound = math.sqrt(6 / self.width) / omega
                layer.weight.uniform_(-bound, bound)
            bound = math.sqrt(6 / self.width) / self.omegas[-1]
            self.head.weight.uniform_(-bound, bound)
            if self.unit_gain:
                self.modulation.weight[:, self.code :].zero_()
                self.modulation.bias.zero_()

    def _linears(self) -> list[nn.Linear]:
        return [layer for layer in self.hidden if isinstance(layer, nn.Linear)]

    def table(self, codes: Tensor, conditions: Tensor) -> Tensor:
        """Modulations [S, nodes^3, columns] at the nodes, of codes [S, D, k, k, k] and conditions [S, q]."""
        at_nodes = codes.flatten(2).mT
        told = conditions[:, None].expand(-1, at_nodes.shape[1], -1)
        found: Tensor = self.modulation(torch.cat((at_nodes, told), -1))
        return found

    def _features(self, x: Tensor) -> Tensor:
        """Features [S, n, F] of the atlas's space at points [S, n, 3]."""
        flat = x.flatten(0, 1)[None]
        found = [read_nodes(grid[None], flat, n) for grid, n in zip(self.features, self.grids, strict=True)]
        return torch.cat(found, -1).view(*x.shape[:2], -1)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Outputs [S, n, outputs] at atlas points [S, n, 3] (normalised), for scans with modulations ``table``."""
        own = read_nodes(table, x, self.nodes)
        pieces = list(own.split(self.width, dim=-1))
        h = torch.sin(self.first_omega * self.first(x))
        for i, (omega, layer) in enumerate(zip(self.omegas, self._linears(), strict=True), start=1):
            z = product(h, omega * layer.weight, hidden=True) + omega * layer.bias
            if i == 1 and self.read is not None:
                z = z + self.read(self._features(x))
            if i in self.modulated:
                k = 2 * self.modulated.index(i)
                gain = 1 + pieces[k] if self.unit_gain else pieces[k]
                z = torch.addcmul(pieces[k + 1], z, gain)
            h = torch.sin(z)
        out: Tensor = self.head(h)
        if self.code_in_output:
            out = out + own[..., 2 * self.width * len(self.modulated) :]
        return out
