"""TierFS: what you use stays on the local disk, what you do not use drifts to object storage."""

__version__ = "0.1.0"
