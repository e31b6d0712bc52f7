"""Jobs on a Ray cluster: what travels with one, how it is sent, followed, listed and stopped from elsewhere."""
