"""Coordinate networks and maps of space, each with its jet."""

from medinr.fields.base import Field
from medinr.fields.maps import DisplacementMap, Map, as_map
from medinr.fields.siren import SIREN, HarmonizedSIREN
from medinr.fields.transform import Transform

__all__ = ["SIREN", "DisplacementMap", "Field", "HarmonizedSIREN", "Map", "Transform", "as_map"]
