"""How facts look in a terminal."""
