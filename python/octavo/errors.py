"""Errors that cross between the parts. Those of the Rust core (`OverloadedError` and so on) are in
`octavo._core`.
"""


class EngineDeadError(RuntimeError):
    """The device or the engine thread is lost; every stream has been ended with an error. Restart
    the process.
    """
