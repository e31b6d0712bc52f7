"""The steps from raw images to a promoted model, and the machinery that runs them durably."""
