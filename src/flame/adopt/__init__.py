"""Runs of fla-org/flame, taken over: its flags and TOML as a recipe."""
