"""What a rank holds of a model, read off the model itself, without any collective."""

from headrace_trainers.shards.model import shards_of
from headrace_trainers.shards.names import clean_name

__all__ = ["clean_name", "shards_of"]
