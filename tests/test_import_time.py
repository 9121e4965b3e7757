"""What importing loads: `import octavo`, the server and the command line must not pull in torch."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "triton", "transformers")


@pytest.mark.parametrize(
    "module",
    [
        "octavo",
        "octavo.config",
        "octavo.cli",
        "octavo.server.app",
        "octavo.server.serve",
        "octavo.entrypoints.openai.api_server",
    ],
)
def test_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_octavo_loads_little() -> None:
    """Counted in modules rather than milliseconds, which depend on the machine."""
    code = "import sys; before = set(sys.modules); import octavo; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout
    assert "'octavo'" in loaded
    assert "octavo._core" not in loaded
    assert "numpy" not in loaded
    assert "aiohttp" not in loaded


def test_lazy_names_are_there() -> None:
    code = "import octavo; print(octavo.SamplingParams.__name__, octavo.EngineConfig.__name__, 'LLM' in dir(octavo))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["SamplingParams", "EngineConfig", "True"]


def test_unknown_names_are_refused() -> None:
    import octavo

    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = octavo.nope
