"""The perinatal brain phantom: what grows, what does not, what is where; same arguments, same content."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import label as components

from medinr.cli import main
from medinr.errors import UserError
from medinr.io import read_image, read_labels
from medinr.phantoms.perinatal import CALLOSUM, PerinatalCase, perinatal_case
from medinr.phantoms.perinatal_cohort import draws, write_dhcp_phantom

SIZE = 56


def upright(age: float, ventricles_ml: float = 5.0, callosum: bool = True, size: int = SIZE) -> PerinatalCase:
    """A subject without pose jitter, of exactly this maturation."""
    case = perinatal_case(age, ventricles_ml, callosum, seed=5, number=1, size=size)
    person = replace(case.person, rotation=(0.0, 0.0, 0.0), translation=(0.0, 0.0, 0.0))
    return replace(case, person=person, maturation=age)


@pytest.fixture(scope="module")
def at() -> Callable[[float], PerinatalCase]:
    cases = {age: upright(age) for age in (28.0, 34.0, 40.0, 44.0)}
    return cases.__getitem__


def surface_ratio(case: PerinatalCase) -> float:
    """Surface of the cortex relative to that of a ball of its volume."""
    inside = np.isin(case.labels, (2, 3, 5, 7, 9, CALLOSUM))
    faces = sum(np.count_nonzero(np.diff(inside.astype(np.int8), axis=a)) for a in range(3))
    return float(faces / np.count_nonzero(inside) ** (2 / 3))


def test_the_brain_grows_and_folds_with_age(at: Callable[[float], PerinatalCase]) -> None:
    volumes = [at(age).volumes_ml()["brain"] for age in (28.0, 34.0, 40.0, 44.0)]
    assert 120 < volumes[0] < 200 and 330 < volumes[2] < 450 and volumes == sorted(volumes)
    folding = [surface_ratio(at(age)) for age in (28.0, 34.0, 40.0)]
    assert folding[1] > 1.1 * folding[0] and folding[2] > 1.1 * folding[1]
    cortex = [at(age).volumes_ml()["cortex"] / at(age).volumes_ml()["brain"] for age in (28.0, 40.0)]
    assert cortex[1] > 1.3 * cortex[0]


def test_the_tissues_lie_where_they_belong(at: Callable[[float], PerinatalCase]) -> None:
    case = at(40.0)
    labels = case.labels
    assert set(np.unique(labels)) == {0, *range(1, 10), CALLOSUM}
    middle = {v: np.argwhere(labels == v).mean(axis=0) for v in (2, 5, 6, 7, 8, 9, CALLOSUM)}
    x = np.argwhere(labels == 2)[:, 0] - (labels.shape[0] - 1) / 2
    assert 0.8 < np.sum(x > 0) / np.sum(x < 0) < 1.25, "two hemispheres"
    assert middle[6][1] < middle[8][1] < middle[7][1], "cerebellum behind brainstem behind nuclei"
    assert middle[6][2] < middle[9][2] < middle[7][2] < middle[CALLOSUM][2]
    _, parts = components(np.isin(labels, (2, 3, 5, 7, 8, 9, CALLOSUM)))
    sizes = np.bincount(components(np.isin(labels, (2, 3, 5, 7, 8, 9, CALLOSUM)))[0].ravel())[1:]
    assert parts >= 1 and sizes.max() > 0.98 * sizes.sum(), "one brain, not islands"
    edge = np.concatenate([labels.take(i, axis=a).ravel() for a in range(3) for i in (0, -1)])
    assert not edge.any(), "inside the field of view"


def test_contrast_is_that_of_the_newborn(at: Callable[[float], PerinatalCase]) -> None:
    def means(age: float, modality: str) -> dict[int, float]:
        case = at(age)
        return {v: float(np.median(case.images[modality][1][case.labels == v])) for v in (2, 3, 5, 7)}

    t2, t1 = means(34.0, "T2w"), means(34.0, "T1w")
    assert t2[5] > t2[3] > t2[2], "CSF brightest; unmyelinated white matter brighter than cortex"
    assert t1[5] < t1[3] < t1[2]
    contrast = [means(age, "T2w")[3] - means(age, "T2w")[2] for age in (28.0, 34.0, 44.0)]
    assert contrast[0] > contrast[1] > contrast[2] > 0
    scanned, restored = at(34.0).images["T2w"]
    inside = at(34.0).mask
    field = np.log(np.maximum(scanned, 1e-3) / np.maximum(restored, 1e-3))[inside]
    assert 0.04 < field.std() < 0.3, "a bias field that restoring takes away"


def test_ventricles_are_as_large_as_asked_and_change_nothing_else() -> None:
    small, large = upright(36.0, 3.0, size=80), upright(36.0, 9.0, size=80)
    found = [c.volumes_ml() for c in (small, large)]
    assert [v["ventricles"] for v in found] == [pytest.approx(3.0, rel=0.1), pytest.approx(9.0, rel=0.1)]
    for name in ("cortex", "cerebellum", "brainstem"):
        assert found[1][name] == pytest.approx(found[0][name], rel=0.02)
    for name in ("white", "brain"):
        assert found[1][name] == pytest.approx(found[0][name], rel=0.06)


def test_agenesis_takes_the_callosum_away_and_opens_the_midline() -> None:
    whole, without = upright(38.0), upright(38.0, callosum=False)
    assert whole.volumes_ml()["callosum"] > 1.5 and without.volumes_ml()["callosum"] == 0
    place = whole.labels == CALLOSUM
    assert np.isin(without.labels[place], (1, 2)).mean() > 0.2, "the fissure and its cortex reach down"
    change = np.abs(whole.images["T2w"][1] - without.images["T2w"][1])
    assert change[place].mean() > 3 * change[whole.mask & ~place].mean()


def test_the_automatic_labels_differ_at_borders_alone(at: Callable[[float], PerinatalCase]) -> None:
    case = at(40.0)
    clean = np.where(case.labels == CALLOSUM, 3, case.labels)
    differ = clean != case.segmentation
    assert 0.001 < differ[case.mask].mean() < 0.15
    assert CALLOSUM not in case.segmentation


def test_ventricles_callosum_and_maturation_are_independent_of_age() -> None:
    drawn = draws(400, seed=1)
    age = np.array([d.age for d in drawn])
    assert 28 <= age.min() < 28.5 and 43.5 < age.max() <= 44
    for values in ([d.ventricles_ml for d in drawn], [d.callosum for d in drawn], range(400)):
        assert abs(np.corrcoef(age, values)[0, 1]) < 0.15
    assert sum(not d.callosum for d in drawn) == 60 and sum(not d.has_t1w for d in drawn) == 40
    error = np.array([d.case(1, SIZE).maturation - d.age for d in drawn])
    assert error.std() == pytest.approx(0.4, rel=0.12) and abs(np.corrcoef(age, error)[0, 1]) < 0.15


@pytest.mark.parametrize("release", ["third", "second"])
def test_files_tables_and_truth(tmp_path: Path, release: str) -> None:
    files = write_dhcp_phantom(tmp_path / "a", 2, 24, seed=3, release=release)
    assert all(file.is_file() for file in files)
    assert {p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()} == {
        file.relative_to(tmp_path / "a") for file in files
    }
    with (tmp_path / "a" / "truth" / "subjects.tsv").open(encoding="utf-8") as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    assert len(rows) == 2 and abs(float(rows[0]["maturation"]) - float(rows[0]["scan_age"])) < 2
    facts = json.loads((tmp_path / "a" / "truth" / "parameters.json").read_text(encoding="utf-8"))
    assert facts["maturation_sd_weeks"] >= 0.3 and facts["age_noise_floor_mae_weeks"] == pytest.approx(0.319, abs=1e-3)
    ending = {"third": "desc-drawem9_dseg", "second": "desc-drawem9_space-T2w_dseg"}[release]
    labels = next(file for file in files if file.name.endswith(f"{ending}.nii.gz"))
    image = read_image(labels.with_name(labels.name.replace(ending, "desc-restore_T2w")))
    assert image.domain.shape == tuple(read_labels(labels, image.domain).shape)
    again = write_dhcp_phantom(tmp_path / "b", 2, 24, seed=3, release=release)
    for one, other in zip(files, again, strict=True):
        if one.suffix == ".gz":
            assert (read_image(one).data == read_image(other).data).all(), one.name
        else:
            assert one.read_bytes() == other.read_bytes()


def test_the_command_and_its_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["phantom", "dhcp", "--out", str(tmp_path / "p"), "--subjects", "1", "--size", "24"]) == 0
    assert "1 subjects" in capsys.readouterr().out and (tmp_path / "p" / "participants.tsv").is_file()
    assert main(["phantom", "tube", "--out", str(tmp_path / "q"), "--subjects", "1"]) == 2
    assert "--subjects: expected with the layout dhcp or ukb only" in capsys.readouterr().err
    for arguments in ((0, None), (1, 20)):
        with pytest.raises(UserError):
            write_dhcp_phantom(tmp_path / "q", *arguments)
    assert not (tmp_path / "q").exists()
