"""``medinr cohort``: one fit for each case, seed and setting, on local processes, SLURM or Ray, and one table."""

import argparse
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medinr.cohorts import claims
from medinr.cohorts.launchers import make_launcher
from medinr.cohorts.plan import (
    CASE,
    OWN,
    Fit,
    case_values,
    check_same,
    copies,
    folder_of,
    make_batches,
    plan,
    seed_values,
    setting_axes,
    write_batches,
    write_plan,
)
from medinr.cohorts.schedule import Outcome, Schedule, Tell
from medinr.cohorts.state import read_state, run_of
from medinr.cohorts.table import FITS, PAGE, SUMMARY, headline, write_tables
from medinr.cohorts.tracking import log_cohort
from medinr.commands import command_parser
from medinr.commands.checks import check_writable
from medinr.commands.messages import explain
from medinr.errors import UserError

EXAMPLE = (
    "medinr cohort --config experiments/idir_dirlab.yaml --data.root data/dirlab --cases 1-10 --seeds 3 --workers 2"
)
LAUNCHERS = ("local", "slurm", "ray")
PASSED = ("--data", "--model", "--trainer", "--checkpoint_steps", "--wandb")
"""Options that every fit is given."""

ABOUT = f"""\
Fit an experiment to many cases, with many seeds and settings, and compare the fits in one table.

Each fit is `medinr fit` and `medinr test` in processes of their own, in its own folder under OUT/fits.
The same command again skips what is done and goes on with what was broken off, whatever was killed;
a fit that fails is tried once more, then listed. OUT/cohort.csv has a row for each fit, OUT/summary.csv
mean, spread and percentiles, OUT/cohort.md both to read.

--data.KEY, --model.KEY, --trainer.KEY, --checkpoint_steps and --wandb go to every fit. The case goes to
--data.case, or takes the place of {CASE} in any of them (--data.root 'scans/{CASE}' --cases anna,bert).
--set KEY=V1,V2 makes fits with each value; several --set, with each combination.

--batch N steps N pairs as one in each process (plain SIREN networks, PairRegistration, one setting),
which pays on a GPU; what a batch that was broken off has kept goes on one by one.

--launcher slurm submits an array by submitit, whose parameters are options: --option timeout_min=60
--option slurm_partition=gpu; --option cluster=local or cluster=debug try it without SLURM.
--launcher ray uses the cluster that `ray start` began: --option address=HOST:6379, --option num_gpus=1."""


@dataclass
class CohortResult:
    """What `cohort` leaves.

    Attributes:
        out: folder of the tables and the fits.
        done: names of the fits.
        failed: name -> error, of those that failed twice.
        summary: rows of summary.csv.
    """

    out: Path
    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    summary: list[dict[str, Any]] = field(default_factory=list)


def cohort(
    config: str | Path | Sequence[str | Path],
    cases: Sequence[str | int] | None = None,
    seeds: int | Sequence[int] = 1,
    settings: Mapping[str, Sequence[Any]] | None = None,
    launcher: str = "local",
    workers: int = 1,
    threads: int | None = None,
    out: str | Path | None = None,
    options: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
    fail_above: Mapping[str, float] | None = None,
    dry_run: bool = False,
    command: Sequence[str] = (),
    tell: Tell = print,
    batch: int = 1,
) -> CohortResult:
    """Fit an experiment to many cases with many seeds, each fit in a process of its own, and write one table.

    Args:
        config: the experiment's YAML, or several that are laid over each other.
        cases: values of ``--data.case``, or of ``{case}`` in ``overrides``; None: an experiment without cases.
        seeds: how many, from 0, or the seeds.
        settings: dotted key -> values; one fit for each combination.
        launcher: ``local``, ``slurm`` (submitit) or ``ray``.
        workers: fits at a time.
        threads: of each fit; None: its share of the cores.
        out: default ``runs/cohorts/NAME``.
        options: of submitit or Ray, as on the command line.
        overrides: ``--key=value`` that every fit is given.
        fail_above: metric -> value from which a fit counts as failed in the failure rate.
        dry_run: say what would be done, and do nothing.
        command: what runs instead of ``python -m medinr.cli``.
        tell: is given one line for each fit that ends.
        batch: fits that share a process, stepped as one (`medinr.methods.batched`); 1: each has its own. A fit that has
            a checkpoint, of a batch that was broken off too, goes on alone.

    Raises:
        UserError: anything that no fit could be run with; nothing is written then.
        KeyboardInterrupt: after the fits kept their states.
    """
    configs = [Path(c) for c in ([config] if isinstance(config, str | Path) else config)]
    if workers < 1 or (threads is not None and threads < 1):
        raise UserError(f"--workers, --threads: expected 1 or more, got {workers} and {threads}")
    if batch < 1:
        raise UserError(f"--batch: expected 1 or more, got {batch}")
    if launcher not in LAUNCHERS:
        raise UserError(f"--launcher: expected one of {', '.join(LAUNCHERS)}, got {launcher}")
    place = Path(out or Path("runs") / "cohorts" / configs[-1].stem)
    axes = {key: [str(v) for v in values] for key, values in (settings or {}).items()}
    chosen: list[str | None] = [None] if cases is None else [str(c) for c in cases]
    given = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or not given:
        raise UserError(f"--cases, --seeds: expected 1 or more, got {len(chosen)} and {len(given)}")
    check_writable(place)
    check_same(place, configs, overrides)
    fits = plan(copies(place, configs), overrides, chosen, given, axes)
    begun = [fit for fit in fits if read_state(folder_of(place, fit))["state"] != "done"]
    tracked = False if command else check_fits(begun, configs, place, batch > 1)
    if dry_run:
        for fit in fits:
            tell(f"{fit.name}: {present(folder_of(place, fit))}")
        return CohortResult(place, done=[fit.name for fit in fits if fit not in begun])
    title = f"{configs[-1].stem}: {len(chosen)} case(s), {len(given)} seed(s)"
    engine = make_launcher(launcher, workers, threads, options or {}, place, f"medinr-{configs[-1].stem}")
    try:
        write_plan(place, configs, overrides, fits, command)
        if batch > 1 and (folders := write_batches(place, make_batches(place, fits, batch))):
            tell(f"{len(folders)} batch(es) of up to {batch} fits; then the results of each fit")
            for name in _run(Schedule(folders, engine, lambda line: tell(f"  {line}"))).failed:
                tell(f"{name}: its fits are run one by one")
        outcome = _run(Schedule({fit.name: folder_of(place, fit) for fit in fits}, engine, tell))
    finally:
        engine.close()
    limits = dict(fail_above or {})
    summary, changed = write_tables(place, fits, title, limits)
    if tracked and changed:
        asked = {"cases": chosen, "seeds": given, "settings": axes, "overrides": list(overrides), "fail_above": limits}
        asked["experiment"] = configs[-1].stem  # by which `medinr dashboard` finds it
        log_cohort(place, f"cohort/{place.name}", asked, summary)
    return CohortResult(place, outcome.done, outcome.failed, summary)


def _run(schedule: Schedule) -> Outcome:
    """Run a schedule; after Ctrl-C its fits keep their states."""
    with _sigterm_interrupts():
        try:
            return schedule.run()
        except KeyboardInterrupt:
            _stop(schedule)
            raise


def _stop(schedule: Schedule) -> None:
    """Let the fits keep their states; a second Ctrl-C ends them at once."""
    print("medinr: stopping the fits, each after its present step; Ctrl-C again ends them at once", file=sys.stderr)
    try:
        schedule.stop()
    except KeyboardInterrupt:
        schedule.kill()


class _sigterm_interrupts:
    """SIGTERM does what Ctrl-C does, where Python lets one choose: in the main thread."""

    def __enter__(self) -> None:
        try:
            self._before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        except ValueError:
            self._before = None

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def present(folder: Path) -> str:
    """Where a fit stands, in words."""
    state = read_state(folder)
    if state["state"] == "done":
        return f"done in {state['seconds']:.0f} s"
    if (holder := claims.holder(folder)) is not None:
        return f"under way on {holder.get('host', 'another machine')}"
    what = "go on from its checkpoint" if run_of(folder) else "run"
    return f"would {what}" + (f" (failed before: {state['error']})" if state["state"] == "failed" else "")


def check_fits(fits: Sequence[Fit], configs: Sequence[Path], out: Path, batch: bool = False) -> bool:
    """Read the configuration and look for the files of each case with the first setting, and of the first case with
    each setting, as `medinr fit` will; with ``batch``, whether they can be fitted as one.

    Returns:
        Whether Weights & Biases is asked for.

    Raises:
        UserError: the line that `medinr fit` would end with.
    """
    from medinr.commands import experiment

    if not fits:
        return False
    experiment.import_data_modules()
    chosen: dict[str, Fit] = {}
    for key in ("case", "setting"):
        chosen |= {fit.name: fit for fit in {getattr(fit, key): fit for fit in reversed(fits)}.values()}
    originals = dict(zip(map(str, copies(out, configs)), map(str, configs), strict=True))
    tracked = True
    for fit in (fit for fit in fits if fit.name in chosen):
        words = [originals.get(word, word) for word in fit.arguments]
        try:
            cli = _checked(words)
            if batch:
                from medinr.commands.batch import check_cli

                check_cli(cli)
        except (argparse.ArgumentError, UserError) as error:
            where = f" (case {fit.case})" if fit.case is not None else ""
            raise UserError(f"{explain(error, 'fit', words)}{where}") from None
        tracked = bool(cli.value("wandb"))
    return tracked


def _checked(words: Sequence[str]) -> Any:
    """LightningCLI with its parts made and the data's files found, and nothing run."""
    from medinr.commands.experiment import ExperimentCLI, Place

    class Check(ExperimentCLI):
        def instantiate_trainer(self, **kwargs: Any) -> Any:
            return None

        def _run_subcommand(self, subcommand: str) -> None:
            self.datamodule.prepare_data()

    return Check("fit", list(words), Place())


# -- the command line ------------------------------------------------------------------------------------------------


def passed_on(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own arguments, and those of the fits as ``--key=value``.

    Raises:
        UserError: an option without a value.
    """
    own: list[str] = []
    passed: list[str] = []
    words = iter(args)
    for word in words:
        name = word.partition("=")[0]
        if not any(name == option or name.startswith(f"{option}.") for option in PASSED):
            own.append(word)
        elif "=" in word:
            passed.append(word)
        elif (value := next(words, None)) is None:
            raise UserError(f"{word}: expected a value, found none; give one")
        else:
            passed.append(f"{word}={value}")
    return own, passed


def pairs_of(option: str, given: Sequence[str]) -> dict[str, str]:
    """``["a=1", "b=2"]`` -> {"a": "1", "b": "2"}."""
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key or not value or key in found:
            raise UserError(f"{option}: expected KEY=VALUE, each key once, got {text}")
        found[key] = value
    return found


def limits_of(given: Sequence[str]) -> dict[str, float]:
    """``["tre/mean=5"]`` -> {"tre/mean": 5.0}."""
    found = {}
    for key, value in pairs_of("--fail-above", given).items():
        try:
            found[key] = float(value)
        except ValueError:
            raise UserError(f"--fail-above {key}: expected a number, got {value}") from None
    return found


def make_parser() -> Any:
    parser = command_parser("cohort", ABOUT, EXAMPLE)
    parser.add_argument("--config", type=str, action="append", required=True, help="YAML of the experiment")
    parser.add_argument("--cases", type=str | None, default=None, help="1-10 or 1,3,5-7, or names (default: no cases)")
    parser.add_argument("--seeds", type=str, default="1", help="how many, from 0; or the seeds: 5,7 or 0-4")
    parser.add_argument("--set", type=str, action="append", help="KEY=V1,V2: fits with each value of a key")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local", help="where the fits run")
    parser.add_argument("--workers", type=int, default=1, help="fits at a time")
    parser.add_argument(
        "--threads", type=int | None, default=None, help="of each fit (default: its share of the cores)"
    )
    parser.add_argument("--batch", type=int, default=1, help="fits of a process, stepped as one (needs --wandb false)")
    parser.add_argument("--option", type=str, action="append", help="KEY=VALUE for submitit or Ray")
    parser.add_argument("--out", type=str | None, default=None, help="folder (default: runs/cohorts/NAME)")
    parser.add_argument(
        "--fail-above", type=str, action="append", help="METRIC=LIMIT: from there on a fit counts as failed"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and run nothing")
    return parser


def main(args: list[str]) -> int:
    """Returns the exit code: 0, 1 where fits failed, 130 after Ctrl-C."""
    own, passed = passed_on(args)
    for word in own:
        key = word.partition("=")[0].removeprefix("--")
        if key in ("seed_everything", "runs", "ckpt_path"):
            raise UserError(f"--{key}: a cohort sets it itself; use {OWN[key]}")
    given = make_parser().parse_args(own)
    begin = time.perf_counter()
    try:
        result = cohort(
            given.config,
            None if given.cases is None else case_values(given.cases),
            seed_values(given.seeds),
            setting_axes(given.set or []),
            given.launcher,
            given.workers,
            given.threads,
            given.out,
            pairs_of("--option", given.option or []),
            passed,
            limits_of(given.fail_above or []),
            given.dry_run,
            tell=lambda line: print(line, flush=True),
            batch=given.batch,
        )
    except KeyboardInterrupt:
        print("medinr: stopped; the same command goes on from there", file=sys.stderr)
        return 130
    if given.dry_run:
        return 0
    print("\n".join(headline(result.summary)))
    for name, error in result.failed.items():
        print(f"failed: {name}: {error}")
    where = ", ".join(str(result.out / name) for name in (PAGE, FITS, SUMMARY))
    counts = f"{len(result.done)} fit(s) are done, {len(result.failed)} failed"
    print(f"{counts}; took {time.perf_counter() - begin:.0f} s; tables: {where}")
    return 1 if result.failed else 0
