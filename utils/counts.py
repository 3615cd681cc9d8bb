"""Counts in messages: `1 video`, `2 videos`, `1,234 classes`."""


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, which is given in the singular."""
    if number != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}es" if noun.endswith("ss") else f"{noun}s"
    return f"{number:,} {noun}"
