import json

import pytest

from runtime.answers import ChunkWriter, Kind


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("model", ["demo", "", 'a"', '""'])
@pytest.mark.parametrize("text", ["", "word", '"quoted" \\ and\n\u2028', "é€🙂", '""'])
def test_text_in_the_middle_is_written_as_any_other(kind: Kind, model: str, text: str) -> None:
    for usage in (False, True):
        writer = ChunkWriter(kind, "id", 7, model, usage)
        assert writer.more(2, text) == writer.text(2, text, None)
        choice = json.loads(writer.more(0, text).removeprefix(b"data: "))["choices"][0]
        assert (choice.get("text") if kind == "completion" else choice["delta"]["content"]) == text
