"""The HTML report: complete in itself, well-formed, escaped, and its pictures the right way round."""

import base64
import io as bytes_io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from torch import Tensor

import medinr
from medinr import cli, figures, io
from medinr.commands.presets import PRESETS, Preset
from medinr.commands.quiet import noted
from medinr.errors import RegistrationWarning
from medinr.figures.maps import SQUARES, checkerboard
from medinr.figures.page import doubts, slices_of, start_in_words
from medinr.methods import Refinement
from medinr.space import Domain, Image, transform_points
from tests.medinr import grids, pairs

METRICS = {
    "tre/initial_mean": 7.5, "tre/mean": 1.25, "tre/p95": 2.0, "folding/percent": 0.0, "folding/det_min": 0.5,
    "folding/det_max": 1.5, "image/rms_before": 9.0, "image/rms": 4.0,
}  # fmt: skip
VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """Tags that are closed in their order, the images, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str]] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(k, v or "") for k, v in attrs]
        if tag == "img":
            self.images.append({k: v or "" for k, v in attrs})
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def shown(self, image: str) -> list[np.ndarray]:
        """The cuts of the fixed or moving image that are seen first, one a plane."""
        return [pixels(i["src"]) for i in self.images if i.get("data-image") == image and i["class"]]


def pixels(source: str) -> np.ndarray:
    head, data = source.split(",", 1)
    assert head == "data:image/png;base64"
    return np.asarray(Picture.open(bytes_io.BytesIO(base64.b64decode(data))))


def page_of(domain: Domain, fixed: Tensor, title: str = "case", **more: object) -> Page:
    u = torch.zeros(*domain.shape, 3)
    scene = figures.scene_of(
        fixed, fixed.flip(0), fixed, torch.ones(domain.shape), u, domain, None, more.pop("u", None)
    )  # type: ignore[arg-type]
    return Page(figures.report_page(scene, METRICS, torch.eye(4), title, **more))  # type: ignore[arg-type]


def test_page_is_complete_in_itself_and_escapes_what_others_named() -> None:
    domain = grids.domain("identity")
    evil = "<script>alert('x')</script> & $title"
    page = page_of(domain, torch.rand(domain.shape), evil, settings={evil: evil, "n": 3}, warnings=[evil])
    assert page.text.count(evil) == 5, "heading, title, warning, key and value: as words"
    for name, value in page.attributes:
        assert name not in ("href", "srcset") and not name.startswith("on")
        assert name != "src" or value.startswith("data:image/png;base64,")
    assert "TRE, mean 7.5 1.25 mm" in page.text and "identity" in page.text
    template = (Path(figures.__file__).parent / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|fetch|XMLHttp", template)
    figures_of_page = [i for i in page.images if i.get("class") == "figure"]
    assert len(figures_of_page) == 2 and all(pixels(i["src"]).ndim == 3 for i in figures_of_page)


@pytest.mark.parametrize("kind", grids.ALL)
def test_the_cuts_show_the_patient_the_right_way_round(kind: str) -> None:
    domain = grids.domain(kind)
    world = transform_points(domain.voxel_to_world, domain.voxels().double()).reshape(*domain.shape, 3).float()
    for axis, planes in ((0, (0, 1)), (1, (0, 2)), (2, (1, 2))):  # R, A, S and the planes in which one sees them
        seen = page_of(domain, world[..., axis]).shown("fixed")
        assert len(seen) == 3
        for plane in planes:
            picture = seen[plane].astype(float)
            down, across = np.gradient(picture.mean(1)).mean(), np.gradient(picture.mean(0)).mean()
            if axis == 0:  # brighter to the patient's right, at the left
                right = across < 0 < abs(across) - abs(down)
            elif axis == 1:  # brighter to the front: up in axial planes, left in sagittal ones
                right = down < 0 if plane == 0 else across < 0
            else:
                right = down < 0
            assert right, (axis, plane)


def test_before_and_after_are_what_they_are_called() -> None:
    domain = grids.domain("identity")
    fixed = torch.linspace(0, 1, domain.shape[0])[:, None, None].expand(domain.shape).contiguous()
    page = page_of(domain, fixed)
    [one, *_], [other, *_] = page.shown("fixed"), page.shown("after")
    assert np.array_equal(one, other)
    hidden = [pixels(i["src"]) for i in page.images if i.get("data-image") == "before"]
    assert any(np.abs(h.astype(int) - one[:, ::-1].astype(int)).max() <= 1 for h in hidden if h.shape == one.shape)


def test_checkerboard() -> None:
    board = checkerboard(np.zeros((32, 16)), np.ones((32, 16)), (1.0, 1.0))
    edge = 32 // SQUARES
    assert board[:edge, :edge].max() == 0 and board[edge : 2 * edge, :edge].min() == 1
    assert board[:edge, edge : 2 * edge].min() == 1 and board.mean() == 0.5
    thick = checkerboard(np.zeros((32, 8)), np.ones((32, 8)), (1.0, 4.0))
    assert (thick[0] == [0, 1] * 4).all(), "squares in mm, not in voxels"


def test_slices_hold_the_centre() -> None:
    domain = Domain.of((40, 12, 5), np.eye(4))
    mask = torch.zeros(domain.shape, dtype=torch.bool)
    mask[25:39, 2:6, 1:4] = True
    u = torch.zeros(*domain.shape, 3)
    image = torch.rand(domain.shape)
    scene = figures.scene_of(image, image, image, torch.ones(domain.shape), u, domain, mask)
    for plane in scene.planes:
        at = slices_of(scene, plane)
        assert scene.centre[plane.normal] in at and 1 < len(at) <= 9 and sorted(set(at)) == at
        part = scene.box[plane.normal]
        assert part.start <= at[0] and at[-1] < part.stop


def test_an_uncertainty_has_its_panel_and_its_line() -> None:
    domain = grids.domain("identity")
    u = torch.zeros(*domain.shape, 3)
    image = torch.rand(domain.shape)
    uncertain = torch.full(domain.shape, 2.0)
    uncertain[:9] = 0
    scenes = [
        figures.scene_of(image, image, image, torch.ones(domain.shape), u, domain, None, x) for x in (None, uncertain)
    ]
    without, drawn = (figures.deformation_figure(s) for s in scenes)
    assert [ax.get_title() for ax in drawn.axes[:4]] == ["deformed grid", "det J", "displacement", "uncertainty"]
    assert len(drawn.axes) == len(without.axes) + 4, "three planes and a colour bar"
    assert drawn.axes[3].images[0].get_clim() == (0, pytest.approx(2))
    assert drawn.axes[-1].get_xlabel() == "uncertainty, mm"
    assert "not" not in " ".join(doubts({"tre/mean": 1, "uncertainty/trusted": 1.0}))
    assert "uncertainty is above" in doubts({"tre/mean": 1, "uncertainty/trusted": 0.0})[0]


def test_doubts() -> None:
    assert doubts(METRICS) == []
    assert "fold" in doubts({**METRICS, "folding/percent": 0.1})[0]
    assert "do not use" in doubts({**METRICS, "tre/mean": 8.0})[0]
    assert "do not use" in doubts({"dsc/initial_mean": 0.8, "dsc/mean": 0.7})[0]
    assert "nothing here measures the error" in doubts({"image/rms": 1.0})[0]


def test_start_in_words() -> None:
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:2, :2] = 1.1 * torch.tensor([[0.0, -1], [1, 0]])
    matrix[:3, 3] = torch.tensor([3.0, 4, 0])
    said = start_in_words(matrix)
    assert "90.0 degrees" in said and "1.000 to 1.100" in said and "5.0 mm" in said


def test_warnings_are_noted_and_still_shown() -> None:
    import warnings

    with pytest.warns(RegistrationWarning, match="lungs"), noted() as said:
        warnings.warn("no lungs", RegistrationWarning, stacklevel=1)
    assert said == ["no lungs"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "fast", Preset((16,), 64, 2, Refinement((4.0,), (2,))))


def test_register_writes_it_with_the_other_files(tiny: None, tmp_path: Path) -> None:
    pair = pairs.pair()
    for side, image in (("fixed", pair.fixed), ("moving", pair.moving)):
        io.write_image(tmp_path / f"{side}.nii.gz", image.data[0], image.domain)
    out = tmp_path / "out"
    files = [str(tmp_path / f"{side}.nii.gz") for side in ("fixed", "moving")]
    call = ["register", *files, "--out", str(out), "--preset", "fast", "--init", "none"]
    assert cli.main([*call, "--report"]) == 0
    listed = json.loads((out / "files.json").read_text(encoding="utf-8"))["files"]
    assert "report.html" in listed
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert "nothing here measures the error" in page.text and "RefinedRegistration" in page.text
    assert files[0] in page.text and "seed 0" in page.text
    assert cli.main(call) == 0 and not (out / "report.html").exists(), "a stale report goes"


def test_single_slice(tiny: None, tmp_path: Path) -> None:
    domain = Domain.of((48, 40, 1), np.diag([1.0, 1, 5, 1]))
    world = transform_points(domain.voxel_to_world, domain.voxels().double())
    images = [
        torch.exp(-((world - torch.tensor([c, 20.0, 0])).norm(dim=1) / 8).square()).reshape(domain.shape).float()
        for c in (24.0, 26.0)
    ]
    fixed, moving = (Image(v[None], domain) for v in images)
    medinr.register(fixed, moving, tmp_path / "out", preset="fast", init="none", report=True)
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert len(page.shown("fixed")) == 1 and page.shown("fixed")[0].shape == (40, 48)
    assert "axial" in page.text and "coronal" not in page.text
