"""What adapters of inference engines share; the engine's own part is all that an adapter's package adds."""
