"""Several networks of one shape, evaluated together: a layer is one batched matrix product."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from medinr import jets
from medinr.errors import UserError
from medinr.fields.base import CPU_CHUNK, Field
from medinr.fields.siren import SIREN
from medinr.jets import Jet


class BatchedSIREN(nn.Module):
    """B `SIREN` networks of one shape with their weights stacked: [B, out, in] and [B, out] a layer.

    Each network has points of its own: the channels of a jet are [1 + k + m, B, N, c]. Values, derivatives and
    gradients are those of the single networks, up to the rounding of sums in another order. The parameters stand in the
    order of `SIREN.parameters`, so that the optimizer's state of one network is a slice of that of all.

    Args:
        fields: the networks; they are copied. `give_back` copies the present weights into networks again.

    Raises:
        UserError: another field than a plain SIREN, or networks of different shapes or frequencies.
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        super().__init__()
        plain = [field for field in fields if type(field) is SIREN]
        if len(plain) < len(fields) or not plain:
            found = next((type(f).__name__ for f in fields if type(f) is not SIREN), "none")
            raise UserError(
                f"field: expected plain SIREN networks in a batch, found {found}; fit such pairs one by one"
            )
        if any(_shape(field) != _shape(plain[0]) for field in plain):
            raise UserError("field: expected networks of one shape and frequency in a batch; fit such pairs one by one")
        self.omegas = plain[0].omegas
        each = [[p.detach() for p in field.parameters()] for field in plain]
        self.stacked = nn.ParameterList(nn.Parameter(torch.stack(parts)) for parts in zip(*each, strict=True))

    def __len__(self) -> int:
        return len(self.stacked[0])

    @torch.no_grad()
    def give_back(self, fields: Sequence[Field]) -> None:
        """Copy each network's weights into a field of its own."""
        for b, field in enumerate(fields):
            for own, stacked in zip(field.parameters(), self.stacked, strict=True):
                own.copy_(stacked[b])

    def jet(self, jet: Jet) -> Jet:
        """Values and derivatives of all networks, channels [1 + k + m, B, N, in] to [1 + k + m, B, N, out].

        On a CPU some points of each at a time, as `medinr.fields.base.in_chunks` does. (Ten networks of 128 and 256
        units, 250 points of each at a time: as fast as one network after the other; 2,500: a quarter slower.)
        """
        n = jet.channels.shape[2]
        chunk = CPU_CHUNK // 2 if jet.channels.device.type == "cpu" else n
        *hidden, head = zip(self.stacked[::2], self.stacked[1::2], strict=True)
        layers = [(omega * w, omega * b) for omega, (w, b) in zip(self.omegas, hidden, strict=True)]
        pieces = []
        for channels in jet.channels.split(chunk, dim=2):
            piece = replace(jet, channels=channels)
            for i, layer in enumerate(layers):
                piece = jets.sine(jets.linear_batched(piece, *layer, hidden=i > 0))
            pieces.append(jets.linear_batched(piece, *head).channels)
        return replace(jet, channels=pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2))


def _shape(field: SIREN) -> tuple[list[torch.Size], list[float]]:
    return [p.shape for p in field.parameters()], field.omegas


def batched_seed(x: Tensor, order: int) -> Jet:
    """`medinr.jets.seed` at points [B, N, 3] of B networks."""
    single = jets.seed(x.reshape(-1, x.shape[-1]), order)
    return Jet(single.channels.view(-1, *x.shape), single.k, single.pairs, single.basis)


def joined(each: Sequence[Jet]) -> Jet:
    """The jets of single networks, channels [1 + k + m, N, c], as one of all."""
    return Jet(torch.stack([jet.channels for jet in each], dim=1), each[0].k, each[0].pairs, each[0].basis)
