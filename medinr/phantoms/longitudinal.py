"""The longitudinal phantom: a thorax at irregular dates, in which a lung tumour shrinks and the body loses weight.

Everything is a map of the anatomy at the first date to that at a later one, in the body frame of
`medinr.phantoms.thorax_motion` (mm; left, posterior, superior), phi_t = W_t o T_t:

    T_t(p) = c + (p - c) (1 - (1 - s_t) w(rho)),  rho = |(p - c) / radii|
    W_t(p) = p - m_t q(d(p)) f(p_y) n(p)

T_t shrinks the ellipsoid rho <= 1 about c by the factor s_t, and fades out at rho = REACH: the tumour keeps its shape
and its volume is s_t^3 of the first, exactly. W_t moves the skin inwards along the rays n of the cross-section; d is
the distance from the skin, q fades out 24 mm inside and 40 mm outside, f keeps the back and the table where they are.
Both are smooth diffeomorphisms. Nothing here uses medinr.fields: truth and method share no code.
"""

import csv
import io as text_io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medinr import io
from medinr.errors import UserError
from medinr.phantoms.thorax_case import ThoraxCase, thorax_case
from medinr.phantoms.thorax_motion import fixed_point, smoothstep
from medinr.phantoms.thorax_wall import body_distance
from medinr.space import Domain

Array = NDArray[np.floating[Any]]

FIRST = date(2024, 1, 8)
DAYS = (0, 9, 23, 44, 51, 86)
"""Days of the scans: irregular, as clinics are."""
CASE = 3
SIZE = 96
RADII = np.array([17.0, 15.0, 18.0])
REACH = 2.2
"""T is the identity beyond this many radii."""
FASTEST_DAYS, RESIDUE = 28.0, 0.12
"""The volume decays with this time constant, to this share."""
WEIGHT_LOSS_MM, WEIGHT_DAYS = 8.0, 60.0
INNER_MM, OUTER_MM = 24.0, 40.0
"""The motion of the skin fades out over this depth inside, and this distance outside of the body."""
TUMOUR_HU = 45.0
LABELS = {1: "tumour", 2: "lungs", 3: "rest of the body"}
LANDMARKS = 60
TOLERANCE_MM = 1e-7


@dataclass(frozen=True)
class LongitudinalCase:
    """The phantom, a function of the arguments alone.

    Args:
        size: voxels in plane; the field of view stays the same.
        seed: of anatomy, tumour and noise.
        days: of the scans, ascending, the first 0.
    """

    size: int = SIZE
    seed: int = 0
    days: tuple[float, ...] = DAYS

    @cached_property
    def thorax(self) -> ThoraxCase:
        return thorax_case(CASE, self.size, self.seed)

    @cached_property
    def domain(self) -> Domain:
        return Domain.of(self.thorax.facts.shape, self.thorax.affine)

    @cached_property
    def centre(self) -> Array:
        """Centre of the tumour in the body frame: in the right lung, up to 3 mm beside by the seed."""
        return np.array([-63.0, -10.0, -4.0]) + np.random.default_rng([self.seed, 31]).uniform(-3, 3, 3)

    # -- the maps ------------------------------------------------------------------------------------------------

    def shrinkage(self, day: float) -> float:
        """s_t: the tumour's diameter relative to the first."""
        return float((RESIDUE + (1 - RESIDUE) * np.exp(-day / FASTEST_DAYS)) ** (1 / 3))

    def tumour_volume(self, day: float) -> float:
        """Millilitres, exactly."""
        ellipsoid = 4 / 3 * np.pi * np.prod(RADII * self.thorax.scale)
        return float(ellipsoid * self.shrinkage(day) ** 3 / 1000)

    def phi(self, points: Array, day: float) -> Array:
        """Where the material at world points [n, 3] (RAS mm) of the first date is at a later one."""
        body = self.thorax.world_to_body(points)
        return self.thorax.body_to_world(self._thinner(self._shrunk(body, day), day))

    def inverse(self, points: Array, day: float) -> Array:
        """Where the material at world points [n, 3] (RAS mm) of a date was at the first; inverse below 1e-5 mm."""
        body = self.thorax.world_to_body(points)
        start = fixed_point(lambda p: body - self._inwards(p, day), body, TOLERANCE_MM)
        offset = start - self.centre
        rho = np.linalg.norm(offset / RADII, axis=-1)
        s, out = self.shrinkage(day), start.copy()
        near = rho < REACH
        low, high = np.zeros(near.sum()), np.full(near.sum(), REACH)
        for _ in range(60):  # rho (1 - (1 - s) w(rho)) grows with rho
            middle = 0.5 * (low + high)
            beyond = middle * (1 - (1 - s) * _fading(middle)) > rho[near]
            low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
        out[near] = self.centre + offset[near] / (1 - (1 - s) * _fading(0.5 * (low + high)))[:, None]
        return self.thorax.body_to_world(out)

    def _shrunk(self, body: Array, day: float) -> Array:
        offset = body - self.centre
        rho = np.linalg.norm(offset / RADII, axis=-1, keepdims=True)
        return np.asarray(self.centre + offset * (1 - (1 - self.shrinkage(day)) * _fading(rho)))

    def _thinner(self, body: Array, day: float) -> Array:
        return np.asarray(body + self._inwards(body, day))

    def _inwards(self, body: Array, day: float) -> Array:
        x, y, z = body[..., 0], body[..., 1], body[..., 2]
        middle = 12.0 + 12.0 * smoothstep((z - 60.0) / 60.0)  # the axis of `body_distance`
        d = body_distance(x, y, z)
        share = np.where(d < 0, _step(1 + d / INNER_MM), 1 - _step(d / OUTER_MM)) * _step((65.0 - y) / 120.0)
        amount = WEIGHT_LOSS_MM * (1 - np.exp(-day / WEIGHT_DAYS)) * share
        ray = np.stack([x, y - middle], axis=-1)
        ray = ray / np.maximum(np.linalg.norm(ray, axis=-1, keepdims=True), 1e-6)
        return np.stack([-amount * ray[..., 0], -amount * ray[..., 1], np.zeros_like(x)], axis=-1)

    # -- what the scans show -------------------------------------------------------------------------------------

    @cached_property
    def _voxels(self) -> Array:
        """World coordinates of all voxel centres [n, 3]."""
        grid = np.stack(np.meshgrid(*(np.arange(n) for n in self.domain.shape), indexing="ij"), axis=-1)
        return self.thorax.voxel_to_world(grid.reshape(-1, 3).astype(np.float64))

    def image(self, day: float, noise: bool = True) -> NDArray[np.int16]:
        """CT in HU [X, Y, Z] of a day."""
        start = self.inverse(self._voxels, day)
        values = self.thorax.sample(start)
        offset = (self.thorax.world_to_body(start) - self.centre) / RADII
        edge = float(np.mean(self.domain.spacing) / RADII.mean()) * 0.8
        inside = np.clip(0.5 - (np.linalg.norm(offset, axis=-1) - 1) / edge, 0, 1).astype(np.float32)
        values = (values + inside * (TUMOUR_HU - values)).reshape(self.domain.shape).astype(np.float32)
        if noise:
            values = values + self.thorax.noise_of(values, round(day))
        return np.asarray(np.clip(np.rint(values), -1024, 3071), dtype=np.int16)

    def labels(self, day: float) -> NDArray[np.uint8]:
        """`LABELS` [X, Y, Z] of a day."""
        start = self.inverse(self._voxels, day)
        body = self.thorax.world_to_body(start)
        found = np.where(body_distance(body[:, 0], body[:, 1], body[:, 2]) < 0, 3, 0)
        found = np.where(self.thorax.inside_lung(start), 2, found)
        found = np.where(np.linalg.norm((body - self.centre) / RADII, axis=-1) <= 1, 1, found)
        return found.astype(np.uint8).reshape(self.domain.shape)

    @cached_property
    def landmarks(self) -> Array:
        """World points [60, 3] of the first date: a third around the tumour, in the lungs, and under the skin."""
        rng = np.random.default_rng([self.seed, 32])
        third = LANDMARKS // 3
        direction = rng.normal(size=(third, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        around = self.centre + RADII * direction * rng.uniform(0.9, 1.6, (third, 1))
        box = rng.uniform([-100, -80, -60], [100, 80, 80], size=(20_000, 3))
        world = self.thorax.body_to_world(box)
        lung = box[self.thorax.inside_lung(world, 5.0)][:third]
        d = body_distance(box[:, 0], box[:, 1], box[:, 2])
        skin = box[(d < -3) & (d > -14) & (box[:, 1] < 0)][:third]
        chosen = self.thorax.body_to_world(np.concatenate([around, lung, skin]))
        return np.asarray(np.rint(chosen * 1e4) / 1e4)

    def displacement(self, day: float) -> NDArray[np.float32]:
        """phi_t(p) - p at the voxel centres of the first date [X, Y, Z, 3], RAS mm."""
        field = self.phi(self._voxels, day) - self._voxels
        return field.reshape(*self.domain.shape, 3).astype(np.float32)


def _step(t: Array) -> Array:
    """Quintic step from 0 to 1, with two continuous derivatives."""
    t = np.clip(t, 0.0, 1.0)
    return np.asarray(t**3 * (10 - 15 * t + 6 * t * t))


def _fading(rho: Array) -> Array:
    """w: 1 inside the tumour, 0 from `REACH` on."""
    return np.asarray(1 - _step((rho - 1) / (REACH - 1)))


def write_longitudinal_phantom(
    out: Path, size: int | None = None, seed: int = 0, days: Sequence[float] = DAYS
) -> list[Path]:
    """Write the longitudinal phantom. Same arguments, same content.

    ``series.tsv`` (file, date, labels, points), and for each date ``DATE.nii.gz`` (HU), ``DATE_labels.nii.gz`` (1
    tumour, 2 lungs, 3 rest of the body) and ``DATE_points.csv`` (60 landmarks, RAS mm).
    ``truth/``: ``displacement_DATE.nii.gz`` (from the first date, at its voxel centres; 5-D, intent 1007, LPS mm),
    ``curves.csv`` (date, days, the tumour's volume in ml and centre in RAS mm) and ``parameters.json``.

    Raises:
        UserError: voxels too coarse for the tumour (before anything is written).
    """
    size = SIZE if size is None else size
    if size < 32:
        raise UserError(f"--size: expected at least 32 voxels in plane (9 mm), or no tumour is seen; got {size}")
    out, case = Path(out), LongitudinalCase(size, seed, tuple(days))
    (out / "truth").mkdir(parents=True, exist_ok=True)
    dates = [(FIRST + timedelta(days=float(day))).isoformat() for day in case.days]
    start = case.landmarks
    files, rows, curve = [], [], []
    for name, day in zip(dates, case.days, strict=True):
        image, labels, points = (out / f"{name}{end}" for end in (".nii.gz", "_labels.nii.gz", "_points.csv"))
        io.write_image(image, torch.from_numpy(case.image(day)), case.domain)
        io.write_image(labels, torch.from_numpy(case.labels(day)), case.domain)
        io.write_points(points, torch.from_numpy(case.phi(start, day)))
        field = out / "truth" / f"displacement_{name}.nii.gz"
        io.write_displacement(field, torch.from_numpy(case.displacement(day)), case.domain)
        files += [image, labels, points, field, io.sidecar_path(field)]
        rows.append([image.name, name, labels.name, points.name])
        centre = case.phi(case.thorax.body_to_world(case.centre[None]), day)[0]
        curve.append([name, f"{day:g}", f"{case.tumour_volume(day):.6f}", *(f"{v:.4f}" for v in centre)])
    largest = np.linalg.norm(case.phi(start, case.days[-1]) - start, axis=1).max()
    facts = {
        "size": size, "seed": seed, "days": list(case.days), "labels": {str(k): v for k, v in LABELS.items()},
        "tumour_centre_mm": case.thorax.body_to_world(case.centre).round(4).tolist(),
        "tumour_radii_mm": (RADII * case.thorax.scale).round(4).tolist(),
        "shrinkage": [round(case.shrinkage(day), 6) for day in case.days],
        "largest_landmark_motion_mm": round(float(largest), 4),
    }  # fmt: skip
    table = _table(["file", "date", "labels", "points"], rows, "\t")
    texts = {
        "series.tsv": table,
        "truth/curves.csv": _table(["date", "days", "volume_ml", "x", "y", "z"], curve, ","),
        "truth/parameters.json": json.dumps(facts, indent=2) + "\n",
    }
    for name, text in texts.items():
        io.write_text(out / name, text)
    return [*files, *(out / name for name in texts)]


def _table(header: list[str], rows: list[list[str]], delimiter: str) -> str:
    buffer = text_io.StringIO()
    csv.writer(buffer, delimiter=delimiter, lineterminator="\n").writerows([header, *rows])
    return buffer.getvalue()
