"""The run that others are compared with."""

from __future__ import annotations

import pytest

from tests.support.tiny_runs import settings, train


@pytest.fixture(scope="module")
def plain(one_block):
    """Four steps with the default options."""
    return train(one_block, settings(batch_size=2))
