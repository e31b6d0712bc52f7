"""Weights of others: pretrained backbones and published checkpoints."""
