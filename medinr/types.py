"""Shapes, named once. N points, c channels, k directions, m pairs of directions, P patch offsets."""

from typing import TypeAlias

from jaxtyping import Bool, Float
from torch import Tensor

Points: TypeAlias = Float[Tensor, "N 3"]
"""Points in space; the unit (normalised, RAS mm, voxels) is the name's: `x`, `world`, `voxels`."""
Features: TypeAlias = Float[Tensor, "N c"]
Directions: TypeAlias = Float[Tensor, "k N c"]
Pairs: TypeAlias = Float[Tensor, "m N c"]
Matrix: TypeAlias = Float[Tensor, "4 4"]
"""A homogeneous matrix that acts on column vectors."""
Volume: TypeAlias = Float[Tensor, "C X Y Z"]
Mask: TypeAlias = Bool[Tensor, "X Y Z"]
Samples: TypeAlias = Float[Tensor, "N"] | Float[Tensor, "N P"]
Scalar: TypeAlias = Float[Tensor, ""]
