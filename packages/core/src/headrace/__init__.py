"""Headrace puts new weights into LLM inference engines while they serve."""
