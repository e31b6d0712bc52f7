"""Where and how fast a flow runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_serializer, field_validator

from pipeline.config.notify import Notify, check_notify, hidden
from pipeline.config.section import Positive, Section


class RuntimeConfig(Section):
    """Where and how fast it runs; none of this changes what is computed beyond rounding.

    Attributes:
        num_workers: training processes of one training run, one a GPU; or [least, most], as many as there is room
            for: a run goes on with fewer when nodes are lost, and with more when they come. The global batch stays.
        cpus_per_worker: CPU cores reserved for, and threads used by, each.
        use_gpu: None means: when the machine has one, or the cluster has one or starts a node with one when asked to.
        sharding: full: each training process keeps its share of parameters, gradients and optimizer state, and gathers
            a block's parameters while it computes (FSDP2), for models that do not fit a GPU; none: all of them (DDP).
        loader_workers: loader processes beside each training process.
        compile: compile the backbone's blocks and the decoder's layers, in training and where a split is scored; worth
            its first minutes on a GPU, or for long runs.
        trials_at_once: concurrent trials of the search.
        trainings_at_once: concurrent training runs of a flow; left out, as many as the cluster has room for when they
            are asked for. Give it for clusters that grow.
        env: names of variables of the caller's environment that `segvit submit` sends along; their values are in no
            experiment file.
        notify: whom to tell of the flow's end: a command, as a list of words, that reads JSON from standard input; or
            a URL to which the JSON is posted. Both may hold secrets, so it is written nowhere as it is.
    """

    num_workers: Positive | tuple[Positive, Positive] = 1
    cpus_per_worker: Positive = 1
    use_gpu: bool | None = None
    sharding: Literal["none", "full"] = "none"
    loader_workers: Annotated[int, Field(ge=0)] = 0
    compile: bool = False
    trials_at_once: Positive = 2
    trainings_at_once: Positive | None = None
    prepare_tasks: Positive = 8
    log_every_steps: Positive = 10
    max_failures: Annotated[int, Field(ge=-1)] = 2
    env: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], ...] = ()
    notify: Notify | None = Field(default=None, repr=False)

    @field_validator("notify", mode="before")
    @classmethod
    def _command_or_url(cls, notify: Any) -> Notify | None:
        return check_notify(notify)

    @field_serializer("notify")
    def _hide(self, notify: Notify | None) -> Notify | None:
        return None if notify is None else hidden(notify)

    @field_validator("num_workers")
    @classmethod
    def _least_and_most(cls, num_workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(num_workers, tuple) and num_workers[0] > num_workers[1]:
            raise ValueError(f"num_workers {list(num_workers)} is [least, most]; swap them")
        return num_workers

    @property
    def min_workers(self) -> int:
        """The fewest training processes of one run."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most training processes of one run."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]
