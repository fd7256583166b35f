"""What can go wrong with a model or a run, each with the code that the protocol carries.

EngineError
 ├─ LoadError        becomes `LoadFailed`: bad_model_file, unsupported_architecture, unsupported_tokenizer,
 │                  out_of_memory, ...
 ├─ RunError         becomes `RunFailed`: prompt_too_long, bad_parameters, engine_busy, ...
 └─ DeviceUnusable   becomes `Unusable`: no_device, unsupported_gpu, self_test_failed, bad_configuration

Anything else that is raised on the device's thread is a device failure or a bug, and ends the process.
"""

from __future__ import annotations

MESSAGE_MAX = 1500  # characters: a hostile file may have names of megabytes


class EngineError(Exception):
    """`code` is for machines, the message for people; of a very long one the middle is left out."""

    def __init__(self, code: str, message: str) -> None:
        if len(message) > MESSAGE_MAX:
            message = f"{message[: MESSAGE_MAX // 2]} ... {message[-MESSAGE_MAX // 2 :]}"
        super().__init__(message)
        self.code = code


class LoadError(EngineError):
    """A model that cannot be loaded here."""


class RunError(EngineError):
    """A run that cannot be served; `retryable` where another worker or a later try may do."""

    def __init__(self, code: str, message: str, retryable: bool = False) -> None:
        super().__init__(code, message)
        self.retryable = retryable


class DeviceUnusable(EngineError):
    """A device that this process cannot own."""
