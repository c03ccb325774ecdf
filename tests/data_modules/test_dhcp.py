"""dHCP as it lies on disk, both releases, with the blemishes of its tables; written by the phantom."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_modules.dhcp import DHCP
from medinr.errors import UserError
from medinr.io import read_image, read_labels, write_image
from medinr.phantoms.perinatal_cohort import draws, write_dhcp_phantom

PIPELINE = Path("derivatives/dhcp_anat_pipeline")
COUNT, SEED = 5, 2


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    roots = {release: tmp_path_factory.mktemp(release) for release in ("third", "second")}
    for release, root in roots.items():
        write_dhcp_phantom(root, COUNT, 24, SEED, release)
    return roots


@pytest.fixture
def root(written: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the present release to spoil."""
    return Path(shutil.copytree(written["third"], tmp_path / "dhcp"))


def files_of(root: Path, number: int) -> dict[str, Path]:
    draw = draws(COUNT, SEED)[number]
    folder = root / PIPELINE / f"sub-{draw.subject}"
    anat = folder / f"ses-{draw.session}" / "anat"
    endings = {"T2w": "desc-restore_T2w", "T1w": "desc-restore_T1w", "labels": "desc-drawem9_dseg"}
    found = {what: anat / f"{draw.name}_{ending}.nii.gz" for what, ending in endings.items()}
    return {**found, "sessions": folder / f"sub-{draw.subject}_sessions.tsv"}


@pytest.mark.parametrize("release", ["third", "second"])
def test_everything_arrives_from_both_releases(written: dict[str, Path], release: str) -> None:
    drawn = draws(COUNT, SEED)
    data = DHCP(
        str(written[release]), conditions=["scan_age", "sex", "ventricle_volume", "callosum"], test=[drawn[0].name]
    )
    cohort = data.cohort
    assert cohort.excluded == [] and cohort.names("test") == (drawn[0].name,) and len(cohort) == COUNT
    assert [c.kind for c in cohort.conditions] == ["continuous", "categorical", "continuous", "categorical"]
    for draw in drawn:
        scan = cohort.scan(draw.name)
        assert scan.person == f"sub-{draw.subject}" and scan.conditions["scan_age"] == draw.age
        assert cohort.condition("sex").text(scan.conditions["sex"]) == draw.sex
        assert list(scan.images) == (["T2w", "T1w"] if draw.has_t1w else ["T2w"])
        assert scan.labels is not None and scan.mask is not None
        assert set(scan.labels.unique().tolist()) <= set(range(10))
        file = next((written[release] / PIPELINE).rglob(f"{draw.name}_desc-restore_T2w.nii.gz"))
        assert torch.equal(scan.images["T2w"], read_image(file).data[0]), "the restored image, not the raw one"


def test_the_pipelines_own_folder_will_do(root: Path) -> None:
    shutil.move(root / "participants.tsv", root / PIPELINE / "participants.tsv")
    shutil.rmtree(root / "truth")  # nobody reads it
    assert len(DHCP(str(root / PIPELINE), ["T2w"], ["sex"]).cohort) == COUNT
    shutil.move(root / PIPELINE, root / "derivatives" / "fetal_pipeline")
    assert len(DHCP(str(root), ["T2w"], ["sex"]).cohort) == COUNT


def test_blemishes_of_the_tables(root: Path) -> None:
    drawn = draws(COUNT, SEED)
    people = root / "participants.tsv"
    lines = people.read_text(encoding="utf-8").splitlines()
    lines[1] += "\t\t"
    lines[2] = lines[2].replace("\t", "\t\t", 1)
    lines[3] = "sub-" + lines[3]
    lines[4] = lines[4].replace(drawn[3].sex, "n/a")
    lines.append(lines[5].replace(drawn[4].sex, "other"))
    people.write_bytes("\r\n".join(lines).encode().replace(b"singleton", b"singl\xe9ton"))
    sessions = files_of(root, 1)["sessions"]
    sessions.write_text(sessions.read_text(encoding="utf-8").replace(f"\t{drawn[1].age:.2f}", "\t"), encoding="utf-8")
    files_of(root, 2)["sessions"].unlink()
    cohort = DHCP(str(root), ["T2w"], ["scan_age", "sex:categorical"]).cohort
    assert cohort.excluded == []
    ages = [cohort.known[d.name]["scan_age"] for d in drawn]
    assert np.isnan(ages).tolist() == [False, True, True, False, False]
    sexes = [cohort.condition("sex").text(cohort.known[d.name]["sex"]) for d in drawn]
    assert sexes == [drawn[0].sex, drawn[1].sex, drawn[2].sex, "missing", drawn[4].sex]
    assert any("is there twice with different values" in note for note in cohort.notes)
    assert any("line 3: 1 stray separator" in note for note in cohort.notes)


def test_subjects_that_cannot_be_used(root: Path) -> None:
    drawn = draws(COUNT, SEED)
    files_of(root, 0)["T2w"].write_bytes(b"no image")
    labels = files_of(root, 1)["labels"]
    domain = read_image(files_of(root, 1)["T2w"]).domain
    write_image(labels, read_labels(labels, domain) + 30, domain)
    for file in files_of(root, 2)["T2w"].parent.glob("*T[12]w.nii.gz"):
        file.unlink()
    files_of(root, 3)["labels"].unlink()
    cohort = DHCP(str(root), ["T2w"]).cohort
    reasons = dict(cohort.excluded)
    assert set(reasons) == {d.name for d in drawn[:3]}
    assert "cannot be read" in reasons[drawn[0].name]
    assert "expected label values 1 to 9, found 30, 31" in reasons[drawn[1].name]
    assert reasons[drawn[2].name] == "no T2w image in its folder"
    assert cohort.names("train") == (drawn[3].name, drawn[4].name) and cohort.scan(drawn[3].name).labels is None


def test_two_sessions_of_a_child_stay_together(root: Path) -> None:
    draw = draws(COUNT, SEED)[0]
    folder = root / PIPELINE / f"sub-{draw.subject}"
    shutil.copytree(folder / f"ses-{draw.session}", folder / "ses-9")
    for file in (folder / "ses-9" / "anat").iterdir():
        new = file.with_name(file.name.replace(f"ses-{draw.session}", "ses-9"))
        file.rename(new)
    image = read_image(folder / "ses-9" / "anat" / f"sub-{draw.subject}_ses-9_desc-restore_T2w.nii.gz")
    write_image(image.source, image.data[0] + 1, image.domain)
    with files_of(root, 0)["sessions"].open("a", encoding="utf-8") as table:
        table.write("ses-9\t44.5\n")
    cohort = DHCP(str(root), ["T2w"], test=[f"sub-{draw.subject}"]).cohort
    assert set(cohort.names("test")) == {draw.name, f"sub-{draw.subject}_ses-9"}
    assert cohort.known[f"sub-{draw.subject}_ses-9"]["scan_age"] == 44.5


def test_mistakes(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected T2w or T1w, found 'FLAIR'"):
        DHCP(str(root), ["FLAIR"])
    with pytest.raises(UserError, match="expected derivatives/dhcp_anat_pipeline"):
        DHCP(str(tmp_path / "nothing")).prepare_data()
    with pytest.raises(UserError, match=r"expected a column iq in a table, found sex, birth_age"):
        DHCP(str(root), conditions=["iq"]).prepare_data()
