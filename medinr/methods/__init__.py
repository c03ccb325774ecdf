"""Methods: one file each."""

from medinr.methods.atlas import ConditionalAtlas
from medinr.methods.base import RegistrationMethod
from medinr.methods.conditioned import ConditionedRegistration
from medinr.methods.cycle import CycleConsistentRegistration
from medinr.methods.diffusion import DiffusionDeformation
from medinr.methods.learned import LearnedRegistration
from medinr.methods.method import Method, load_method
from medinr.methods.module import RegistrationModule
from medinr.methods.pair import PairRegistration
from medinr.methods.refined import RefinedRegistration
from medinr.methods.refinement import Refinement
from medinr.methods.spatiotemporal import SpatioTemporalRegistration
from medinr.methods.spatiotemporal_lattice import SpatioTemporalLattice
from medinr.methods.volume import VolumeRegistration

__all__ = [
    "ConditionalAtlas",
    "ConditionedRegistration",
    "CycleConsistentRegistration",
    "DiffusionDeformation",
    "LearnedRegistration",
    "Method",
    "PairRegistration",
    "RefinedRegistration",
    "Refinement",
    "RegistrationMethod",
    "RegistrationModule",
    "SpatioTemporalLattice",
    "SpatioTemporalRegistration",
    "VolumeRegistration",
    "load_method",
]
