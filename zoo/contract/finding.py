"""The smallest input that still shows a difference."""

from collections.abc import Callable

from .report import NotApplicable


def smallest(fails: Callable[[dict], bool], sizes: dict, least: dict) -> tuple[dict, bool]:
    """Makes sizes smaller, one at a time, as long as what is run with them still fails.

    Args:
        fails: whether these sizes show the difference; may raise NotApplicable when time is up.
        sizes: name -> number, which do show it.
        least: the smallest number that makes sense for each name.

    Returns:
        (the smallest sizes found, whether nothing smaller was left to try).
    """
    sizes = dict(sizes)
    try:
        while True:
            before = dict(sizes)
            for name, floor in least.items():
                sizes[name] = _smaller(lambda x, n=name: fails(sizes | {n: x}), sizes[name], floor)
            if sizes == before:
                return sizes, True
    except NotApplicable:
        return sizes, False


def _smaller(fails, number, floor):
    """The least number that fails, if what fails stays failing above it; else one near it."""
    if number > floor and fails(floor):
        return floor
    passing = floor
    while number - passing > 1:
        middle = (passing + number) // 2
        if fails(middle):
            number = middle
        else:
            passing = middle
    return number
