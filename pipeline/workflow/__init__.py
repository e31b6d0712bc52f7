"""Flows that survive: steps with fingerprints, executed once, cached by MLflow, run on Ray."""
