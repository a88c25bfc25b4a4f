"""A run's outputs, and one browser for all tests."""

from __future__ import annotations

import pytest

from tests.support.browser import Browser
from tests.support.report_outputs import write_outputs


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    running = Browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@pytest.fixture
def root(tmp_path):
    write_outputs(tmp_path)
    return tmp_path
