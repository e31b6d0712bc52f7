"""Complete experiment files, one per experiment."""
