"""Model versions in MLflow: registering, comparing, promoting and rolling back."""
