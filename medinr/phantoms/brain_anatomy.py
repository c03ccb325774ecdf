"""The anatomy of the brain phantoms: signed distances of its structures on a grid of body coordinates.

Body coordinates are mm in a brain of term size, R, A, S, the origin near the third ventricle. The two hemispheres are
mirror images; what differs between them comes from the individual deformation of the coordinates. A sulcus is a sheet
that stands on the hull: the zero level of a smooth random function on the hull, continued inwards along rays; what is
nearer to a sheet than its half width, and less deep than the sulcus, is CSF, and the cortex follows at its thickness.
Everything that changes with age is a number in `BrainShape`.
"""

from dataclasses import dataclass

import numpy as np

from medinr.phantoms.brain_shapes import (
    Array,
    Waves,
    ellipsoid,
    sheet_distance,
    smooth_cut,
    smooth_union,
    tube,
    tube_distances,
)  # fmt: skip

HEMISPHERE = (16.0, -1.0, 10.0)
"""Where the rays of the sulci come from (|x|, y, z)."""
HULL = (45.0, 58.0, 40.0)
VENTRICLE = np.array(
    [
        [5.5, 24, 9, 2.2], [6.5, 10, 15, 3.0], [8.5, -8, 17, 2.8], [14.5, -24, 11, 4.2], [20.5, -22, 0, 2.6],
        [24, -8, -11, 1.7], [23.5, 2, -14, 1.2],
    ],
    dtype=np.float32,
)  # fmt: skip
"""Frontal horn, body, atrium, temporal horn of a lateral ventricle: |x|, y, z, radius."""
NUCLEI = ((0.0, -3.0, 2.0), (31.0, 40.0, 18.0))
"""Centre and radii of what no sulcus enters."""
OCCIPITAL = np.array([[14.5, -24, 11, 4.2], [16.5, -38, 7, 1.6]], dtype=np.float32)
WAVELENGTHS, BEND = (54.0, 35.0, 23.0), 0.3
"""Of primary, secondary and tertiary sulci on the hull, mm; how far a sulcus goes aside per mm of depth."""
SULCI_SEED = 20
"""The pattern of the sulci is that of the species: equal for all subjects but for their deformations."""


@dataclass(frozen=True)
class BrainShape:
    """What differs between brains beside their deformation. Lengths in mm of the world.

    Args:
        scale: world mm per body mm.
        sulci: depths of the primary, secondary and tertiary sulci.
        cortex: thickness.
        gap: half width of a sulcus.
        csf: width of the CSF around the brain.
        sylvian: how far the Sylvian fossa stands open, 0 to 1.
        ventricles: factor of the radii of the lateral ventricles.
        callosum: thickness of the corpus callosum; 0: agenesis.
        hindbrain: size of cerebellum and brainstem relative to the cerebrum's.
        shift: mm, by which the individual sulci lie elsewhere.
    """

    scale: float
    sulci: tuple[float, float, float]
    cortex: float
    gap: float
    csf: float
    sylvian: float
    ventricles: float
    callosum: float
    hindbrain: float
    shift: float = 2.0


@dataclass(frozen=True)
class Anatomy:
    """Signed distances [X, Y, Z] in world mm, negative inside."""

    head: Array
    """Outer surface of the CSF."""
    pial: Array
    """Outer surface of the cortex, sulci included."""
    white: Array
    """Inner surface of the cortex."""
    ventricles: Array
    callosum: Array
    capsule: Array
    """Posterior limb of the internal capsule, where myelin comes first."""
    deep: Array
    hippocampus: Array
    cerebellum: Array
    brainstem: Array
    midline: Array
    """Third and fourth ventricle."""
    folia: Array
    """Phase of the folds of the cerebellum, -1 to 1 (no distance)."""


def anatomy(p: Array, shape: BrainShape, spacing: float, rng: np.random.Generator) -> Anatomy:
    """All structures at body coordinates.

    Args:
        p: [3, X, Y, Z], body mm, of the voxels of a grid.
        shape: of this brain.
        spacing: of the grid, body mm.
        rng: for the individual shift of the sulci.
    """
    m = np.stack([np.abs(p[0]), p[1], p[2]])
    s = shape.scale
    callosum, core = _callosum(p, shape)
    cerebrum = _cerebrum(m)
    fissure = np.hypot(p[0], np.maximum(-core, 0))
    inward = np.minimum(-cerebrum, fissure)
    within = np.maximum(-ellipsoid(p, *NUCLEI), 0)
    pial = np.maximum(cerebrum, (0.6 + 0.3 * shape.csf / s) * _opening(m) - fissure)
    for depth, distance in zip(shape.sulci, _sulci(p, m, inward, shape, spacing, rng), strict=True):
        wall = np.sqrt(distance**2 + np.maximum(inward - depth / s, 0) ** 2 + within**2)
        half = shape.gap / s * np.clip(depth / 4, 0, 1)
        pial = np.maximum(pial, half - wall)
    sylvian = ellipsoid(_tilted(m), (44, 0, 0), (15, 24, 1.2 + 7 * shape.sylvian))
    pial = np.maximum(pial, -sylvian)
    deep = np.min(list(nuclei(p).values()), axis=0)
    hind = _scaled(p, (0, -16, -14), shape.hindbrain)
    cerebellum = _cerebellum(hind) * shape.hindbrain
    brainstem = _brainstem(hind) * shape.hindbrain
    head = smooth_union(smooth_union(cerebrum, cerebellum, 10), brainstem, 8) - shape.csf / s
    fourth = ellipsoid(hind, (0, -22, -22), (3.0, 2.2, 6)) * shape.hindbrain
    third = ellipsoid(p, (0, -3, -1), (1.1, 9, 8))
    body = Anatomy(
        head=head, pial=pial, white=pial + shape.cortex / s, ventricles=ventricle_shape(p, shape),
        callosum=callosum, capsule=ellipsoid(_turned(m), (0, 0, 0), (2.4, 10, 9)), deep=deep,
        hippocampus=tube(tube_distances(m, np.array([[18, 6, -14, 4.6], [20, -6, -14, 3.2], [19, -18, -6, 2.2]]))),
        cerebellum=cerebellum, brainstem=brainstem, midline=np.minimum(third, fourth),
        folia=np.sin(2 * np.pi * np.hypot(hind[2] + 22, hind[1] + 16) / 5.0) * s,
    )  # fmt: skip
    return Anatomy(**{name: (s * d).astype(np.float32) for name, d in vars(body).items()})


def ventricle_pieces(p: Array, shape: BrainShape) -> list[tuple[Array, Array]]:
    """Distances from the axes of the lateral ventricles and their radii, body mm; wider apart without a callosum."""
    apart = 4.0 * np.clip((p[1] + 25) / 25, 0, 1) if shape.callosum == 0 else 0.0
    m = np.stack([np.abs(p[0]) - apart, p[1], p[2]])
    wider = OCCIPITAL * [1, 1, 1, 1.6] if shape.callosum == 0 else OCCIPITAL
    return [*tube_distances(m, VENTRICLE), *tube_distances(m, wider)]


def ventricle_shape(p: Array, shape: BrainShape) -> Array:
    """Lateral ventricles, body mm; the two never meet in the midline."""
    return np.asarray(np.maximum(tube(ventricle_pieces(p, shape), shape.ventricles), 1.0 - np.abs(p[0])))


def _cerebrum(m: Array) -> Array:
    """The hull of the hemispheres: an egg, narrower in front, flat below, with temporal lobes."""
    narrow = np.stack([m[0] * (1 + 0.16 * np.clip(m[1] / HULL[1], -0.3, 1)), m[1], m[2]])
    egg = smooth_cut(ellipsoid(narrow, (0, 0, 10), HULL), -(m[2] + 12 + 0.06 * m[1]), 14)
    temporal = ellipsoid(m, (29, 6, -14), (14, 27, 14))
    return smooth_union(egg, temporal, 10)


def _opening(m: Array) -> Array:
    """The interhemispheric fissure is wider at its edge."""
    return np.asarray(1 + 0.8 * np.clip((m[2] - 25) / 20, 0, 1))


def _callosum(p: Array, shape: BrainShape) -> tuple[Array, Array]:
    """The corpus callosum, and the core (y-z) that the interhemispheric fissure does not reach into."""
    q = np.stack([np.zeros_like(p[0]), p[1], p[2]])
    if shape.callosum == 0:
        core = ellipsoid(q, (0, -6, -2), (1, 17, 10))
        return np.full_like(p[0], 50.0), smooth_union(core, p[2] + 14, 8)
    half = 0.5 * shape.callosum / shape.scale
    arch = ellipsoid(q, (0, -3, 5), (1, 28, 14.5))
    lower = (p[2] - 3) + 0.12 * p[1]  # the arch is open below
    band = smooth_cut(np.abs(arch + half) - half, -lower, 3)
    band = smooth_union(band, ellipsoid(q, (0, -29, 6), (1, 2.8 + half, 2.6 + half)), 2)  # splenium
    width = np.abs(p[0]) - (13 - 0.004 * (p[1] + 3) ** 2)
    return smooth_cut(band, width, 3), smooth_union(arch, p[2] + 14, 8)


def _sulci(
    p: Array, m: Array, inward: Array, shape: BrainShape, spacing: float, rng: np.random.Generator
) -> list[Array]:
    """Distances from the sheets of the primary, secondary and tertiary sulci, body mm."""
    radii = (HULL[0] - HEMISPHERE[0], HULL[1], HULL[2])
    q = np.stack([(m[a] - HEMISPHERE[a]) / radii[a] for a in range(3)])
    q /= np.sqrt((q**2).sum(axis=0)) + 1e-3
    hull = np.stack([HEMISPHERE[a] + q[a] * radii[a] for a in range(3)]).astype(np.float32)
    sided = np.stack([hull[0] * np.sign(p[0]), hull[1], hull[2]])
    own = np.stack([Waves(60.0, rng)(sided) for _ in range(3)])
    species = np.random.default_rng(SULCI_SEED)
    # A sulcus does not go straight down: the deeper, the further beside.
    bent = np.stack([Waves(45.0, species)(hull) for _ in range(3)]) * np.clip(inward, 0, 15)
    hull = hull + shape.shift / shape.scale * own + BEND * bent
    return [sheet_distance(Waves(length, species)(hull), spacing) for length in WAVELENGTHS]


def nuclei(p: Array) -> dict[str, Array]:
    """Thalamus, lentiform nucleus and caudate of both sides, body mm."""
    m = np.stack([np.abs(p[0]), p[1], p[2]])
    return {
        "thalamus": ellipsoid(m, (8.5, -8, 3), (7.5, 12, 8)),
        "lentiform": ellipsoid(m, (21, 5, 1), (6, 13, 8)),
        "caudate": tube(tube_distances(m, np.array([[10, 19, 7, 4.6], [13, 4, 14, 3.0], [15, -14, 15, 1.6]]))),
    }


def _turned(m: Array) -> Array:
    """Coordinates along the internal capsule, between thalamus and lentiform nucleus."""
    angle = np.deg2rad(28)
    x, y = m[0] - 15.5, m[1] + 3
    return np.stack([np.cos(angle) * x + np.sin(angle) * y, -np.sin(angle) * x + np.cos(angle) * y, m[2] - 4])


def _tilted(m: Array) -> Array:
    """Coordinates of the Sylvian fissure, which rises backwards."""
    angle = np.deg2rad(-20)
    y, z = m[1] - 4, m[2] + 1
    return np.stack([m[0], np.cos(angle) * y + np.sin(angle) * z, -np.sin(angle) * y + np.cos(angle) * z])


def _scaled(p: Array, centre: tuple[float, float, float], factor: float) -> Array:
    middle = np.array(centre, dtype=np.float32).reshape(3, 1, 1, 1)
    return np.asarray((p - middle) / factor + middle)


def _cerebellum(p: Array) -> Array:
    m = np.stack([np.abs(p[0]), p[1], p[2]])
    return smooth_union(ellipsoid(m, (12, -33, -25), (14, 15, 11)), ellipsoid(m, (0, -30, -23), (8, 12, 12)), 4)


def _brainstem(p: Array) -> Array:
    nodes = np.array([[0, -6, -7, 9], [0, -11, -17, 7.5], [0, -15, -30, 6.0], [0, -19, -46, 4.6]])
    return smooth_union(tube(tube_distances(p, nodes)), ellipsoid(p, (0, -8.5, -20), (10, 7, 8.5)), 5)
