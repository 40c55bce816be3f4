"""How many of a thing, in words that fit: 1 note, 2 notes."""


def counted(count: int, one: str, many: str | None = None) -> str:
    """The number and the noun that goes with it; many: the plural, where it is not one + s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
