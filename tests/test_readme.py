"""The README's code blocks run, in their order and in one folder, on a tiny phantom that bears the names they use.

- ``medinr ...``: the real command, in this process; ``SMALLER`` adds the sizes of a test to it.
- ``make X``: X must be a target of the Makefile. ``pip install ".[a]"``: ``a`` must be an extra of pyproject.toml.
- ``wandb sync FILES``: the files must be there.
- Python blocks run as they are.

A line that none of these rules knows fails the test: it would be a line that nobody has tried. A new file name in a
block needs a file of that name in `folder`.
"""

import glob
import re
import shlex
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from data_modules.dirlab import DIRLab
from medinr import cli, io
from medinr.commands.presets import PRESETS, Preset
from medinr.errors import RegistrationWarning
from medinr.methods import Refinement
from medinr.space import transform_points

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

FEW = "--data.steps_per_epoch 2 --model.points 64"
NARROW = "--model.field.hidden [32,32,32]"  # where the line leaves the experiment's network as it is
ATLAS = "--model.decoder.width 16 --model.decoder.code 6 --model.decoder.grids [3,5] --wandb false"
SMALLER = {
    "phantom dirlab": "--size 32 --phases extremes",
    "phantom dhcp": "--size 24",
    "fit": f"--trainer.max_steps 4 {FEW}",
    "adapt": "--steps 10 --points 64 --restarts 1",
    "atlas": "--spacing 8",
    "test": f"{FEW} --wandb false",
    "predict": f"{FEW} --wandb false",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every file that the blocks name: two phases of a tiny breathing thorax, with all that can come with them."""
    out = tmp_path_factory.mktemp("readme")
    (out / "experiments").symlink_to(ROOT / "experiments")
    arguments = ["phantom", "dirlab", "--out", str(out / "data" / "dirlab"), "--cases", "1"]
    assert cli.main([*arguments, *SMALLER["phantom dirlab"].split()]) == 0
    assert cli.main(["phantom", "dhcp", "--out", str(out / "other"), "--subjects", "1", "--size", "24"]) == 0
    [new] = (out / "other").rglob("*_desc-restore_T2w.nii.gz")
    (out / "new_T2w.nii.gz").symlink_to(new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegistrationWarning)  # at this size the lungs are a few voxels
        pair = DIRLab(str(out / "data" / "dirlab"), 1, labels="vessels").pair
    for side in ("fixed", "moving"):
        image, points = getattr(pair, side), getattr(pair, f"{side}_points")
        io.write_image(out / f"{side}.nii.gz", image.data[0], image.domain)
        io.write_image(out / f"{side}_labels.nii.gz", getattr(pair, f"{side}_labels"), image.domain)
        io.write_points(out / f"{side}_points.csv", points)
    io.write_points(out / "points.csv", pair.fixed_points[:3])
    world = transform_points(pair.domain.voxel_to_world, pair.domain.voxels().double())
    near = (world - pair.fixed_points[0]).norm(dim=1) < 15
    io.write_image(out / "lesion.nii.gz", near.reshape(pair.domain.shape), pair.domain)
    return out


def lines_of(block: str) -> list[list[str]]:
    """Commands of a shell block: continued lines joined, comments and prompts off."""
    return [words for line in block.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def run_line(words: list[str], folder: Path) -> None:
    if words[0] == "medinr":
        smaller = SMALLER.get(" ".join(words[1:3]), SMALLER.get(words[1], "")).split()
        if any("cinema" in word for word in words) and words[1] == "fit":
            smaller += ATLAS.split()
        elif FEW in SMALLER.get(words[1], "") and "--model.field" not in words:
            smaller += NARROW.split()
        words = [file for word in words for file in (sorted(glob.glob(word)) if "*" in word else [word])]
        assert cli.main([*words[1:], *smaller]) == 0, shlex.join(words)
    elif words[0] == "make":
        for target in words[1:]:
            assert re.search(rf"^{target}:.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), (
                f"make {target}"
            )
    elif words[:2] == ["pip", "install"]:
        [extras] = re.findall(r"^\.(?:\[([\w,]+)\])?$", words[2])
        known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        assert set(filter(None, extras.split(","))) <= set(known), words
    elif words[:2] == ["wandb", "sync"]:
        assert list(folder.glob(words[2])), words
    else:
        pytest.fail(f"README: no rule says how to try {shlex.join(words)}")


def test_blocks_run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    for preset in PRESETS:
        monkeypatch.setitem(PRESETS, preset, Preset((16, 16), 128, 8, Refinement(steps=(2, 2, 2))))
    before = set(folder.iterdir())
    for language, block in BLOCKS:
        try:
            if language == "bash":
                for words in lines_of(block):
                    run_line(words, folder)
            elif language == "python":
                exec(compile(block, "README.md", "exec"), {})
            else:
                pytest.fail(f"README: a block of {language or 'no language'}: {block}")
        except (Exception, pytest.fail.Exception) as error:
            raise AssertionError(f"{block}\n{capsys.readouterr().err}") from error
    made = {p.name for p in set(folder.iterdir()) - before}
    said = {
        "result",
        "masked",
        "excluded",
        "measured",
        "carried",
        "carried_back",
        "runs",
        "results",
        "tables",
        "atlas",
        "new",
    }
    assert made == said, "each call writes where it says"
    # The table of `register`'s files is what is there.
    table = README[README.index("The folder then holds") :].split("\n\n")[1]
    named = set(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)) | {"displacement.json"}
    assert {str(p.relative_to("result")) for p in Path("result").rglob("*") if p.is_file()} == named
    points = io.read_points("carried/points.csv")
    back = io.read_points("carried_back/points.csv")
    assert points.shape == back.shape and not torch.equal(points, io.read_points("fixed_points.csv"))


def test_there_are_blocks_of_all_languages() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python"}
    commands = {
        words[1] for language, b in BLOCKS if language == "bash" for words in lines_of(b) if words[0] == "medinr"
    }
    assert commands >= {"register", "apply", "fit", "test", "predict", "check", "phantom", "atlas", "adapt"}


def test_options_and_files_in_the_text_exist() -> None:
    from medinr.commands.cohort import make_parser as cohort_parser
    from medinr.commands.register_cli import register_parser

    known = set(re.findall(r"--[\w-]+", register_parser().format_help()))
    for option in re.findall(r"`(--[\w-]+)", README[README.index("## Register") : README.index("## Carry")]):
        assert option in known, option
    known |= set(re.findall(r"--[\w-]+", cohort_parser().format_help()))
    known |= {"--trainer", "--checkpoint_steps", "--ckpt_path"}  # of `fit`, where blocks and tests use them
    for option in re.findall(r"`(--[\w-]+)", README[README.index("## What else") : README.index("## Add")]):
        assert option in known, option
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"`((?:medinr|tests|experiments)/[\w/]+\.\w+)`", README):
        assert (ROOT / name).exists() or "mymethod" in name, name
    table = README[README.index("| experiment |") :].split("\n\n")[0]
    names = [n for row in table.splitlines()[2:] for n in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert len(names) > 10
    for name in names:
        assert (ROOT / "experiments" / f"{name}.yaml").exists(), name


def test_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 180


# -- CITATION.cff and CHANGELOG.md ------------------------------------------------------------------------------------

# The keys of the Citation File Format 1.2.0 that may stand in the file, in a reference and with a person or an entity.
TOP = """
abstract authors cff-version commit contact date-released doi identifiers keywords license license-url message
preferred-citation references repository repository-artifact repository-code title type url version
"""
REFERENCE = """
abbreviation abstract authors collection-doi collection-title conference date-published date-released doi editors end
identifiers issn issue issue-title journal keywords license loc-end loc-start month notes pages pmcid publisher
repository-code scope start status title type url volume year
"""
PERSON = {"given-names", "family-names", "name-particle", "name-suffix", "alias", "affiliation", "orcid", "email"}
ENTITY = {"name", "address", "city", "country", "date-start", "date-end", "email", "location", "website", "alias"}
KINDS = {"article", "conference-paper", "software", "book", "thesis", "data", "report"}


def test_citation_is_valid() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"authors", "cff-version", "message", "title"} <= set(found) <= set(TOP.split())
    assert found["cff-version"] == "1.2.0" and found["type"] == "software"
    assert (found["title"], found["version"], found["license"]) == ("medinr", project["version"], project["license"])
    for entry in (found, *found["references"]):
        assert entry["authors"]
        for author in entry["authors"]:
            assert set(author) <= PERSON or set(author) <= ENTITY, author
    for reference in found["references"]:
        assert {"authors", "title", "type"} <= set(reference) <= set(REFERENCE.split()), reference["title"]
        assert reference["type"] in KINDS and isinstance(reference["year"], int)
        assert set(reference.get("conference", {"name": ""})) <= ENTITY
        for identifier in reference.get("identifiers", []):
            assert set(identifier) <= {"type", "value", "description"}
            assert identifier["type"] in {"doi", "url", "swh", "other"}
    notes = " ".join(r["notes"] for r in found["references"])
    assert "IDIR" in notes and "cIDIR" in notes
    for name in re.findall(r"experiments/\w+\.yaml", notes):
        assert (ROOT / name).exists()


def test_changelog_has_the_usual_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert text.startswith("# Changelog\n") and "keepachangelog.com" in text
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    for version in versions[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", version), version
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds
