"""The CRL fetal brain atlas (Gholipour et al. 2017): one T2 template per week, 21 to 37, with masks and regions."""

import re
from collections.abc import Mapping
from pathlib import Path

from medinr.data.cohort import Condition
from medinr.data.cohort_files import Entry
from medinr.data.cohort_module import CohortModule
from medinr.errors import UserError

SIDED = {
    37: "Hippocampus", 41: "Amygdala", 71: "Caudate", 73: "Lentiform", 77: "Thalamus", 92: "Lateral_Ventricle",
    100: "Cerebellum", 108: "Subthalamic_Nuc", 112: "Cortical_Plate", 114: "Subplate", 116: "Inter_Zone",
    118: "Vent_Zone", 120: "White_Matter", 122: "Internal_Capsule",
}  # fmt: skip
"""Left; the right one has the next value."""
MIDLINE = {91: "CorpusCallosum", 94: "Brainstem", 110: "Hippocampal_Comm", 111: "Fornix", 124: "CSF", 125: "Misc"}
REGIONS = dict(sorted({**MIDLINE, **{v + s: f"{name}_{'LR'[s]}" for v, name in SIDED.items() for s in (0, 1)}}.items()))
"""Label values of ``_WMZparc``, as in the atlas's own key."""
TEMPLATE = re.compile(r"STA(\d{2})\.nii(\.gz)?")


class FetalCRL(CohortModule):
    """One template a week, the week as condition; region labels where the folder has them (weeks 21 to 30).

    The templates are averages, rigidly aligned already. Non-commercial research only: see the licence in the folder,
    and cite Gholipour et al., Scientific Reports 2017.

    Args:
        root: folder of ``STA21.nii.gz`` ..., ``STA21_mask.nii.gz`` ... and ``STA21_WMZparc.nii.gz`` ...
        weeks: those to use; None: all that are there.
        val, test: ``sta23`` ..., or a share.
        spacing: mm of the working grid; None: 0.8 mm, as they are.
        margin_mm: crop to the brain mask and this margin; None: whole images.
    """

    def __init__(
        self,
        root: str,
        weeks: list[int] | None = None,
        val: list[str] | float = 0.0,
        test: list[str] | float = 0.0,
        spacing: float | list[float] | None = None,
        margin_mm: float | None = None,
        seed: int = 0,
        steps_per_epoch: int = 100,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__("fetal_crl", ["T2w"], val, test, spacing, margin_mm, seed, steps_per_epoch, cache_dir)
        self.root, self.weeks = root, weeks

    def label_names(self) -> Mapping[int, str]:
        return REGIONS

    def listed(self) -> tuple[list[Entry], list[Condition]]:
        root = Path(self.root)
        found = {int(m[1]): file for file in sorted(root.glob("STA*")) if (m := TEMPLATE.fullmatch(file.name))}
        if not found:
            raise UserError(f"{root}: expected templates STA21.nii.gz ..., found none; check data.root")
        if missing := sorted(set(self.weeks or ()) - set(found)):
            have = ", ".join(map(str, sorted(found)))
            raise UserError(f"data.weeks: expected some of {have}; found {missing[0]}; correct it")
        entries = []
        for week, file in found.items():
            if self.weeks is None or week in self.weeks:
                end = file.name.removeprefix(f"STA{week}")
                labels, mask = (file.with_name(f"STA{week}_{what}{end}") for what in ("WMZparc", "mask"))
                entries.append(
                    Entry(
                        f"sta{week}", f"sta{week}", {"T2w": file}, labels if labels.exists() else None,
                        mask if mask.exists() else None, {"week": float(week)},
                    )
                )  # fmt: skip
        return entries, [Condition("week", "continuous")]
