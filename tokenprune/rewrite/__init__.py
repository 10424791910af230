"""Graph passes: the only code that edits a traced graph."""

from tokenprune.analysis.operators import Kind
from tokenprune.rewrite.rules import Hiding, OperatorRule, hide_in_reduction, rule

__all__ = ["Hiding", "Kind", "OperatorRule", "hide_in_reduction", "rule"]
