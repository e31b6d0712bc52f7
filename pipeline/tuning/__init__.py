"""The search for loss weights on Ray Tune, durable by its own record."""
