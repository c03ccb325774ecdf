"""UK Biobank from archives and tables, with what goes wrong there; written by the phantom."""

import math
import shutil
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from data_modules.ukbiobank import UKBiobank
from medinr.data.archives import ZipMember, open_source, source_domain
from medinr.errors import UserError
from medinr.io import read_domain, read_labels
from medinr.phantoms.adult_cohort import adult_draws, write_ukb_phantom
from medinr.phantoms.adult_template import mni_grid

COUNT, SIZE = 5, 32


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ukb")
    write_ukb_phantom(root, COUNT, SIZE, 1, "synthetic")
    return root


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "ukb"))


def module(root: Path, **options: Any) -> UKBiobank:
    return UKBiobank(str(root), str(root / "phenotypes.csv"), **options)


def archive(root: Path, number: int) -> Path:
    return root / f"{adult_draws(COUNT, 1)[number].eid}_20252_2_0.zip"


def rewrite(path: Path, change: dict[str, bytes | None]) -> None:
    """Replace (or leave out, None) members of an archive."""
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in {**content, **change}.items():
            if data is not None:
                new.writestr(name, data)


def test_everything_arrives_without_unpacking(written: Path) -> None:
    drawn = adult_draws(COUNT, 1)
    before = sorted(written.rglob("*"))
    asked = ["age", "sex", "ventricles_ml", "25003"]
    cohort = module(written, conditions=asked, test=[f"sub-{drawn[4].eid}"]).cohort
    assert cohort.excluded == [] and cohort.notes == [] and len(cohort) == COUNT
    assert cohort.names("test") == (f"sub-{drawn[4].eid}_ses-2",)
    scan = cohort.scan(f"sub-{drawn[0].eid}_ses-2")
    assert scan.conditions["age"] == drawn[0].age
    assert cohort.condition("sex").text(scan.conditions["sex"]) == ("female", "male")[drawn[0].sex]
    assert scan.conditions["25003"] == pytest.approx(1000 * drawn[0].ventricles_ml, rel=0.3)
    assert 0.3 < scan.conditions["ventricles_ml"] * 1000 / scan.conditions["25003"] < 1.1
    assert scan.labels is not None and set(scan.labels.unique().tolist()) == {0, 1, 2, 3}
    assert scan.mask is not None and scan.images["T1w"][~scan.mask].abs().max() == 0, "the brain alone"
    assert sorted(written.rglob("*")) == before, "nothing is unpacked"


def test_the_header_alone_gives_the_grid(root: Path) -> None:
    place = archive(root, 0)
    source = ZipMember(place, "T1/T1.nii.gz")
    whole = read_domain(open_source(source))
    assert source_domain(source).same_grid(whole, 1e-6)
    plain = nib.nifti1.Nifti1Image(np.ones((5, 6, 7), dtype=np.int16), np.diag([1, 2, 3, 1]))
    rewrite(place, {"a.nii": plain.to_bytes(), "b.nii.gz": b"nothing"})
    assert source_domain(ZipMember(place, "a.nii")).spacing == (1, 2, 3)
    for member, message in (("b.nii.gz", "expected a whole NIfTI image"), ("c.nii.gz", "expected this file in the")):
        with pytest.raises(UserError, match=message):
            source_domain(ZipMember(place, member))


def test_linear_space_is_mni_space(written: Path) -> None:
    """FAST's labels of native space, placed by FLIRT's matrix, cover the true labels of MNI space."""
    grid = mni_grid(218 / SIZE)
    linear = module(written, space="linear").cohort
    shares = {}
    for space, cohort in (("linear", linear), ("native", module(written, space="native").cohort)):
        found = []
        for draw in adult_draws(COUNT, 1):
            true = read_labels(written / "truth" / f"{draw.eid}_labels.nii.gz", grid) > 0
            scan = cohort.scan(f"sub-{draw.eid}_ses-2")
            assert scan.labels is not None
            world = grid.voxels().double() @ grid.voxel_to_world[:3, :3].T + grid.voxel_to_world[:3, 3]
            inverse = scan.domain.world_to_voxel
            voxels = (world @ inverse[:3, :3].T + inverse[:3, 3]).round().long()
            inside = ((voxels >= 0) & (voxels < torch.tensor(scan.domain.shape))).all(dim=1)
            i, j, k = voxels[inside].T
            a, b = scan.labels[i, j, k] > 0, true.reshape(-1)[inside]
            found.append(2 * float((a & b).sum()) / float(a.sum() + b.sum()))
        shares[space] = np.mean(found)
    assert shares["linear"] > 0.94 and shares["native"] < shares["linear"] - 0.03


def test_mni_images_have_no_labels_and_first_has_its_own(written: Path) -> None:
    mni = module(written, space="mni").cohort
    scan = mni.scan(mni.names("train")[0])
    assert scan.labels is None and mni.label_names == {} and scan.domain.same_grid(mni_grid(218 / SIZE), 1e-2)
    first = module(written, labels="first").cohort
    assert first.label_names[10] == "thalamus_left"


def test_unpacked_folders_and_r_exports(root: Path) -> None:
    folder = root / "deeper" / archive(root, 0).stem
    with zipfile.ZipFile(archive(root, 0)) as packed:
        packed.extractall(folder)
    archive(root, 0).unlink()
    table = root / "phenotypes.csv"
    text = table.read_text(encoding="utf-8").replace("eid,21003-2.0,31-0.0", "f.eid,f.21003.2.0,f.31.0.0")
    table.write_text(text, encoding="utf-8")
    cohort = module(root, conditions=["age", "sex"]).cohort
    assert len(cohort) == COUNT and cohort.excluded == []
    name = f"sub-{adult_draws(COUNT, 1)[0].eid}_ses-2"
    assert cohort.known[name]["age"] == adult_draws(COUNT, 1)[0].age and cohort.scan(name).labels is not None


def test_what_cannot_be_used_is_listed(root: Path, tmp_path: Path) -> None:
    eids = [draw.eid for draw in adult_draws(COUNT, 1)]
    archive(root, 0).write_bytes(archive(root, 0).read_bytes()[:5000])
    rewrite(archive(root, 1), {"T1/T1.nii.gz": None})
    image = nib.nifti1.Nifti1Image(np.ones((5, 5, 5), dtype=np.int16), np.eye(4))
    rewrite(archive(root, 2), {"T1/T1_fast/T1_brain_seg.nii.gz": None, "T1/T1_brain_mask.nii.gz": image.to_bytes()})
    table = root / "phenotypes.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    kept = [f"{eids[3]},," if line.startswith(eids[3]) else line for line in lines]
    table.write_text("\n".join(kept) + "\n", encoding="utf-8")
    cohort = module(root).cohort
    reasons = {name.split("-")[1].split("_")[0]: reason for name, reason in cohort.excluded}
    assert set(reasons) == set(eids[:4]) and cohort.names("train") == (f"sub-{eids[4]}_ses-2",)
    assert "expected a whole zip archive" in reasons[eids[0]]
    assert "expected T1/T1.nii.gz in it" in reasons[eids[1]]
    assert "grid of its image" in reasons[eids[2]]
    assert "no condition is known (age)" in reasons[eids[3]]
    gone = tmp_path / "withdrawn.csv"
    gone.write_text(f"eid\n{eids[4]}\n", encoding="utf-8")
    with pytest.raises(UserError, match="expected scans to train on, found none; 5 excluded"):
        module(root, withdrawn=str(gone)).setup()


def test_a_missing_registration_excludes_from_mni_alone(root: Path) -> None:
    rewrite(archive(root, 0), {"T1/T1_brain_to_MNI.nii.gz": None, "T1/T1_fast/T1_brain_seg.nii.gz": None})
    rewrite(archive(root, 1), {"T1/transforms/T1_to_MNI_linear.mat": b"nothing"})
    counts = {space: len(module(root, space=space).cohort) for space in ("linear", "native", "mni")}
    assert counts == {"linear": COUNT - 1, "native": COUNT, "mni": COUNT - 1}
    cohort = module(root, space="native").cohort
    assert cohort.scan(f"sub-{adult_draws(COUNT, 1)[0].eid}_ses-2").labels is None
    assert "labels: missing for 1 of 5 scans" in cohort.notes


def test_a_missing_age_beside_another_condition_stays_missing(root: Path) -> None:
    eid = adult_draws(COUNT, 1)[2].eid
    table = root / "phenotypes.csv"
    rows = [line.split(",") for line in table.read_text(encoding="utf-8").splitlines()]
    kept = [",".join([row[0], "", *row[2:]] if row[0] == eid else row) for row in rows]
    table.write_text("\n".join(kept), encoding="utf-8")
    cohort = module(root, conditions=["age", "ventricles_ml"]).cohort
    assert math.isnan(cohort.known[f"sub-{eid}_ses-2"]["age"]) and cohort.excluded == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "talairach"}, "expected linear, native, mni"),
        ({"labels": "aseg"}, "expected fast, first or none"),
        ({"conditions": ["height"]}, "expected age, sex, ventricles_ml"),
        ({"conditions": ["25010"]}, "expected a column 25010-2.0 or f.25010.2.0"),
        ({"visits": [3]}, "expected archives EID_20252_3_0.zip"),
    ],
)
def test_mistakes_in_the_settings(written: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        module(written, **options).prepare_data()


def test_an_all_missing_column_is_one_line(root: Path) -> None:
    table = root / "phenotypes.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    emptied = [lines[0], *(",".join([line.split(",")[0], "", *line.split(",")[2:]]) for line in lines[1:])]
    table.write_text("\n".join(emptied), encoding="utf-8")
    with pytest.raises(UserError, match="age: expected a value for some scan, found 5 empty cells"):
        module(root).prepare_data()
