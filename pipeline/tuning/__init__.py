"""The search for settings on Ray Tune, durable by its own record."""
