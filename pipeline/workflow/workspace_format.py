"""The file that says what a workspace is: in which format its folders are, and which tracking stores know of them.

Format 1: a step's outputs lie in STEP/FINGERPRINT, Ray's state in ray/STEP-FINGERPRINT, the logs of a run's steps in
logs/RUN, and the marks of leases in leases/STEP-FINGERPRINT. A workspace without the file is of an earlier release,
whose folders are the same; it gets the file with its next run.
"""

from __future__ import annotations

from pydantic import ValidationError

from pipeline import storage
from pipeline.errors import UserError
from pipeline.records import Record

WORKSPACE_FILE = "workspace.json"
FORMAT = 1


class WorkspaceFile(Record):
    """What the file holds.

    Attributes:
        format: of the folders.
        stores: those whose flows have run here, those that lie in the workspace by their path from it.
        all_stores: whether `stores` names all there ever were; not where the workspace is older than the file.
    """

    format: int = FORMAT
    stores: tuple[str, ...] = ()
    all_stores: bool = False

    def is_only_store(self, store: str) -> bool:
        """Whether no store but the one of that name can know of what lies in the workspace."""
        return self.all_stores and self.stores == (store,)


def read_workspace_file(workspace: str) -> WorkspaceFile:
    """What is known of a workspace; raises UserError for one of a later release, and for a file that cannot be read."""
    uri = storage.join(workspace, WORKSPACE_FILE)
    try:
        content = storage.read_json(uri)
    except (FileNotFoundError, NotADirectoryError):
        return WorkspaceFile()
    except OSError as error:
        raise UserError(f"{uri} cannot be read ({error}); make it readable, or use another workspace") from error
    except ValueError as error:
        raise UserError(f"{uri} cannot be read ({error}); remove it, the next run writes it anew") from error
    found = content.get("format") if isinstance(content, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise UserError(
            f"workspace {workspace} has format {found}, this release reads up to {FORMAT}; upgrade segvit, or use "
            "another workspace"
        )
    try:
        return WorkspaceFile.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{uri} is not as segvit writes it; remove it, the next run writes it anew") from error


def enter_workspace(workspace: str, store: str) -> None:
    """Note that flows of the store of that name (`store_name`) run in the workspace.

    Raises UserError as `read_workspace_file` does, and for a workspace that cannot be written to.
    """
    known = read_workspace_file(workspace)
    is_new = not known.stores and not _has_outputs(workspace)
    try:
        # Read again: two that begin at once must not forget one another.
        while store not in known.stores:
            entered = WorkspaceFile(stores=(*known.stores, store), all_stores=known.all_stores or is_new)
            storage.publish_json(storage.join(workspace, WORKSPACE_FILE), entered.model_dump(mode="json"))
            known = read_workspace_file(workspace)
    except OSError as error:
        raise UserError(
            f"workspace {workspace} cannot be written to ({error}); free some space or choose another workspace"
        ) from error


def store_name(workspace: str, tracking_uri: str, experiment: str) -> str:
    """What a workspace calls a tracking store: one that lies in it by its path from there, since it may be moved."""
    if storage.is_local(workspace) and tracking_uri.startswith("sqlite:///"):
        tracking_uri = tracking_uri.replace(f"{storage.local_path(workspace).absolute()}/", "")
    return f"{tracking_uri} {experiment}"


def _has_outputs(workspace: str) -> bool:
    own = (WORKSPACE_FILE, "mlflow.db", "mlartifacts")
    return any(not name.startswith(own) for name in storage.list_names(workspace))
