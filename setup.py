"""Builds the compiled part where there is a compiler; without it everything works, more slowly."""

import os
import runpy

from setuptools import Extension, setup

HERE = os.path.dirname(os.path.abspath(__file__))
compiled = runpy.run_path(os.path.join(HERE, "tierfs", "fuse", "compiled.py"))
sources = compiled["fingerprint"](os.path.join(HERE, "tierfs"))
setup(
    ext_modules=[
        Extension(
            "tierfs.fuse._hot",
            [f"tierfs/{name}" for name in compiled["C"]],
            depends=["tierfs/fuse/_hot.h"],
            define_macros=[("TIERFS_SOURCES", f'"{sources}"')],
            extra_compile_args=["-O2"],
            optional=True,
        )
    ],
    # What is there may be of sources that have changed without the compiler's own being newer.
    options={"build_ext": {"force": True}},
)
