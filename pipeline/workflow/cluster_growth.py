"""What a cluster that grows with the work could have, though it is not there yet.

Ray keeps no list of the node types of a cluster where programs could read it; its autoscaler says only which demands
no node type can meet. So the demand is placed, and the autoscaler's answer to it waited for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

# An autoscaler looks every five seconds; after a start of its own it may be late.
ANSWER_TIMEOUT_S = 60.0
POLL_S = 0.5


def can_grow() -> bool:
    """Whether an autoscaler serves the cluster that this process is in; a local Ray has none."""
    return bool(_status().autoscaling_state.autoscaler_state_version)


def will_come(resources: Mapping[str, float]) -> bool:
    """Whether the autoscaler has a node type with these resources, which it then starts; False without autoscaler.

    Ray's own name for what it cannot offer is an infeasible request. True, too, where the autoscaler does not answer
    within a minute: whoever then waits for such a node is told so by Ray itself.
    """
    if not can_grow():
        return False
    from ray.util.placement_group import placement_group, remove_placement_group

    demand = placement_group([dict(resources)])
    try:
        return _is_feasible(demand)
    finally:
        remove_placement_group(demand)


def _is_feasible(demand: PlacementGroup) -> bool:
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    seen_at: int | None = None
    while time.monotonic() < deadline:
        status = _status()
        pending = [one.details for one in status.cluster_resource_state.pending_gang_resource_requests]
        if seen_at is None and any(demand.id.hex() in details for details in pending):
            seen_at = status.cluster_resource_state.cluster_resource_state_version
        state = status.autoscaling_state
        if seen_at is not None and state.last_seen_cluster_resource_state_version >= seen_at:
            return not any(demand.id.hex() in one.details for one in state.infeasible_gang_resource_requests)
        if demand.wait(timeout_seconds=POLL_S):
            return True
    return True


def _status() -> Any:
    """A `GetClusterStatusReply`: what the control service knows of the demands and the autoscaler said to them."""
    import ray
    from ray import _raylet
    from ray.core.generated import autoscaler_pb2

    # Ray's type stubs leave out what is generated.
    generated: Any = autoscaler_pb2
    library: Any = _raylet
    reply = generated.GetClusterStatusReply()
    client = library.GcsClient(address=ray.get_runtime_context().gcs_address)
    with suppress(ray.exceptions.RpcError):
        reply.ParseFromString(client.get_cluster_status(timeout_s=ANSWER_TIMEOUT_S))
    return reply
