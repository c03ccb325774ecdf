"""Coordinate networks and maps of space, each with its jet."""

from medinr.fields.base import Field, computed_once
from medinr.fields.cycle import CycleTransform, Inference
from medinr.fields.flow import Flow
from medinr.fields.fourier import FourierSIREN
from medinr.fields.lattice import CubicLattice
from medinr.fields.maps import Composed, Composition, DisplacementMap, Map, Sum, as_map
from medinr.fields.mlp import MLP, FourierMLP
from medinr.fields.prior import ImagePrior
from medinr.fields.regional import Regional, RegionalTransform
from medinr.fields.sinr import SINR
from medinr.fields.siren import SIREN, HarmonizedSIREN
from medinr.fields.tangent import TangentField
from medinr.fields.timed_lattice import TimedLattice
from medinr.fields.times import LinearTime, PhaseTime, SurrogateTime, TimedVelocity, TimeEncoding
from medinr.fields.transform import Transform

__all__ = [
    "MLP",
    "SINR",
    "SIREN",
    "Composed",
    "Composition",
    "CubicLattice",
    "CycleTransform",
    "DisplacementMap",
    "Field",
    "Flow",
    "FourierMLP",
    "FourierSIREN",
    "HarmonizedSIREN",
    "ImagePrior",
    "Inference",
    "LinearTime",
    "Map",
    "PhaseTime",
    "Regional",
    "RegionalTransform",
    "Sum",
    "SurrogateTime",
    "TangentField",
    "TimeEncoding",
    "TimedLattice",
    "TimedVelocity",
    "Transform",
    "as_map",
    "computed_once",
]
