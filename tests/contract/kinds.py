"""The kinds of stores that the contract is tried on, with the markers that their servers need."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest


def _at_hand(program: str) -> bool:
    return bool(shutil.which(program)) or (Path(sys.executable).parent / program).exists()


# Besides those that everybody tries: each where it is there.
_OTHERS = {
    "seaweedfs": _at_hand("weed"),
    "minio": _at_hand("minio"),
    "named": bool(os.environ.get("TIERFS_TEST_S3")),
}
S3_KINDS = [
    pytest.param("rclone", marks=pytest.mark.s3),
    pytest.param("moto", marks=pytest.mark.s3),
    pytest.param("versitygw", marks=pytest.mark.s3),
    pytest.param("rgw", marks=[pytest.mark.s3, pytest.mark.rgw]),
    *(pytest.param(kind, marks=pytest.mark.s3) for kind, there in _OTHERS.items() if there),
]
KINDS = ["memory", "directory", "wrapped", *S3_KINDS]
