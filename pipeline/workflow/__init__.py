"""Flows that survive: steps with fingerprints, executed once, remembered by MLflow, run on Ray."""
