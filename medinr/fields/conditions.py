"""What is known of a person as tokens that a network attends to; whatever is missing has a token of its own."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medinr.configured import Configured
from medinr.errors import UserError


class ConditionEmbedding(Configured, nn.Module):
    """One token for each condition: ``forward(values [B, C]) -> context [B, C, width]``, NaN where missing.

    A continuous value is scaled to [-1, 1] over its trained range and becomes Fourier features
    sin, cos(2^k pi c / 2), then an MLP; a level of a categorical one is looked up. Diff-Def (Starck et al.,
    arXiv 2403.16776) has a frozen CLIP text encoder read a sentence with the value in it, which needs weights from the
    network and rounds the value; here nothing is downloaded, and any number of columns can be given.

    A missing condition is a learned token, so that any of them may be left out and all of them give the unconditional
    network of classifier-free guidance (Ho and Salimans, arXiv 2207.12598).

    Args:
        width: of a token: the denoiser's `context` channels.
        frequencies: k = 0 .. frequencies - 1; few, or the network learns the persons by heart.
    """

    low: Tensor
    high: Tensor

    def __init__(self, width: int = 64, frequencies: int = 2) -> None:
        super().__init__()
        if width < 1 or frequencies < 0:
            raise UserError(f"embedding: expected a width above 0 and frequencies from 0, found {width}, {frequencies}")
        self.width, self.frequencies = width, frequencies
        self.levels: list[int] = []
        self.encoders = nn.ModuleList()
        self.missing = nn.Parameter(torch.empty(0, width))
        self.register_buffer("low", torch.empty(0))
        self.register_buffer("high", torch.empty(0))

    def size(self, levels: Sequence[int], low: Sequence[float], high: Sequence[float]) -> None:
        """Make the encoders of C conditions; nothing happens if they are there.

        Args:
            levels: of a categorical condition; 0: a continuous one.
            low, high: trained range of a continuous one.
        """
        if len(self.missing) and self.levels == list(levels):
            return
        self.levels = list(levels)
        device = self.missing.device
        features = 1 + 2 * self.frequencies
        self.encoders = nn.ModuleList(
            nn.Embedding(n, self.width, device=device)
            if n
            else nn.Sequential(
                nn.Linear(features, self.width, device=device), nn.SiLU(),
                nn.Linear(self.width, self.width, device=device),
            )
            for n in levels
        )  # fmt: skip
        # One token even of no condition: attention needs something to look at.
        self.missing = nn.Parameter(torch.randn(max(1, len(levels)), self.width, device=device))
        self.low = torch.nan_to_num(torch.tensor(low, dtype=torch.float32, device=device))
        self.high = torch.nan_to_num(torch.tensor(high, dtype=torch.float32, device=device), nan=1.0)

    def scaled(self, values: Tensor) -> Tensor:
        """Continuous values [B, C] in [-1, 1] over the trained range, levels as they are, NaN where missing."""
        span = (self.high - self.low).clamp(min=1e-6)
        categorical = torch.tensor(self.levels, device=values.device) > 0
        return torch.where(categorical, values, 2 * (values - self.low) / span - 1)

    def forward(self, values: Tensor) -> Tensor:
        if values.ndim != 2 or values.shape[1] != len(self.levels):
            raise UserError(
                f"conditions: expected {len(self.levels)} values each (NaN: missing), found {tuple(values.shape)}"
            )
        tokens: Tensor = self.missing.expand(len(values), -1, -1)
        if not self.levels:
            return tokens
        scaled = self.scaled(values)
        known = []
        for column, encoder in zip(torch.nan_to_num(scaled).T, self.encoders, strict=True):
            known.append(encoder(column.round().long() if isinstance(encoder, nn.Embedding) else self.features(column)))
        return torch.where(values.isnan()[..., None], tokens, torch.stack(known, dim=1))

    def features(self, c: Tensor) -> Tensor:
        """Fourier features [B, 1 + 2 frequencies] of scaled values [B]."""
        angles = c[:, None] * (math.pi / 2) * 2.0 ** torch.arange(self.frequencies, device=c.device)
        return torch.cat((c[:, None], angles.sin(), angles.cos()), dim=1)
