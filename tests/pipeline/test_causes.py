from __future__ import annotations

import errno
import os

import pytest
from mlflow.exceptions import MlflowException

from pipeline.causes import one_line
from pipeline.errors import UserError

ROOM = "free some space or choose another workspace, then run again"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/w/a.tar"), f"the disk is full at /w/a.tar; {ROOM}"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), f"the disk is full; {ROOM}"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/w"), f"the disk quota is used up at /w; {ROOM}"),
        (
            MlflowException("(sqlite3.OperationalError) database or disk is full\n[SQL: ...]"),
            f"the disk is full; {ROOM}",
        ),
        # Of the same number, but about reading.
        (OSError(errno.EFBIG, "larger than 512 MiB", "/w"), "OSError: [Errno 27] larger than 512 MiB: '/w'"),
        (
            MlflowException(
                "API request to http://h:5000/api/2.0/mlflow/runs/create failed with exception "
                "HTTPConnectionPool(host='h', port=5000): Max retries exceeded"
            ),
            "the tracking server http://h:5000 does not answer; start it or mend the network, then run again",
        ),
        (UserError("the disk is full of sand"), "the disk is full of sand"),
    ],
)
def test_one_line__what_a_person_can_mend(error: Exception, expected: str) -> None:
    assert one_line(error) == expected
