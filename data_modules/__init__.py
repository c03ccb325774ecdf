"""Data modules: one file per data set."""

from data_modules.brains import AdultSlabsCohort, MouseCohort
from data_modules.checks import check_root
from data_modules.cohort import CohortDataModule
from data_modules.crl import FetalCRL
from data_modules.dhcp import DHCP
from data_modules.dirlab import DIRLab
from data_modules.dirlab_sequence import DIRLabSequence
from data_modules.fourdct import FourDCT
from data_modules.fourdct_sequence import FourDCTSequence
from data_modules.longitudinal import LongitudinalSequence
from data_modules.mouse import MouseBrains
from data_modules.pair import PairDataModule
from data_modules.slabs import AdultSlabs
from data_modules.ukbiobank import UKBiobank

__all__ = [
    "DHCP",
    "AdultSlabs",
    "AdultSlabsCohort",
    "CohortDataModule",
    "DIRLab",
    "DIRLabSequence",
    "FetalCRL",
    "FourDCT",
    "FourDCTSequence",
    "LongitudinalSequence",
    "MouseBrains",
    "MouseCohort",
    "PairDataModule",
    "UKBiobank",
    "check_root",
]
