"""Values in pickle streams, read without running them.

A pickle is a program for a stack machine that may import and call anything. This machine has no
such power: it builds numbers, strings, lists and dicts, and hands each call to a function of the
reader that knows a few harmless names. Python's own unpickler is not used: with allowed names only
it still reserves any amount of memory at the file's word, dies of deeply nested keys, and takes
hours over numbers as keys that all have the same hash. So nothing of the file is ever hashed here
but text, whose hashes Python makes differ from process to process.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ldm_jax.errors import UserError
from ldm_jax.tensors import quote

MAX_BYTES = 64 * 2**20  # of the pickles in one file
MAX_STEPS = 2_000_000  # a checkpoint with its optimiser's state takes about 100 per weight

LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
STORE = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
FETCH = frozenset({"GET", "BINGET", "LONG_BINGET"})
SCALARS = (bytes, int, float, type(None))


class Stream(Protocol):
    """Bytes one after the other, of which no more may be asked for than memory holds."""

    def read(self, size: int) -> bytes: ...

    def readline(self) -> bytes: ...


@dataclass(frozen=True, eq=False)
class Name:
    """The name of a class or function that the file mentions. It is never looked up."""

    text: str


@dataclass(frozen=True, eq=False)
class Inert:
    """An object that no weight depends on: its content was dropped, its class's name is kept."""

    name: str


def kind(value: Any) -> str:
    """What a value of a pickle is, in a few words for a message."""
    if isinstance(value, Name | Inert):
        return quote(value.text if isinstance(value, Name) else value.name)[1:-1]
    name = "None" if value is None else type(value).__name__.lower()
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def read_pickle(
    stream: Stream,
    source: str,
    allowed: Collection[str],
    call: Callable[[str, tuple], Any],
    load: Callable[[Any], Any],
) -> Any:
    """Returns the value that the next pickle of a stream describes; what follows it is not read.

    Args:
        stream: a pickle of any protocol. A length in it reserves no memory if `read` gives no more
            than there is, as that of io.BytesIO does.
        source: what it is, for messages.
        allowed: full names ('module.name') that may be mentioned.
        call: gives the value of calling one of these names with positional arguments.
        load: gives the value for a persistent id.

    Raises:
        UserError: damaged, too large, or it asks for anything else; the message names it.
    """
    machine = _Machine(source, allowed, call, load)
    for opcode, argument in _opcodes(stream, source):
        if opcode == "STOP":
            return machine.result()
        machine.step(opcode, argument)
    raise UserError(f"{source} is damaged: it has no end")


def _opcodes(stream: Stream, source: str) -> Iterator[tuple[str, Any]]:
    """Operations and their arguments."""
    operations = pickletools.genops(stream)
    for _ in range(MAX_STEPS):
        try:
            opcode, argument, _ = next(operations)
        except (ValueError, OverflowError, MemoryError, AssertionError) as error:
            raise UserError(f"{source} is damaged: {quote(str(error))[1:-1]}") from error
        yield opcode.name, argument
        if opcode.name == "STOP":
            return
    raise UserError(f"{source} takes more than {MAX_STEPS} steps: refused")


class _Machine:
    def __init__(
        self,
        source: str,
        allowed: Collection[str],
        call: Callable[[str, tuple], Any],
        load: Callable[[Any], Any],
    ):
        self.source, self.allowed, self.call, self.load = source, allowed, call, load
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[str, Any] = {}  # by text: see above

    def refuse(self, text: str) -> UserError:
        return UserError(
            f"{self.source} {text}: refused; only plain tensors are read, so re-save the weights "
            "as safetensors"
        )

    def damaged(self, text: str) -> UserError:
        return UserError(f"{self.source} is damaged: {text}")

    def result(self) -> Any:
        value = self.pop()
        if self.stack or self.marks:
            raise self.damaged("it ends with values left over")
        return value

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.damaged("it takes a value from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise self.damaged("it takes values up to a mark that it never set")
        height = self.marks.pop()
        values = self.stack[height:]
        del self.stack[height:]
        return values

    def step(self, opcode: str, argument: Any) -> None:
        """Does one operation; each makes at most one new object."""
        push = self.stack.append
        if opcode in LITERALS:
            push(argument)
        elif opcode in STORE:
            self.memo[str(argument)] = self.top()
        elif opcode in FETCH:
            if str(argument) not in self.memo:
                raise self.damaged("it recalls a value that it never stored")
            push(self.memo[str(argument)])
        elif opcode in CONSTANTS:
            push(CONSTANTS[opcode])
        else:
            self.rare_step(opcode, argument)

    def rare_step(self, opcode: str, argument: Any) -> None:
        push, pop, pop_to_mark = self.stack.append, self.pop, self.pop_to_mark
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(self.stack))
            case "MEMOIZE":
                self.memo[str(len(self.memo))] = self.top()
            case "POP":
                if self.marks and self.marks[-1] == len(self.stack):
                    self.marks.pop()
                else:
                    pop()
            case "POP_MARK":
                pop_to_mark()
            case "DUP":
                push(self.top())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([pop() for _ in range(int(opcode[-1]))][::-1]))
            case "TUPLE":
                push(tuple(pop_to_mark()))
            case "EMPTY_LIST":
                push([])
            case "LIST":
                push(pop_to_mark())
            case "APPEND":
                value = pop()
                self.extend(self.top(), [value])
            case "APPENDS":
                values = pop_to_mark()
                self.extend(self.top(), values)
            case "EMPTY_DICT":
                push({})
            case "DICT":
                values, target = pop_to_mark(), {}
                self.update(target, values)
                push(target)
            case "SETITEM":
                values = [pop(), pop()][::-1]
                self.update(self.top(), values)
            case "SETITEMS":
                values = pop_to_mark()
                self.update(self.top(), values)
            case "EMPTY_SET":
                push(Inert("set"))
            case "FROZENSET":
                pop_to_mark()
                push(Inert("frozenset"))
            case "ADDITEMS":
                values = pop_to_mark()
                self.extend(self.top(), values)
            case "GLOBAL":
                push(self.name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                module, name = [pop(), pop()][::-1]
                push(self.name(module, name))
            case "REDUCE" | "NEWOBJ":
                values = pop()
                push(self.apply(pop(), values))
            case "NEWOBJ_EX":
                keywords, values = pop(), pop()
                push(self.apply(pop(), values, keywords))
            case "INST":
                name = self.name(*argument.split(" ", 1))
                push(self.apply(name, tuple(pop_to_mark())))
            case "OBJ":
                values = pop_to_mark()
                if not values:
                    raise self.damaged("it makes an object of no class")
                push(self.apply(values[0], tuple(values[1:])))
            case "BUILD":
                state = pop()
                self.set_state(self.top(), state)
            case "BINPERSID":
                push(self.load(pop()))
            case _:  # extension codes, buffers outside of the file, ids as text
                raise self.refuse(f"uses the pickle operation {opcode}")

    def name(self, module: Any, name: Any) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.damaged("it mentions something whose name is no text")
        text = f"{module}.{name}"
        if text not in self.allowed:
            raise self.refuse(f"asks for {quote(text)[1:-1]}")
        return Name(text)

    def apply(self, function: Any, values: Any, keywords: Any = None) -> Any:
        if not isinstance(function, Name):
            raise self.refuse(f"calls {kind(function)}")
        if not isinstance(values, tuple) or keywords:
            raise self.refuse(f"calls {function.text} with unusual arguments")
        return self.call(function.text, values)

    def set_state(self, target: Any, state: Any) -> None:
        """Drops the state of an inert object, and the version numbers of a state dict."""
        if isinstance(target, Inert):
            return
        keys = list(state) if isinstance(state, dict) else [Inert(kind(state))]
        if not isinstance(target, dict) or keys not in ([], ["_metadata"]):
            first = keys[0] if keys else Inert("the state")
            what = quote(first) if isinstance(first, str) else kind(first)
            raise self.refuse(f"sets {what} of {kind(target)}")

    def extend(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Inert):
            raise self.refuse(f"adds items to {kind(target)}")

    def update(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, Inert):
            return
        if not isinstance(target, dict):
            raise self.refuse(f"sets items of {kind(target)}")
        if len(values) % 2:
            raise self.damaged("a key has no value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if isinstance(key, str):
                if key in target:
                    raise self.refuse(f"sets the key {quote(key)} twice")
                target[key] = value
            elif isinstance(key, (*SCALARS, Name, Inert)):
                # As an optimiser's state has, never the weights. The entry is kept, not its key.
                target[Inert(kind(key))] = value
            else:
                raise self.refuse(f"has {kind(key)} as a key")
