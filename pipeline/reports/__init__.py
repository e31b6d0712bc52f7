"""The page that a flow ends with."""
