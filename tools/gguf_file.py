"""Read a GGUF file of version 3: its fields, and its tensors as float32. Only the types that SmolLM2's file has.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
BLOCK = 32      # weights that share a scale
Q4_1 = np.dtype([("scale", "<f2"), ("least", "<f2"), ("nibbles", "u1", BLOCK // 2)])
Q8_0 = np.dtype([("scale", "<f2"), ("values", "i1", BLOCK)])


class Place(NamedTuple):
    "Where a tensor stands in the file."

    shape: tuple[int, ...]
    kind: int           # a key of KINDS
    start: int          # byte


def from_q4_1(blocks: np.ndarray) -> np.ndarray:
    "[blocks, 32] weights: scale x nibble + least. The low nibbles are the first 16 weights, the high ones the rest."
    nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1).astype(np.float32)
    return blocks["scale"].astype(np.float32)[:, None] * nibbles + blocks["least"].astype(np.float32)[:, None]


def from_q8_0(blocks: np.ndarray) -> np.ndarray:
    "[blocks, 32] weights: scale x value."
    return blocks["scale"].astype(np.float32)[:, None] * blocks["values"]


def as_float32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)


# type in the file -> (what stands in it, weights in each, to float32)
KINDS: dict[int, tuple[np.dtype, int, Callable[[np.ndarray], np.ndarray]]] = {
    0: (np.dtype("<f4"), 1, as_float32),
    1: (np.dtype("<f2"), 1, as_float32),
    3: (Q4_1, BLOCK, from_q4_1),
    8: (Q8_0, BLOCK, from_q8_0),
}


class Gguf:
    "`fields`: what the file says of itself; `places`: its tensors by name. Raises `ValueError` for any other file."

    def __init__(self, data: bytes):
        self.data, self.at = data, 0
        magic, version, tensors, fields = self.take("4sIQQ")
        if magic != b"GGUF" or version != 3:
            raise ValueError(f"not a GGUF file of version 3: it begins with {magic!r}, version {version}")
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            name = self.string()
            self.fields[name] = self.value(*self.take("I"))
        heads = [self.head() for _ in range(tensors)]
        step = self.fields.get("general.alignment", 32)
        first = -(-self.at // step) * step
        self.places = {name: Place(shape, kind, first + offset) for name, shape, kind, offset in heads}

    def take(self, form: str) -> tuple:
        "The next values of the file."
        values = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return values

    def string(self) -> str:
        (length,) = self.take("Q")
        self.at += length
        return self.data[self.at - length:self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING: return self.string()
        if kind != ARRAY: return self.take(SCALARS[kind])[0]
        inner, length = self.take("IQ")
        return [self.value(inner) for _ in range(length)]

    def head(self) -> tuple[str, tuple[int, ...], int, int]:
        "Name, shape, type and place of a tensor; the file names the fastest dimension first."
        name = self.string()
        (dimensions,) = self.take("I")
        shape = self.take(f"{dimensions}Q")[::-1]
        kind, offset = self.take("IQ")
        return name, shape, kind, offset

    def tensor(self, name: str) -> np.ndarray:
        "The weights as float32. Raises `ValueError` for a type that is not read here."
        shape, kind, start = self.places[name]
        if kind not in KINDS: raise ValueError(f"{name}: GGUF type {kind} is not read here, only {sorted(KINDS)}")
        dtype, each, convert = KINDS[kind]
        values = np.frombuffer(self.data, dtype, int(np.prod(shape)) // each, start)
        return convert(values).reshape(shape)
