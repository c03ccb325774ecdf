"""File names and label values of the brain cohorts (dHCP, UK Biobank), once for readers and phantom writers alike."""

from collections.abc import Mapping
from pathlib import Path

# ------------------------------------------------------------------------------------------------------------ dHCP

DHCP_PIPELINE = Path("derivatives") / "dhcp_anat_pipeline"
DHCP_ROOTS = (str(DHCP_PIPELINE), "derivatives/*", "*dhcp_anat_pipeline")
"""Where the subjects' folders may lie under the data root, if not in it: patterns, the first with scans counts."""
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


def dhcp_folder(root: Path | str) -> Path | None:
    """The folder of the subjects under a data root, or None."""
    places = [place for pattern in DHCP_ROOTS for place in sorted(Path(root).glob(pattern))]
    return next((place for place in [*places, Path(root)] if dhcp_scans(place)), None)


def dhcp_file(folder: Path, subject: str, session: str, ending: str) -> Path:
    """The path of a file under the pipeline's folder; ``subject`` and ``session`` without their prefixes."""
    name = f"sub-{subject}_ses-{session}"
    return folder / f"sub-{subject}" / f"ses-{session}" / "anat" / f"{name}_{ending}.nii.gz"


# ------------------------------------------------------------------------------------------------------ UK Biobank

UKB_SCAN = "{eid}_20252_{visit}_0"
"""Name of a subject's archive (.zip), or of the folder where it was unpacked."""
UKB_T1 = "T1/T1.nii.gz"
UKB_MASK = "T1/T1_brain_mask.nii.gz"
UKB_MNI = "T1/T1_brain_to_MNI.nii.gz"
UKB_LINEAR = "T1/transforms/T1_to_MNI_linear.mat"
UKB_FAST = "T1/T1_fast/T1_brain_seg.nii.gz"
UKB_PVE = "T1/T1_fast/T1_brain_pve_{tissue}.nii.gz"
UKB_FIRST = "T1/T1_first/T1_first_all_fast_firstseg.nii.gz"
UKB_KEYS = ("eid", "f.eid")
UKB_AGE, UKB_SEX, UKB_VENTRICLES_NORMALISED, UKB_VENTRICLES = 21003, 31, 25003, 25004
"""Fields: years at the visit, 0 female or 1 male, ventricular CSF in mm3 (normalised for the head's size, and not)."""
FAST: Mapping[int, str] = {1: "csf", 2: "grey_matter", 3: "white_matter"}
FIRST: Mapping[int, str] = {
    10: "thalamus_left", 11: "caudate_left", 12: "putamen_left", 13: "pallidum_left", 16: "brainstem",
    17: "hippocampus_left", 18: "amygdala_left", 26: "accumbens_left", 49: "thalamus_right", 50: "caudate_right",
    51: "putamen_right", 52: "pallidum_right", 53: "hippocampus_right", 54: "amygdala_right", 58: "accumbens_right",
}  # fmt: skip
MNI_SHAPE, MNI_CORNER = (182, 218, 182), (90.5, -126.5, -72.5)
"""Voxels of MNI152 at 1 mm, and its first outer corner, RAS mm; x runs to the left, as FSL writes it."""


def ukb_columns(field: int, visit: int) -> tuple[str, ...]:
    """Names that a field has in CSV and in R exports at a visit, then at the first visit (sex is asked only there)."""
    return tuple(
        name for v in dict.fromkeys((visit, 0)) for name in (f"{field}-{v}.0", f"f.{field}.{v}.0", f"p{field}_i{v}")
    )
