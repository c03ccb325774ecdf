"""``medinr dashboard``: a page about the runs of an experiment, and their workspace in Weights & Biases."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medinr.commands import command_parser
from medinr.commands.messages import did_you_mean
from medinr.errors import UserError

EXAMPLE = "medinr dashboard idir_dirlab cidir_dirlab --out dashboard"
PAGE, WORKSPACE = "dashboard.html", "workspace.json"

ABOUT = f"""\
Show the runs of experiments: state, curves, cases, images, settings, and how the experiments compare.

RUN is the name of an experiment with runs under --runs, its YAML file, the folder of one run, or any folder
that holds some (of `medinr cohort` too).
OUT/{PAGE} is one page from local files alone. It needs no account, no network and no file beside it.
OUT/{WORKSPACE} says which panels the workspace in Weights & Biases has. With an account, and with
medinr[dashboard] installed, the workspace is made at once, and a later call brings it up to date; otherwise
`medinr dashboard --spec OUT/{WORKSPACE}` makes it later, also after you have edited the file. It shows what was
sent: `wandb sync` sends the runs that were offline."""


@dataclass(frozen=True)
class Dashboard:
    """What `dashboard` has made.

    Attributes:
        page: the HTML page (None: there was no run to show).
        specification: the file that says the workspace's panels.
        url: of the workspace, None where it was not made.
        why_not: what was missing for it, None where nothing was, or where nobody asked for it.
        unsent: folders of W&B that were not sent yet.
    """

    page: Path | None
    specification: Path
    url: str | None
    why_not: str | None
    unsent: list[Path]


def dashboard(
    names: Sequence[str | Path],
    out: str | Path,
    config: str | Path | None = None,
    runs: str | Path = "runs",
    wandb: bool = True,
    project: str | None = None,
    entity: str | None = None,
) -> Dashboard:
    """Write the page about some runs, and the specification of their workspace; make the workspace where possible.

    Args:
        names: experiments, their YAML files, run folders, or folders of runs.
        out: folder of the two files.
        config: YAML file of a further experiment, of which no run need be there yet.
        runs: folder that holds the runs of all experiments.
        wandb: make the workspace if an account and the package are there.
        project: of W&B (None: ``WANDB_PROJECT``, or the one that runs are logged to).
        entity: user or team of W&B (None: that of the account).

    Raises:
        UserError: no such run; nothing asked for; a folder that cannot be written to; W&B refuses.
    """
    import os

    from medinr import io
    from medinr.callbacks.logs import PROJECT
    from medinr.commands.checks import check_writable
    from medinr.dashboard.records import read_record
    from medinr.dashboard.report import page
    from medinr.dashboard.specification import read_specification, specification, write_specification

    if not names and config is None:
        raise UserError("RUN: expected an experiment, a run or a folder of runs, found nothing; name one")
    check_writable(out)
    experiment, alpha = (None, False) if config is None else _experiment(Path(config))
    wanted = [str(name) for name in names]
    if experiment is not None and (Path(runs) / experiment).is_dir():
        wanted.append(str(Path(runs) / experiment))
    records = [read_record(run) for run in find_runs(wanted, Path(runs))]
    experiments = list(dict.fromkeys([*(r.experiment for r in records), *([experiment] if experiment else [])]))
    project = project or os.environ.get("WANDB_PROJECT", PROJECT)
    spec = specification(records, experiments, project, entity, alpha)
    target, html = Path(out) / WORKSPACE, Path(out) / PAGE
    if target.is_file():  # the workspace that an earlier call has made
        spec["url"] = read_specification(target).get("url")
    write_specification(target, spec)
    if records:
        io.write_text(html, page(records, f"Runs of {', '.join(experiments)}"))
    url, why_not = upload(target) if wandb else (None, None)
    unsent = [folder for r in records for folder in r.unsent]
    return Dashboard(html if records else None, target, url, why_not, unsent)


def upload(path: Path) -> tuple[str | None, str | None]:
    """Make the workspace of a specification's file, and note its address there.

    Returns:
        The address and None, or None and what is missing.

    Raises:
        UserError: not a specification; W&B refuses.
    """
    from medinr.callbacks.logs import why_offline
    from medinr.dashboard import workspace
    from medinr.dashboard.specification import read_specification, write_specification

    spec = read_specification(path)
    if reason := why_offline():
        return None, reason
    if not workspace.available():
        return None, f"the package wandb-workspaces is missing: {workspace.INSTALL}"
    url = workspace.upload(spec)
    write_specification(path, {**spec, "url": url})
    return url, None


def find_runs(names: Sequence[str], root: Path) -> list[Path]:
    """The run folders that are meant, each once.

    Args:
        names: run folders, folders of runs, names of experiments, or their YAML files.
        root: the folder that holds the runs of all experiments.

    Raises:
        UserError: a name that has no run.
    """
    from medinr.dashboard.records import runs_below

    found: dict[Path, Path] = {}
    for name in names:
        path = Path(name)
        folder = path if path.is_dir() else root / (path.stem if path.suffix in (".yaml", ".yml") else name)
        some = runs_below(folder) if folder.is_dir() else []
        if not some:
            known = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
            near = did_you_mean(name, known)
            raise UserError(
                f"{name}: expected an experiment with runs in {root}, a run's folder or a folder of runs, found none"
                f"{near or '; run `medinr fit` first, or say with --runs where runs are'}"
            )
        found |= {run.resolve(): run for run in some}
    return list(found.values())


def _experiment(config: Path) -> tuple[str, bool]:
    """The name of a YAML file's experiment, and whether its method searches an alpha."""
    from medinr import io
    from medinr.callbacks.runs import load_yaml

    try:
        found: Any = load_yaml(io.existing_file(config).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config}: not valid YAML: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise UserError(f"{config}: expected an experiment with a model, found none; give one as `medinr fit` takes it")
    arguments = found["model"].get("init_args")
    return str(found.get("experiment") or config.stem), isinstance(arguments, dict) and "conditioned" in arguments


def main(args: list[str]) -> int:
    parser = command_parser("dashboard", ABOUT, EXAMPLE)
    parser.add_argument("run", type=str, nargs="*", help="experiments, run folders, or folders of runs")
    parser.add_argument("--out", type=str | None, default=None, help="folder of the page and the specification")
    parser.add_argument(
        "--config", type=str | None, default=None, help="YAML of an experiment, also before its first run"
    )
    parser.add_argument("--runs", type=str, default="runs", help="folder that holds the runs of all experiments")
    parser.add_argument("--wandb", type=bool, default=True, help="make the workspace in Weights & Biases, if possible")
    parser.add_argument("--project", type=str | None, default=None, help="project of Weights & Biases")
    parser.add_argument("--entity", type=str | None, default=None, help="user or team of Weights & Biases")
    parser.add_argument("--spec", type=str | None, default=None, help="only make the workspace that this file says")
    given = parser.parse_args(args)
    if given.spec is not None:
        if given.run or given.config or given.out:
            raise UserError("--spec: expected to stand alone, found runs beside it; leave out one or the other")
        url, why_not = upload(Path(given.spec))
        if why_not:
            raise UserError(f"{given.spec}: expected to make the workspace, found: {why_not}; nothing was sent")
        print(f"Weights & Biases: {url}")
        return 0
    if given.out is None:
        raise UserError("--out: missing; name a folder for the page and the specification")
    found = dashboard(given.run, given.out, given.config, given.runs, given.wandb, given.project, given.entity)
    print("\n".join(_told(found)))
    return 0


def _told(found: Dashboard) -> list[str]:
    lines = [f"page: {found.page}" if found.page else "page: none, as there is no run yet"]
    if found.url:
        lines.append(f"Weights & Biases: {found.url}")
    else:
        later = f" ({found.why_not}); later: medinr dashboard --spec {found.specification}" if found.why_not else ""
        lines.append(f"Weights & Biases: its panels are in {found.specification}{later}")
    if found.unsent and (found.url or found.why_not):
        more = f" and {len(found.unsent) - 1} more" if len(found.unsent) > 1 else ""
        lines.append(f"not sent yet: {found.unsent[0]}{more}; `wandb sync` sends them")
    return lines
