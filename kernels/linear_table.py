from dataclasses import dataclass


@dataclass(frozen=True)
class Int4Plan:
    kernel: str  # "slices" or "tiles"
    tiles: int  # of 16 rows a program
    tokens: int  # a program, padded
    splits: int  # of k over programs
    warps: int
    ahead: int  # rounds in flight
    depth: int = 1  # tiles of 64 k a round (tiles)


def int4_plan(tokens: int, rows: int, depth: int) -> Int4Plan | None:
    if tokens <= 8:
        return Int4Plan("slices", 2, 8, 1, 4, 2)
    if tokens > 1024:
        return None
    padded = min(128, max(16, 1 << (tokens - 1).bit_length()))
    return Int4Plan("tiles", 4, padded, 1 if tokens > 64 else 2, 4, 4, 2)
