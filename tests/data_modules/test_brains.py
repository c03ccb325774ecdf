"""The real slabs and mouse brains as cohorts."""

from pathlib import Path

import pytest
import torch

from data_modules.brains import CSF, AdultSlabsCohort, MouseCohort
from data_modules.slabs import REPEATS, TEST, VAL
from medinr.data.cohort import UNLABELLED
from medinr.errors import UserError
from medinr.io import write_image
from medinr.space import Domain
from tests.data_modules import tiny_slabs


def test_slabs_keep_persons_together_and_know_their_csf(shared: Path) -> None:
    data = AdultSlabsCohort(str(shared / "data" / "adult_t1_slabs"))
    entries, _ = data.listed()
    splits = data.splits(entries)
    place = {name: split for split, names in splits.items() for name in names}
    assert len(entries) == 40 and {n for n in place if place[n] == "test"} == {f"sub-{n:02d}" for n in TEST}
    assert {n for n in place if place[n] == "val"} == {f"sub-{n:02d}" for n in VAL}
    for group in REPEATS:
        assert len({place[f"sub-{n:02d}"] for n in group}) == 1
    values = [entry.conditions[CSF] for entry in entries]
    assert entries[0].conditions[CSF] == pytest.approx(18.62) and 10 < min(values) < max(values) < 40
    shares = AdultSlabsCohort(data.root, test=0.3, seed=1)
    test = shares.splits(shares.listed()[0])["test"]
    assert len(test) > 7 and all(len({f"sub-{n:02d}" in test for n in group}) == 1 for group in REPEATS)
    scan = data.reader()(entries[0])
    assert tuple(scan["image_T1w"].shape)[2] == 18, "no slice is lost"
    unlabelled = (scan["labels"] == UNLABELLED).all(dim=0).all(dim=0)
    assert unlabelled.tolist() == [True] * 4 + [False] * 10 + [True] * 4


def test_a_slab_without_labels_is_listed(tmp_path: Path) -> None:
    root = tiny_slabs.write(tmp_path / "slabs")
    broken = sorted(Path(root).glob("*_dseg.nii.gz"))[0]
    broken.write_bytes(b"nothing")
    data = AdultSlabsCohort(str(root), spacing=8.0)
    cohort = data.cohort
    assert [name for name, _ in cohort.excluded] == [broken.name.split("_")[0]]


def test_mice_in_their_own_space_and_in_one(tmp_path: Path) -> None:
    domain = Domain.of((8, 9, 10), torch.eye(4))
    for number in (1, 2):
        values = torch.rand(8, 9, 10)
        for folder, volume in (("template", values), ("mask", values > 0.1), ("label", (values * 5).short())):
            write_image(tmp_path / folder / f"brain_{number}.nii.gz", volume, domain)
    cohort = MouseCohort(str(tmp_path), test=["mouse-2"]).cohort
    assert cohort.names("train") == ("mouse-1",) and cohort.conditions == () and set(cohort.label_names) == {1, 2, 3, 4}
    assert cohort.scan("mouse-2").domain.same_grid(domain)
    starts = tmp_path / "starts"
    starts.mkdir()
    (starts / "mouse-1_to_mouse-2.txt").write_text("1 0 0 2\n0 1 0 0\n0 0 2 0\n0 0 0 1\n")
    moved = MouseCohort(str(tmp_path), str(starts)).cohort
    assert moved.scan("mouse-1").domain.same_grid(domain)
    matrix = moved.scan("mouse-2").domain.voxel_to_world
    assert matrix[0, 3] == -2 and matrix[2, 2] == 0.5, "voxels lie where the start says that they come from"
    with pytest.raises(UserError, match=r"expected one .nii.gz file a brain"):
        MouseCohort(str(tmp_path / "none")).prepare_data()
