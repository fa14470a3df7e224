"""What will happen to each tensor: a recipe (the user's wishes) resolves to a plan (one row per tensor)."""

from fewbit.plan.plan import Plan, Row, Site
from fewbit.plan.recipe import Recipe, Rule, preset_names
from fewbit.plan.resolve import resolve
from fewbit.plan.steps import Step, Steps, steps_names

__all__ = ["Plan", "Recipe", "Row", "Rule", "Site", "Step", "Steps", "preset_names", "resolve", "steps_names"]
