"""Scores of a checkpoint, per class and per image, and predictions of images."""
