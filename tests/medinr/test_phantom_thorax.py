"""medinr.phantoms.thorax: the maps are what they claim to be, the images show them, the files say the same."""

import ast
import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

import medinr.phantoms
from medinr.data import layouts
from medinr.errors import UserError
from medinr.phantoms.thorax import ThoraxCase, thorax_case, write_dirlab_phantom
from medinr.phantoms.thorax_anatomy import diaphragm_height
from medinr.phantoms.thorax_motion import cavity_axes, cavity_coordinates, cavity_level

SIZE = 64


@pytest.fixture(scope="module")
def phantom() -> ThoraxCase:
    return thorax_case(3, SIZE, seed=5)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dirlab")
    write_dirlab_phantom(out, [3], SIZE, seed=5, phases=[0, 50])
    return out


def _points(phantom: ThoraxCase, count: int = 3000) -> np.ndarray:
    shape = np.array(phantom.facts.shape)
    return phantom.voxel_to_world(np.random.default_rng(1).uniform(-0.5, shape - 0.5, size=(count, 3)))


# ------------------------------------------------------------------------------------------------- the maps


@pytest.mark.parametrize("case", [1, 5, 8])
@pytest.mark.parametrize("phase", [20, 50, 80])
def test_each_region_has_an_inverse_and_does_not_fold(case: int, phase: int) -> None:
    phantom = thorax_case(case, SIZE)
    points = _points(phantom)
    for region in ("inside", "outside"):
        there = phantom.phase_map(points, phase, region)
        assert np.abs(phantom.inverse_phase_map(there, phase, region) - points).max() < 1e-4
        h = 1e-3
        columns = [
            phantom.phase_map(points + h * e, phase, region) - phantom.phase_map(points - h * e, phase, region)
            for e in np.eye(3)
        ]
        assert np.linalg.det(np.stack(columns, -1) / (2 * h)).min() > 0.4
    assert np.abs(phantom.inverse_phase_map(phantom.phase_map(points, phase), phase) - points).max() < 1e-4


def test_end_inspiration_is_the_reference(phantom: ThoraxCase) -> None:
    points = _points(phantom)
    assert np.abs(phantom.phase_map(points, 0) - points).max() < 1e-9


def test_contents_slide_along_the_wall(phantom: ThoraxCase) -> None:
    angle, z = (v.ravel() for v in np.meshgrid(np.linspace(0, 2 * np.pi, 60), np.linspace(-80, 60, 15)))
    low, high = np.zeros_like(angle), np.full_like(angle, 2.0)
    for _ in range(60):  # the pleura on each ray
        middle = 0.5 * (low + high)
        inside = cavity_level(middle * np.cos(angle), middle * np.sin(angle)) < 1
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    a, b, c = cavity_axes(z)
    pleura = np.stack([low * np.cos(angle) * a, low * np.sin(angle) * b + c, z], -1)
    jump = phantom.motion.forward(pleura, 50, "inside") - phantom.motion.forward(pleura, 50, "outside")
    assert np.linalg.norm(jump[z < -20], axis=-1).min() > 3.0
    # Relative to the wall, the contents stay on the pleura: the jump is tangential, no gap and no overlap.
    slid = phantom.motion.slip_forward(pleura, 50)
    level = cavity_level(*cavity_coordinates(slid[:, 0], slid[:, 1], slid[:, 2]))
    assert np.abs(level - 1.0).max() < 1e-9


def test_ribs_and_spine_do_not_go_up_and_down(phantom: ThoraxCase) -> None:
    points = _points(phantom)
    outside = ~phantom.motion.inside(phantom.world_to_body(points))
    assert 500 < outside.sum() < 2900
    moved = (phantom.phase_map(points, 50) - points)[outside]
    assert np.abs(moved[:, [0, 2]]).max() < 1e-9
    assert 2.0 < np.abs(moved[:, 1]).max() < 6.0
    assert moved[:, 1].max() < 1e-9  # RAS: the front sinks towards the back


def test_diaphragm_excursion_and_mean_motion_by_case() -> None:
    means = []
    for case in range(1, 11):
        phantom = thorax_case(case, 32)
        x, y = np.meshgrid([-45.0, 45.0], [20.0, 40.0])
        z = diaphragm_height(x, y, np.full_like(x, -70.0), phantom.habitus)
        dome = phantom.body_to_world(np.stack([x, y, z], -1))
        rise = (phantom.phase_map(dome, 50, "inside") - dome)[..., 2]
        assert 8.0 < rise.mean() < 27.0
        grid = _points(phantom)
        lung = grid[phantom.inside_lung(grid, 2.0)]
        means.append(np.linalg.norm(phantom.phase_map(lung, 50) - lung, axis=-1).mean())
    assert np.all(np.diff(means[:5]) > 0)
    assert means[0] > 4.0 and 11.0 < means[4] < 15.5


def test_the_two_limbs_differ(phantom: ThoraxCase) -> None:
    extreme, _ = phantom.landmarks
    out, back = (phantom.voxel_to_world(phantom.landmark_positions(extreme, p)) for p in (30, 70))
    assert np.linalg.norm(out - back, axis=-1).mean() > 1.0


def test_motion_uses_no_code_of_the_methods() -> None:
    for path in Path(medinr.phantoms.__path__[0]).glob("thorax*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert not name.startswith(("torch", "medinr.fields", "medinr.jets", "medinr.methods")), path


# ------------------------------------------------------------------------------------------------- the images


def test_images_show_the_map(phantom: ThoraxCase) -> None:
    fixed, moving = (phantom.image(p, noise=False).astype(float) for p in (0, 50))
    voxels = np.argwhere(phantom.lung_mask(0))
    world = phantom.voxel_to_world(voxels.astype(float))
    chosen = phantom.inside_lung(world, 6.0)
    voxels, world = voxels[chosen], world[chosen]
    target = phantom.world_to_voxel(phantom.phase_map(world, 50))
    warped = map_coordinates(moving, target.T, order=3)
    before = (moving - fixed)[tuple(voxels.T)].std()
    after = (warped - fixed[tuple(voxels.T)]).std()
    assert after < 0.35 * before


def test_hounsfield_values_and_orientation(phantom: ThoraxCase) -> None:
    image = phantom.image(0)
    lung = image[phantom.lung_mask(0)]
    assert -900 < np.median(lung) < -800
    assert image.min() >= -1024 and np.percentile(image, 99.9) > 300  # air, bone
    mask = phantom.lung_mask(0)
    right = phantom.voxel_to_world(np.array([0.0, 0, 0]))[0] > phantom.voxel_to_world(np.array([SIZE - 1.0, 0, 0]))[0]
    assert right  # x runs to the left
    # Supine: bone (the spine) lies behind the lungs, the liver under the right one.
    centre = np.argwhere(mask).mean(0)
    assert np.argwhere(image > 250)[:, 1].mean() > centre[1]
    # Expiration makes lungs smaller and denser.
    assert phantom.lung_mask(50).sum() < 0.97 * mask.sum()
    assert np.median(phantom.image(50)[phantom.lung_mask(50)]) > np.median(lung) + 8


def test_wide_fields_of_view_end_in_air() -> None:
    image = thorax_case(6, SIZE).image(0, noise=False)
    border = np.concatenate([image[:3].ravel(), image[-3:].ravel(), image[:, :3].ravel(), image[:, -2:].ravel()])
    assert np.percentile(border, 99) < -900 and image.max() > 200


def test_noise_is_new_in_each_phase(phantom: ThoraxCase) -> None:
    noise = [phantom.image(p).astype(float) - phantom.image(p, noise=False) for p in (0, 50)]
    mask = phantom.lung_mask(0)
    assert 3 < noise[0][mask].std() < 40
    assert abs(np.corrcoef(noise[0][mask], noise[1][mask])[0, 1]) < 0.05


def test_lattice_of_the_renderer_agrees_with_the_exact_inverse(phantom: ThoraxCase) -> None:
    voxels = np.argwhere(phantom.lung_mask(50))[::50]
    exact = phantom.inverse_phase_map(phantom.voxel_to_world(voxels.astype(float)), 50, "inside")
    pull = phantom._pullback(50)
    body = np.stack([pull.contents[a][tuple(voxels.T)] for a in range(3)], -1)
    assert np.linalg.norm(phantom.body_to_world(body) - exact, axis=-1).max() < 0.02


# ------------------------------------------------------------------------------------------------- landmarks


def test_landmarks_lie_on_vessels_inside_the_lungs(phantom: ThoraxCase) -> None:
    extreme, sampled = phantom.landmarks
    both = np.concatenate([extreme, sampled])
    assert extreme.shape == (300, 3) and sampled.shape == (75, 3)
    assert len(np.unique(both, axis=0)) == 375
    assert phantom.lung_mask(0)[tuple(both.T)].all()
    nodes = np.concatenate([t.branchings(0.7)[0] for t in phantom.trees.vessels])
    nodes = phantom.body_to_world(nodes)
    gap = np.linalg.norm(phantom.voxel_to_world(both.astype(float))[:, None] - nodes[None], axis=-1).min(1)
    assert gap.max() <= 0.5 * np.linalg.norm(phantom.facts.spacing) + 1e-6
    image = phantom.image(0, noise=False)
    assert image[tuple(both.T)].mean() > np.median(image[phantom.lung_mask(0)]) + 60
    for phase in range(0, 100, 10):
        positions = phantom.landmark_positions(both, phase)
        assert (positions >= 0).all() and (positions <= np.array(phantom.facts.shape) - 1).all()


# ------------------------------------------------------------------------------------------------- the files


def _landmarks(path: Path) -> np.ndarray:
    return np.loadtxt(path, delimiter="\t")


def test_files_hold_what_the_phantom_says(root: Path, phantom: ThoraxCase) -> None:
    facts = layouts.dirlab_geometry(root, 3)
    assert facts.shape == phantom.facts.shape and facts.spacing == phantom.facts.spacing
    for phase in ("T00", "T50"):
        path = layouts.first_existing(layouts.dirlab_image_candidates(root, 3, phase))
        assert path is not None
        stored = np.fromfile(path, dtype=layouts.DIRLAB_DTYPE).reshape(facts.shape, order="F")
        assert np.array_equal(stored.astype(int) - 1024, phantom.image(int(phase[1:])))
        assert stored.min() >= 0
    assert not (root / "Case3Pack/Images/case3_T10-ssm.img").exists()
    first = _landmarks(root / "Case3Pack/ExtremePhases/Case3_300_T00_xyz.txt")
    assert np.array_equal(first, np.rint(first)) and np.array_equal(first - 1, phantom.landmarks[0])
    second = _landmarks(root / "Case3Pack/ExtremePhases/Case3_300_T50_xyz.txt")
    exact = phantom.landmark_positions(phantom.landmarks[0], 50) + 1
    assert np.abs(second - exact).max() < 1e-4
    assert _landmarks(root / "Case3Pack/Sampled4D/case3_4D-75_T50.txt").shape == (75, 3)


def test_truth_displacement_is_lps_and_exact(root: Path, phantom: ThoraxCase) -> None:
    image = nib.load(root / "truth/case3/displacement_T50.nii.gz")
    field = np.asanyarray(image.dataobj)
    assert field.shape == (*phantom.facts.shape, 1, 3) and field.dtype == np.float32
    assert int(image.header["intent_code"]) == 1007
    assert np.allclose(image.affine, phantom.affine)
    voxels = phantom.landmarks[0]
    world = phantom.voxel_to_world(voxels.astype(float))
    moved = world + field[tuple(voxels.T)][:, 0] * [-1, -1, 1]
    assert np.abs(moved - phantom.phase_map(world, 50)).max() < 1e-4
    mask = np.asanyarray(nib.load(root / "truth/case3/lung_mask_T50.nii.gz").dataobj)
    assert np.array_equal(mask.astype(bool), phantom.lung_mask(50))


def test_truth_landmarks_at_all_phases(root: Path, phantom: ThoraxCase) -> None:
    with (root / "truth/case3/landmarks.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 375 * 10
    chosen = [r for r in rows if r["set"] == "sampled" and r["phase"] == "T70"]
    world = np.array([[float(r[a]) for a in "xyz"] for r in chosen])
    start = phantom.voxel_to_world(phantom.landmarks[1].astype(float))
    assert np.abs(world - phantom.phase_map(start, 70)).max() < 1e-5


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    def contents(name: str, seed: int) -> dict[str, bytes]:
        out = tmp_path / name
        files = write_dirlab_phantom(out, [2], 24, seed=seed, phases=[0, 50])
        assert sorted(files) == sorted(p for p in out.rglob("*") if p.is_file())
        return {str(p.relative_to(out)): p.read_bytes() for p in files}

    first, again, other = contents("a", 1), contents("b", 1), contents("c", 2)
    assert first == again
    assert first.keys() == other.keys()
    same = [name for name in first if first[name] == other[name]]
    assert same == ["geometry.json"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"cases": [1, 12]}, "from 1 to 10"),
        ({"size": 4}, "size: expected 16"),
        ({"size": 16, "phases": [0, 15]}, "phases: expected"),
        ({"size": 16, "phases": []}, "phases: expected"),
    ],
)
def test_mistakes_leave_nothing_behind(tmp_path: Path, arguments: dict[str, list[int]], match: str) -> None:
    with pytest.raises(UserError, match=match):
        write_dirlab_phantom(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_sizes_show_the_same_body() -> None:
    small, large = thorax_case(4, 32, seed=2), thorax_case(4, 128, seed=2)
    point = np.array([[40.0, 20.0, -50.0]])
    for phantom in (small, large):
        assert phantom.facts.spacing[2] >= max(2.5, phantom.facts.spacing[0])
    moves = [p.phase_map(p.body_to_world(point), 50) - p.body_to_world(point) for p in (small, large)]
    assert np.allclose(moves[0], moves[1])
    view = [np.array(p.facts.shape) * p.facts.spacing for p in (small, large)]
    assert np.abs(view[0] - view[1]).max() < 0.5 * small.facts.spacing[2] + 0.1
