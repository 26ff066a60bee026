"""The embedded torch engine: a small real engine with tensor parallelism, and the reference adapter for it.

`control` needs nothing beside the core; everything else needs the extra `headrace[engine]`.
"""
