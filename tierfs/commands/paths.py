"""The type of arguments that are paths."""

from __future__ import annotations

from typing import Any

import click


class _SomePath(click.Path):
    """Any path but the empty one, which would mean the working directory: it is what a script gives whose
    variable is not set, and `adopt` must not turn that into a volume."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not value:
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


PATH = _SomePath(readable=False)
