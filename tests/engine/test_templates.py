"""Chat templates: what published ones use works, what a hostile one tries is refused quickly."""

from __future__ import annotations

import time

import pytest

from engine.text import templates
from engine.text.templates import TemplateError, render

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " <x> é "}]
GROW = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = GROWN %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "{% for m in messages %}{{ m.role }}:{{ m['content']|trim }};{% endfor %}",
            "user:Hi;assistant:<x> é;",
        ),
        (
            "{{ messages|tojson }}",
            '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " <x> é "}]',
        ),
        ("{{ messages[0]|tojson(indent=2) }}", '{\n  "role": "user",\n  "content": "Hi"\n}'),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') ~ f(2) ~ 'z' }}", "[a][2]z"),
        (
            "{% set ns = namespace(a=0) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}",
            "2",
        ),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
            "assistant",
        ),
        ("{% generation %}{{ messages[1:]|length }}{% endgeneration %}", "1"),
        (
            "{{ ['a', 'b']|join(', ') }}{{ '+'.join(['c', 'd']) }}{{ 'a-b'.split('-')[1].replace('b', 'c') }}",
            "a, bc+dc",
        ),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ (1, 2)[0] }}", "a11"),
        ("{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list }}", "['Hi']"),
        (
            "{% if tools is none %}{{ 7 // 2 + 7 % 4 * 2 ** 3 }}{% endif %}{{ ('=' * 5)|replace('=', '-') }}",
            "27-----",
        ),
        ("{{ strftime_now('%Y')|length }}{{ missing is defined }}{{ missing or 'none' }}", "4Falsenone"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
    ],
)
def test_what_published_templates_use(template: str, text: str) -> None:
    assert render(template, {"messages": MESSAGES, "tools": None}) == text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 'a' * 10**9 }}", "more than"),
        ("{{ [1] * 10**8 }}", "more than"),
        ("{{ 2 ** 64 ** 64 }}", "more than"),
        ("{{ 'a'.center(10**9) }}", "unsafe"),
        ("{{ '%1000000000d' % 1 }}", "formats"),
        ("{{ '{:>1000000000}'.format(1) }}", "formats"),
        ("{{ 'a'|center(10**9) }}", "filter"),
        ("{{ ('a' * 4000000).replace('a', 'b' * 1000) }}", "more than"),
        ("{{ ['a'] * 1000 | join('b' * 4000000) }}", "more than"),
        (GROW.replace("GROWN", "ns.x + ns.x"), "more than"),
        (GROW.replace("GROWN", "ns.x ~ ns.x"), "more than"),
        (GROW.replace("GROWN", "[ns.x, ns.x]"), "more than"),
        (GROW.replace("GROWN", "(ns.x, ns.x)"), "more than"),
        (GROW.replace("GROWN", "{'a': ns.x, 'b': ns.x}"), "more than"),
        (GROW.replace("GROWN", "dict(a=ns.x, b=ns.x)"), "more than"),
        (GROW.replace("GROWN", "[ns.x]|list + [ns.x]"), "more than"),
        (GROW.replace("'aaaaaaaa'", "2").replace("GROWN", "ns.x * ns.x"), "large number"),
        ("".join(f"{{% set a{n} = 'x' * 4000000 %}}" for n in range(100)), "more than"),
        ("{% set x %}{% for i in range(99999) %}" + "a" * 5000 + "{% endfor %}{% endset %}", "more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "deeply"),
        ("{% block a %}{{ self.a() }}{% endblock %}", "deeply"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "deeply"),
        ("{{ " + "[" * 3000 + "]" * 3000 + " }}", "deeply"),
        ("x" * (templates.SOURCE_CHARACTERS_MAX + 1), "characters"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ lipsum(n=100) }}", "undefined"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ strftime_now('%1000000d') }}", "strange"),
        ("{{ 1e999 + 1 }}", "inf"),
        ("{{ 1 / 0 }}", "zero"),
        ("{{ x.y.z }}", "undefined"),
        ("{% for", "unexpected"),
    ],
)
def test_hostile_ones_are_refused(template: str, words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        render(template, {"messages": MESSAGES})


def test_endless_ones_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS_MAX", 0.1)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = 1 %}{% endfor %}{% endfor %}"
    began = time.thread_time()
    for body in (
        loops,
        loops.replace("range(99999)", "text"),
        "{% for a in range(99999) %}{{ text|upper }}{% endfor %}",
    ):
        with pytest.raises(TemplateError, match=r"longer than|more than"):
            render(body, {"text": "abc" * 30_000})
    assert time.thread_time() - began < 2
