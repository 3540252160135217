"""The part in C, optional: without a compiler the installation goes on, and Pillow resizes.

The rest is in pyproject.toml.
"""

import sysconfig

from setuptools import Extension, setup

# One file for every Python from 3.11 on, but for those without a global lock, which have no such interface.
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            "llava_kd.data.pixels._resample",
            ["llava_kd/data/pixels/_resample.c"],
            depends=["llava_kd/data/pixels/resample.h"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if STABLE else [],
            extra_compile_args=["-O3"],
            py_limited_api=STABLE,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE else {},
)
