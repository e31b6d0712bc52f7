"""From images to label maps: scores, windows, scales and flips, exported graphs, latency."""
