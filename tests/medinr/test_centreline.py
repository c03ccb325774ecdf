"""The centreline: length, frame, curvature, files and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from medinr.errors import UserError
from medinr.fields.centreline import Centreline, first_normal, parallel_transport, read_centreline, rotate
from tests.medinr.tubes import CLIMB, CURVATURE, RADIUS, TORSION, bent, helix, straight


def test_helix_has_its_length_curvature_and_torsion() -> None:
    """The parallel frame turns about the tangent by minus the torsion against Frenet's."""
    line = Centreline.of(helix(), degree=None)
    assert line.length == pytest.approx(1.6 * np.pi * np.hypot(RADIUS, CLIMB), rel=1e-4)
    assert line.smallest_radius == pytest.approx(1 / CURVATURE, rel=0.05)
    tangents, n1, _ = line.frame
    t = np.linspace(0, 1.6 * np.pi, len(tangents))
    inwards = -np.stack([np.cos(t), np.sin(t), 0 * t], axis=1)
    upwards = np.cross(tangents, inwards)
    angle = np.unwrap(np.arctan2((n1 * upwards).sum(1), (n1 * inwards).sum(1)))
    assert (angle[-8] - angle[8]) / (line.step * (len(angle) - 16)) == pytest.approx(-TORSION, rel=2e-3)


def test_arc_length_is_the_parameter() -> None:
    line = Centreline.of(bent(), degree=None)
    speed = np.linalg.norm(line.curve(np.linspace(0, line.length, 501), 1), axis=1)
    assert np.abs(speed - 1).max() < 1e-3


@pytest.mark.parametrize("points", [bent(), straight(), helix()], ids=["bent", "straight", "helix"])
def test_frame_is_orthonormal_and_right_handed(points: list[list[float]]) -> None:
    for frame in (np.stack(Centreline.of(points, degree=8).frame, axis=1),):
        gram = frame @ frame.transpose(0, 2, 1)
        assert np.abs(gram - np.eye(3)).max() < 1e-12
        assert np.abs(np.linalg.det(frame) - 1).max() < 1e-12


@pytest.mark.parametrize("axis", range(3))
def test_first_normal_exists_for_every_tangent(axis: int) -> None:
    for sign in (1, -1):
        tangent = sign * np.eye(3)[axis]
        normal = first_normal(tangent)
        assert abs(normal @ tangent) < 1e-12 and np.linalg.norm(normal) == pytest.approx(1)


def test_parallel_transport_of_a_plane_curve_keeps_the_normal_of_the_plane() -> None:
    """Half a circle: what points across its plane stays; nothing twists."""
    t = np.linspace(0, np.pi, 50)
    tangents = np.stack([-np.sin(t), np.cos(t), 0 * t], axis=1)
    n1, n2 = parallel_transport(tangents, np.array([0.0, 0.0, 1.0]))
    assert np.abs(n1 - [0, 0, 1]).max() < 1e-12
    assert np.abs(n2 - np.cross(tangents, [0, 0, 1])).max() < 1e-12
    assert np.allclose(rotate(tangents[0], tangents[0], tangents[20]), tangents[20])


def test_polynomial_is_recovered_and_noise_is_smoothed() -> None:
    t = np.linspace(-1, 1, 60)
    clean = np.stack([70 * t, 20 * t**3 - 15 * t, 10 * t**2], axis=1)
    noisy = clean + np.random.default_rng(0).normal(0, 1.0, clean.shape)
    through, fitted = Centreline.of(noisy, degree=None), Centreline.of(noisy, degree=8)
    smoothed = Centreline.of(noisy, degree=None, smooth_mm=1.0 * np.sqrt(3))

    def gap(line: Centreline) -> float:
        fine = np.stack([70 * (s := np.linspace(-1, 1, 4000)), 20 * s**3 - 15 * s, 10 * s**2], axis=1)
        return float(np.linalg.norm(line.knots[5:-5, None] - fine, axis=-1).min(1).mean())

    assert gap(Centreline.of(clean, degree=8)) < 0.05
    assert gap(fitted) < 0.6 < gap(through)
    assert gap(smoothed) < 0.6


def test_overlap_tells_where_coordinates_are_not_unique() -> None:
    """A circle of 30 mm: none of a tube of 20 mm, half of the wall of one that reaches beyond its centre."""
    t = np.linspace(0, 1.5 * np.pi, 100)
    line = Centreline.of(np.stack([30 * np.cos(t), 30 * np.sin(t), 0 * t], axis=1), degree=None)
    assert line.overlap(20) == 0
    assert line.overlap(45) > 0.2


def test_points_of_files(tmp_path: Path) -> None:
    file = tmp_path / "centreline.csv"
    file.write_text("x,y,z\n" + "".join(f"{x},{y},{z}\n" for x, y, z in bent()), encoding="utf-8")
    assert np.allclose(read_centreline(file), bent())
    slicer = tmp_path / "curve.fcsv"
    rows = "".join(f"{i},{-x},{-y},{z},0,0,0,1,1,1,0,,,\n" for i, (x, y, z) in enumerate(bent()))
    slicer.write_text(f"# CoordinateSystem = LPS\n# columns = id,x,y,z\n{rows}", encoding="utf-8")
    assert np.allclose(read_centreline(slicer), bent())


def test_what_is_no_centreline_is_refused() -> None:
    with pytest.raises(UserError, match=r"line\.csv: expected over 8 points for a polynomial of degree 8, found 5"):
        Centreline.of(bent(5), degree=8, source="line.csv")
    with pytest.raises(UserError, match="two different points, found 1"):
        Centreline.of([[1.0, 2.0, 3.0]] * 4, degree=None)
    with pytest.raises(UserError, match="finite points"):
        Centreline.of([[1.0, 2.0, np.nan], [0.0, 0.0, 0.0]], degree=None)
    assert Centreline.of([[0, 0, 0], [0, 0, 0], [0, 0, 60]], degree=None).length == pytest.approx(60)
