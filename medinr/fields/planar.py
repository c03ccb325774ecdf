"""Maps of a plane: what a volume's map becomes for a single slice (a 2-D image, a frame of a cine series)."""

from dataclasses import replace

from torch import Tensor

from medinr import jets
from medinr.fields.maps import Map
from medinr.jets import Jet
from medinr.space import Domain
from medinr.types import Points


class PlanarMap(Map):
    """x + P u(P x), P the orthogonal projection onto a plane through the origin.

    The displacement lies in the plane and does not change across it, so that det J is the determinant in the plane, and
    penalties and inverses are those of two dimensions.

    Args:
        map: the map x + u(x) of space.
        plane: P, [3, 3] in normalised coordinates.
    """

    def __init__(self, map: Map, plane: Tensor) -> None:
        super().__init__()
        if tuple(plane.shape) != (3, 3):
            raise ValueError(f"plane: expected a projection [3, 3], got {tuple(plane.shape)}")
        self.map, self.plane = map, plane

    def displacement(self, x: Points, context: Tensor | None = None) -> Points:
        p = self.plane.to(x)
        u: Points = self.map.displacement(x @ p, context) @ p
        return u

    def displacement_jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        p = self.plane.to(jet.channels)
        u = self.map.displacement_jet(replace(jet, channels=jet.channels @ p), context)
        return replace(u, channels=u.channels @ p)

    def forward(self, x: Points, context: Tensor | None = None) -> Points:
        moved: Points = x + self.displacement(x, context)
        return moved

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        return jets.add(self.displacement_jet(jet, context), jet)


def within(map: Map, domain: Domain) -> Map:
    """The map itself for a volume; for a single slice, the map of its plane (which shares the parameters)."""
    if domain.in_plane is None or isinstance(map, PlanarMap):
        return map
    return PlanarMap(map, domain.in_plane)
