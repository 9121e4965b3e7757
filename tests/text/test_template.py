"""Chat templates against jinja2 set up as `transformers` does, and hostile ones against their
limits.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from octavo import _core
from tests.text import jinja_oracle
from tests.text.conversations import CONVERSATIONS, ODD, TOOLS, VARIABLES

NOW = 1_760_000_000.75


def render(
    template: _core.ChatTemplate, messages: Any, tools: Any, generate: bool, variables: dict[str, Any]
) -> str | None:
    try:
        return template.render(
            json.dumps(messages),
            tools_json=None if tools is None else json.dumps(tools),
            add_generation_prompt=generate,
            kwargs_json=json.dumps(variables),
            now=NOW,
        )
    except _core.TemplateError:
        return None


def test_published_templates_render_as_jinja2(shared_data: Path) -> None:
    paths = sorted((shared_data / "chat_templates").glob("*.jinja"))
    assert len(paths) == 35
    rendered, different = 0, []
    for path in paths:
        source = path.read_text()
        template = _core.ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
        for name, messages in CONVERSATIONS.items():
            for tools in (None, TOOLS):
                for generate in (False, True):
                    for kind, variables in VARIABLES.items():
                        ours = render(template, messages, tools, generate, variables)
                        context = {"documents": None, **variables}
                        oracle = jinja_oracle.render(
                            source, NOW, messages=messages, tools=tools, add_generation_prompt=generate,
                            bos_token="<s>", eos_token="</s>", **context,
                        )  # fmt: skip
                        rendered += oracle is not None
                        if ours != oracle:
                            different.append((path.name, name, bool(tools), generate, kind, ours, oracle))
    assert rendered > 3000
    assert not different, f"{len(different)} differ, first: {different[0]}, all: { {d[:3] for d in different} }"


SNIPPETS = [
    "{{ 1.0 }} {{ 1e22 }} {{ 1e16 }} {{ 123456789012345.0 }} {{ 1e-5 }} {{ 0.0001 }} {{ -0.0 }} "
    "{{ 7 / 2 }} {{ 7 // 2 }}",
    "{{ [1.5, 'a', \"b'c\", none, true, (1,), (1, 2), {'k': 1e30}] }}",
    "{{ messages }}|{{ messages|string }}|{{ messages[0]|tojson }}",
    "{{ tools|tojson(indent=2) }}{{ tools|tojson(indent=0) }}{{ [] | tojson(indent=4) }}{{ {}|tojson(indent=4) }}",
    "{{ tools|tojson(sort_keys=true, separators=(',', ':')) }}{{ odd|tojson(ensure_ascii=true) }}{{ odd|tojson }}",
    "{{ {'b': 1, 'a': [1, 2.50, none, true], 3: 'x'}|tojson }}",
    "{{ missing|tojson }}",
    "{{ missing }}|{{ missing is defined }}|{{ missing.attribute }}",
    "{{ 'a' + missing }}",
    "{{ none + 'a' }}",
    "{{ '%s is %d, %5.2f%%' % ('x', 3, 2.5) }}{{ '%s' % odd }}{{ 'a' + '%s-' % messages[0].content|upper + 'b' }}",
    "{{ 'a,b,c'.rsplit(',', 1) }}{{ ' a  b c '.split() }}{{ ' a  b c '.rsplit(none, 1) }}{{ ' a b c'.split(' ', 1) }}",
    "{{ odd.strip() }}|{{ odd|trim }}|{{ odd.splitlines() }}|{{ odd.split() }}|{{ 'xaxx'.strip('x') }}",
    "{{ 'a-b-c'.partition('-') }}{{ 'a-b-c'.rpartition('-') }}{{ 'prefix'.removeprefix('pre') }}"
    "{{ 'ab'.removesuffix('b') }}",
    "{{ 'abc'.find('c') }}{{ 'abc'.index('b') }}{{ 'abc'[::-1] }}{{ 'abc'[-1] }}"
    "{{ [3, 1, 2]|sort }}{{ [1, 2].index(2) }}",
    "{{ 'a b'.title() }}{{ 'aB'.capitalize() }}{{ 'ab'.upper() }}{{ 'x'.join(['a', 'b']) }}{{ '12'.isdigit() }}",
    "{% for m in messages %}  {{ loop.index }}/{{ loop.length }}{{ loop.last }}\n {% endfor %}",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}"
    "{% endif %}{{ i }}{% endfor %}",
    "  {% if true %}  \n  x\n  {%- endif +%}  \n  y  {#- c -#}  z\n",
    "{%- set ns = namespace(a=1, b=[]) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}",
    "a\n  {%- generation %}{{ messages[0].content }}\n{% set x = 1 %}{%- endgeneration %}\nb{{ x is defined }}",
    "{% macro f(x, y='d') %}<{{ x }}{{ y }}{% endmacro %}{{ f(1) }}{{ f(1, y=2) }}",
    "{{ messages|map(attribute='role')|join(', ') }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}",
    "{{ dict(a=1, b='c') }}{{ {'b': 1, 'a': 2}|dictsort }}{{ {'a': 1}.items()|list }}{{ {'a': 1}.get('b', 5) }}",
    "{{ strftime_now('%d %b %Y') }}|{{ strftime_now('%H:%M:%S.%f %j %-d %%') }}|{{ strftime_now('%Z%z') }}",
    "{{ raise_exception('no') }}",
    "{{ messages[7] }}|{{ messages[7] is none }}",
    "{{ 'x' if messages else 'y' }}{{ messages[0]['content']|default('d', true) }}{{ ''|default('d', true) }}",
    "{{ 'a' ~ 1 ~ none ~ true ~ 1.5 }}{{ 3|string + 'x' }}{{ '3'|int + 1 }}{{ '2.5'|float }}",
    "{{ 'a\\nb' }}{{ '\\u00e9' }}{{ \"it's\" }}{{ 'tab\\t' }}",
    "{% set x %}  block {{ 1 }} {% endset %}[{{ x }}]",
    "{{ [1, 2] + [3] }}{{ (1, 2)|list }}{{ [1, 2, 3][1:] }}{{ 2 ** 3 }}{{ -7 % 3 }}{{ 5 in [5] }}"
    "{{ 'a' not in 'abc' }}",
    "{{ odd|length }}{{ odd|upper }}{{ odd|replace('q', 'Q') }}{{ odd|e }}",
    "{{ messages is iterable }}{{ messages is mapping }}{{ odd is string }}{{ 1 is number }}{{ none is none }}",
    "{{ messages[0].items()|list }}{{ messages[0].keys()|list }}"
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
]


@pytest.mark.parametrize("source", SNIPPETS)
def test_python_semantics(source: str) -> None:
    messages = [{"role": "user", "content": 'it\'s "x"\n'}, {"role": "assistant", "content": ODD}]
    ours = render(_core.ChatTemplate(source, {"bos_token": "<s>"}), messages, TOOLS, True, {"odd": ODD})
    oracle = jinja_oracle.render(
        source,
        NOW,
        messages=messages,
        tools=TOOLS,
        documents=None,
        odd=ODD,
        add_generation_prompt=True,
        bos_token="<s>",
    )
    assert ours == oracle


NUMBERS = [
    *(sign * value for value in (2**53 + 1, 2**63, 2**64 - 1, 2**64, 2**127, 2**128, 10**60 + 7) for sign in (1, -1)),
    *(0.1, 1 / 3, 123456789.123456789, 5e-324, 1.7976931348623157e308, -0.0, 1e23, 9007199254740993.0, 2.5e-7),
]


@pytest.mark.parametrize(
    "source",
    [
        "{% for n in messages[0].content %}{{ n }} {{ n|string }} {{ n|tojson }},{% endfor %}",
        "{% for n in messages[0].content[:14] %}{{ 'n' ~ n }}{% endfor %}",
        "{{ messages }}|{{ messages|tojson }}|{{ tools|tojson(indent=2) }}|{{ odd }}",
    ],
)
def test_numbers_are_those_of_python(source: str) -> None:
    """Integers of any size, and floats to the last digit, in messages, tools and variables."""
    messages, tools = [{"role": "user", "content": NUMBERS}], [{"parameters": {"default": NUMBERS, "enum": [2**70]}}]
    ours = render(_core.ChatTemplate(source), messages, tools, True, {"odd": NUMBERS})
    oracle = jinja_oracle.render(source, NOW, messages=messages, tools=tools, odd=NUMBERS)
    assert ours is not None and ours == oracle


def test_keys_keep_their_order_and_the_last_of_two_counts() -> None:
    text = '[{"z": 1, "a": 2, "z": {"y": 3, "b": 4, "y": 5}, "": null}]'
    assert _core.ChatTemplate("{{ messages|tojson }}").render(text) == json.dumps(json.loads(text))


HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "repeated text": "{{ 'a' * 2000000000 }}",
    "doubled text": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "doubled list": "{% set ns = namespace(x=[1]) %}{% for i in range(20) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}{{ ns.x }}",
    "list doubled by macros": "{% macro f(x, n) %}{% if n %}{{ f(x + x, n - 1) }}{% endif %}{% endmacro %}"
    "{{ f([1], 45) }}",
    "list doubled by with": "{% with x0 = [1] %}"
    + "".join(f"{{% with x{i + 1} = x{i} + x{i} %}}" for i in range(45))
    + "{{ x45|length }}"
    + "{% endwith %}" * 46,
    "list doubled by a recursive loop": "{% for x in [[1]] recursive %}{{ loop([x + x]) }}{% endfor %}",
    "list doubled by loops": "".join(f"{{% for x{i + 1} in [{f'x{i} + x{i}' if i else '[1]'}] %}}" for i in range(45))
    + "{{ x45|length }}"
    + "{% endfor %}" * 45,
    "list doubled by callers": "{% macro f(x) %}{{ caller(x + x) }}{% endmacro %}{% set x = [1] %}"
    + "{% call(x) f(x) %}" * 40
    + "{{ x|length }}"
    + "{% endcall %}" * 40,
    "list doubled in a namespace": "{% set ns = namespace(x=[1]) %}{% for i in range(45) %}"
    "{% set ns = namespace(x=[ns.x + ns.x]) %}{% set ns = namespace(x=ns.x[0]) %}{% set y = ns %}{% endfor %}"
    + "{% set a = namespace(x=[1]) %}"
    + "{% set a = namespace(x=a.x + a.x) %}" * 45
    + "{{ a.x|length }}",
    "list doubled in a value": "{% set a = {'x': [1]} %}" + "{% set a = {'x': a.x + a.x} %}" * 45 + "{{ a.x|length }}",
    "long list added often": "{{ " + "([1] * 1000000000) + " * 34 + "[1] }}",
    "long lists added up": "{{ ([[1] * 1000000000] * 40)|sum(start=[]) }}",
    "long lists chained": "{{ ([1] * 1000000000)|chain([1])" + "|chain([1])" * 40 + " }}",
    "wide format": "{{ '%1000000000d' % 1 }}{{ '%1000000000d' % 1 }}",
    "wide format filter": "{{ '%1000000000d'|format(1) }}",
    "wide str.format": "{{ '{:1000000000}'.format(1) }}",
    "huge range": "{{ range(1000000000)|list }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep value": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}"
    "{{ ns.x }}",
    "deepest value": "{% set ns = namespace(x=[]) %}{% for i in range(99) %}{% for j in range(99999) %}"
    "{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}",
    "deep json": "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}"
    "{{ ns.x|tojson }}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "replace": "{{ ('a' * 99999).replace('a', 'a' * 99999) }}",
    "join": "{{ ('a' * 9999).join(range(99999)) }}",
    "indent": "{{ [[[[1]]]]|tojson(indent=1000000000) }}",
    "include": "{% include '/etc/passwd' %}",
    "too long": "x" * 300_000,
    "unclosed": "{% if true %}",
    "no such filter": "{{ 1|no_such_filter }}",
    "pad": "{{ 'a'|center(1000000000) }}",
    # Chains that make the compiler's tree as deep as they are long.
    "minuses": "{{ " + "-" * 20_000 + "1 }}",
    "elifs": "{% if a %}" + "{% elif b %}" * 7_500 + "{% endif %}",
    "not": "{{ " + "not " * 20_000 + "1 }}",
    "is not": "{{ a" + " is not none" * 20_000 + " }}",
    "ternaries": "{{ " + "a if b else " * 20_000 + "1 }}",
    "names in brackets": "{% for " + "(" * 20_000 + "x" + ")" * 20_000 + " in a %}{% endfor %}",
    "minuses in a macro": "{% macro f(a=" + "-" * 20_000 + "1) %}{% endmacro %}",
    "minuses behind a comment": "{# {{ ' #}{{ " + "-" * 20_000 + "1 }}{# ' }} #}",
    "minuses behind braces": "{{ {'a': {'b': 1}} ~ " + "-" * 20_000 + "1 }}",
    "minuses behind raw": "{% raw %}{{ '{% endraw %}{{ " + "-" * 20_000 + "1 }}",
    **{
        f"chain of {link}": "{{ a" + link * 20_000 + " }}"
        for link in ("~1", ".b", "[0]", "[0:1]", "()", "|e", "*1", "**1", "//1", "-1", "<1", " in a", " and 1", " or 1")
    },
    **{
        f"chain of filters in {tag}": f"{{% {tag} e{'|e' * 20_000} %}}x{{% end{tag.split()[0]} %}}"
        for tag in ("filter", "set x |")
    },
    **{
        f"blocks of {tag}": f"{{% {tag} %}}" * 5_000 + f"{{% end{tag.split()[0]} %}}" * 5_000
        for tag in ("if a", "for a in b", "set a", "with a=1", "filter e", "autoescape true", "macro f()", "call f()")
    },
    "additions behind a comment": "{# {{ ' #}{{ " + "([1] * 1000000000) + " * 34 + "[1] }}{# ' }} #}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_an_error(name: str) -> None:
    start = time.process_time()
    with pytest.raises(_core.TemplateError, match=r"^chat template"):
        _core.ChatTemplate(HOSTILE[name]).render(json.dumps([{"role": "user", "content": "x"}]))
    # Not a measurement of speed: jinja2 needs seconds to hours for these.
    assert time.process_time() - start < 1.0


def test_nothing_of_the_host_can_be_reached() -> None:
    source = "{{ ''.__class__ }}{{ messages.__class__ }}{{ self }}{{ cycler is defined }}{{ lipsum is defined }}"
    assert "class" not in (render(_core.ChatTemplate(source), [], None, False, {}) or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"messages_json": "{"}, "messages"),
        ({"messages_json": "{}"}, "messages must be an array"),
        ({"messages_json": "[1]"}, r"messages\[0\] must be an object"),
        ({"messages_json": "[" * 500 + "]" * 500}, "messages"),
        ({"messages_json": "[]", "kwargs_json": "[]"}, "chat_template_kwargs must be an object"),
        ({"messages_json": "[]", "kwargs_json": '{"messages": []}'}, "must not set messages"),
        ({"messages_json": "[]", "tools_json": "nope"}, "tools"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(_core.TemplateError, match=message):
        _core.ChatTemplate("x").render(**arguments)
