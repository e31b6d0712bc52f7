"""The choices that the command line offers by name."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """What is rendered."""

    KUBERAY = "kuberay"
    RAYJOB = "rayjob"
    SLURM = "slurm"


class Spot(StrEnum):
    """Whose spot nodes workers go to."""

    GKE = "gke"
    EKS = "eks"
    KARPENTER = "karpenter"
    AKS = "aks"
