"""Backbones of timm: plain ViTs and Swin, cut and returned block by block."""
