"""Which scheme holds which matrix."""

import torch

from octavo.layers.schemes.cpu import HalfScheme, PackedScheme, has_fbgemm, has_onednn, widens_half
from octavo.layers.schemes.dense import DenseScheme, PlainScheme
from octavo.layers.schemes.scheme import Matrix, Scheme


class Schemes:
    """Handed down while a model is built: what its numbers are, and the scheme of each matrix.

    This one keeps all weights plain. A quantised model has a subclass that overrides `linear`, by
    name where a checkpoint leaves some matrices plain.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """dtype: of plain weights, and of hidden states unless `activation_dtype` says otherwise."""
        self.dtype = dtype
        self.device = device
        # On a CPU only weights and KV pages are 16-bit. Hidden states in bfloat16 turn near ties
        # round: SmolLM2 answers in French then. And FBGEMM's product takes and gives float32 for
        # nothing; rounding around each costs 4 ms of SmolLM2's 28 ms a token (two cores).
        self.activation_dtype = torch.float32 if device.type == "cpu" else dtype

    def linear(self, matrix: Matrix) -> Scheme:
        """The scheme of one matrix, its tensors still on the `meta` device."""
        return self.plain(matrix)

    def plain(self, matrix: Matrix) -> PlainScheme:
        """The fastest scheme of weights that are not quantised."""
        if self.device.type == "cpu":
            if self.dtype == torch.float32 and has_onednn():
                return PackedScheme(matrix, self.dtype)
            # torch's own 16-bit product rounds what it gives, and logits are compared.
            if widens_half(self.dtype) or (matrix.makes_logits and has_fbgemm() and self.dtype != torch.float32):
                return HalfScheme(matrix, self.dtype)
        return DenseScheme(matrix, self.dtype)
