from dataclasses import dataclass


@dataclass(frozen=True)
class Int4Plan:
    kernel: str  # "slices" or "tiles"
    tiles: int  # of 16 rows a program
    depth: int  # tiles of 64 k a warp (slices) or program (tiles) and round
    tokens: int  # of a program, padded
    splits: int  # of k over programs
    warps: int
    stages: int


def int4_plan(tokens: int, rows: int, depth: int) -> Int4Plan | None:
    if tokens <= 8:
        return Int4Plan("slices", 2, 1, 8, 1, 8, 3)
    if tokens > 1024:
        return None
    padded = min(128, max(16, 1 << (tokens - 1).bit_length()))
    return Int4Plan("tiles", 4, 2, padded, 1 if tokens > 64 else 2, 4, 4)
