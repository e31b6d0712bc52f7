"""Decoders by name: Attention-to-Mask in the structures of the paper, and the linear baseline."""
