"""Commands about clusters: what one is started from, written for the system that starts it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cluster.kinds import Kind, Spot
from flows.commands.options import Overrides

cluster = typer.Typer(
    name="cluster", help="What a Ray cluster is started from; see docs/cluster.md.", no_args_is_help=True
)


@cluster.command()
def render(
    kind: Annotated[
        Kind,
        typer.Option(help="kuberay: a cluster that stays; rayjob: one experiment with its own; slurm: a batch script."),
    ],
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.yaml", help="The experiment that a rayjob or slurm runs.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write files there; default: all on standard output.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="Built from flows/cluster/Dockerfile, with its tag.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What everything is named after; default: segvit.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Kubernetes namespace; default: segvit.")] = None,
    operator_namespace: Annotated[
        str | None, typer.Option(help="Where KubeRay's operator runs; default: kuberay-operator.")
    ] = None,
    cpu_workers: Annotated[int | None, typer.Option(help="At most so many workers without GPU; default: 4.")] = None,
    cpu_worker_size: Annotated[
        str | None, typer.Option(metavar="CPUSxMEMORY", help="Of one such worker; default: 14x28Gi.")
    ] = None,
    gpu_workers: Annotated[int | None, typer.Option(help="At most so many workers with GPUs; default: 4.")] = None,
    gpu_worker_size: Annotated[
        str | None, typer.Option(metavar="CPUSxMEMORY", help="Of one such worker; default: 14x56Gi.")
    ] = None,
    gpus_per_worker: Annotated[int | None, typer.Option(help="GPUs of a worker or node; default: 1.")] = None,
    gpu_selector: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A label of the nodes with the right GPU.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes of a slurm job; default: 1.")] = None,
    spot: Annotated[Spot | None, typer.Option(help="Run workers on spot nodes, labelled as there.")] = None,
    storage_class: Annotated[
        str | None, typer.Option(help="Of the shared storage, which must offer ReadWriteMany; default: the cluster's.")
    ] = None,
    storage_size: Annotated[str | None, typer.Option(help="Of the shared storage; default: 500Gi.")] = None,
    claim: Annotated[str | None, typer.Option(help="A volume claim that exists, to be the shared storage.")] = None,
    mlflow_uri: Annotated[
        str | None, typer.Option(metavar="URI", help="A tracking server that exists; default: one beside the cluster.")
    ] = None,
    redis: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Keep the cluster's state there, for the head to come back.")
    ] = None,
    workspace: Annotated[
        str | None, typer.Option(metavar="DIR", help="Of a rayjob or slurm, as the nodes see it.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Write manifests for KubeRay, or a batch script for Slurm; nothing is started and no secret is in them."""
    from flows.cluster.render import cluster_manifests, job_manifests, slurm_script, write_files

    given: dict[str, Any] = {
        "image": image,
        "name": name,
        "namespace": namespace,
        "operator_namespace": operator_namespace,
        "cpu_workers": cpu_workers,
        "cpu_worker_size": cpu_worker_size,
        "gpu_workers": gpu_workers,
        "gpu_worker_size": gpu_worker_size,
        "gpus_per_worker": gpus_per_worker,
        "gpu_selector": tuple(gpu_selector) if gpu_selector else None,
        "nodes": nodes,
        "spot": spot,
        "storage_class": storage_class,
        "storage_size": storage_size,
        "claim": claim,
        "mlflow_uri": mlflow_uri,
        "redis": redis,
        "workspace": workspace,
    }
    chosen = {option: value for option, value in given.items() if value is not None}
    if kind is Kind.KUBERAY:
        files = cluster_manifests(config, overrides or (), chosen)
    elif kind is Kind.RAYJOB:
        files = job_manifests(config, overrides or (), chosen)
    else:
        files = slurm_script(config, overrides or (), chosen)
    if out is None:
        print("".join(files.values()), end="")
        return
    for file in write_files(out, files, overwrite):
        print(file)
