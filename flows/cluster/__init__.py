"""What a Ray cluster for the flows is described by: manifests for KubeRay, a batch script for Slurm."""
