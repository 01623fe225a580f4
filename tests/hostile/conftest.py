"""One room of good things for each process, left as found."""

import os

import pytest

from tests.hostile.room import Room


@pytest.fixture(scope="session")
def _room(tmp_path_factory):
    here = os.getcwd()
    yield Room(tmp_path_factory.mktemp("hostile") / "room")
    os.chdir(here)


@pytest.fixture
def room(_room):
    """The room, with an empty ``work/``, which the test is in."""
    here = os.getcwd()
    _room.fresh()
    yield _room
    _room.check()
    os.chdir(here)
