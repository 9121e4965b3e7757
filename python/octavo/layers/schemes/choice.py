"""Which scheme holds which matrix."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo import _core
from octavo.kernels import ops
from octavo.kernels.linear.int4_layout import DEPTH, ROWS
from octavo.layers.schemes.blocks import FLOATS, LEAVING, BlockScheme, BlockTable
from octavo.layers.schemes.cpu import HalfScheme, PackedScheme, has_fbgemm, has_onednn, widens_half
from octavo.layers.schemes.dense import DenseScheme, PlainScheme
from octavo.layers.schemes.formats.online import OnlineFormat
from octavo.layers.schemes.formats.stored import Format, ShapeOf, Stored
from octavo.layers.schemes.online import OnlineScheme
from octavo.layers.schemes.products import Int4Product, Product, UnpackedProduct, eight_bit_product
from octavo.layers.schemes.quantised import QuantisedScheme, SideBySide
from octavo.layers.schemes.scheme import PLAIN, InputForm, Matrix, Scheme
from octavo.model_config import ModelError


class Schemes:
    """Handed down while a model is built: what its numbers are, and the scheme of each matrix.

    This one keeps all weights plain.
    """

    between: InputForm = PLAIN
    """Of norms inside of the layers that no product reads."""
    leaving: InputForm = PLAIN
    """Of the norm behind the last layer: it makes tensors."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """dtype: of plain weights, and of hidden states unless `activation_dtype` says otherwise."""
        self.dtype = dtype
        self.device = device
        # On a CPU only weights and KV pages are 16-bit. Hidden states in bfloat16 turn near ties
        # round: SmolLM2 answers in French then. And FBGEMM's product takes and gives float32 for
        # nothing; rounding around each costs 4 ms of SmolLM2's 28 ms a token (two cores).
        self.activation_dtype = torch.float32 if device.type == "cpu" else dtype

    def hold(self, weight: Tensor) -> Any:
        """A norm's weight as its op takes it."""
        return weight

    def linear(self, matrix: Matrix) -> Scheme:
        """The scheme of one matrix, its tensors still on the `meta` device."""
        return self.plain(matrix)

    def table(self, name: str, rows: int, size: int) -> BlockTable | None:
        """The table of embeddings; None: a plain one."""
        return None

    def tied(self, matrix: Matrix) -> PlainScheme | BlockScheme:
        """The scheme of a head that multiplies by the table of embeddings."""
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


class BlockSchemes(Schemes):
    """Of a GGUF file on a CPU: every matrix stays in the file's blocks."""

    between, leaving = FLOATS, LEAVING

    def __init__(self) -> None:
        super().__init__(torch.float32, torch.device("cpu"))

    def hold(self, weight: Tensor) -> Any:
        return _core.Floats.of(weight)

    def linear(self, matrix: Matrix) -> Scheme:
        return BlockScheme(matrix)

    def table(self, name: str, rows: int, size: int) -> BlockTable | None:
        return BlockTable(name, rows, size)

    def tied(self, matrix: Matrix) -> PlainScheme | BlockScheme:
        return BlockScheme(matrix)


class QuantisedSchemes(Schemes):
    """Of a model whose matrices are in 4 or 8 bits, all of them or those that its config names."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        format_of: Callable[[str], Format | None],
        shape_of: ShapeOf = lambda name: None,
        *,
        judged: bool = False,
    ) -> None:
        """format_of: what the config says of a projection, None: it is plain. shape_of: of the
        file's tensors; without a file it has none. judged: as `OnlineScheme` has it.
        """
        super().__init__(dtype, device)
        if self.on_gpu and dtype == torch.float32:
            raise ModelError(
                "dtype = float32: quantised weights run in float16 or bfloat16 on a GPU; give --dtype bfloat16"
            )
        self.format_of = format_of
        self.shape_of = shape_of
        self.judged = judged

    @property
    def on_gpu(self) -> bool:
        """Whether products are those of the kernels."""
        return self.device.type == "cuda"

    def linear(self, matrix: Matrix) -> Scheme:
        forms = {self.form(name) for name in matrix.projections}
        if len(forms) > 1:
            return SideBySide(matrix, self.linear, self.form)
        (form,) = forms
        if form is None:
            return self.plain(matrix)
        self._check_device(form)
        made_by = partial(self._product, form, matrix.makes_logits)
        takes = input_form(form) if self.on_gpu else PLAIN
        refusal = gpu_refusal(matrix, form) if self.on_gpu else None
        if isinstance(form, OnlineFormat):
            return OnlineScheme(
                matrix,
                form,
                self.dtype,
                input_form=takes,
                make=made_by,
                make_plain=self.plain,
                refusal=refusal,
                judged=self.judged,
            )
        return QuantisedScheme(matrix, form, self.dtype, self.shape_of, input_form=takes, make=made_by, refusal=refusal)

    def form(self, name: str) -> Format | None:
        """The format of a projection: where the file has it plain, whatever the config says of its
        kind, it is plain.
        """
        form = self.format_of(name)
        if form is None or self.shape_of(f"{name}.{form.first}") is not None:
            return form
        return None if self.shape_of(f"{name}.weight") is not None else form

    def _check_device(self, form: Format) -> None:
        if self.device.type != "cuda" or form.weight_dtype != torch.float8_e4m3fn:
            return
        capability = torch.cuda.get_device_capability(self.device)
        if capability < (8, 9):
            raise ModelError(
                f"{form}: fp8 needs a GPU of compute capability 8.9, this one has {capability[0]}.{capability[1]}; "
                "use int8 or int4 weights"
            )

    def _product(self, form: Format, makes_logits: bool, stored: list[Stored], bias: Tensor | None) -> Product:
        if not self.on_gpu:
            rows = {one.name: one.rows for one in stored}
            plain = self.plain(Matrix(rows, stored[0].inputs, bias is not None, makes_logits))
            return UnpackedProduct(stored, bias, plain, form.input_dtype)
        if form.weight_dtype == torch.uint8:
            return Int4Product(stored, bias, self.dtype)
        return eight_bit_product(stored, bias, self.dtype, form)


def input_form(form: Format) -> InputForm:
    """What the layer before a product makes of its output, on a GPU."""
    dtype = form.row_dtype
    if dtype is None:
        return PLAIN
    return InputForm(
        rms_norm=partial(_with, ops.rms_norm_quant, dtype),
        add_rms_norm=partial(_with, ops.add_rms_norm_quant, dtype),
        silu_and_mul=partial(_with, ops.silu_and_mul_quant, dtype),
        gelu_tanh_and_mul=partial(_with, ops.gelu_tanh_and_mul_quant, dtype),
        from_plain=partial(_with, ops.quantize_rows, dtype),
    )


def _with(op: Callable[..., Any], dtype: torch.dtype, *args: Any) -> Any:
    return op(*args, dtype)


def gpu_refusal(matrix: Matrix, form: Format) -> str | None:
    """Why the kernels cannot multiply by a matrix of this shape."""
    inputs, group = matrix.in_features, form.group_of(matrix.in_features)
    if inputs % group:
        return None  # the format says so itself
    if form.weight_dtype == torch.uint8:
        rows = [rows for rows in matrix.projections.values() if rows % ROWS]
        if rows:
            return f"{rows[0]} outputs: 4-bit weights on a GPU need a multiple of {ROWS}"
        if inputs % DEPTH:
            return f"{inputs} inputs: 4-bit weights on a GPU need a multiple of {DEPTH}"
        if group != 32 and group % DEPTH:
            return f"groups of {group}: 4-bit weights on a GPU need 32 or a multiple of {DEPTH}"
    elif group != inputs and group % 32:
        return f"groups of {group}: 8-bit weights on a GPU need a multiple of 32"
    return None
