"""Operations of a function, counted before it is compiled.

The compiler's own count has the body of a loop once, however often it runs.
"""

from __future__ import annotations

import math
from typing import Any

from jax.extend import core


def count_flops(jaxpr: core.ClosedJaxpr, loops: bool = True) -> float:
    """Floating-point operations of all products of matrices and convolutions of a traced function.

    A multiplication and an addition are two; all else is left out. Loops count as often as they
    run (those of unknown length once), of branches the longest, and a kernel as often as its grid
    has cells. Sizes are global: it is the work of all devices together.

    loops: False counts the bodies of loops once, as the compiler does.
    """
    return _jaxpr_flops(jaxpr.jaxpr, loops)


def _jaxpr_flops(jaxpr: core.Jaxpr, loops: bool, used: list[bool] | None = None) -> float:
    """Operations that the results need, or those of them that are `used`.

    Derivatives leave behind what nobody reads, such as the value beside a gradient.
    """
    used = [True] * len(jaxpr.outvars) if used is None else used
    needed = {v for v, read in zip(jaxpr.outvars, used, strict=True) if read and _is_variable(v)}
    total = 0.0
    for equation in reversed(jaxpr.eqns):
        read = [variable in needed for variable in equation.outvars]
        if any(read) or equation.effects:
            needed.update(filter(_is_variable, equation.invars))
            total += _equation_flops(equation, loops, read)
    return total


def _is_variable(atom: Any) -> bool:
    return not isinstance(atom, core.Literal)


def _equation_flops(equation: core.JaxprEqn, loops: bool, read: list[bool]) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        contracted = params["dimension_numbers"][0][0]
        left = equation.invars[0].aval.shape
        inner = math.prod(left[axis] for axis in contracted)
        return 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    if name == "cond":
        # A branch per platform does the same sum in another order.
        return max(_jaxpr_flops(branch.jaxpr, loops, read) for branch in params["branches"])
    times = 1.0
    if name == "scan":
        times = params["length"] if loops else 1
        carried = params["num_carry"]
        read = [True] * carried + read[carried:]  # what is carried is read by the next turn
    elif name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
    elif name == "shard_map":
        sizes, split = params["mesh"].shape, params["in_specs"]
        times = math.prod(sizes[axis] for axis in _named(split))
    total = 0.0
    for inner in _inner(params):
        same = name != "while" and len(inner.outvars) == len(read)
        total += _jaxpr_flops(inner, loops, read if same else None)
    return times * total


def _convolution_flops(equation: core.JaxprEqn) -> float:
    """Two operations for each output, input channel and element of the window.

    Elements that fall on holes of a dilated image do not count, those beside its border do.
    """
    params, numbers = equation.params, equation.params["dimension_numbers"]
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    window = math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])  # and its input channels
    return 2.0 * math.prod(out) * window / math.prod(params["lhs_dilation"])


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The functions among the parameters of an operation, each once."""
    found = []
    for name, value in params.items():
        if name in ("cond_jaxpr", "fwd_jaxpr_thunk", "bwd"):
            continue
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                found.append(one.jaxpr)
            elif isinstance(one, core.Jaxpr):
                found.append(one)
    return found


def _named(specs: Any) -> set[str]:
    """Axes of a mesh that inputs are divided over."""
    axes: set[str] = set()
    for spec in specs:
        for entry in spec:
            if entry is not None:
                axes |= {entry} if isinstance(entry, str) else set(entry)
    return axes
