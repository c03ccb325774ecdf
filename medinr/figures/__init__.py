"""Pictures of registrations and of fits; drawn without a window and without touching pyplot's state."""

from medinr.figures.curves import curve_figure, loss_figure
from medinr.figures.files import new_figure, save_figure
from medinr.figures.registration import registration_figure

__all__ = ["curve_figure", "loss_figure", "new_figure", "registration_figure", "save_figure"]
