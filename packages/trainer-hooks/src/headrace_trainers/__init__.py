"""Headrace in trainers: weight sources that read a rank's own shards, and hooks that publish after a step."""
