import inspect

import pytest

from runtime.client import RuntimeClient
from runtime.errors import RuntimeUnreachable
from tuner.connection import RuntimeConnection


def public(noun):
    return {
        name: member for name, member in vars(noun).items() if inspect.isfunction(member) and name[0] != "_"
    }


def test_connection_takes_every_call_that_the_client_takes():
    client, connection = public(RuntimeClient), public(RuntimeConnection)
    for name, member in client.items():
        assert name in connection, (
            f"RuntimeConnection has no `{name}`, which the daemon would miss only when it asks"
        )
        assert list(inspect.signature(connection[name]).parameters) == list(
            inspect.signature(member).parameters
        )


def test_runtime_that_is_not_announced_is_unreachable(tmp_path):
    with pytest.raises(RuntimeUnreachable, match="announced"):
        RuntimeConnection(tmp_path).state()
