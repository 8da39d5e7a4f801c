"""The parts of README.md that are written from results, each between two comments of its own."""


def replaced(text, mark, lines):
    """A text with another part between its marks.

    Args:
        text: which holds `<!-- mark -->` and, after it, `<!-- end of mark -->`, once each.
        mark: what the part is called.
        lines: of the new part, each without its end.

    Raises:
        ValueError: the marks are not there once each.
    """
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected one part from {begin} to {end}; write both marks once.")
    before, rest = text.split(begin)
    return "\n".join([before + begin, *lines, end + rest.split(end)[1]])
