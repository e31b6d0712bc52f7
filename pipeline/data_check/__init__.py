"""A look at raw data before anything is made of it: what it holds, and everything that is wrong with it at once."""
