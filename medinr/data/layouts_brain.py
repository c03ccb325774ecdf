"""File names and label values of the brain cohorts (dHCP, UK Biobank), once for readers and phantom writers alike."""

from collections.abc import Mapping
from pathlib import Path

# ------------------------------------------------------------------------------------------------------------ dHCP

DHCP_PIPELINE = Path("derivatives") / "dhcp_anat_pipeline"
DHCP_ROOTS = (DHCP_PIPELINE, Path("dhcp_anat_pipeline"), Path("rel3_dhcp_anat_pipeline"), Path("."))
"""Where the subjects' folders may lie under the data root."""
DHCP_PARTICIPANTS = "participants.tsv"
DRAWEM9: Mapping[int, str] = {
    1: "csf", 2: "cortical_grey_matter", 3: "white_matter", 4: "background", 5: "ventricles", 6: "cerebellum",
    7: "deep_grey_matter", 8: "brainstem", 9: "hippocampi_and_amygdala",
}  # fmt: skip
DHCP_ENDINGS: Mapping[str, tuple[str, ...]] = {
    "T2w": ("desc-restore_T2w", "desc-restore_space-T2w_T2w", "T2w"),
    "T1w": ("desc-restore_space-T2w_T1w", "desc-restore_T1w"),
    "labels": ("desc-drawem9_dseg", "desc-drawem9_space-T2w_dseg"),
    "mask": ("desc-brain_mask", "desc-bet_space-T2w_brainmask"),
}
"""What a file name ends in, the first that is there counts. A raw T1w is on a grid of its own, and not listed."""
DHCP_WRITTEN: Mapping[str, Mapping[str, str]] = {
    "third": {
        "T2w": "T2w", "T1w": "T1w", "restored_T2w": "desc-restore_T2w", "restored_T1w": "desc-restore_T1w",
        "labels": "desc-drawem9_dseg", "mask": "desc-brain_mask",
    },
    "second": {
        "T2w": "T2w", "T1w": "T1w", "restored_T2w": "desc-restore_T2w", "restored_T1w": "desc-restore_space-T2w_T1w",
        "labels": "desc-drawem9_space-T2w_dseg", "mask": "desc-bet_space-T2w_brainmask",
    },
}  # fmt: skip
"""What each release calls the files that the phantom writes."""


def dhcp_scans(folder: Path) -> list[tuple[str, str]]:
    """Subject and session, without prefixes, of every ``sub-*/ses-*/anat`` under the pipeline's folder."""
    found = sorted(anat.parent for anat in folder.glob("sub-*/ses-*/anat") if anat.is_dir())
    return [(ses.parent.name.removeprefix("sub-"), ses.name.removeprefix("ses-")) for ses in found]


def dhcp_file(folder: Path, subject: str, session: str, ending: str) -> Path:
    """The path of a file under the pipeline's folder; ``subject`` and ``session`` without their prefixes."""
    name = f"sub-{subject}_ses-{session}"
    return folder / f"sub-{subject}" / f"ses-{session}" / "anat" / f"{name}_{ending}.nii.gz"
