"""Headrace in SGLang: the inference backend of its workers, and control over its interface."""
