"""A blend of the user's own: one Python function, compiled for the CPU and into the compositing kernel on a card.

The function gives a composite's value from ``(fg, bg, alpha, x, y)``, all of them integers: the foreground's and the
background's value of one channel, 0 to 255, the foreground's straight alpha, 0 to 255, and the pixel's place in the
frame. It is called for every pixel of the foreground's rectangle, also where alpha is 0, and for each of the three
channels. What it returns is cut to 0 to 255; a fraction is dropped then, and what is not a number (NaN) is 0.

Both compilers are Numba's, with the same rules: whole numbers have 64 bits, a division by 0 raises nothing (``// 0``
and ``% 0`` are 0), an integer to the power of an integer is an integer (``x ** -1`` is 0 for x from 2 on), an index
out of range is not noticed, global and enclosing variables are constants. Integer arithmetic is exact, so the bytes
are the same everywhere. So they are with floats, as long as each operation is one
that IEEE 754 defines (``+ - * /``, comparisons, conversions, ``math.sqrt``): neither side reorders or joins them, nor
rounds to another precision. ``exp``, ``sin`` and the like come from two libraries, as do ``**``, ``//`` and ``%`` of
floats; they can differ in the last bit.

On a card: Numba-CUDA compiles the function to LTO-IR, nvJitLink joins it with that of ``kernels/composite.cu``, where
it is inlined.
"""

from __future__ import annotations

import dis
import inspect
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from importlib import resources
from types import CodeType, ModuleType
from typing import Any

import numba
import numpy as np

from gpufgbg.exceptions import DeviceError, OptionError
from gpufgbg.quick_division import quotient, with_quick_division

__all__ = ["Blend"]

_ARGUMENTS = ("fg", "bg", "alpha", "x", "y")
_SYMBOL = "gpufgbg_blend"  # of kernels/composite.cu
_OLDEST_CARD = (7, 5)  # LTO-IR for a card is fit for all later ones, too
# Steps of Python's bytecode: of try, and of with, which has them too
_TRIES, _WITHS = {"PUSH_EXC_INFO", "SETUP_FINALLY"}, {"WITH_EXCEPT_START", "SETUP_WITH"}
_MISSING = "a blend on a card needs Numba-CUDA (pip install 'gpufgbg[blend]'), or use device cpu"


class Blend:
    """A blend made of a Python function; `gpufgbg.Compositor` takes either.

    Compiling takes a second or so on each kind of device: keep the object to have it done once. It never changes:
    copies are the object itself. Pickled, it is its function, which another process imports and compiles again.

    Parameters
    ----------
    function : callable
        ``function(fg, bg, alpha, x, y) -> number``; see the module's description.

    Attributes
    ----------
    function : callable
        The Python function.
    name : str
        Its name.
    cpu : Numba's dispatcher
        It cut to a byte, for the CPU: five int32 -> int32, 0 to 255.

    Raises
    ------
    OptionError
        It takes other arguments, is async, can't be compiled, returns no number, or raises or catches exceptions,
        itself or in a function that it calls.

    Examples
    --------
    >>> def multiply(fg, bg, alpha, x, y):
    ...     return (bg * (255 - alpha) * 255 + bg * fg * alpha) // 65025
    >>> Blend(multiply).cpu(100, 51, 255, 0, 0)
    20
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._given = function
        self.function = _checked(function)
        self.name = printable_name(self.function)
        self._render: Any = None
        self._cubins: dict[int, bytes] = {}
        self._ltoir: bytes | None = None
        self._lock = threading.Lock()
        inner = numba.njit(inline="always", nogil=True, boundscheck=False, error_model="numpy")(self.function)
        cut = numba.njit(nogil=True, boundscheck=False, error_model="numpy", forceinline=True)(_cutting(inner))
        self.cpu = cut
        _check_result(self.function, self.name)
        int32 = numba.types.int32
        try:
            cut.compile((int32,) * 5)
        except Exception as error:  # whatever Numba meets inside
            raise _refusal(self.name, error) from None

    def __repr__(self) -> str:
        return f"Blend({self.name})"

    def __copy__(self) -> Blend:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Blend:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle; `OptionError` where the function can't be had by its name in another process."""
        try:
            pickle.dumps(self._given)
        except (pickle.PicklingError, AttributeError, TypeError):
            raise OptionError(
                "blend",
                f"{self.name} can't go to a process that is not forked: expected a function that a module defines at "
                "its top level (no lambda, no inner function), or forked processes",
            ) from None
        return Blend, (self._given,)

    def cpu_render(self) -> Any:
        """The CPU backend's loops with this blend, see `gpufgbg.backends.cpu_blend.make_render`. Made once."""
        from gpufgbg.backends.cpu_blend import make_render

        with self._lock:
            if self._render is None:
                self._render = make_render(self.cpu)
            return self._render

    def link(self, cc: int) -> bytes:
        """Machine code of ``kernels/composite.cu`` with this blend; no card is needed. Made once for each ``cc``.

        Parameters
        ----------
        cc : int
            Compute capability, for example 90.

        Returns
        -------
        cubin : bytes
            Has the kernels ``composite`` and ``composite_placed``.

        Raises
        ------
        DeviceError
            Numba-CUDA or nvJitLink is missing or does not know the card.
        OptionError
            The function can't be compiled for cards, though for the CPU.
        """
        with self._lock:
            if cc not in self._cubins:
                if self._ltoir is None:
                    self._ltoir = _compile_ltoir(self.function, self.name)
                self._cubins[cc] = _link(cc, self._ltoir)
            return self._cubins[cc]


def printable_name(function: Any) -> str:
    """A function's name for messages."""
    return str(getattr(function, "__name__", type(function).__name__))


def _checked(function: Any) -> Callable[..., Any]:
    """The Python function itself, out of Numba's wrapper where it is in one."""
    function = getattr(function, "py_func", function)
    expected = f"expected a Python function of ({', '.join(_ARGUMENTS)})"
    if not inspect.isfunction(function):
        raise OptionError("blend", f"got {type(function).__name__}, {expected}")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise OptionError("blend", f"got async {printable_name(function)}, {expected}")
    parameters = inspect.signature(function).parameters.values()
    plain = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    if len(parameters) != len(_ARGUMENTS) or not plain:
        found = ", ".join(map(str, parameters))
        raise OptionError("blend", f"{printable_name(function)} takes ({found}), {expected}")
    name = printable_name(function)
    for called in _calls(function):
        who = name if called is function else f"{name} calls {printable_name(called)}, which"
        steps = {step.opname for code in _codes(called.__code__) for step in dis.get_instructions(code)}
        if "RAISE_VARARGS" in steps:
            raise OptionError("blend", f"{who} raises exceptions, which a card can't: return a value")
        if steps & _TRIES and not steps & _WITHS:  # Numba tells what is wrong with a with
            raise OptionError("blend", f"{who} has a try, which a card can't: test for what would raise")
    return function


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions inside of it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _calls(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """A function and the functions of Numba's that it names, and what these name: variables, or those of modules."""
    seen: set[int] = set()
    waiting: list[Any] = [function]
    while waiting:
        caller = waiting.pop()
        if id(caller) in seen:
            continue
        seen.add(id(caller))
        yield caller
        names = {name for code in _codes(caller.__code__) for name in code.co_names}
        named = [caller.__globals__.get(name) for name in names]
        for cell in caller.__closure__ or ():
            with suppress(ValueError):  # empty
                named.append(cell.cell_contents)
        modules: list[ModuleType] = []
        for value in named:  # it grows
            if isinstance(value, ModuleType):
                if value not in modules:
                    modules.append(value)
                    named.extend(vars(value).get(name) for name in names)
            elif inspect.isfunction(called := getattr(value, "py_func", None)):
                waiting.append(called)


def _check_result(function: Callable[..., Any], name: str) -> None:
    """`OptionError` where the function does not compile or returns no number."""
    types = numba.types
    try:
        plain = numba.njit(nogil=True, boundscheck=False, error_model="numpy")(function)
        plain.compile((types.int32,) * 5)
        result = plain.overloads[(types.int32,) * 5].signature.return_type
    except Exception as error:  # whatever Numba meets inside
        raise _refusal(name, error) from None
    if not isinstance(result, types.Integer | types.Float | types.Boolean):
        raise OptionError("blend", f"{name} returns {result}, expected a number from every path")


def _refusal(name: str, error: Exception, for_what: str = "") -> OptionError:
    """What Numba says, in one line: the first that tells what is wrong, and where."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # Numba colours its messages where colorama is installed
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Failed in ", "File ", "- "))] or [""]
    said = said[: 2 if said[0].endswith(":") else 1]  # a heading alone says too little
    problem = " ".join(" ".join(said).replace(">>>", "").split())
    if not isinstance(error, numba.core.errors.NumbaError):
        problem = f"{type(error).__name__}: {problem}"
    where = next((line[line.rindex("line ") :].rstrip(":") for line in lines if line.startswith("File ")), "")
    return OptionError("blend", f"{name} can't be compiled{for_what}{', ' + where if where else ''}: {problem}")


def _cutting(inner: Any) -> Callable[..., Any]:
    """``inner`` cut to a byte, for either compiler; `inner` is one of its functions."""
    int32 = numba.int32

    def gpufgbg_blend(fg, bg, alpha, x, y):  # type: ignore[no-untyped-def]
        value = inner(fg, bg, alpha, x, y)
        if not value > 0:  # a NaN, too
            return int32(0)
        if value > 255:
            return int32(255)
        return int32(value)

    return gpufgbg_blend


def _compile_ltoir(function: Callable[..., Any], name: str) -> bytes:
    try:
        import numba_cuda  # else Numba's own, older numba.cuda would be taken
        from numba import cuda
    except ImportError:
        raise DeviceError(_MISSING) from None
    quick = with_quick_division(function, cuda.jit(device=True, inline="always")(quotient))
    if quick is not None:
        with suppress(Exception):  # such as that a dividend is no integer: the function as it is tells what is wrong
            return _ltoir(quick)
    try:
        return _ltoir(function)
    except Exception as error:  # whatever Numba meets inside
        if type(error).__name__ == "CudaSupportError":  # looks for a card, to compile what is called
            said = " ".join(str(error).split()).rstrip(" :")
            raise DeviceError(f"blend: {name} calls functions that Numba compiles on a card alone: {said}") from None
        if isinstance(error, AttributeError) and "module 'numpy'" in str(error):  # Numba-CUDA's own use of NumPy
            raise DeviceError(
                f"blend: Numba-CUDA {numba_cuda.__version__} does not go with NumPy {np.__version__} ({error}): "
                "pip install 'gpufgbg[blend]' takes versions that go together"
            ) from None
        raise _refusal(name, error, " for a card") from None


def _ltoir(function: Callable[..., Any]) -> bytes:
    from numba import cuda

    # Inlined by Numba itself: a call between two device functions would make it look for a card.
    inner = cuda.jit(device=True, inline="always")(function)
    code, _ = cuda.compile(
        _cutting(inner), numba.int32(*(numba.int32,) * 5), device=True, abi="c", abi_info={"abi_name": _SYMBOL},
        cc=_OLDEST_CARD, output="ltoir",
    )  # fmt: skip
    return bytes(code)


@lru_cache(1)
def _kernels() -> bytes:
    """LTO-IR of ``kernels/composite.cu``, for a function yet to come."""
    path = resources.files("gpufgbg") / "_kernels" / "composite_blend.ltoir"
    if not path.is_file():
        raise DeviceError(f"no kernels in this build ({path.name} is missing): install gpufgbg where nvcc is")
    return path.read_bytes()


def _link(cc: int, function: bytes) -> bytes:
    """Machine code for compute capability ``cc`` of the kernels and the function's LTO-IR."""
    kernels = _kernels()
    try:
        from cuda.bindings import nvjitlink
    except ImportError:
        raise DeviceError(_MISSING) from None
    # As the CPU rounds: no multiplication and addition in one, no shortcut for division or tiny numbers.
    options = [f"-arch=sm_{cc}", "-lto", "-O3", "-fma=0", "-prec-div=1", "-prec-sqrt=1", "-ftz=0"]
    linker = None
    try:
        linker = nvjitlink.create(len(options), options)
        kind = nvjitlink.InputType
        nvjitlink.add_data(linker, kind.FATBIN, kernels, len(kernels), "composite")
        nvjitlink.add_data(linker, kind.LTOIR, function, len(function), "blend")
        nvjitlink.complete(linker)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(linker))
        nvjitlink.get_linked_cubin(linker, cubin)
    except Exception as error:  # nvJitLink's, or of a library that is not found
        said = _log(nvjitlink, linker) or str(error).partition("\n")[0]
        raise DeviceError(f"blend: nvJitLink can't make code for compute capability {cc}: {said}") from None
    finally:
        if linker is not None:
            nvjitlink.destroy(linker)
    return bytes(cubin)


def _log(nvjitlink: Any, linker: Any) -> str:
    """The linker's own words, in one line."""
    if linker is None:
        return ""
    log = bytearray(nvjitlink.get_error_log_size(linker))
    if log:
        nvjitlink.get_error_log(linker, log)
    return " ".join(bytes(log).decode(errors="replace").replace("\0", " ").split())
