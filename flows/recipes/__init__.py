"""Recipes by name: which steps, in which order. `recipe:` in an experiment file chooses one.

A package of one's own adds a recipe by an entry point of the group `segvit.recipes` (docs/extending.md).
"""

from __future__ import annotations

from flows.recipes.recipe import Recipe
from segvit.registry import Registry

RECIPES: Registry[Recipe] = Registry(
    "recipe",
    "segvit.recipes",
    {
        "ablation": "flows.recipes.ablation:RECIPE",
        "segmentation": "flows.recipes.segmentation:RECIPE",
        "search": "flows.recipes.search:RECIPE",
        "train": "flows.recipes.train:RECIPE",
    },
)

__all__ = ["RECIPES", "Recipe"]
