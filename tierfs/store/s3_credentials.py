"""boto3's credentials, as obstore wants them. Receives boto3's session class from s3.py."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from tierfs.errors import StoreDeniedError
from tierfs.store.s3_errors import NO_CREDENTIALS

_CREDENTIALS_FOR = timedelta(seconds=60)  # then asked again: notices renewed and rewritten credentials

# What botocore says of credentials from its files: the variable that names the file, and its own name.
_FILES = {
    "shared-credentials-file": ("AWS_SHARED_CREDENTIALS_FILE", "credentials"),
    "config-file": ("AWS_CONFIG_FILE", "config"),
}


class Credentials:
    """boto3's chain for obstore: environment, profile, SSO, instance role; asked again when a file changes."""

    def __init__(self, region: str, new_session: Callable[..., Any]) -> None:
        self._region = region
        self._new_session = new_session
        self._lock = threading.Lock()
        self._read_at: tuple[int, ...] = ()
        self.latest: Any = None

    def session(self) -> Any:
        """The present boto3 session. Raises botocore's errors where the configuration makes no sense."""
        with self._lock:
            changed = tuple(_modified(*file) for file in _FILES.values())
            if self.latest is None or changed != self._read_at:
                region = self._region or self._new_session().region_name or "us-east-1"
                self.latest = self._new_session(region_name=region)
                self._read_at = changed
            return self.latest

    def origin(self) -> str:
        """Where they come from, as a person would say it; "" where that is not known."""
        session = self.latest
        found = session.get_credentials() if session is not None else None
        if found is None:
            return ""
        if found.method == "env":
            return f"the environment (AWS_ACCESS_KEY_ID ends in {found.access_key[-4:]})"
        file = _FILES.get(found.method)
        if file is not None:
            return f"{_file(*file)}, profile {session.profile_name}, key ending in {found.access_key[-4:]}"
        return f"boto3's provider {found.method}"

    def __call__(self) -> Any:
        """What obstore asks for, from its own thread."""
        found = self.session().get_credentials()
        if found is None:
            raise StoreDeniedError(NO_CREDENTIALS)
        frozen = found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_FOR,
        }


def _file(variable: str, name: str) -> str:
    return os.path.expanduser(os.environ.get(variable, f"~/.aws/{name}"))


def _modified(variable: str, name: str) -> int:
    """When an AWS configuration file last changed, in nanoseconds; 0 where there is none."""
    try:
        return os.stat(_file(variable, name)).st_mtime_ns
    except OSError:
        return 0
