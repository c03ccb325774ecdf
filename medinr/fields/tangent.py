"""A displacement in the tangent coordinates of a tube: along its centreline and across it."""

import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from medinr import jets
from medinr.errors import RegistrationWarning, UserError
from medinr.fields.base import Field, in_chunks
from medinr.fields.centreline import EXTENSION, Centreline, read_centreline
from medinr.fields.maps import DisplacementMap, Map, Sum, check_displacement
from medinr.fields.tube import TubeCoordinates, columns, smooth_step_rule
from medinr.jets import Jet
from medinr.space import Domain
from medinr.types import Features, Points

STRETCH = (0.05, 0.2)
"""Where a millimetre of the centreline is shorter than this, the planes across it nearly meet: no displacement below
the first number, the whole one above the second."""


class TangentField(Field):
    """Displacement u = R(r + net(r)) - x with r = R^-1(x), net a network of the tube's own coordinates.

    van Harten, van Harten, Stoker and Isgum, Deformable Image Registration with Geometry-informed Implicit Neural
    Representations, MIDL 2023 (PMLR 227:730-742). R maps tangent coordinates (w along the centreline, u and v across,
    each scaled to [-1, 1]) to image space; R^-1 takes the nearest point of the centreline (`TubeCoordinates`). The
    field is a displacement of image space with exact jets, so it goes with every method, similarity and regularizer;
    `Sum` of it and of a network of image space is the paper's combined model. With `medinr.losses.OwnCoordinates` a
    penalty acts on r + net(r) instead, as published.

    Outside the tube nothing moves: the displacement is whole up to the tube's radius and the ends of the centreline,
    and falls smoothly (twice continuously differentiable) to zero over ``blend`` radii across and over a fifth of the
    length along. The paper samples inside the tube only, where both are the same. It falls to zero, too, where the
    tube is bent so strongly that the planes across it meet. Where two parts of one tube touch, the nearest centreline
    point changes from one to the other, and the displacement with it: a warning tells.

    Args:
        network: from (w, u, v) to the displacement in these units; as published, three layers of 256 sines with omega
            64 (180 in the combined model). A control lattice covers the tube.
        centreline: file with points in order from one end to the other (x,y,z, RAS mm; or a list or curve of Slicer),
            or the points themselves. A checkpoint holds the points and needs no file.
        diameter_mm: of the tube; published 40 mm, wider than the bowel.
        degree: of the polynomial that is fitted to the points on each axis; None: a spline through them.
        smooth_mm: for the spline, the root mean square distance by which it may miss the points.
        blend: width of the margin in which the displacement falls to zero, in radii.

    Raises:
        UserError: a file without a usable centreline; sizes that are not above zero.
    """

    in_features = 3
    out_features = 3
    tube: TubeCoordinates
    size: Tensor
    to_mm: Tensor
    to_normalised: Tensor

    def __init__(
        self,
        network: Field,
        centreline: str | list[list[float]],
        diameter_mm: float = 40.0,
        degree: int | None = 8,
        smooth_mm: float = 0.0,
        blend: float = 0.25,
    ) -> None:
        super().__init__()
        check_displacement("network", network)
        if network.in_features != 3 or network.out_features != 3:
            raise ValueError(f"network: expected 3 to 3, got {network.in_features} to {network.out_features}")
        for name, value in (("diameter_mm", diameter_mm), ("blend", blend)):
            if value <= 0:
                raise UserError(f"{name}: expected a number above 0, got {value}")
        self.source = centreline if isinstance(centreline, str) else "centreline"
        self.points = read_centreline(centreline).tolist() if isinstance(centreline, str) else centreline
        self.centreline = Centreline.of(torch.tensor(self.points).double().numpy(), degree, smooth_mm, self.source)
        self.network, self.radius, self.blend = network, diameter_mm / 2, blend
        self.conditions = getattr(network, "conditions", 0)
        # What a checkpoint keeps of the arguments: the points instead of the name of a file.
        kept = {"network": network, "centreline": self.points, "diameter_mm": diameter_mm, "degree": degree}
        object.__setattr__(self, "_arguments", ((), kept | {"smooth_mm": smooth_mm, "blend": blend}))
        self._warn()
        half = torch.tensor([self.centreline.length / 2, self.radius, self.radius])
        self.register_buffer("size", half, persistent=False)
        self.register_buffer("to_mm", torch.zeros(3, 3), persistent=False)
        self.register_buffer("to_normalised", torch.zeros(3, 3), persistent=False)
        self.unit_mm = 0.0

    def _warn(self) -> None:
        share = self.centreline.overlap(self.radius)
        if share > 0:
            bend = self.centreline.smallest_radius
            warnings.warn(
                f"{self.source}: {100 * share:.1f}% of the wall of a tube of {2 * self.radius:g} mm lies nearer to "
                f"another part of the centreline (smallest radius of curvature {bend:.0f} mm), where tangent "
                "coordinates jump; take a smaller diameter_mm, a lower degree or a shorter segment",
                RegistrationWarning,
                stacklevel=4,
            )

    def cover(self, domain: Domain) -> None:
        m = domain.normalised_to_world
        knots = torch.from_numpy(self.centreline.knots)
        inside = domain.contains_voxels(knots @ domain.world_to_voxel[:3, :3].T + domain.world_to_voxel[:3, 3])
        share = inside.double().mean().item()
        if share < 0.5:
            raise UserError(
                f"{self.source}: expected a centreline inside the image, found {100 * share:.0f}% of it there; its "
                "points are taken as RAS mm"
            )
        place = self.size
        self.tube = TubeCoordinates(self.centreline, m[:3, 3]).to(place)
        self.to_mm, self.to_normalised = (a.to(place) for a in (m[:3, :3], torch.linalg.inv(m[:3, :3])))
        self.unit_mm = domain.unit_mm
        sides = (2 * self.size.double().cpu()).tolist()
        shape = [max(4, round(side)) for side in sides]
        affine = torch.diag(torch.tensor([*(side / n for side, n in zip(sides, shape, strict=True)), 1.0]))
        self.network.cover(Domain.of(shape, affine, "per-axis"))

    def _ready(self) -> None:
        if not self.unit_mm:
            raise ValueError("TangentField: call cover(domain) first, the centreline is in mm")

    def forward(self, x: Features, context: Tensor | None = None) -> Features:
        self._ready()
        q = self.tube.to_tangent(x @ self.to_mm.T)
        seen = Jet(q[None], 0)
        moved = q + self.size * self.network(self._unit(seen).value, context)
        u: Points = self.share(seen).value * (self.tube.to_image(moved) - self.tube.to_image(q)) @ self.to_normalised.T
        return u

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        self._ready()
        q = self.tube.tangent_jet(jets.linear(jet, self.to_mm))
        moved = jets.add(q, self._scaled(self.network.jet(self._unit(q), context), self.size))
        ahead = self.tube.image_jet(moved)
        # R(q) is x; computed again, a network that says 0 moves nothing at all.
        here = self.tube.image_jet(q)
        u = jets.add(ahead, replace(here, channels=-here.channels))
        return jets.linear(jets.multiply(self.share(q), u), self.to_normalised)

    def _scaled(self, jet: Jet, by: Tensor) -> Jet:
        return replace(jet, channels=jet.channels * by)

    def _unit(self, q: Jet) -> Jet:
        """(s, u, v) in mm -> (w, u, v) in [-1, 1]."""
        origin = torch.zeros_like(q.channels)
        origin[0, :, 0] = self.size[0]
        return self._scaled(replace(q, channels=q.channels - origin), 1 / self.size)

    def share(self, q: Jet) -> Jet:
        """Part of the displacement that counts [N, 1], at tangent coordinates in mm: 1 in the tube, 0 far from it."""
        s, u, v = (columns(q, i, i + 1) for i in range(3))
        square = jets.add(jets.multiply(u, u), jets.multiply(v, v))
        reach = EXTENSION * self.centreline.length
        low, high = STRETCH
        rises = (
            (square, 1 / (self.radius**2 * ((1 + self.blend) ** 2 - 1)), self.radius**2),
            (s, 1 / reach, self.centreline.length),
            (s, -1 / reach, 0.0),
            (self.tube.stretch_jet(q), -1 / (high - low), high),
        )
        total: Jet | None = None
        for jet, slope, origin in rises:
            shift = torch.zeros_like(jet.channels)
            shift[0] = origin
            part = jets.activate(replace(jet, channels=slope * (jet.channels - shift)), smooth_step_rule)
            total = part if total is None else jets.multiply(total, part)
        assert total is not None
        return total

    def coordinates(self, x: Points) -> Points:
        """(w, u, v), each in [-1, 1] inside the tube, of normalised image coordinates [N, 3]."""
        self._ready()
        return self._unit(Jet(self.tube.to_tangent(x @ self.to_mm.T)[None], 0)).value

    def own_jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        """Jet of net in tangent space, at the points of a seed and along its directions there.

        Lengths are in normalised units of the image along and across the tube alike, so that second-order penalties
        mean the same as in image space. Points outside the tube and its margin give zeros.
        """
        self._ready()
        q = self.tube.to_tangent(jet.value @ self.to_mm.T)
        r = self._unit(Jet(q[None], 0)).channels
        size = self.size / self.unit_mm
        directions = jet.channels[1 : 1 + jet.k] / size
        found = self._scaled(self.network.jet(replace(jet, channels=torch.cat((r, directions))), context), size)
        inside = self.share(Jet(q[None], 0)).value > 0
        return replace(found, channels=torch.where(inside, found.channels, torch.zeros_like(found.channels)))


def own_jets(field: nn.Module, seed: Jet, context: Tensor | None = None) -> tuple[Jet, ...]:
    """Displacement jets of a field in its own coordinates, of each part of a `Sum` on its own.

    Args:
        field: a map or a displacement; all but `TangentField` have the coordinates of the image.
        seed: points of the image and directions (`medinr.jets.seed` or `probe`).
        context: the condition.
    """
    if isinstance(field, DisplacementMap):
        return own_jets(field.field, seed, context)
    if isinstance(field, Sum):
        return own_jets(field.one, seed, context) + own_jets(field.other, seed, context)
    if isinstance(field, TangentField):
        return (in_chunks(lambda piece: field.own_jet(piece, context), seed),)
    if isinstance(field, Map):
        return (field.displacement_jet(seed, context),)
    assert isinstance(field, Field)
    return (in_chunks(lambda piece: field.jet(piece, context), seed),)
