"""A head that shares the embedding's table: which of the two a checkpoint holds, and whether they are
one.

As in transformers 5: the tensors decide, where `tie_word_embeddings` says that they are one.
"""

import logging
from dataclasses import replace

from octavo.model_config import ModelConfig, ModelError
from octavo.weights.safetensors import SafetensorsSource

logger = logging.getLogger(__name__)

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def settle_head(config: ModelConfig, source: SafetensorsSource) -> ModelConfig:
    """The config as the tensors want it: a head of its own where the file has one that differs from
    the embedding. Raises `ModelError` where the two have different shapes.
    """
    shapes = source.shapes()
    if not config.tie_word_embeddings or HEAD not in shapes:
        return config
    if TABLE not in shapes:
        source.call(HEAD, TABLE)
        return config
    if shapes[HEAD] != shapes[TABLE]:
        raise ModelError(
            f"{source.name}: {HEAD}: shape {list(shapes[HEAD])}, but tie_word_embeddings makes it one with {TABLE} of "
            f"shape {list(shapes[TABLE])}"
        )
    if source.equal(HEAD, TABLE):
        return config
    logger.warning("%s: %s differs from %s and is kept, although tie_word_embeddings is true", source.name, HEAD, TABLE)
    return replace(config, tie_word_embeddings=False)
