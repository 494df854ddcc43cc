"""Fixtures of the conformance tests: an empty place for each test, on volumes that all share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import places
import pytest
from harness import Scratch, Volume
from places import Place


@pytest.fixture(scope="session")
def volumes(area: Scratch) -> Iterator[dict[str, Volume]]:
    """One volume a binding for the whole run, mounted when the first test asks for it."""
    made: dict[str, Volume] = {}
    try:
        yield made
    finally:
        for volume in made.values():
            volume.discard()


@pytest.fixture(params=places.RESIDENT)
def place(request: pytest.FixtureRequest, area: Scratch, volumes: dict[str, Volume]) -> Iterator[Place]:
    """For what does not regard content."""
    made = places.make(request.param, area, volumes)
    yield made
    shutil.rmtree(made.path)


@pytest.fixture(params=places.STATES)
def settled(request: pytest.FixtureRequest, area: Scratch, volumes: dict[str, Volume]) -> Iterator[Place]:
    """For what content is used in: each state in which a file may be."""
    made = places.make(request.param, area, volumes)
    yield made
    shutil.rmtree(made.path)
