"""Headrace in vLLM: the inference backend of its workers, and control over its interface."""
