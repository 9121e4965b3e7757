"""The levels of instructions at which the CPU's ops are tested."""

import pytest

from octavo import _core

LEVELS = ("portable", "avx2", "avx512")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    """Each that this processor has."""
    if request.param not in _core.cpu_levels():
        pytest.skip(f"this processor has {', '.join(_core.cpu_levels())}")
    return str(request.param)
