"""From listed files to a `Cohort`: everything is read once, and what does not fit is left out with its reason."""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from medinr.data.cohort import SPLITS, Cohort, Condition
from medinr.data.cohort_files import Entry, ReadScan, ScanStore
from medinr.errors import UserError


def build_cohort(
    name: str,
    entries: Sequence[Entry],
    modalities: Sequence[str],
    conditions: Sequence[Condition],
    label_names: Mapping[int, str] | None,
    reader: ReadScan,
    split: Callable[[Sequence[Entry]], Mapping[str, Sequence[str]]],
    excluded: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
    cache_dir: str | None = None,
) -> Cohort:
    """A cohort of the scans that can be used; the others are `Cohort.excluded`, each with its reason.

    Left out are: duplicated names, files or voxels; scans of which no condition is known, where conditions are asked
    for; files that are missing or cannot be read, NaN or constant images, other grids, wrong label values.

    Args:
        label_names: None: the values that occur, named by their numbers.
        split: names of the scans of each split, given the usable entries.
        excluded, notes: what the data module has left out or noted already.

    Raises:
        UserError: nothing is left to train on.
    """
    usable, out = listed_once(entries)
    out = [*excluded, *out]
    if conditions:
        asked = ", ".join(c.name for c in conditions)
        out += [(e.name, f"no condition is known ({asked})") for e in usable if not _known(e, conditions)]
        usable = [e for e in usable if _known(e, conditions)]
    store = ScanStore(usable, reader, cache_dir)
    usable, problems, values = _readable(usable, store)
    out += problems
    names = label_names if label_names is not None else {value: str(value) for value in values}
    splits = split(usable)
    train = set(splits.get("train", ()))
    known = {e.name: {c.name: float(e.conditions.get(c.name, math.nan)) for c in conditions} for e in usable}
    ranged = [_with_range(c, [known[e.name][c.name] for e in usable if e.name in train]) for c in conditions]
    lacking = {c.name: sum(math.isnan(known[e.name][c.name]) for e in usable) for c in conditions}
    lacking |= {m: sum(m not in e.images for e in usable) for m in modalities}
    lacking |= {"labels": sum(e.labels is None for e in usable)} if names else {}
    missing = [f"{what}: missing for {n} of {len(usable)} scans" for what, n in lacking.items() if n]
    return Cohort(name, modalities, names, ranged, splits, store, known, out, [*notes, *missing])


def listed_once(entries: Sequence[Entry]) -> tuple[list[Entry], list[tuple[str, str]]]:
    """The entries whose name and image files nobody before them has; the others as exclusions."""
    kept: dict[str, Entry] = {}
    owners: dict[str, str] = {}
    out: list[tuple[str, str]] = []
    for entry in entries:
        files = [str(source) for source in entry.images.values()]
        shared = next((file for file in files if file in owners), None)
        if entry.name in kept:
            out.append((entry.name, "listed more than once: only the first is used"))
        elif shared is not None:
            out.append((entry.name, f"{shared}: the image of {owners[shared]} too: a scan that is there twice"))
        else:
            kept[entry.name] = entry
            owners |= dict.fromkeys(files, entry.name)
    return list(kept.values()), out


def _readable(entries: Sequence[Entry], store: ScanStore) -> tuple[list[Entry], list[tuple[str, str]], set[int]]:
    """The entries that can be read and whose voxels nobody before them has; exclusions; label values above 0."""
    kept: list[Entry] = []
    out: list[tuple[str, str]] = []
    values: set[int] = set()
    seen: dict[int, str] = {}
    for entry in entries:
        try:
            scan = store(entry.name)
        except UserError as error:
            out.append((entry.name, str(error)))
            continue
        digest = zlib.crc32(next(iter(scan.images.values())).numpy().tobytes())
        if digest in seen:
            out.append((entry.name, f"the same voxels as {seen[digest]}: a scan that is there twice"))
            continue
        seen[digest] = entry.name
        kept.append(entry)
        if scan.labels is not None:
            values |= {v for v in scan.labels.unique().tolist() if v > 0}
    return kept, out, values


def _known(entry: Entry, conditions: Sequence[Condition]) -> bool:
    return any(not math.isnan(entry.conditions.get(c.name, math.nan)) for c in conditions)


def _with_range(condition: Condition, values: Sequence[float]) -> Condition:
    finite = [v for v in values if not math.isnan(v)]
    if condition.kind == "categorical" or not finite:
        return condition
    return replace(condition, low=min(finite), high=max(finite))


def split_persons(
    entries: Sequence[Entry], val: Sequence[str] | float = 0.0, test: Sequence[str] | float = 0.0, seed: int = 0
) -> dict[str, list[str]]:
    """Names of the scans of each split; all scans of a person go together.

    Args:
        val, test: names of scans or persons (all scans of that person then), or a share of the persons, drawn by the
            seed among the persons that nothing else decides. An entry's own ``split`` comes first.

    Raises:
        UserError: an unknown name; a person asked for in two splits; shares that leave nobody.
    """
    place: dict[str, str] = {}
    persons = sorted({entry.person for entry in entries})
    by_scan = {entry.name: entry.person for entry in entries}
    asked = [(e.person, e.split, "the table") for e in entries if e.split is not None]
    for split, given in (("val", val), ("test", test)):
        for name in () if isinstance(given, float | int) else given:
            person = by_scan.get(name, name)
            if person not in persons:
                raise UserError(f"data.{split}: expected scans or persons that are usable, found {name!r}; correct it")
            asked.append((person, split, f"data.{split}"))
    for person, split, where in asked:
        if split not in SPLITS:
            raise UserError(f"{where}: expected the splits {', '.join(SPLITS)}, found {split!r}; correct it")
        if place.setdefault(person, split) != split:
            raise UserError(
                f"{where}: expected each person in one split, found {person} in {place[person]} and {split}"
            )
    free = [p for p in persons if p not in place]
    order = [free[i] for i in np.random.default_rng(seed).permutation(len(free))]
    for split, given in (("val", val), ("test", test)):
        if isinstance(given, float | int):
            if not 0 <= given < 1:
                raise UserError(f"data.{split}: expected a share from 0 to below 1, found {given}; correct it")
            count = round(given * len(persons))
            place |= dict.fromkeys(order[:count], split)
            order = order[count:]
    place |= dict.fromkeys(order, "train")
    return {s: [e.name for e in entries if place[e.person] == s] for s in SPLITS}
