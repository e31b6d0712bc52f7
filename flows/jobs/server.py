"""A cluster's job server, which may be away for a while: behind a tunnel that broke, or on a head that starts anew."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, TypeVar

import requests
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobSubmissionClient

from pipeline.errors import UserError

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
PATIENCE_S = 300.0
"""How long a server that has answered before is waited for."""
FIRST_DELAY_S = 0.5
LAST_DELAY_S = 15.0
# They tell of each package that they make and send.
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class ServerAwayError(ConnectionError):
    """The job server did not answer, or said that it cannot now; `cause` is why, in a few words."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


class JobServer(JobSubmissionClient):
    """Ray's client, with a limit to each request and one error for a server that is away.

    Attributes:
        address: where it is, `http://HOST:PORT`.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        with _address_as_given():
            super().__init__(self.address)

    def json(self, path: str) -> Any:
        """The answer to a GET of `path`; raises ServerAwayError, or RuntimeError where the path is unknown."""
        response = self._do_request("GET", path)
        if response.status_code != HTTPStatus.OK:
            raise RuntimeError(f"{path} is answered with status {response.status_code}")
        return response.json()

    def find(self, job_id: str, log: Callable[[str], None]) -> JobDetails:
        """The job's details; waits for a server that is away. Raises UserError where there is no such job."""
        try:
            info: JobDetails = self.patiently(lambda: self.get_job_info(job_id), log)
        except RuntimeError as error:
            raise UserError(
                f"the cluster at {self.address} knows no job {job_id} ({first_line(error)}); list those it knows with: "
                f"segvit jobs --address {self.address} - a head that was started anew has forgotten its jobs, but not "
                "what they finished: submit again and that is reused"
            ) from error
        return info

    def patiently(self, action: Callable[[], T], log: Callable[[str], None], patience_s: float | None = None) -> T:
        """What `action` returns; tried again, ever less often, while the server is away.

        Raises:
            UserError: it was away for `patience_s` (None: PATIENCE_S), or refuses the token.
        """
        patience_s = PATIENCE_S if patience_s is None else patience_s
        deadline, delay = None, FIRST_DELAY_S
        while True:
            try:
                result = action()
            except ServerAwayError as error:
                now = time.monotonic()
                if deadline is None:
                    deadline = now + patience_s
                    log(f"{error}, trying again for {patience_s:.0f} s")
                if now >= deadline:
                    raise UserError(
                        f"{error}, for {patience_s:.0f} s; mend the tunnel, or look after the cluster's head"
                    ) from error
                time.sleep(min(delay, deadline - now))
                delay = min(delay * 2, LAST_DELAY_S)
            except RayError as error:
                raise UserError(_token_refused(self.address, error)) from error
            else:
                if deadline is not None:
                    log(f"connected to {self.address} again")
                return result

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", (CONNECT_TIMEOUT_S, READ_TIMEOUT_S))
        try:
            response: requests.Response = super()._do_request(method, endpoint, **options)
        except requests.RequestException as error:
            cause = _cause_of(error)
            raise ServerAwayError(f"connection to {self.address} lost ({cause})", cause) from error
        if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            # Ray answers with a traceback; what it ends with is the cause.
            cause = last_line(response.text) or f"status {response.status_code}"
            raise ServerAwayError(f"the job server at {self.address} is not ready ({cause})", cause)
        return response


def connect(address: str | None) -> JobServer:
    """A client of the job server at `address`, or at the one that the environment names.

    Raises UserError where none is named or answers, or it refuses the token.
    """
    address = address or named_address()
    if not address.startswith(("http://", "https://")):
        raise UserError(f"address {address!r} is no job server; it looks like http://127.0.0.1:8265")
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return JobServer(address)
    except RayError as error:
        raise UserError(_token_refused(address, error)) from error
    except (ServerAwayError, RuntimeError, requests.RequestException) as error:
        cause = error.cause if isinstance(error, ServerAwayError) else first_line(error)
        raise UserError(
            f"no job server answers at {address} ({cause}); start the cluster, forward its port 8265, "
            "or correct the address"
        ) from error


def named_address() -> str:
    """The job server that the environment names; raises UserError where it names none."""
    for name in ADDRESS_VARIABLES:
        if (address := os.environ.get(name, "")).startswith(("http://", "https://")):
            return address
    raise UserError(
        "no job server is named; give --address http://127.0.0.1:8265, or export RAY_API_SERVER_ADDRESS with it"
    )


def first_line(error: Exception) -> str:
    """What an error says, without what Ray appends to it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def last_line(text: str) -> str:
    """The last line of a text that is not blank, or nothing."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _token_refused(address: str, error: Exception) -> str:
    return (
        f"the job server at {address} refuses this user's token ({first_line(error)}); give the cluster's token "
        "with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
    )


def _cause_of(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    # urllib3 wraps the system's error several times.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__


@contextmanager
def _address_as_given() -> Iterator[None]:
    """For Ray's client, these variables win over the address that it is given."""
    kept = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
