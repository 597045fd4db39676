"""MLServer's codecs: decoding is `preprocess.parse`, encoding `postprocess.serialize`.

Models call them inside `predict`, by `self.decode(...)`, by a decorator or by name; a codec that
calls another one counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import local
from typing import Any

from mlserver.codecs import base
from mlserver.codecs.decorator import SignatureCodec

from stagescope.middleware.hooks.hook import PATCHED, wrap
from stagescope.middleware.hooks.mlserver_rest import PARSE, SERIALIZE
from stagescope.middleware.marks import marked
from stagescope.middleware.stage import stage

_METHODS = {
    "decode_input": PARSE,
    "decode_request": PARSE,
    "encode_output": SERIALIZE,
    "encode_response": SERIALIZE,
}
_inside = local()


def time_codecs() -> None:
    """Time the codecs that are registered, and those that will be."""
    registry = base._codec_registry
    for codec in [*registry._input_codecs.values(), *registry._request_codecs.values()]:
        _time_codec(codec)
    _time_codec(SignatureCodec)
    for name in ("register_input_codec", "register_request_codec"):
        wrap(base._CodecRegistry, name, _registering)


def _registering(register: Callable[..., Any]) -> Callable[..., Any]:
    def register_timed(self: Any, content_type: str, codec: Any) -> None:
        _time_codec(codec)
        register(self, content_type, codec)

    return register_timed


def _time_codec(codec: Any) -> None:
    kind = codec if isinstance(codec, type) else type(codec)
    for owner in kind.__mro__:
        for name, code in _METHODS.items():
            _time(owner, name, code)


def _time(owner: type, name: str, code: int) -> None:
    found = vars(owner).get(name)
    function = found.__func__ if isinstance(found, classmethod) else found
    if not callable(function) or hasattr(function, PATCHED):
        return
    timed = wraps(function)(_timed(function, code))
    setattr(timed, PATCHED, function)
    setattr(owner, name, classmethod(timed) if isinstance(found, classmethod) else timed)


def _timed(function: Callable[..., Any], code: int) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if getattr(_inside, "codec", False):
            return function(*args, **kwargs)
        _inside.codec = True
        try:
            with stage.of_code(code):
                return function(*args, **kwargs)
        finally:
            _inside.codec = False

    return marked(run, code)
