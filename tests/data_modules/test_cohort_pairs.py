"""Cohorts of pairs: who is in which split, the common grid, pairs as on disk."""

from pathlib import Path

import pytest
import torch

from data_modules.cohort_pairs import CohortPairs, Subject
from data_modules.mouse import MouseBrains
from data_modules.slabs import REPEATS, TEST, VAL, AdultSlabs
from medinr import io
from medinr.errors import UserError
from medinr.space import Domain, transform_points
from tests.data_modules import tiny_slabs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_slabs.write(tmp_path_factory.mktemp("slabs"))


def cohort(folder: Path) -> AdultSlabs:
    return AdultSlabs(str(folder), spacing=[2.0, 2.0, 2.0], steps_per_epoch=3, val_pairs=2, test_pairs=2)


def test_no_person_is_in_two_splits() -> None:
    numbers = {n: group[0] for group in REPEATS for n in group}
    split = {n: "val" if n in VAL else "test" if n in TEST else "train" for n in range(1, 41)}
    for n, person in numbers.items():
        assert split[n] == split[person], f"scan {n} is of the same person as {person}"
    assert [list(split.values()).count(s) for s in ("train", "val", "test")] == [28, 6, 6]


def test_pairs_are_of_different_persons_and_of_one_split(folder: Path) -> None:
    data = cohort(folder)
    train = data.of("train")
    assert [s.name for s in train] == ["sub-01", "sub-02", "sub-03"]
    assert data.ordered_pairs("train") == [(0, 2), (1, 2), (2, 0), (2, 1)], "1 and 2 are one person"
    assert len(data.ordered_pairs("test", 2)) == 2
    assert data.check()[0] == "train: 3 scans of 2 persons, 4 ordered pairs"


def test_loaders_give_windowed_pairs_on_the_common_grid(folder: Path) -> None:
    data = cohort(folder)
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    for batch in (*batches, *data.val_dataloader()):
        assert batch["fixed"].shape == batch["moving"].shape == (1, 1, *data.grid.shape)
        assert batch["fixed_labels"].shape == (1, *data.grid.shape)
        assert 0 <= batch["fixed"].min() < 0.05 and 0.95 < batch["fixed"].max() <= 1
        assert not torch.equal(batch["fixed"], batch["moving"])
        bright, labels = batch["fixed"][0, 0] > 0.5, batch["fixed_labels"][0] > 0
        assert 2 * (bright & labels).sum() > 0.8 * (bright.sum() + labels.sum()), "labels lie where the image is"
    assert len(list(data.test_dataloader())) == 2


def test_a_test_pair_is_as_on_disk(folder: Path) -> None:
    data = cohort(folder)
    pair = data.test_pair(1)
    moving, fixed = pair.name.split("_to_")
    assert torch.equal(pair.fixed.data, io.read_image(folder / f"{fixed}_T1w.nii.gz").data)
    assert torch.equal(pair.moving.data, io.read_image(folder / f"{moving}_T1w.nii.gz").data)
    assert pair.fixed_labels is not None and pair.moving_labels is not None
    assert data.pair.name == data.test_pair(0).name != pair.name


class Moved(CohortPairs):
    """The same scan at two places: the starts say where."""

    def subjects(self) -> list[Subject]:
        file, labels = (Path(self.root) / f"sub-01_{kind}.nii.gz" for kind in ("T1w", "dseg"))
        away = torch.eye(4, dtype=torch.float64)
        away[0, 3] = 4.0
        splits = ("train", "train", "test", "test")
        return [
            Subject(f"s{k}", f"p{k}", split, file, labels, away if k % 2 else torch.eye(4, dtype=torch.float64))
            for k, split in enumerate(splits)
        ]


def test_starts_bring_the_scans_together(folder: Path) -> None:
    """Start s_k maps the common space to scan k: s_1 reads 4 mm further on, and the pair's start is s_1 s_0^-1."""
    data = Moved(str(folder), [2.0, 2.0, 2.0])
    here, there = data.prepared("train")
    assert torch.allclose(there["image"][:, :-2], here["image"][:, 2:], atol=1e-4)
    assert torch.equal(there["labels"][:-2], here["labels"][2:])
    pair = data.test_pair(0)
    assert pair.start[0, 3] == 4.0
    grid = Domain.of(pair.domain.shape, pair.domain.affine)
    origin = grid.voxel_to_world[None, :3, 3]
    assert torch.allclose(transform_points(pair.start, origin) - origin, torch.tensor([4.0, 0, 0]).double())


class Torn(Moved):
    """One person in two splits."""

    def subjects(self) -> list[Subject]:
        return [Subject(f"s{k}", "same", split, Path("a"), None) for k, split in enumerate(("train", "test"))]


def test_mouse_brains_are_aligned_once_and_lose_their_skulls(folder: Path, tmp_path: Path) -> None:
    """Ellipsoids 4 mm apart, each in a bright block outside its mask; the maps are found, written, and read again."""
    root, starts = tmp_path / "mice", tmp_path / "starts"
    source = io.read_image(folder / "sub-01_T1w.nii.gz")
    for k in range(6):
        affine = source.domain.voxel_to_world.clone()
        affine[0, 3] += 4.0 * (k % 2)
        domain = Domain.of(source.domain.shape, affine)
        inside = source.data[0] > 0
        image = torch.where(inside, source.data[0], torch.tensor(5000.0))
        for name, values in (("template", image), ("mask", inside.short()), ("label", inside.short())):
            (root / name).mkdir(parents=True, exist_ok=True)
            io.write_image(root / name / f"brain_{k}.nii.gz", values, domain)
        if k > 1:  # known already; only the second one is searched for
            starts.mkdir(exist_ok=True)
            text = f"1 0 0 {4 * (k % 2)}\n0 1 0 0\n0 0 1 0\n0 0 0 1\n"
            (starts / f"mouse-1_to_mouse-{k + 1}.txt").write_text(text, encoding="utf-8")
    parts = {"train": [1, 2], "val": [3, 4], "test": [5, 6]}
    data = MouseBrains(str(root), str(starts), **parts, spacing=[2.0, 2.0, 2.0])
    assert [len(data.of(split)) for split in parts] == [2, 2, 2]
    assert data.of("train")[1].start[:3, 3].tolist() == pytest.approx([4.0, 0.0, 0.0], abs=1.0)
    batch = next(iter(data.val_dataloader()))
    assert 0.9 < batch["fixed"].max() <= 1 and batch["fixed"][0, 0, 0, 0, 0] == 0
    written = {f.name: f.stat().st_mtime_ns for f in starts.iterdir()}
    assert len(written) == 5
    again = MouseBrains(str(root), str(starts), **parts).of("train")[1].start
    assert torch.allclose(again, data.of("train")[1].start, atol=1e-6)
    assert {f.name: f.stat().st_mtime_ns for f in starts.iterdir()} == written
    pair = data.test_pair(0)
    assert pair.fixed.data.max() < 2000, "the block outside the mask is gone"
    with pytest.raises(UserError, match=r"data.test: expected numbers from 1 to 6, found 9"):
        MouseBrains(str(root), str(starts), test=[5, 9]).prepare_data()


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"each person in one split, found same in \['test', 'train'\]"):
        Torn(str(folder), [2.0, 2.0, 2.0]).prepare_data()
    with pytest.raises(UserError, match=r"sub-NN_T1w.nii.gz files, found none"):
        AdultSlabs(str(tmp_path)).prepare_data()
    with pytest.raises(UserError, match=r"data.spacing: expected three lengths"):
        AdultSlabs(str(folder), spacing=[1.0, 0.0, 1.0])
    with pytest.raises(UserError, match=r"data.val_pairs: expected 1 or more, found 0"):
        AdultSlabs(str(folder), val_pairs=0)
    (folder / "sub-04_T1w.nii.gz").touch()
    with pytest.raises(UserError, match="sub-04"):
        AdultSlabs(str(folder)).prepare_data()
    (folder / "sub-04_T1w.nii.gz").unlink()
