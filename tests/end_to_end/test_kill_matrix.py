"""One kill each of what is quick to come back; `python -m tests.end_to_end.kill_matrix` is the long form."""

import random

import pytest

from tests.end_to_end.deployment import Deployment
from tests.end_to_end.kill_matrix import Matrix
from tests.end_to_end.victims import VICTIMS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    one = Matrix(Deployment(tmp_path_factory.mktemp("kills")), 2.0, random.Random(1))
    yield one
    one.close()


@pytest.mark.parametrize("name", ["daemon", "search", "engine", "front end"])
def test_kill_loses_nothing_and_all_is_well_again(matrix, name):
    figures = matrix.run(VICTIMS[name], 1)
    assert figures["breaches"] == []
    assert figures["num_ok"] > 0 and figures["kills"][0]["recovered_s"] is not None
