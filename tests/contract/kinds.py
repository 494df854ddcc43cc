"""The kinds of stores that the contract is tried on, with the markers that their servers need."""

from __future__ import annotations

import pytest

S3_KINDS = [
    pytest.param("rclone", marks=pytest.mark.s3),
    pytest.param("moto", marks=pytest.mark.s3),
    pytest.param("versitygw", marks=pytest.mark.s3),
    pytest.param("rgw", marks=[pytest.mark.s3, pytest.mark.rgw]),
    pytest.param("seaweedfs", marks=pytest.mark.s3),
    pytest.param("minio", marks=pytest.mark.s3),
    pytest.param("named", marks=pytest.mark.s3),
]
KINDS = ["memory", "directory", "wrapped", *S3_KINDS]
