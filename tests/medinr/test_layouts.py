"""medinr.data.layouts: the facts of DIR-LAB 4DCT, candidate paths, geometry overrides."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medinr.data import layouts
from medinr.errors import UserError


def test_published_facts() -> None:
    cases = layouts.DIRLAB_CASES
    assert [cases[n].shape[2] for n in range(1, 11)] == [94, 112, 104, 99, 106, 128, 136, 128, 128, 120]
    assert [cases[n].shape[0] for n in (1, 5, 6, 10)] == [256, 256, 512, 512]
    assert [cases[n].spacing[0] for n in range(1, 7)] == [0.97, 1.16, 1.15, 1.13, 1.10, 0.97]
    assert {facts.spacing[2] for facts in cases.values()} == {2.5}
    assert np.isclose(np.mean([facts.mean_motion for facts in cases.values()]), 8.461)
    assert layouts.DIRLAB_PHASES[0] == "T00" and layouts.DIRLAB_PHASES[9] == "T90"


@pytest.mark.parametrize(
    ("case", "first"),
    [
        (1, "Case1Pack/Images/case1_T50_s.img"),
        (3, "Case3Pack/Images/case3_T50-ssm.img"),
        (7, "Case7Pack/Images/case7_T50.img"),
        (8, "Case8Deploy/Images/case8_T50.img"),
    ],
)
def test_original_image_name_comes_first(case: int, first: str) -> None:
    candidates = layouts.dirlab_image_candidates("root", case, "T50")
    assert candidates[0] == Path("root") / first
    assert len(set(candidates)) == len(candidates)
    # Copies renamed to _s throughout.
    assert candidates[0].with_name(f"case{case}_T50_s.img") in candidates


@pytest.mark.parametrize(
    ("case", "path"),
    [
        (1, "Case1Pack/ExtremePhases/Case1_300_T00_xyz.txt"),
        (6, "Case6Pack/ExtremePhases/case6_dirLab300_T00_xyz.txt"),
        (8, "Case8Deploy/extremePhases/case8_dirLab300_T00_xyz.txt"),
        (10, "Case10Pack/extremePhases/case10_dirLab300_T00_xyz.txt"),
    ],
)
def test_every_spelling_of_landmarks_is_found(tmp_path: Path, case: int, path: str) -> None:
    candidates = layouts.dirlab_extreme_landmark_candidates(tmp_path, case, "T00")
    assert layouts.first_existing(candidates) is None
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text("1\t2\t3\n")
    assert layouts.first_existing(candidates) == tmp_path / path


def test_sampled_landmarks() -> None:
    candidates = layouts.dirlab_sampled_landmark_candidates("r", 2, "T30")
    assert candidates[0] == Path("r/Case2Pack/Sampled4D/case2_4D-75_T30.txt")


def test_affine_is_lps_identity() -> None:
    affine = layouts.dirlab_affine((0.97, 0.97, 2.5))
    assert np.allclose(affine @ [10, 20, 30, 1], [-9.7, -19.4, 75.0, 1.0])


def test_unknown_case() -> None:
    with pytest.raises(UserError, match="from 1 to 10"):
        layouts.dirlab_case(11)


def test_geometry_overrides_and_extends(tmp_path: Path) -> None:
    assert layouts.dirlab_geometry(tmp_path, 2) == layouts.DIRLAB_CASES[2]
    small = replace(layouts.DIRLAB_CASES[2], shape=(32, 32, 30), spacing=(9.0, 9.0, 9.5))
    layouts.write_geometry(tmp_path, [small])
    other = replace(layouts.DIRLAB_CASES[1], shape=(64, 64, 60))
    layouts.write_geometry(tmp_path, [other])
    assert layouts.dirlab_geometry(tmp_path, 2) == small
    assert layouts.dirlab_geometry(tmp_path, 1) == other
    assert layouts.dirlab_geometry(tmp_path, 3) == layouts.DIRLAB_CASES[3]
    (tmp_path / "geometry.json").write_text('{"case4": {"spacing": [2, 2, 2.5]}}')
    assert layouts.dirlab_geometry(tmp_path, 4).shape == layouts.DIRLAB_CASES[4].shape


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "expected JSON"),
        ("[1]", "found a list"),
        ('{"case77": {}}', "case77"),
        ('{"case1": {"size": 3}}', "'size'"),
        ('{"case1": {"shape": [1, 2]}}', "shape: expected three"),
        ('{"case1": {"shape": [1, 2, 2.5]}}', "shape: expected three"),
        ('{"case1": {"shape": [true, 2, 3]}}', "shape: expected three"),
        ('{"case1": {"spacing": [1, -1, 2]}}', "spacing: expected three"),
        ('{"case1": {"spacing": [1, NaN, 2]}}', "spacing: expected three"),
        ('{"case1": {"spacing": "wide"}}', "spacing: expected three"),
    ],
)
def test_malformed_geometry_is_one_line(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / "geometry.json").write_text(content)
    with pytest.raises(UserError, match=match) as caught:
        layouts.read_geometry(tmp_path)
    assert "\n" not in str(caught.value) and "geometry.json" in str(caught.value)


def test_geometry_file_is_plain_json(tmp_path: Path) -> None:
    layouts.write_geometry(tmp_path, [layouts.DIRLAB_CASES[1]])
    assert json.loads((tmp_path / "geometry.json").read_text(encoding="utf-8")) == {
        "case1": {"shape": [256, 256, 94], "spacing": [0.97, 0.97, 2.5]}
    }
