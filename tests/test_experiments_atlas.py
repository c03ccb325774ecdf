"""The experiments that fit an atlas run through the real commands, on tiny cohorts: fit, atlas, adapt."""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medinr import cli, io
from medinr.callbacks import runs
from medinr.methods import ConditionalAtlas, load_method
from medinr.phantoms.perinatal_cohort import write_dhcp_phantom
from tests.medinr import tiny_atlas

ROOT = Path(__file__).resolve().parents[1]
ATLASES = sorted(
    p for p in (ROOT / "experiments").glob("*.yaml") if p.stem.split("_")[1] in ("dhcp", "crl") and p.stem[:2] == "ci"
)
SMALL = ["--model.decoder.width", "16", "--model.decoder.code", "6", "--model.points", "64"]
SMALL += ["--trainer.max_steps", "4", "--data.steps_per_epoch", "2"]


def write(layout: str, root: Path) -> None:
    if layout == "dhcp":
        write_dhcp_phantom(root, 4, 24)
        return
    for week in (28, 29, 30):
        scan = tiny_atlas.scan(0, float(week))
        assert scan.labels is not None and scan.mask is not None
        labels = 112 * scan.labels.clamp(max=1)
        for end, volume in (("", scan.images["T2w"]), ("_mask", scan.mask), ("_WMZparc", labels)):
            io.write_image(root / f"STA{week}{end}.nii.gz", volume, scan.domain)


def test_there_are_four() -> None:
    assert [p.stem for p in ATLASES] == ["cina_dhcp", "cinema_crl", "cinema_dhcp", "cinema_dhcp_best"]


@pytest.mark.parametrize("path", ATLASES, ids=lambda path: path.stem)
def test_experiment_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = path.stem.split("_")[1]
    write(layout, tmp_path / "data" / layout)
    monkeypatch.chdir(tmp_path)
    common = ["--config", str(path), "--wandb", "false", "--data.root", f"data/{layout}", *SMALL]
    if layout == "crl":
        common += ["--data.spacing", "4", "--data.test", "[sta29]"]
    if path.stem in ("cinema_crl", "cinema_dhcp_best"):
        common += ["--model.decoder.grids", "[3, 5]"]

    def call(*words: str) -> None:
        assert cli.main(list(words)) == 0, capsys.readouterr().err

    call("fit", *common)
    [run] = runs.runs_of(tmp_path / "runs", path.stem)
    assert runs.is_finished(run)
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        assert "image/psnr" in next(csv.reader(file))
    method = load_method(run / runs.LAST)
    assert isinstance(method, ConditionalAtlas)
    if path.stem == "cina_dhcp":
        assert method.codes[0].shape[1:] == (1, 1, 1)
    if layout == "crl":
        call("test", *common)
        with (run / "results" / "cases.csv").open(encoding="utf-8") as file:
            [row] = csv.DictReader(file)
        assert row["case"] == "sta29" and float(row["dsc/mean"]) >= 0 and float(row["week/error"]) >= 0
        means = json.loads((run / "results" / "metrics.json").read_text(encoding="utf-8"))
        assert means["image/psnr"] == pytest.approx(float(row["image/psnr"])) and means["case"] == "mean of 1"
        assert cli.main(["predict", *common]) == 2 and "medinr atlas CKPT" in capsys.readouterr().err
        look_at_atlas_and_adapt(run / runs.LAST, tmp_path, capsys)


def look_at_atlas_and_adapt(checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands on a checkpoint of the weekly templates."""
    out = folder / "atlas"
    assert cli.main(["atlas", str(checkpoint), "--ages", "28:30:1", "--spacing", "8", "--out", str(out)]) == 0
    names = {p.name for p in out.iterdir()}
    assert {"montage.png", "labels.png", "animation.gif", "volumes.csv", "volumes.png", "atlas.json"} <= names
    assert {"T2w_t28.nii.gz", "labels_t29.nii.gz", "probabilities_t30.nii.gz", "T2w_4d.nii.gz"} <= names
    assert nib.load(out / "T2w_4d.nii.gz").shape[3] == 3  # type: ignore[attr-defined]
    shares = nib.load(out / "probabilities_t29.nii.gz").get_fdata()  # type: ignore[attr-defined]
    assert np.allclose(shares.sum(-1), 1, atol=0.15), "rounded to 1/255 each"
    known = json.loads((out / "atlas.json").read_text(encoding="utf-8"))
    assert known["ages"] == [28, 29, 30] and known["scans"] == 2 and known["label_names"]["112"] == "Cortical_Plate_L"

    data, adapted = folder / "data" / "crl", folder / "adapted"
    words = ["adapt", str(checkpoint), "--image", f"T2w={data / 'STA29.nii.gz'}", "--steps", "10", "--points", "64"]
    words += ["--labels", str(data / "STA29_WMZparc.nii.gz"), "--restarts", "2", "--add", "--name", "sta29"]
    assert cli.main([*words, "--out", str(adapted)]) == 0, capsys.readouterr().err
    names = {p.name for p in adapted.iterdir()}
    assert {"T2w.nii.gz", "labels.nii.gz", "adapted.png", "adapted.json", "latent.npz", "atlas.ckpt"} <= names
    found = json.loads((adapted / "adapted.json").read_text(encoding="utf-8"))
    assert 26 < found["conditions"]["week"] < 32 and found["spread"]["week"] >= 0 and len(found["nearest"]) == 2
    assert "dice/mean" in found and "psnr/T2w" in found
    grown = load_method(adapted / "atlas.ckpt")
    assert isinstance(grown, ConditionalAtlas) and grown.names == ["sta28", "sta30", "sta29"]
    capsys.readouterr()
    for words, line in (
        (["atlas", str(checkpoint), "--ages", "x", "--out", str(out)], "--ages: expected FIRST:LAST:STEP"),
        (["atlas", str(checkpoint), "--ages", "28", "--out", str(out), "--spacing", "0"], "--spacing: expected"),
        (["atlas", str(checkpoint), "--ages", "28", "--out", str(out), "--condition", "wek=3"], "did you mean week"),
        (["atlas", str(checkpoint), "--ages", "28", "--out", str(out), "--condition", "week"], "NAME=VALUE"),
        (["adapt", str(checkpoint), "--image", "T1w=x.nii.gz", "--out", str(out)], "expected MODALITY=FILE of T2w"),
        (["adapt", str(checkpoint), "--image", "T2w=x.nii.gz", "--out", str(out)], "x.nii.gz: expected a file"),
        (["adapt", str(data / "STA29.nii.gz"), "--image", "T2w=x.nii.gz", "--out", str(out)], "not a readable"),
    ):
        assert cli.main(words) == 2
        err = capsys.readouterr().err
        assert line in err and len(err.splitlines()) == 1, err
