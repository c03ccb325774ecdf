"""How a label hangs together: Euler characteristic, pieces, tunnels and cavities."""

from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

Inside = NDArray[np.bool_]


def euler_characteristic(mask: Tensor) -> int:
    """V - E + F - C of the union of the closed cubes of a mask's voxels [X, Y, Z].

    A closed cube is all of its faces, edges and corners, so voxels that share a corner only are joined
    (26-neighbourhood). A ball has 1, a hollow ball 2, a ring 0; a sheet with n holes 1 - n.
    """
    inside = np.pad(mask.cpu().numpy().astype(bool), 1)
    total = 0
    for axes in product((0, 1), repeat=3):  # the cells of every kind: thick (1) or flat (0) along each axis
        cells = inside
        for axis, thick in enumerate(axes):
            if not thick:  # a flat cell is there where either of the voxels beside it is
                low = np.take(cells, range(cells.shape[axis] - 1), axis)
                high = np.take(cells, range(1, cells.shape[axis]), axis)
                cells = low | high
        total += (-1) ** sum(axes) * int(cells.sum())
    return total


def topology(mask: Tensor) -> dict[str, int]:
    """Euler characteristic = pieces - tunnels + cavities of a mask [X, Y, Z], and each of them.

    Pieces are joined through corners, cavities (of the background, without the outside) through faces only.
    """
    inside = mask.cpu().numpy().astype(bool)
    _, pieces = ndimage.label(inside, np.ones((3, 3, 3)))
    _, outside = ndimage.label(~np.pad(inside, 1))
    euler, cavities = euler_characteristic(mask), int(outside) - 1
    return {"euler": euler, "pieces": int(pieces), "tunnels": int(pieces) + cavities - euler, "cavities": cavities}
