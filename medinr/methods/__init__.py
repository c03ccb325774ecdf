"""Methods: one file each."""

from medinr.methods.base import RegistrationMethod, load_method
from medinr.methods.pair import PairRegistration

__all__ = ["PairRegistration", "RegistrationMethod", "load_method"]
