"""The names of this package and of its extra for the command line, for all messages that name them."""

DISTRIBUTION = "mica-fast"
# pip finds an installed package by its name, wherever it was installed from, and asks no index for it.
HOW_TO_INSTALL = f'pip install "{DISTRIBUTION}[cli]"'
