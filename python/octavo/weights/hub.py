"""Models by hub id, through `huggingface_hub` (an optional extra) and its cache. Weights in
safetensors only.
"""

import errno
import glob
import re
from pathlib import Path

from octavo.model_config import ModelError
from octavo.weights.quantization.config import OWN_FILES
from octavo.weights.safetensors import INDEX, SINGLE, shard_names

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TEXTS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    INDEX,
    *OWN_FILES,
]
"""What a model's folder is read for besides its weights. Of those many repositories hold a second
copy in another form (`consolidated.safetensors`, subfolders), so only what the index names is
fetched.
"""


def is_hub_id(model: str) -> bool:
    """Whether a text has the form `name` or `owner/name`."""
    return _HUB_ID.fullmatch(model) is not None and ".." not in model


def download(model: str) -> Path:
    """The local folder of a hub model, fetched where the cache lacks it. Raises `ModelError` that
    says what to do.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise ModelError(
            f"model {model!r}: not a local folder or .gguf file; for hub ids run: pip install 'octavo[hub]'"
        ) from None
    try:
        folder = Path(huggingface_hub.snapshot_download(model, allow_patterns=_TEXTS))
        index = folder / INDEX
        weights = [glob.escape(name) for name in shard_names(index)] if index.exists() else [SINGLE]
        # Of the same commit, should the repository change in between.
        revision = folder.name if folder.parent.name == "snapshots" else None
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=weights))
    except ModelError:
        raise
    except Exception as error:  # the hub's and the HTTP client's many errors; each means the same to the user
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            raise ModelError(
                f"model {model!r}: {huggingface_hub.constants.HF_HUB_CACHE} cannot be written ({error.strerror}): set "
                "HF_HOME to a folder that can be written and has room"
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model {model!r}: not a local folder or .gguf file, and not to be had from the hub "
            f"({type(error).__name__}: {reason[:200]}); check the name and the network, or give a local path"
        ) from None
