"""Triton's interpreter without the work it does over and over; the results are the same."""

import contextlib
import dataclasses

try:
    import triton.language as tl
    from triton.runtime import interpreter
except ImportError:
    interpreter = None
else:
    BUILDER = interpreter.interpreter_builder
    _patch_lang = interpreter._patch_lang


def _patch_lang_once(function):
    """It searches the whole language for what to replace, at each call of a device function inside a kernel too."""
    languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    if any(tl.core.is_builtin(language.load) for language in languages):
        return _patch_lang(function)
    return interpreter._LangPatchScope()


@contextlib.contextmanager
def overflow_checked(check=True):
    """Whether each sum and product of 32-bit integers is computed in 64 bits as well and compared: half the time."""
    if interpreter is None:
        yield
        return
    before = BUILDER.options
    BUILDER.options = dataclasses.replace(before, sanitize_overflow=check)
    try:
        yield
    finally:
        BUILDER.options = before


def speed_up():
    if interpreter is None:
        return
    interpreter._patch_lang = _patch_lang_once
    BUILDER.options = dataclasses.replace(BUILDER.options, sanitize_overflow=False)
