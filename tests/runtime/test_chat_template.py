import pytest

from runtime.chat_template import ChatTemplate
from runtime.errors import InvalidRequest
from runtime.model_folder import ModelFolder
from runtime.prompts import Prompts
from tests.servers import DEMO_MODEL

HELLO = [{"role": "user", "content": "hello, naïve 你好"}]


@pytest.fixture
def made():
    """Templates that are closed at the end of the test."""
    templates: list[ChatTemplate] = []

    def make(text: str) -> ChatTemplate:
        templates.append(ChatTemplate(text, {"bos_token": "<s>"}))
        return templates[-1]

    yield make
    for template in templates:
        template.close()


def test_rendering_in_the_child_is_what_transformers_renders():
    prompts = Prompts.load(ModelFolder.read(DEMO_MODEL))
    expected = prompts._tokenizer.apply_chat_template(
        HELLO, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert prompts.encode_chat(HELLO, 2048) == expected
    prompts.close()


def test_a_template_sees_messages_and_special_tokens(made):
    template = made("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    assert template.render(HELLO) == "<s>[user] hello, naïve 你好"


@pytest.mark.parametrize(
    "endless",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
        "{{ 7 ** (7 ** (9 + messages | length)) }}",
    ],
)
def test_a_rendering_without_end_is_refused_and_the_next_one_is_served(made, endless):
    template = made(
        "{% if messages | length > 1 %}" + endless + "{% else %}{{ messages[0].content }}{% endif %}"
    )
    with pytest.raises(InvalidRequest, match=r"did not finish|too much memory"):
        template.render(HELLO * 2)
    assert template.render(HELLO) == HELLO[0]["content"]


def test_one_child_renders_many_conversations(made):
    template = made("{{ messages[0].content }}")
    template.render(HELLO)
    pid = template._child.pid
    assert [template.render([{"role": "user", "content": str(n)}]) for n in range(50)] == [
        str(n) for n in range(50)
    ]
    assert template._child.pid == pid


def test_a_child_that_was_killed_is_replaced(made):
    template = made("{{ messages[0].content }}")
    template.render(HELLO)
    template._child.kill()
    template._child.wait()
    assert template.render(HELLO) == HELLO[0]["content"]


def test_the_child_ends_with_its_parent(made):
    template = made("x")
    template.start()
    child = template._child
    child.stdin.close()
    assert child.wait(30) == 0
