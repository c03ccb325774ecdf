"""Methods: one file each."""

from medinr.methods.base import RegistrationMethod, load_method
from medinr.methods.conditioned import ConditionedRegistration
from medinr.methods.pair import PairRegistration

__all__ = ["ConditionedRegistration", "PairRegistration", "RegistrationMethod", "load_method"]
