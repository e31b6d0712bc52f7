"""Files on any fsspec location: reading, publishing whole or not at all, and their sums."""

from pipeline.storage.json_text import parse_json
from pipeline.storage.publish import PARTIAL, publish_bytes, publish_folder, publish_json, publishing, remove_files
from pipeline.storage.uri import (
    MAX_READ_BYTES,
    exists,
    fetch_file,
    fetch_folder,
    file_digest,
    file_size,
    filesystem_of,
    is_local,
    join,
    list_names,
    local_path,
    open_uri,
    read_bytes,
    read_json,
)

__all__ = [
    "MAX_READ_BYTES",
    "PARTIAL",
    "exists",
    "fetch_file",
    "fetch_folder",
    "file_digest",
    "file_size",
    "filesystem_of",
    "is_local",
    "join",
    "list_names",
    "local_path",
    "open_uri",
    "parse_json",
    "publish_bytes",
    "publish_folder",
    "publish_json",
    "publishing",
    "read_bytes",
    "read_json",
    "remove_files",
]
