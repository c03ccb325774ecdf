"""Registration conditioned on the regularization weight (cIDIR): one training, any weight afterwards."""

import itertools
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from medinr import figures, io
from medinr.errors import UserError
from medinr.fields import Field
from medinr.losses import Regularizer, Similarity
from medinr.losses.regularizers import bending, volume_change
from medinr.methods.base import RegistrationMethod
from medinr.ranks import from_first
from medinr.results import Evaluation, landmark_metrics
from medinr.sampling import PointSampler, interpolate, near
from medinr.search import Criterion, Row, SearchResult, best_row, search
from medinr.space import REFERENCE_LENGTH_MM, Scale, transform_points
from medinr.types import Points, Scalar


class ConditionedRegistration(RegistrationMethod):
    """min over the field of E_alpha [ similarity + sum_k alpha_k weight_k R_k ], the field conditioned on alpha.

    El Hadramy, Cherkaoui and Cattin, cIDIR: Conditioned Implicit Neural Representation for Regularized Deformable Image
    Registration, 2025 (arXiv 2507.12953). The paper trains 50,000 steps with one alpha a step, uniform on [0, 1], and
    bending energy. It does not say how alpha enters the loss; both forms are offered. Ours: several stratified alphas
    in each step (each for its share of the points), a log-uniform prior, and alpha may weigh several regularizers.

    Args:
        conditioned: names of the regularizers that alpha weighs, in alpha's order; the others keep their own weight.
        prior: of each alpha: ``uniform`` on [0, 1], ``beta`` (both parameters 1/2: more at the ends), ``log-uniform``
            on [1e-4, 1].
        form: ``sum``: similarity + alpha weight R; ``convex``: (1 - alpha) similarity + alpha weight R, for one alpha.
        alphas: different alphas in each step.
        select: how `search` chooses the alpha that results are read at: ``dice``, ``landmarks`` (an oracle), or
            ``similarity``.
        alpha: the alpha to read results at before any search (default: the prior's median).
        grid: number of grid values for each alpha in the search.
        search_points: points of the fixed sample that the search looks at.

    Other arguments as for `RegistrationMethod`; ``field`` must take a condition of as many values.
    """

    low = 1e-4

    takes_condition = True

    def __init__(
        self,
        field: Field,
        similarity: Similarity,
        regularizers: dict[str, Regularizer],
        conditioned: Sequence[str],
        prior: Literal["uniform", "beta", "log-uniform"] = "log-uniform",
        form: Literal["sum", "convex"] = "sum",
        alphas: int = 4,
        select: Criterion = "similarity",
        alpha: Sequence[float] | None = None,
        grid: int = 11,
        search_points: int = 4000,
        points: int = 10_000,
        pyramid_mm: Sequence[float] = (0.0,),
        lr: float = 1e-4,
        warmup: float = 0.0,
        cosine: bool = False,
        overlap_weight: float = 1.0,
        window: tuple[float, float] | None = None,
        jitter: bool = True,
        use_mask: bool = True,
        use_moving_mask: bool = False,
        scale: Scale = "isotropic",
        landmark_weight: float = 0.0,
        background: float = 0.1,
    ) -> None:
        super().__init__(
            field, similarity, regularizers, points, pyramid_mm, lr, warmup, cosine, overlap_weight, window, jitter,
            use_mask, use_moving_mask, scale, landmark_weight, background,
        )  # fmt: skip
        if points < alphas:
            raise UserError(f"points: expected at least one for each of {alphas} alphas, got {points}")
        missing = [name for name in conditioned if name not in regularizers]
        if missing or not conditioned:
            raise UserError(f"conditioned: expected names among {sorted(regularizers)}, got {list(conditioned)}")
        if len(conditioned) != field.conditions:
            raise UserError(
                f"field.conditions: expected {len(conditioned)}, one for each of {list(conditioned)}, "
                f"found {field.conditions} ({type(field).__name__})"
            )
        if form == "convex" and len(conditioned) != 1:
            raise UserError("form: convex needs exactly one conditioned regularizer")
        self.conditioned, self.prior, self.form, self.alphas = tuple(conditioned), prior, form, alphas
        self.select, self.grid, self.search_points = select, grid, search_points
        start = self.quantile(torch.full((len(conditioned),), 0.5)).tolist() if alpha is None else list(alpha)
        self.register_buffer("alpha", torch.tensor(start, dtype=torch.float32))
        self.alpha: Tensor
        self.found: SearchResult | None = None

    def quantile(self, u: Tensor) -> Tensor:
        """Alpha at quantile u of the prior."""
        if self.prior == "uniform":
            return u
        if self.prior == "beta":  # the arcsine law, Beta(1/2, 1/2), has this closed form
            return torch.sin(math.pi / 2 * u) ** 2
        return self.low ** (1 - u)

    def context(self) -> Tensor:
        return self.alpha

    def at(self, alpha: Sequence[float]) -> "ConditionedRegistration":
        """Read results at this alpha from now on."""
        value = torch.tensor(list(alpha), dtype=torch.float32, device=self.alpha.device)
        if value.shape != self.alpha.shape or not bool(((value >= 0) & (value <= 1)).all()):
            raise UserError(f"alpha: expected {len(self.alpha)} value(s) in [0, 1], got {list(alpha)}")
        self.alpha.copy_(value)
        return self

    def conditions(self) -> list[Tensor | None]:
        """Stratified alphas, at random within their strata of the prior."""
        strata = torch.stack([torch.randperm(self.alphas, device=self.device) for _ in self.conditioned], dim=1)
        # One for all processes: sums over their points are those of one field.
        alphas = from_first(self.quantile((strata + torch.rand(strata.shape, device=self.device)) / self.alphas))
        return list(alphas)

    def loss_at(self, batch: Points, conditions: Sequence[Tensor | None]) -> dict[str, Scalar]:
        totals: dict[str, list[Scalar]] = {}
        for x, alpha in zip(batch.tensor_split(self.alphas), conditions, strict=True):
            assert alpha is not None
            data, raw = self.terms(x, alpha)
            terms = self.weigh(data, raw)
            for name, a in zip(self.conditioned, alpha, strict=True):
                terms[name] = a * terms[name]
            if self.form == "convex":
                terms["similarity"] = (1 - alpha[0]) * terms["similarity"]
            for name, value in terms.items():
                totals.setdefault(name, []).append(value)
        return {name: torch.stack(values).mean() for name, values in totals.items()}

    # -- search --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, alpha: Tensor, x: Points, labelled: Points | None = None) -> Row:
        """Similarity at the finest level, folding %, bending (per 100 mm), and Dice and TRE where they are known.

        The same points x [N, 3] for every alpha: the differences between rows are the field's, not the sample's.
        """
        pair, level = self.pair, self.levels[-1]
        assert pair is not None
        alpha = alpha.to(self.device)
        u = self.displacement_jet(x, 1, alpha)
        similarity, overlap, _ = self.compare(x, u, level)
        unit = self.domain.unit_mm / REFERENCE_LENGTH_MM
        curvature = self.displacement_jet(x[: len(x) // 8], 2, alpha).rescale(unit, unit)
        row = {
            "similarity": similarity.item(),
            "overlap": overlap.item(),
            "folding": 100 * (volume_change(u) <= 0).float().mean().item(),
            "bending": bending(curvature).item(),
        }
        if labelled is not None:
            row["dice"] = self._dice(alpha, labelled)
        found = landmark_metrics(self.transform(alpha), pair)
        if found:
            row["tre"] = found["tre/mean"]
        return row

    @property
    def segmentations(self) -> tuple[Tensor, Tensor] | None:
        """Labels of the fixed and the moving image, or their masks, whichever the pair has of both."""
        assert self.pair is not None
        for names in (("fixed_labels", "moving_labels"), ("fixed_mask", "moving_mask")):
            fixed, moving = (getattr(self.pair, name) for name in names)
            if fixed is not None and moving is not None:
                return fixed.int(), moving.int()
        return None

    def labelled_region(self, generator: torch.Generator) -> Points | None:
        """Points of the segmentation and 10 mm around it, where a moving structure counts that ends up outside."""
        if self.segmentations is None:
            return None
        region = near(self.segmentations[0] > 0, self.domain, 10.0)
        return PointSampler(self.domain, region)(4 * self.search_points, self.device, generator)

    def _dice(self, alpha: Tensor, x: Points) -> float:
        """Mean over labels of the soft Dice 2 sum(ab) / sum(a^2 + b^2) of warped against fixed labels at x [N, 3].

        a and b are the labels' indicators, read trilinearly: the hard Dice of a sample jumps by more than the alphas
        that are to be told apart.
        """
        assert self.segmentations is not None
        fixed, moving = self.segmentations
        source = transform_points(self.domain.normalised_to_voxel, x)
        target = transform_points(self.to_moving_voxels, x + self.motion.displacement(x, alpha))
        found = []
        for label in fixed.unique().tolist():
            if label:
                a = interpolate((fixed == label)[None].float(), source)
                b = interpolate((moving == label)[None].float(), target)
                found.append(2 * (a * b).sum() / (a * a + b * b).sum().clamp(min=1e-6))
        return torch.stack(found).mean().item()

    def settle(self) -> None:
        """Search alpha by the method's own criterion, or by the similarity where its masks or landmarks are missing."""
        assert self.pair is not None
        known = {
            "dice": self.segmentations is not None,
            "landmarks": self.pair.fixed_points is not None and self.pair.moving_points is not None,
            "similarity": True,
        }
        if not known[self.select]:
            warnings.warn(
                f"select: {self.select} is not possible with this data; alpha is chosen by similarity", stacklevel=2
            )
        self.found = self.search(self.select if known[self.select] else "similarity")

    def predict_step(self, batch: Any, batch_idx: int) -> Evaluation:
        """As for every method, and how alpha was found."""
        evaluation = super().predict_step(batch, batch_idx)
        if self.found is not None:
            evaluation.metrics["search/seconds"] = self.found.seconds
            evaluation.metrics.update({f"search/alpha_{k}": v for k, v in enumerate(self.found.alpha)})
        return evaluation

    def report(self, out: Path) -> list[Path]:
        """The table of the last search, and its curves with the choice of every criterion that the data allow."""
        if self.found is None:
            return []
        table = self.found.table
        columns = list(table[0])
        lines = [",".join(columns), *(",".join(f"{row[c]:.6g}" for c in columns) for row in table)]
        io.write_text(out / "alpha_search.csv", "\n".join(lines) + "\n")
        files = [out / "alpha_search.csv"]
        if len(self.conditioned) == 1:
            series: dict[str, list[float]] = {
                str(c): [row[c] for row in table] for c in ("tre", "dice", "folding", "bending") if c in columns
            }
            marks = {("landmarks (oracle)" if c == "landmarks" else c): a[0] for c, a in self.choices().items()}
            figure = figures.curve_figure(
                [row["alpha"] for row in table], series, marks, log_x=self.prior == "log-uniform",
                title=f"alpha chosen by {self.found.criterion}: {self.found.alpha[0]:.3g}",
            )  # fmt: skip
            figures.save_figure(figure, out / "figures" / "alpha.png")
            files.append(out / "figures" / "alpha.png")
        return files

    def choices(self) -> dict[Criterion, list[float]]:
        """The alpha that each possible criterion would choose from the last search's table."""
        assert self.found is not None
        columns: dict[Criterion, str] = {"similarity": "similarity", "dice": "dice", "landmarks": "tre"}
        table = self.found.table
        return {criterion: best_row(table, criterion) for criterion, c in columns.items() if c in table[0]}

    def search(self, criterion: Criterion | None = None, seed: int = 0) -> SearchResult:
        """Choose alpha and keep it (`context`). A grid even in the prior's quantiles, then two refinements."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        x = self.sampler(self.search_points, self.device, generator)
        labelled = self.labelled_region(generator)
        line = self.quantile(torch.linspace(0, 1, self.grid)).tolist()
        result = search(
            lambda alpha: self.score(alpha, x, labelled),
            criterion or self.select,
            [list(a) for a in itertools.product(line, repeat=len(self.conditioned))],
        )
        self.at(result.alpha)
        self.state["search"] = {"alpha": result.alpha, "criterion": result.criterion, "oracle": result.oracle}
        return result
