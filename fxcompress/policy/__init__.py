"""The policy language: texts to checked policies. No torch here."""

from .api import instantiate, load_policy, parse, parse_selector
from .check import Checked, check_source
from .convert import coerce
from .format import format_policy

__all__ = ["Checked", "check_source", "coerce", "format_policy", "instantiate", "load_policy", "parse",
           "parse_selector"]
