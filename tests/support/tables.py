"""Cases of a test as lines of text, which are read more easily than tuples of short strings."""


def rows(text: str) -> list[list[str]]:
    """The cells of each line, which " => " separates; a cell may be empty."""
    return [[cell.strip() for cell in f"{line} ".split(" => ")] for line in text.strip("\n").splitlines()]
