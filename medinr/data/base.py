"""The base of all data modules: files -> MONAI pipeline -> one `Pair` and loaders that count steps."""

import os
from pathlib import Path
from typing import Any

import lightning
from monai.data.dataset import CacheDataset, PersistentDataset
from monai.data.utils import pickle_hashing
from monai.transforms.compose import Compose
from torch.utils.data import DataLoader

from medinr.data.pair import Pair
from medinr.data.report import check_pair, pair_report
from medinr.data.transforms import CropToMaskd, PlainTensorsd, ReadImaged, Resampled, pair_of
from medinr.errors import UserError
from medinr.io import is_dicom
from medinr.space import Domain


class MedINRDataModule(lightning.LightningDataModule):
    """One case: a pair of images with masks, landmarks and labels, read once.

    Methods of pairs draw their points on their own device inside the training step, so the training loader yields
    nothing but step numbers (no worker processes); the other loaders yield the index of the case.

    A data set is a subclass that gives `item` (names of files, and nothing read yet) and, where the files are not plain
    images, `readers`.

    Args:
        steps_per_epoch: training steps between two validations.
        spacing: resample both images to this isotropic spacing in mm; None: as they are.
        margin_mm: crop each image to the box of its mask and this margin; None: whole images.
        cache_dir: keep the prepared tensors in this folder (MONAI's PersistentDataset), which pays where masks are
            computed from large scans; None: keep nothing.
    """

    def __init__(
        self,
        steps_per_epoch: int = 100,
        spacing: float | None = None,
        margin_mm: float | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, low in (("steps_per_epoch", steps_per_epoch, 1), ("margin_mm", margin_mm, 0)):
            if value is not None and value < low:
                raise UserError(f"data.{name}: expected {low} or more, found {value}; correct it")
        if spacing is not None and spacing <= 0:
            raise UserError(f"data.spacing: expected a length in mm above 0, found {spacing}; correct it")
        self.steps_per_epoch = steps_per_epoch
        self.spacing = spacing
        self.margin_mm = margin_mm
        self.cache_dir = cache_dir
        self.cases: list[str] = []
        self._pair: Pair | None = None

    # ------------------------------------------------------------------------------------- what a data set must give

    def item(self) -> dict[str, Any]:
        """Names of files under the names of `Pair`'s fields, and ``name``; plain values only.

        Raises:
            UserError: names what is missing.
        """
        raise NotImplementedError

    def readers(self) -> list[Any]:
        """The transforms that turn the item into `MetaTensor` volumes and RAS points; plain images by default."""
        return [ReadImaged()]

    # -------------------------------------------------------------------------------------------- what all share

    @property
    def pair(self) -> Pair:
        """The loaded pair; loads it on the first use."""
        if self._pair is None:
            self._pair = self._load()
        return self._pair

    @property
    def domain(self) -> Domain:
        return self.pair.domain

    def pipeline(self) -> list[Any]:
        """All transforms in order: read, crop, resample, plain tensors."""
        steps = list(self.readers())
        if self.margin_mm is not None:
            steps.append(CropToMaskd(self.margin_mm))
        if self.spacing is not None:
            steps.append(Resampled(self.spacing))
        return [*steps, PlainTensorsd()]

    def prepare_data(self) -> None:
        """Check that the files are there, once per machine; nothing is loaded."""
        self.item()

    def setup(self, stage: str | None = None) -> None:
        """Load the pair, whatever the stage."""
        _ = self.pair

    def check(self) -> list[str]:
        """What was found, one line per thing.

        Raises:
            UserError: something is missing or does not fit.
        """
        return pair_report(self.pair)

    def finish(self, pair: Pair) -> Pair:
        """A last look at the loaded pair; raises or warns about what makes results wrong."""
        check_pair(pair)
        return pair

    def _load(self) -> Pair:
        item = self.item()
        return self.finish(pair_of(self.prepared(item), str(item["name"])))

    def prepared(self, item: dict[str, Any]) -> Any:
        """An item through the pipeline, or from the cache."""
        transforms = Compose(self.pipeline(), log_stats=False)
        try:
            if self.cache_dir is None:
                return CacheDataset([item], transforms, num_workers=None, progress=False, copy_cache=False)[0]
            # The name of the cached file must change with the files and with every setting of the pipeline.
            item = {**item, "fingerprint": fingerprint(item, self.pipeline())}
            Path(self.cache_dir).mkdir(parents=True, exist_ok=True)
            return PersistentDataset([item], transforms, cache_dir=self.cache_dir)[0]
        except RuntimeError as error:
            raise users_mistake(error) or error from None

    # ------------------------------------------------------------------------------------------------- loaders

    def train_dataloader(self) -> Any:
        return step_loader(self.steps_per_epoch)

    def val_dataloader(self) -> Any:
        return step_loader(1)

    def test_dataloader(self) -> Any:
        return step_loader(1)

    def predict_dataloader(self) -> Any:
        return step_loader(1)


def fingerprint(item: dict[str, Any], transforms: list[Any]) -> str:
    """A name for the outcome of ``transforms`` on ``item``: settings, and size and date of each file.

    The slices of a DICOM series count one by one, those beside a slice too.
    """
    files = []
    for value in [v for many in item.values() for v in (many if isinstance(many, list) else [many])]:
        path = Path(value) if isinstance(value, str | Path) else None
        if path is None or not path.exists():
            continue
        folder = path if path.is_dir() else path.parent if is_dicom(path) else None
        for file in sorted(folder.iterdir()) if folder else [path]:
            stat = os.stat(file)
            files.append((str(path), file.name, stat.st_size, stat.st_mtime_ns))
    settings = [
        (type(t).__name__, sorted((k, repr(v)) for k, v in vars(t).items() if k.isidentifier() and k[0] != "_"))
        for t in transforms
    ]
    return pickle_hashing((files, settings)).decode()


def users_mistake(error: BaseException | None) -> UserError | None:
    """The `UserError` that MONAI has wrapped in RuntimeErrors, one per transform, or None."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


def step_loader(length: int) -> DataLoader[int]:
    """0 ... length - 1, one number a step. Keywords only: Lightning builds the loader anew from them."""
    numbers: Any = range(length)
    return DataLoader(dataset=numbers, batch_size=None, shuffle=False, num_workers=0)
