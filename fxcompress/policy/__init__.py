"""The policy language: texts to checked policies. No torch here."""

from .api import instantiate, load_policy, parse, parse_selector
from .check import Checked, check_source
from .convert import coerce

__all__ = ["Checked", "check_source", "coerce", "instantiate", "load_policy", "parse", "parse_selector"]
