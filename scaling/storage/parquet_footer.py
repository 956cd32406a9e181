"""Read Thrift's compact protocol, the encoding of a Parquet file's footer."""

from __future__ import annotations

from typing import Any

_DEEPEST = 16  # levels of nested structures; Parquet has five


def read_struct(data: bytes) -> dict[int, Any]:
    """Read the structure at the start of `data` → {field number: value}; texts stay bytes, structures become dicts.

    Raises ValueError where it is cut short, nested too deeply, or not a structure.
    """
    try:
        return _Reader(data).struct(0)
    except IndexError:
        raise ValueError("it is cut short") from None


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = 0

    def byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1]

    def take(self, length: int) -> bytes:
        if length > len(self.data) - self.place:
            raise IndexError
        self.place += length
        return self.data[self.place - length : self.place]

    def varint(self) -> int:
        number = 0
        for shift in range(0, 70, 7):
            byte = self.byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise ValueError("a number of more than 64 bits")

    def zigzag(self) -> int:
        number = self.varint()
        return number >> 1 if number % 2 == 0 else -(number >> 1) - 1

    def struct(self, depth: int) -> dict[int, Any]:
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        fields: dict[int, Any] = {}
        name = 0
        while head := self.byte():
            name = name + (head >> 4) if head >> 4 else self.zigzag()
            kind = head & 15
            fields[name] = kind == 1 if kind in (1, 2) else self.value(kind, depth)
        return fields

    def value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2, 3):
            return self.byte()
        if kind in (4, 5, 6):
            return self.zigzag()
        if kind in (7, 8):
            return self.take(8 if kind == 7 else self.varint())
        if kind in (9, 10):
            return self.list(depth)
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"no type has the number {kind}")  # maps have number 11, but Parquet has no maps

    def list(self, depth: int) -> list[Any]:
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        head = self.byte()
        length = self.varint() if head >> 4 == 15 else head >> 4
        if length > len(self.data) - self.place:  # each element takes a byte at least
            raise IndexError
        return [self.value(head & 15, depth + 1) for _ in range(length)]
