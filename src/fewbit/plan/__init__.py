"""What will happen to each tensor: a recipe (the user's wishes) resolves to a plan (one row per tensor)."""

from fewbit.plan.plan import Plan, Row, Site
from fewbit.plan.recipe import Recipe, Rule, preset_names
from fewbit.plan.resolve import resolve

__all__ = ["Plan", "Recipe", "Row", "Rule", "Site", "preset_names", "resolve"]
