"""Which tensors hold NaN or infinite numbers, found while they are loaded.

A CPU looks at a tensor on a second thread while the next one is read: one after the other it is 7 to
12 % of a load. A GPU is told to look, and nothing waits for it until the end.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from octavo._core import BlockMatrix

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class FiniteCheck:
    """Takes tensors as they are filled. To be used in a `with` statement, which ends its thread."""

    def __init__(self) -> None:
        self._found: dict[str, Callable[[], Tensor]] = {}
        self._broken: list[str] = []
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[Tensor] | None = None
        # Torch's own team of threads would be a third. The setting is also that of threads to come,
        # so it is set back.
        threads = torch.get_num_threads()
        self._thread.submit(torch.set_num_threads, 1).result()
        torch.set_num_threads(threads)

    def __enter__(self) -> "FiniteCheck":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)

    def look(self, name: str, tensor: Tensor) -> None:
        """Looks at a tensor that is filled now. Whole numbers, and codes of other types, always
        are finite.
        """
        if tensor.dtype not in _FLOATS:
            return
        if tensor.device.type == "cpu":
            if self._last is not None:
                self._last.result()  # so that at most one tensor is kept that its layer has let go of
            self._last = self._thread.submit(_extremes, tensor)
            self._found[name] = self._last.result
        else:
            extremes = _extremes(tensor)
            self._found[name] = lambda: extremes

    def look_at_blocks(self, name: str, blocks: "BlockMatrix") -> None:
        """Looks at the scales of a tensor that stays in its file: all numbers are codes times them."""
        if not blocks.is_finite():
            self._broken.append(name)

    def broken(self) -> list[str]:
        """Names of the tensors that are not finite."""
        if not self._found:
            return self._broken
        finite = torch.stack([extremes() for extremes in self._found.values()]).isfinite().all(dim=1)
        return self._broken + [
            name for name, is_finite in zip(self._found, finite.tolist(), strict=True) if not is_finite
        ]


def _extremes(tensor: Tensor) -> Tensor:
    """[2] float32: the least and the greatest number, or NaN where there is any."""
    return torch.stack(torch.aminmax(tensor)).float()
