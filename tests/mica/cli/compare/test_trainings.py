"""Which held-out blocks are for which question; trainings are in test_session.py."""

import pytest

from mica.cli.compare import trainings


@pytest.mark.parametrize(
    ("documents", "chosen"),
    [
        ([1, 1, 2, 2, 3, 3, 4, 4], [0, 1]),
        ([4, 4, 3, 3, 2, 2, 1, 1], [6, 7]),  # whatever their order
        ([5, 5, 5, 5, 5, 7, 8, 9], [0, 4]),  # the first is too long
        ([1] * 8, [0, 4]),
    ],
)
def test_rates_are_chosen_by_documents_of_their_own(documents, chosen):
    assert trainings._for_choosing(documents) == chosen
