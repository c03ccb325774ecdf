"""Pictures of registrations and of fits; drawn without a window and without touching pyplot's state."""

from medinr.figures.curves import curve_figure, loss_figure, overlay_figure, spread_figure
from medinr.figures.files import new_figure, save_figure
from medinr.figures.maps import Scene, comparison_figure, deformation_figure, scene_of
from medinr.figures.page import report_page
from medinr.figures.registration import registration_figure
from medinr.figures.timeline import motion_figure, save_animation

__all__ = [
    "Scene",
    "comparison_figure",
    "curve_figure",
    "deformation_figure",
    "loss_figure",
    "motion_figure",
    "new_figure",
    "overlay_figure",
    "registration_figure",
    "report_page",
    "save_animation",
    "save_figure",
    "scene_of",
    "spread_figure",
]
