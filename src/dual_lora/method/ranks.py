"""The two ranks of an adapter, derived from the user's options."""

from .._warning import warn

Rank = int | list[int] | tuple[int, int]


def ranks_of(rank: Rank, where: str = "rank", one_group: bool = False) -> tuple[int, int]:
    """Return (r1, r2) from a total or a pair, as `rank_pattern` has them. one_group: (r, 0), without C and D."""
    if isinstance(rank, list | tuple):
        if len(rank) != 2:
            raise ValueError(f"{where} must be a total rank or a pair [r1, r2], got {rank!r}.")
        return split_rank(None, rank[0], rank[1], where=f"{where}: ", one_group=one_group)
    return split_rank(rank, None, None, where=f"{where}: ", one_group=one_group)


def split_rank(
    r: int | None, r1: int | None, r2: int | None, where: str = "", one_group: bool = False
) -> tuple[int, int]:
    """Return (r1, r2) from any sufficient choice of the three. Raises ValueError for a contradiction.

    where: what begins a message, such as the pattern's name.
    """
    for name, value in (("r", r), ("r1", r1), ("r2", r2)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{where}`{name}` must be a whole number, got {value!r}.")
    if r is None and r1 is None and r2 is None:
        r = 8
    if r is not None and r < 1:
        raise ValueError(f"{where}`r` should be a positive integer value but the value passed is {r}.")
    if one_group:
        if r2 or (r1 is not None and r1 != (r or r1)) or r1 == 0:
            raise ValueError(
                f"{where}got r={r}, r1={r1}, r2={r2}, but frozen signs have no factors C and D: all of the rank is "
                "in A and B. Give `r` alone."
            )
        return r1 or r or 8, 0
    if r1 is None and r2 is None:
        assert r is not None
        if r == 1:
            warn(
                f"{where}`r` is 1, which two groups cannot share: this adapter has r1 = r2 = 1, as many parameters "
                "as LoRA of rank 2.",
                stacklevel=5,
            )
        return (r + 1) // 2, max(1, r // 2)
    if r is None and (r1 is None or r2 is None):
        raise ValueError(f"{where}got r1={r1}, r2={r2}: give both, or one of them and the total `r`.")
    r1 = r - r2 if r1 is None else r1  # type: ignore[operator]
    r2 = r - r1 if r2 is None else r2  # type: ignore[operator]
    if r1 < 1 or r2 < 1:
        raise ValueError(f"{where}both ranks must be at least 1, got r1={r1}, r2={r2} (r={r}).")
    if r is not None and r1 + r2 != r:
        raise ValueError(
            f"{where}r = {r} is the total, but r1 + r2 = {r1} + {r2} = {r1 + r2}. Leave `r` out, or make them agree."
        )
    return r1, r2
