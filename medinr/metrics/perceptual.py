"""How alike two images look to a network that has learned to see."""

from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medinr.errors import UserError

_CONVOLUTIONS = ((0, 3, 64, 11, 4, 2), (3, 64, 192, 5, 1, 2), (6, 192, 384, 3, 1, 1), (8, 384, 256, 3, 1, 1),
                 (10, 256, 256, 3, 1, 1))  # fmt: skip
"""AlexNet (Krizhevsky 2014, one tower): number in the file of weights, channels in and out, kernel, stride, padding."""
_POOLED = (3, 6)  # convolutions that follow a pooling
_MEAN, _SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_LEAST = 64  # pixels of a slice's shorter side: the size on which the heads were learned
_BATCH = 16


class PerceptualDistance(nn.Module):
    """LPIPS 0.1 with AlexNet (Zhang et al., CVPR 2018), slice by slice; 0 for the same image, lower is better.

    sum over layers of mean over pixels of w . (f - g)^2, where f and g are the activations of the two images after
    each of five convolutions, of unit length along their channels, and w are the published heads. Slices run along the
    last axis; grey values are given to all three colours; slices smaller than 64 pixels are enlarged to that.

    The heads come with torchmetrics. The backbone's weights are those of ImageNet, which come with no package here:
    ``weights`` is the public file ``alexnet-owt-7be5be79.pth``, and no torchvision is needed to read it.

    Args:
        weights: file with AlexNet's state (keys ``features.0.weight`` ...).

    Raises:
        UserError: a file that is not there, or is not AlexNet's.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        state = _read(Path(weights), "AlexNet's ImageNet weights, alexnet-owt-7be5be79.pth")
        heads = files("torchmetrics").joinpath("functional/image/lpips_models/alex.pth")
        learned = _read(Path(str(heads)), "the heads of LPIPS, which torchmetrics has")
        self.layers = nn.ModuleList()
        for i, (number, inside, outside, kernel, stride, padding) in enumerate(_CONVOLUTIONS):
            layer = nn.Conv2d(inside, outside, kernel, stride, padding)
            try:
                layer.load_state_dict({k: state[f"features.{number}.{k}"] for k in ("weight", "bias")})
            except (KeyError, RuntimeError) as error:
                raise UserError(
                    f"{weights}: expected AlexNet's weights, found other ones (features.{number})"
                ) from error
            self.layers.append(layer)
            self.register_buffer(f"head{i}", learned[f"lin{i}.model.1.weight"].view(1, outside, 1, 1))
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("spread", torch.tensor(_SPREAD).view(1, 3, 1, 1))
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, image: Tensor, reference: Tensor, data_range: float) -> Tensor:
        """Mean distance of the slices of two volumes [X, Y, Z] with values in [0, data_range]."""
        if image.shape != reference.shape or image.ndim != 3:
            raise ValueError(f"lpips: expected two volumes, got {tuple(image.shape)} and {tuple(reference.shape)}")
        slices = [v.permute(2, 0, 1)[:, None].float() * (2 / data_range) - 1 for v in (image, reference)]
        pairs = zip(*(s.split(_BATCH) for s in slices), strict=True)
        return torch.cat([self._of_slices(a, b) for a, b in pairs]).mean()

    def _of_slices(self, a: Tensor, b: Tensor) -> Tensor:
        x = torch.cat((a, b))
        if min(x.shape[2:]) < _LEAST:
            scale = _LEAST / min(x.shape[2:])
            x = F.interpolate(x, size=[round(n * scale) for n in x.shape[2:]], mode="bilinear")
        x = (x.expand(-1, 3, -1, -1) - self.mean) / self.spread
        total = torch.zeros(len(a), device=x.device)
        for i, (number, *_) in enumerate(_CONVOLUTIONS):
            x = self.layers[i](F.max_pool2d(x, 3, 2) if number in _POOLED else x).relu()
            f, g = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
            total += ((f - g).square() * getattr(self, f"head{i}")).sum(1).mean((1, 2))
        return total


def _read(file: Path, what: str) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what its unpickler happens to raise
        raise UserError(f"{file}: expected {what}, found {error.__class__.__name__}") from error
    if not isinstance(state, dict):
        raise UserError(f"{file}: expected {what}, found {type(state).__name__}")
    return state
