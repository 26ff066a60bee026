"""Recording: the engine's own loader, run once without data, becomes a LoadRecipe."""

from headrace.recording.assemble import opaque_recipe, record
from headrace.recording.cache import RecipeCache
from headrace.recording.proof import prove, whole_tensors
from headrace.recording.skeleton import skeleton_of

__all__ = ["RecipeCache", "opaque_recipe", "prove", "record", "skeleton_of", "whole_tensors"]
