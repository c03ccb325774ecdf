"""What the brain phantoms hold: how well the age can be known, and whether volumes are what was asked for.

    python -m tests.benchmarks.phantoms [--only perinatal|adult]

Every row is a JSON line in tests/benchmarks/phantoms.jsonl; rows that are there are not made again. Kinds of rows:

    perinatal  60 subjects of a seed, 1 to 40 to learn from, 41 to 60 to test: mean error in weeks of the age by a line
               on the true brain volume, by the mean age, and by the maturation itself (the noise floor: better than
               that is chance); measured against requested ventricles; correlation of these with the age
    adult      30 subjects of a template: measured ventricles of the true labels in MNI space against what was drawn
               (slope, correlation), their growth with age, grey matter per mm of thinning
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from medinr.phantoms.adult import adult_case
from medinr.phantoms.adult_cohort import adult_draws
from medinr.phantoms.adult_template import mni_grid, nilearn_folder, template
from medinr.phantoms.perinatal_cohort import draws
from tests.benchmarks.measure import read_rows
from tests.benchmarks.tables import commit

ROWS = Path(__file__).parent / "phantoms.jsonl"
SEEDS, SUBJECTS, TRAIN, SIZE = (0, 1, 2), 60, 40, 64
ADULTS, ADULT_SIZE = 30, 54
Row = dict[str, Any]


def perinatal(seed: int) -> Row:
    """One cohort of the perinatal phantom."""
    found = []
    for draw in draws(SUBJECTS, seed):
        case = draw.case(seed, SIZE)
        volumes = case.volumes_ml()
        found.append([draw.age, case.maturation, volumes["brain"], volumes["ventricles"], draw.ventricles_ml])
    age, maturation, brain, measured, asked = np.array(found).T
    line = np.polyfit(brain[:TRAIN], age[:TRAIN], 1)
    errors = {
        "brain_volume": np.polyval(line, brain[TRAIN:]) - age[TRAIN:],
        "mean_age": age[:TRAIN].mean() - age[TRAIN:],
        "maturation": maturation[TRAIN:] - age[TRAIN:],
        "maturation_all": maturation - age,
    }
    return {
        **{f"mae_{name}": round(float(np.abs(e).mean()), 3) for name, e in errors.items()},
        "ventricles_slope": round(float(np.polyfit(asked, measured, 1)[0]), 3),
        "ventricles_r": round(float(np.corrcoef(asked, measured)[0, 1]), 4),
        "ventricles_r_age": round(float(np.corrcoef(age, measured)[0, 1]), 3),
    }


def adult(source: str) -> Row:
    """One cohort of the adult phantom."""
    grid = mni_grid(218 / ADULT_SIZE)
    brain = template(0.75 * 218 / ADULT_SIZE, source)
    voxel = float(np.prod(grid.spacing)) / 1000
    found = []
    for draw in adult_draws(ADULTS, 0):
        case = adult_case(draw.age, draw.ventricles_ml, 0, draw.number, brain, grid)
        labels = case.true_labels()
        found.append([draw.age, draw.ventricles_ml, (labels == 4).sum() * voxel, case.thinning_mm,
                      (labels == 2).sum() * voxel])  # fmt: skip
    age, asked, measured, thinning, grey = np.array(found).T
    return {
        "ventricles_slope": round(float(np.polyfit(asked, measured, 1)[0]), 3),
        "ventricles_r": round(float(np.corrcoef(asked, measured)[0, 1]), 4),
        "ventricles_log_per_year": round(float(np.polyfit(age, np.log(measured), 1)[0]), 4),
        "grey_ml_per_mm": round(float(np.polyfit(thinning, grey, 1)[0]), 1),
        "grey_r_age": round(float(np.corrcoef(age, grey)[0, 1]), 3),
    }


def wanted(only: str | None) -> Iterator[Row]:
    """The keys of all rows."""
    if only in (None, "perinatal"):
        yield from ({"kind": "perinatal", "seed": seed, "size": SIZE, "subjects": SUBJECTS} for seed in SEEDS)
    if only in (None, "adult"):
        sources = ["synthetic", *(["nilearn"] if nilearn_folder() else [])]
        yield from ({"kind": "adult", "template": s, "size": ADULT_SIZE, "subjects": ADULTS} for s in sources)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["perinatal", "adult"])
    for key in wanted(parser.parse_args().only):
        if any(key.items() <= row.items() for row in read_rows(ROWS)):
            continue
        row = perinatal(key["seed"]) if key["kind"] == "perinatal" else adult(key["template"])
        with ROWS.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**key, **row, "commit": commit()}) + "\n")
        print({**key, **row}, flush=True)


if __name__ == "__main__":
    main()
