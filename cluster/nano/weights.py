"""Random weights that are the same bytes everywhere, written as one safetensors file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

LOGIT_STD = 4.0  # peaky, as a trained model is: the best token leads by far more than rounding


@dataclass(frozen=True, slots=True)
class Tensor:
    """One weight: uniform around 0 with standard deviation `std`, or all ones (`std` None).

    The first `num_zero_rows` rows are zero: control tokens that must not win the argmax.
    """

    name: str
    shape: tuple[int, ...]
    std: float | None = None
    num_zero_rows: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def norm(name: str, size: int) -> Tensor:
    """The weight of an RMSNorm."""
    return Tensor(name, (size,))


def linear(name: str, outputs: int, inputs: int) -> Tensor:
    """A projection that keeps the variance of its input."""
    return Tensor(name, (outputs, inputs), inputs**-0.5)


def embedding(name: str, vocab_size: int, hidden_size: int) -> Tensor:
    """Input embeddings of variance 1."""
    return Tensor(name, (vocab_size, hidden_size), 1.0)


def output(name: str, vocab_size: int, hidden_size: int, num_control_tokens: int) -> Tensor:
    """The output head. Control tokens, the end of the text among them, are (almost) never chosen."""
    std = LOGIT_STD * hidden_size**-0.5
    return Tensor(name, (vocab_size, hidden_size), std, num_control_tokens)


def write(path: Path, tensors: Sequence[Tensor], *, seed: str) -> None:
    """Write `tensors` in bfloat16. The bytes depend on `seed` and the tensors alone."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + 2 * tensor.size
        header[tensor.name] = {
            "dtype": "BF16", "shape": tensor.shape, "data_offsets": (start, end),
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(_values(tensor, f"{seed}/{tensor.name}").tobytes())


def values(tensor: Tensor, *, seed: str) -> npt.NDArray[np.float32]:
    """The numbers that `write` stores."""
    words = _values(tensor, f"{seed}/{tensor.name}").astype(np.uint32) << np.uint32(16)
    return words.view(np.float32).reshape(tensor.shape)


def _values(tensor: Tensor, seed: str) -> npt.NDArray[np.uint16]:
    if tensor.std is None:
        return _bfloat16(np.ones(tensor.size, np.float32))
    # Raw words of the bit generator: numpy promises them across versions, unlike its distributions.
    bits = np.random.PCG64(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], "big"))
    words = np.asarray(bits.random_raw(-(-tensor.size // 4)), dtype="<u8").view("<i2")[
        : tensor.size
    ]
    values = words.astype(np.float32) * np.float32(tensor.std * 3**0.5 / 2**15)
    values.reshape(tensor.shape)[: tensor.num_zero_rows] = 0
    return _bfloat16(values)


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2")
