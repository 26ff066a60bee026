"""The demonstration: a small model generates text without a break while its weights change under it."""
