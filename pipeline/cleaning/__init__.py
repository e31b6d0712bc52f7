"""Removing what nothing needs any more: outputs, models, and what killed processes left."""
