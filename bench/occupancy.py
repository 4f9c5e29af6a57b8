"""How much of a GPU's room for warps a kernel can fill, predicted from its registers, shared memory and warps.

The rule: a multiprocessor holds whole blocks until one of its limits is reached. Registers come to a warp in units, from
the quarter of the multiprocessor that the warp runs on; shared memory to a block, in units. Occupancy is resident warps
over the most there can be. It says what can hide latency, not how fast a kernel is.

Sources: NVIDIA, CUDA Programming Guide, "Technical Specifications per Compute Capability", and the allocation units of
cuda_occupancy.h (the tests compare with that header, compiled); tensor memory, PTX ISA, "Tensor Memory". AMD: LLVM,
AMDGPUBaseInfo.cpp (gfx90a and later), and the "; Occupancy:" that it prints (compared in the tests too).
"""

from __future__ import annotations

from dataclasses import dataclass

KB = 1024


@dataclass(frozen=True)
class Part:
    """Limits of one multiprocessor (AMD: compute unit); registers are 32 bits wide, memory is in bytes."""

    lanes: int = 32
    """Threads of a warp."""
    warps: int = 64
    blocks: int = 32
    quarter_registers: int = 16_384
    """Of each of the four partitions."""
    register_unit: int = 256
    """What a warp's registers are rounded up to."""
    shared: int = 228 * KB
    shared_block: int = 227 * KB
    """The most one block may have."""
    shared_unit: int = 128
    shared_reserved: int = KB
    """Taken from each block by the system."""
    tensor_columns: int = 512
    """Of tensor memory, which only Blackwell has."""
    quarter_scalars: int = 0
    """Scalar registers of a partition, which only AMD allots; in units of 16, and 16 more a wave for its trap handler."""


PARTS = {
    "sm_80": Part(shared=164 * KB, shared_block=163 * KB),
    "sm_90": Part(),
    "sm_100": Part(),
    "sm_120": Part(warps=48, blocks=24, shared=100 * KB, shared_block=99 * KB),
    "gfx942": Part(
        lanes=64, warps=32, quarter_registers=512 * 64, register_unit=8 * 64, shared=64 * KB, shared_block=64 * KB,
        shared_unit=512, shared_reserved=0, quarter_scalars=800,
    ),
}  # fmt: skip
BARRIERS = 16  # AMD: groups of several waves in a compute unit


def resident_blocks(
    part: Part, registers: int, shared: int, warps: int, tensor_columns: int = 0, scalars: int = 0
) -> tuple[int, str]:  # fmt: skip
    """(blocks a multiprocessor holds at once, which limit says so) for blocks of `warps` warps.

    registers: per thread; shared: bytes per block; tensor_columns: of tensor memory per block;
    scalars: scalar registers of a warp. 0 blocks: it cannot run.
    """
    if shared > part.shared_block:
        return 0, "shared memory"
    limits = {"warps": part.warps // warps, "blocks": part.blocks}
    if part.lanes == 64 and warps > 1:
        limits["blocks"] = min(part.blocks, BARRIERS)
    if registers:
        per_warp = _up(registers * part.lanes, part.register_unit)
        limits["registers"] = 4 * (part.quarter_registers // per_warp) // warps
    if scalars and part.quarter_scalars:
        limits["scalar registers"] = 4 * (part.quarter_scalars // (_up(scalars, 16) + 16)) // warps
    if shared + part.shared_reserved:
        limits["shared memory"] = part.shared // _up(shared + part.shared_reserved, part.shared_unit)
    if tensor_columns:
        limits["tensor memory"] = part.tensor_columns // tensor_columns
    limit = min(limits, key=limits.__getitem__)
    return limits[limit], limit


def occupancy(part: Part, blocks: int, warps: int) -> float:
    """Resident warps over the most the multiprocessor can hold, 0 to 1."""
    return blocks * warps / part.warps


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
