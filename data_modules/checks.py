"""What lies under a folder: every case that a data module recognises there, with what is wrong with it."""

import warnings
from collections.abc import Callable
from pathlib import Path

from data_modules.cohort_checks import cohort_lines
from data_modules.dirlab import DIRLab, dirlab_cases_in
from data_modules.fourdct import FourDCT, phases_in
from medinr.data.base import MedINRDataModule
from medinr.data.layouts import PHASE_PATTERNS
from medinr.data.report import pair_summary
from medinr.errors import RegistrationWarning, UserError


def check_root(path: str | Path) -> list[str]:
    """One line per case under a data root: ``case1: ok: ...``, ``case1: warning: ...`` or ``case1: problem: ...``.

    Recognised are DIR-LAB 4DCT cases (`DIRLab`), folders with one image per breathing phase (`FourDCT`), and the
    cohorts of `data_modules.cohort_checks`; also the table of a cohort, a file.

    Raises:
        UserError: no such folder, or nothing in it that a data module knows.
    """
    root = Path(path)
    if root.is_file():
        return cohort_lines(root)
    if not root.is_dir():
        raise UserError(f"{root}: expected a folder of data, found none; check the path")
    lines = [
        _line(f"case{case}", lambda case=case: DIRLab(root=str(root), case=case))  # type: ignore[misc]
        for case in dirlab_cases_in(root)
    ]
    for pattern in PHASE_PATTERNS:
        phases = phases_in(root, pattern)
        if len(phases) >= 2:
            # The two phases half a cycle apart that are there, as a pair; the others are only counted.
            first = phases[0]
            second = first + 50 if first + 50 in phases else phases[-1]
            name = f"{root.resolve().name}, phases {', '.join(f'T{p:02d}' for p in phases)}"
            lines.append(_line(name, lambda f=first, s=second, p=pattern: FourDCT(str(root), f, s, p)))  # type: ignore[misc]
    lines += cohort_lines(root)
    if not lines:
        raise UserError(
            f"{root}: expected DIR-LAB cases (Case1Pack, ...), a folder with one image per phase (*_T00.nii.gz ...) or "
            "a cohort (dHCP, UK Biobank, fetal CRL), found none of them; name the folder that holds them"
        )
    return lines


def _line(name: str, make: Callable[[], MedINRDataModule]) -> str:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = pair_summary(make().pair)
    except UserError as error:
        return f"{name}: problem: {error}"
    said = [str(w.message) for w in caught if issubclass(w.category, RegistrationWarning)]
    return f"{name}: warning: {' | '.join(said)} ({found})" if said else f"{name}: ok: {found}"
