"""Networks that look at both images and answer with a displacement: VoxelMorph's and MIDIR's, from MONAI's parts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medinr.configured import Configured
from medinr.errors import UserError
from medinr.fields.squaring import control_shape, dense_spline, scaling_and_squaring
from medinr.precision import convolutions, full

SLOPE = 0.2
Steps = Sequence[Sequence[int]]


class PairNetwork(Configured, nn.Module):
    """``forward(images [B, 2, X, Y, Z]) -> u [B, 3, X, Y, Z]`` in voxels: fixed voxel v shows moving voxel v + u(v).

    Channel 0 is the fixed image, channel 1 the moving one, both windowed to [0, 1]. Any size of grid will do.
    """

    def forward(self, images: Tensor) -> Tensor:
        raise NotImplementedError


def block(inputs: int, outputs: int, normalise: bool, stride: Sequence[int] = (1, 1, 1)) -> nn.Module:
    """3 x 3 x 3 convolution, instance normalisation if wanted, and LeakyReLU(0.2).

    Weights are drawn so that the variance of the features is kept (He et al., ICCV 2015): with those of torch it falls
    to a sixth with every layer, and the first hundreds of steps are lost.
    """
    # Not above: MONAI's networks take a second to import, which `medinr register` would wait for.
    from monai.networks.blocks.convolutions import Convolution

    norm = ("instance", {"affine": True}) if normalise else None
    act = ("leakyrelu", {"negative_slope": SLOPE})
    made = Convolution(3, inputs, outputs, strides=tuple(stride), kernel_size=3, act=act, norm=norm)
    for part in made.modules():
        if isinstance(part, nn.Conv3d):
            nn.init.kaiming_normal_(part.weight, a=SLOPE)
            channels_last(part)
    return made


def channels_last(layer: nn.Conv3d) -> None:
    """Keep the weights with the channels last, and so the features: half the time on a CPU."""
    layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)


def output_layer(inputs: int) -> nn.Conv3d:
    """The last convolution, zero: the network starts at the identity."""
    layer = nn.Conv3d(inputs, 3, 3, padding=1)
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    channels_last(layer)
    return layer


def check_images(images: Tensor) -> None:
    """Raises `UserError` unless images are [B, 2, X, Y, Z]."""
    if images.ndim != 5 or images.shape[1] != 2:
        raise UserError(
            f"images: expected fixed and moving image as two channels [B, 2, X, Y, Z], found {tuple(images.shape)}; "
            "give single-channel volumes on one grid"
        )


def contrasted(images: Tensor) -> Tensor:
    """Mean and difference of both images in place of themselves, of about one variance.

    The images are nearly equal, so the first layer would have to find their small difference before anything is
    learned. It spans the same functions as before.
    """
    fixed, moving = images[:, :1], images[:, 1:]
    return torch.cat((2 * (fixed + moving - 1), 4 * (fixed - moving)), dim=1)


class Encoder(nn.Module):
    """Strided convolutions; answers with the features of every level, the images first.

    Args:
        channels: features of each level.
        strides: of each level, along the three axes.
        normalise: instance normalisation in every layer.
    """

    def __init__(self, channels: Sequence[int], strides: Steps, normalise: bool) -> None:
        super().__init__()
        if len(strides) != len(channels) or any(len(s) != 3 or min(s) < 1 for s in strides):
            raise UserError(
                f"strides: expected three numbers of 1 or more for each of the {len(channels)} levels, found {strides}"
            )
        self.strides = [list(s) for s in strides]
        inputs = [2, *channels[:-1]]
        self.layers = nn.ModuleList(
            block(i, o, normalise, s) for i, o, s in zip(inputs, channels, strides, strict=True)
        )
        self.multiple = torch.tensor(self.strides).prod(0).tolist()

    def forward(self, images: Tensor) -> list[Tensor]:
        features = [contrasted(self.padded(images))]
        for layer in self.layers:
            features.append(layer(features[-1]))
        return features

    def coarsest(self, images: Tensor) -> list[int]:
        """Voxels of the last level along each axis: two at least along one, or there is nothing to normalise."""
        cells = [-(-n // m) for n, m in zip(images.shape[2:], self.multiple, strict=True)]
        return cells if max(cells) > 1 else [2, *cells[1:]]

    def padded(self, images: Tensor) -> Tensor:
        """The images with their last slices repeated up to a multiple of the whole stride."""
        cells = self.coarsest(images)
        short = [c * m - n for c, m, n in zip(cells, self.multiple, images.shape[2:], strict=True)]
        if not any(short):
            return images
        return F.pad(images, (0, short[2], 0, short[1], 0, short[0]), mode="replicate")


class VoxelMorphNetwork(PairNetwork):
    """U-Net with a displacement, or a velocity, in every voxel.

    Balakrishnan et al., VoxelMorph, IEEE TMI 38(8), 2019 (strided encoder; here with the wider decoder of the later
    code); velocity: Dalca et al., Medical Image Analysis 57, 2019. Here the last layer starts at zero, the image is
    padded and cropped back inside the network, and the strides may differ between the axes.

    Args:
        encoder: features of the levels at 1/2, 1/4, 1/8, 1/16 of the resolution.
        decoder: features of the convolutions on the way back, one a level, then those at full resolution.
        strides: of each level along each axis (None: 2 throughout).
        squarings: 0: the network gives the displacement; else it gives a stationary velocity, integrated with so many
            squarings.
        normalise: instance normalisation after every convolution; the paper has none. After 150 steps of one pair and a
            learning rate of 1e-3, the loss of unseen slabs was 0.198 with it and 0.231 without (0.238 at the start).
    """

    def __init__(
        self,
        encoder: Sequence[int] = (16, 32, 32, 32),
        decoder: Sequence[int] = (32, 32, 32, 32, 16, 16),
        strides: list[list[int]] | None = None,
        squarings: int = 0,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        n = len(encoder)
        if len(decoder) < n:
            raise UserError(f"decoder: expected at least the {n} levels of the encoder, found {len(decoder)}")
        self.encoder = Encoder(encoder, strides or [[2, 2, 2]] * n, normalise)
        self.squarings = squarings
        skips = [*reversed(encoder[:-1]), 2]
        inputs = [encoder[-1], *(d + s for d, s in zip(decoder, skips, strict=False))]
        inputs += list(decoder[n:-1])
        self.up = nn.ModuleList(block(i, o, normalise) for i, o in zip(inputs[:n], decoder[:n], strict=True))
        self.full = nn.ModuleList(block(i, o, normalise) for i, o in zip(inputs[n:], decoder[n:], strict=False))
        self.out = output_layer(decoder[-1] if len(decoder) > n else inputs[n])

    def features(self, images: Tensor) -> Tensor:
        """Features at full resolution."""
        features = self.encoder(images)
        x: Tensor = features.pop()
        for layer in self.up:
            skip = features.pop()
            x = torch.cat((F.interpolate(layer(x), size=skip.shape[2:], mode="nearest"), skip), dim=1)
        for layer in self.full:
            x = layer(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        check_images(images)
        with convolutions(images.device.type, self.encoder.coarsest(images)):
            x = self.features(images)
        a, b, c = images.shape[2:]
        with full(images.device.type):  # sixteen bits are too few for the place of a voxel
            field = self.out(x.float())[:, :, :a, :b, :c]
            return scaling_and_squaring(field, self.squarings) if self.squarings else field


class MIDIRNetwork(PairNetwork):
    """Velocities at the control points of a cubic B-spline, integrated by scaling and squaring.

    Qiu et al., Learning Diffeomorphic and Modality-invariant Registration using B-splines, MIDL 2021. The paper resizes
    the features to the control grid; here control points and features of one voxel distance are aligned by padding.

    Args:
        encoder: features of the levels at 1/2, 1/4, 1/8, 1/16 of the resolution.
        decoder: features of the convolutions on the way back up to the control grid.
        head: features of the convolutions on the control grid.
        strides: of each level along each axis (None: 2 throughout).
        spacing: of the control points in voxels: one of the encoder's levels must have it along all axes.
        squarings: of the integration; 0: the spline is the displacement.
        normalise: instance normalisation after every convolution; the paper has none. After 150 steps of one pair and a
            learning rate of 1e-3, the loss of unseen slabs was 0.198 with it and 0.231 without (0.238 at the start).
    """

    def __init__(
        self,
        encoder: Sequence[int] = (16, 32, 32, 32),
        decoder: Sequence[int] = (32, 32),
        head: Sequence[int] = (32, 32),
        strides: list[list[int]] | None = None,
        spacing: int = 4,
        squarings: int = 7,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        n = len(encoder)
        self.encoder = Encoder(encoder, strides or [[2, 2, 2]] * n, normalise)
        self.spacing, self.squarings = spacing, squarings
        scales = torch.tensor(self.encoder.strides).cumprod(0).tolist()
        if [spacing] * 3 not in scales:
            raise UserError(f"spacing: expected that of a level of the encoder, {scales}, found {spacing} voxels")
        self.level = scales.index([spacing] * 3)
        if len(decoder) != n - 1 - self.level:
            raise UserError(f"decoder: expected {n - 1 - self.level} levels up to the control grid, found {decoder}")
        skips = list(reversed(encoder[self.level : -1]))
        inputs = [encoder[-1], *(d + s for d, s in zip(decoder, skips, strict=True))]
        self.up = nn.ModuleList(block(i, o, normalise) for i, o in zip(inputs, decoder, strict=False))
        widths = [inputs[-1], *head]
        self.head = nn.ModuleList(block(i, o, normalise) for i, o in zip(widths, head, strict=False))
        self.out = output_layer(widths[-1])

    def control(self, images: Tensor) -> Tensor:
        """Control-point velocities [B, 3, x, y, z], in voxels of the images."""
        features = self.encoder(images)
        x = features.pop()
        for layer in self.up:
            skip = features.pop()
            x = torch.cat((F.interpolate(layer(x), size=skip.shape[2:], mode="nearest"), skip), dim=1)
        # Feature j lies in the middle of the cell between control points j + 1 and j + 2.
        wanted = control_shape(images.shape[2:], self.spacing)
        more = [w - n - 1 for w, n in zip(wanted, x.shape[2:], strict=True)]
        x = F.pad(x, (1, max(more[2], 0), 1, max(more[1], 0), 1, max(more[0], 0)), mode="replicate")
        x = x[:, :, : wanted[0], : wanted[1], : wanted[2]]
        for layer in self.head:
            x = layer(x)
        with full(images.device.type):
            found: Tensor = self.out(x.float())
        return found

    def forward(self, images: Tensor) -> Tensor:
        check_images(images)
        with convolutions(images.device.type, self.encoder.coarsest(images)):
            control = self.control(images)
        with full(images.device.type):  # sixteen bits are too few for the place of a voxel
            field = dense_spline(control, images.shape[2:], self.spacing)
            return scaling_and_squaring(field, self.squarings) if self.squarings else field
