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
            changed = (
                _modified("AWS_SHARED_CREDENTIALS_FILE", "credentials"),
                _modified("AWS_CONFIG_FILE", "config"),
            )
            if self.latest is None or changed != self._read_at:
                region = self._region or self._new_session().region_name or "us-east-1"
                self.latest = self._new_session(region_name=region)
                self._read_at = changed
            return self.latest

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


def _modified(variable: str, name: str) -> int:
    """When an AWS configuration file last changed, in nanoseconds; 0 where there is none."""
    path = os.path.expanduser(os.environ.get(variable, f"~/.aws/{name}"))
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0
