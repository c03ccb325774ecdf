"""``medinr generate checkpoint``: atlases of requested conditions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from medinr import figures, io, metrics
from medinr.commands import command_parser
from medinr.commands.checks import DEVICES, check_device, check_inputs_stay, check_writable
from medinr.errors import UserError
from medinr.fields.gridded import GridTransform
from medinr.fields.warp import chunks, resample, resample_labels
from medinr.figures.generated import generated_figure
from medinr.methods import DiffusionDeformation, load_method
from medinr.methods.diffusion_stages import GeneratedAtlas
from medinr.precision import full
from medinr.results import write_metrics
from medinr.space import Domain, Image, transform_points
from medinr.types import Matrix

EXAMPLE = "medinr generate runs/diffdef_slabs/last.ckpt --condition csf_ml=20 --samples 5 --guidance 2 --out atlas"
WRITES = "atlas labels displacement jacobian_determinant spread_mm montage metrics atlas_full labels_full"
Wanted = Mapping[str, str | float]


def generate(
    checkpoint: str | Path,
    out: str | Path,
    conditions: Wanted | Sequence[Wanted] = (),
    samples: int = 1,
    guidance: float = 1.0,
    steps: int = 20,
    seed: int = 0,
    atlas: Any = None,
    labels: Any = None,
    device: str = "cpu",
) -> list[Path]:
    """Write the atlas of some conditions; those that are not named are left open.

    ``out`` (with several requests, a folder in it for each) gets atlas, labels, displacement (as every other one of
    medinr's), Jacobian determinant, spread of the samples in mm, a picture, and metrics.json with the volumes.

    Args:
        checkpoint: of a `DiffusionDeformation`.
        out: a folder of its own.
        conditions: a value or the name of a level for each wanted condition; or several of these.
        samples: the atlas is that of the mean of so many velocities.
        guidance: strength of classifier-free guidance; 1 is the trained network.
        steps: of DDIM.
        seed: the same seed gives the same atlas.
        atlas, labels: image of the general atlas' space (of any resolution) and its labels, to be deformed as well.
        device: where the networks run.

    Raises:
        UserError: a checkpoint that generates nothing; an unknown condition; images that lie elsewhere.
    """
    check_writable(out)
    check_inputs_stay(out, (atlas, labels), WRITES)
    if samples < 1 or guidance < 0:
        raise UserError(f"--samples, --guidance: expected 1 or more and 0 or more, found {samples} and {guidance}")
    if labels is not None and atlas is None:
        raise UserError("--labels: expected the image that they belong to, found none; give --atlas too")
    method = load_method(checkpoint, check_device(device))
    if not isinstance(method, DiffusionDeformation):
        raise UserError(
            f"{checkpoint}: expected a checkpoint of DiffusionDeformation, found {type(method).__name__}; "
            "`medinr atlas` reads conditional atlases"
        )
    method.require("registration", "autoencoder", "diffusion")
    requests = [conditions] if isinstance(conditions, Mapping) else list(conditions) or [{}]
    values = [method.wanted(numbers(method, wanted)) for wanted in requests]
    image = None if atlas is None else near(io.as_image(atlas), Domain.from_dict(method.state["grid"]))
    files = []
    for wanted, chosen in zip(requests, values, strict=True):
        folder = Path(out) if len(requests) == 1 else Path(out) / (name_of(wanted) or "any")
        with full(method.device.type):
            found = method.generate(chosen, samples, guidance, steps, seed)
        told = {"conditions": dict(wanted), "samples": samples, "guidance": guidance, "seed": seed}
        files += write_generated(folder, method, found, name_of(wanted) or "any", told, image, labels)
    return files


def numbers(method: DiffusionDeformation, wanted: Wanted) -> dict[str, float]:
    """Conditions as numbers, a level by its place."""
    known = {c.name: c for c in method.conditions}
    return {k: known[k].value(str(v)) if k in known else float("nan") for k, v in wanted.items()}


def name_of(wanted: Wanted) -> str:
    """Of a request, for folders and titles."""
    return "_".join(f"{k}-{v}" for k, v in wanted.items())


def near(image: Image, grid: Domain) -> Image:
    """The image, if it lies where the general atlas does.

    Raises:
        UserError: less than half of the atlas' grid is inside it.
    """
    inside = 0
    for _, world in chunks(grid):
        voxels = transform_points(image.domain.world_to_voxel, world)
        inside += int(image.domain.contains_voxels(voxels).sum())
    if inside < 0.5 * grid.n_voxels:
        raise UserError(
            f"--atlas {image.source}: expected an image in the space of the general atlas, found one that covers "
            f"{100 * inside / grid.n_voxels:.0f} % of its grid; register it first (medinr register)"
        )
    return image


def write_generated(
    out: Path,
    method: DiffusionDeformation,
    found: GeneratedAtlas,
    title: str,
    told: Mapping[str, Any],
    image: Image | None = None,
    labels: Any = None,
) -> list[Path]:
    """All files of a generated atlas, or none at all."""
    assert found.displacement is not None and found.det is not None
    domain = found.domain
    with io.staged_folder(out) as staged:
        io.write_image(staged / "atlas.nii.gz", found.image.float(), domain)
        io.write_displacement(staged / "displacement.nii.gz", found.displacement, domain)
        io.write_image(staged / "jacobian_determinant.nii.gz", found.det.float(), domain)
        if found.labels is not None:
            io.write_image(staged / "labels.nii.gz", found.labels.short(), domain)
        if found.spread_mm is not None:
            io.write_image(staged / "spread_mm.nii.gz", found.spread_mm.float(), domain)
        if image is not None:
            moved = on_image(found.displacement, domain, image.domain)
            full_size = resample(image, image.domain, moved)
            io.write_image(staged / "atlas_full.nii.gz", full_size[0], image.domain)
            if labels is not None:
                read = io.read_labels(labels, image.domain)
                carried = resample_labels(read, image.domain, image.domain, moved)
                io.write_image(staged / "labels_full.nii.gz", carried, image.domain)
        general = method.state["template"][0]
        figure = generated_figure(
            general, found.image, found.displacement, found.spread_mm, domain, general > 0.1 * general.max(), title
        )
        figures.save_figure(figure, staged / "montage.png")
        names = dict(zip(method.state["label_values"], method.state["label_names"], strict=True))
        record = {
            **told,
            "folding/percent": metrics.folding_percent(found.det),
            "displacement/mean_mm": float(found.displacement.norm(dim=-1).mean()),
            "displacement/max_mm": float(found.displacement.norm(dim=-1).max()),
            **{f"volume_ml/{names[v]}": ml for v, ml in found.volumes_ml.items()},
        }
        if found.spread_mm is not None:
            record["spread/mean_mm"] = float(found.spread_mm.mean())
        write_metrics(staged / "metrics.json", record)
        files = sorted(f.relative_to(staged) for f in staged.rglob("*") if f.is_file())
    return [out / f for f in files]


def on_image(displacement: torch.Tensor, domain: Domain, grid: Domain) -> torch.Tensor:
    """A displacement [X, Y, Z, 3] (RAS mm) of one grid on another; its border continues."""
    identity: Matrix = torch.eye(4, dtype=torch.float64)
    transform = GridTransform(displacement.movedim(-1, 0), domain, identity)
    out = torch.empty(grid.n_voxels, 3)
    for rows, world in chunks(grid):
        out[rows] = (transform(world) - world).float()
    return out.reshape(*grid.shape, 3)


def parsed(text: str | None) -> list[dict[str, str]]:
    """``age=60,sex=male;age=70`` as two requests.

    Raises:
        UserError: something else.
    """
    found = []
    for request in (text or "").split(";"):
        wanted: dict[str, str] = {}
        for part in filter(None, (p.strip() for p in request.split(","))):
            name, sign, value = part.partition("=")
            if not sign or not name.strip() or not value.strip():
                raise UserError(f"--condition: expected NAME=VALUE, as age=60,sex=male, found {part!r}; correct it")
            wanted[name.strip()] = value.strip()
        found.append(wanted)
    return found


def main(args: list[str]) -> int:
    """Parse the command line, write, and name the folder."""
    parser = command_parser(
        "generate",
        "Generate the atlas of requested conditions: image, labels, displacement, spread of the samples,\npicture. "
        "Conditions that are not named are left open.",
        EXAMPLE,
    )
    parser.add_argument("checkpoint", type=str, help="of DiffusionDeformation (last.ckpt of a run)")
    parser.add_argument("--out", type=str, required=True, help="folder for the results, of their own")
    parser.add_argument("--condition", type=str | None, help="age=60,sex=male; several atlases: 'age=50;age=60;age=70'")
    parser.add_argument("--samples", type=int, default=1, help="the atlas is that of the mean of so many deformations")
    parser.add_argument("--guidance", type=float, default=1.0, help="strength of the conditions; 1: as trained")
    parser.add_argument("--steps", type=int, default=20, help="of DDIM")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same atlas")
    parser.add_argument("--atlas", type=str | None, help="image in the general atlas' space, to be deformed too")
    parser.add_argument("--labels", type=str | None, help="its labels")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where the networks run")
    options = parser.parse_args(args).as_dict()
    options["conditions"] = parsed(options.pop("condition"))
    files = generate(**options)
    print(f"wrote {len(files)} files to {options['out']}; look at montage.png first")
    return 0
