"""What a weight takes in each form of `load_scorer(quantization=)`."""

from __future__ import annotations

from dataclasses import dataclass

from guided_decode.checkpoints.shape import Shape


@dataclass(frozen=True, slots=True)
class WeightForm:
    """How the matrices of the layers are held; embeddings, norms and heads stay in bfloat16.

    bits: of a weight, with the scales of its block or group. row_bytes: of the scales of one output
    row. unpacks: for many rows its library writes a matrix out in bfloat16 before it multiplies.
    """

    name: str
    bits: float
    row_bytes: int = 0
    unpacks: bool = False

    def matrix_bytes(self, shape: Shape) -> int:
        """Bytes of the matrices of all layers."""
        rows = sum(outputs for outputs, _ in shape.matrices)
        return shape.layers * (round(shape.layer_weights * self.bits / 8) + rows * self.row_bytes)


BF16 = WeightForm("bf16", 16)

# As the libraries' sources have them: bitsandbytes 0.50 (functional.py, nn/modules.py) and torchao
# 0.18 (quantize_/workflows). A test measures those that a CPU can make.
FORMS: dict[str, WeightForm] = {
    one.name: one
    for one in (
        # int8, and a float32 scale for each row.
        WeightForm("bnb-8bit", 8, row_bytes=4),
        # int8, with a float32 scale and an int8 zero point for each row; cast at each forward.
        WeightForm("int8", 8, row_bytes=5, unpacks=True),
        # float8_e4m3fn, and a float32 scale for each row.
        WeightForm("fp8", 8, row_bytes=4),
        # NF4 with one 8-bit scale for each 64, and a float32 one for each 256 of these. Its fused
        # kernel takes a few rows or some tens, by card and shape (backends/cuda/ops.py).
        WeightForm("bnb-4bit", 4 + 8 / 64 + 32 / (64 * 256), unpacks=True),
        # Groups of 128 with a bfloat16 scale and zero point each.
        WeightForm("int4", 4 + 32 / 128),
    )
}

# Those that every card runs, the more precise one first.
USUAL = (FORMS["bnb-8bit"], FORMS["bnb-4bit"])


def find_form(name: str) -> WeightForm:
    """The form of that name. Raises ValueError for an unknown one."""
    if name not in FORMS:
        raise ValueError(f"quantization={name!r}: expected one of {', '.join(FORMS)}")
    return FORMS[name]
