"""Coordinate networks and maps of space, each with its jet."""

from medinr.fields.base import Field
from medinr.fields.maps import DisplacementMap, Map, as_map
from medinr.fields.siren import SIREN, HarmonizedSIREN

__all__ = ["SIREN", "DisplacementMap", "Field", "HarmonizedSIREN", "Map", "as_map"]
