"""Errors that cross between the parts. Those of the Rust core (`OverloadedError` and so on) are in
`octavo._core`.
"""


class EngineDeadError(RuntimeError):
    """The device or the engine thread is lost; every stream has been ended with an error. Restart
    the process.
    """


class FieldError(ValueError):
    """A value that cannot be used; `param` is its field, `code` a stable word."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code
