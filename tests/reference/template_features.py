"""Small templates, one for each feature of Jinja that chat templates use; check_templates.py compares their texts.

Not supported, and so not here: `varargs` and `kwargs` in macros, a sign before a number (`+1`), `'%s' % value`,
methods that are not called (`text.strip is defined`), and the test `callable`, and the filters `random`, `urlize`, `xmlattr`, `filesizeformat`
and `wordwrap`. No template of the packages that check_templates.sh reads uses any of them.

The conversation is CONTEXT's `messages`; `d` and `l` are variables.
"""

CONTEXT = {
    "messages": [
        {"role": "system", "content": "  Be good.\n"},
        {"role": "user", "content": "it's a 'test' ünï\tx", "n": 3, "tags": ["b", "a", "B"]},
        {"role": "assistant", "content": "", "n": 1.5, "flag": True, "none": None},
    ],
    "variables": {"d": {"b": 1, "a": {"c": [1, 2.0, "x"]}, "C": None, "e": False}, "l": [3, 1, 2, 2], "s": "a-b--c", "n": -7, "f": 2.5},
    "add_generation_prompt": False,
}

FEATURES = r"""
{%- set ns = namespace(a=1, b='x') %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ ns.zzz }}
{% set ns = namespace(d) %}{{ ns.b }}
{% macro m(a, b=2, c='z') %}[{{ a }}|{{ b }}|{{ c }}]{% endmacro %}{{ m(1) }}{{ m(1, 3) }}{{ m(b=5, a=0) }}
{% macro m(a, b=2) %}[{{ a }}|{{ b }}]{% endmacro %}{{ m() }}{{ m.name }}
{% macro m(x) %}{{ caller(x) }}{% endmacro %}{% call(y) m(3) %}<{{ y }}>{% endcall %}
{% macro m() %}({{ caller() }}){% endmacro %}{% call m() %}in{% endcall %}
{% filter upper %}abc{{ s }}{% endfilter %}{% filter replace('a', 'b') | indent(2) %}a\na{% endfilter %}
{% set x %}block {{ n }}{% endset %}{{ x }}{{ x is string }}{{ x|length }}
{% set x | upper %}up{% endset %}{{ x }}
{% set a, b = 1, 'two' %}{{ a }}{{ b }}{% set t = 1, 2 %}{{ t }}{{ (1,) }}{{ () }}
{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}
{% for i in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.depth }}{{ loop.depth0 }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.cycle('o', 'e') }}{{ loop.changed(i) }};{% endfor %}
{% for i in [] %}x{% else %}empty{% endfor %}
{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}{% for k in d %}{{ k }}{% endfor %}
{% for m in messages if m.role != 'user' %}{{ loop.index }}{{ m.role }}{% endfor %}
{% for m in messages[1:] %}{{ m.role }}{{ loop.length }}{% endfor %}{{ messages[::-1]|map(attribute='role')|list }}{{ messages[-1].role }}{{ messages[:-1]|length }}
{% for i in l recursive %}{{ i }}{% endfor %}{% for x in [[1, [2]], 3] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}
{{ s[::-1] }}{{ s[1:3] }}{{ s[-2:] }}{{ s[::2] }}{{ s[10:] }}{{ s[3:1:-1] }}{{ l[::-2] }}{{ l[1] }}{{ s[0] }}{{ s[-1] }}
{{ 'ab' * 3 }}{{ 3 * 'ab' }}{{ [1] * 2 }}{{ 'a' ~ 1 ~ none ~ true ~ 1.0 ~ [1] }}
{{ 7 // 2 }}{{ -7 // 2 }}{{ -7 % 3 }}{{ 7 / 2 }}{{ 4 / 2 }}{{ 2 ** 3 }}{{ 2 ** -1 }}{{ -2 ** 2 }}{{ 1 + 2 * 3 }}{{ (1 + 2) * 3 }}{{ 1 - -1 }}
{{ 1 < 2 < 3 }}{{ 1 < 3 < 2 }}{{ 1 == 1.0 }}{{ 'a' < 'b' }}{{ not true }}{{ not 1 == 2 }}{{ 1 in l }}{{ 9 not in l }}{{ 'b' in s }}{{ 'b' in d }}{{ 'zz' in d }}
{{ 'y' if n else 'n' }}{{ 'y' if false }}|{{ ('y' if false) is defined }}{{ 'a' if false else 'b' if false else 'c' }}
{{ undefined_name }}|{{ undefined_name is defined }}{{ undefined_name is undefined }}{{ d.zz is defined }}{{ d.zz }}|{{ undefined_name|default('x') }}{{ ''|default('x') }}|{{ ''|default('x', true) }}{{ none|default('x', boolean=true) }}{{ undefined_name or 'or' }}{{ undefined_name == '' }}{{ undefined_name|length }}{% for x in undefined_name %}{% endfor %}{{ undefined_name ~ 'a' }}{{ not undefined_name }}
{{ none is none }}{{ 1 is none }}{{ 's' is string }}{{ 1 is string }}{{ d is mapping }}{{ l is mapping }}{{ l is iterable }}{{ s is iterable }}{{ 1 is iterable }}{{ none is iterable }}{{ d is iterable }}{{ l is sequence }}{{ s is sequence }}{{ d is sequence }}{{ 1 is sequence }}{{ none is sequence }}
{{ true is boolean }}{{ 1 is boolean }}{{ true is true }}{{ 1 is true }}{{ false is false }}{{ 0 is false }}{{ none is false }}{{ 1 is number }}{{ true is number }}{{ 1.5 is float }}{{ 1 is integer }}{{ true is integer }}{{ 1 is odd }}{{ 2 is even }}{{ 4 is divisibleby 2 }}{{ 4 is divisibleby(3) }}
{{ 1 is eq 1 }}{{ 1 is sameas 1 }}{{ 2 is gt 1 }}{{ 1 is lt(2) }}{{ 1 is ne 2 }}{{ 1 is in [1, 2] }}{{ 'a' is in 'abc' }}{{ 'A' is upper }}{{ 'a' is lower }}{{ 1 is not none }}{{ 'x' is not string }}{{ 1 is ge 1 }}{{ 1 is le 0 }}{{ 'upper' is filter }}{{ 'odd' is test }}
{{ messages|map(attribute='role')|join(', ') }}{{ messages|map(attribute='n', default='?')|list }}{{ l|map('string')|join('+') }}{{ ['a', 'b']|map('upper')|list }}{{ ['a b', 'c']|map('replace', ' ', '_')|join }}
{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ messages|selectattr('n', 'defined')|map(attribute='role')|list }}{{ messages|rejectattr('role', 'eq', 'user')|map(attribute='role')|list }}{{ messages|selectattr('flag')|list|length }}{{ messages|rejectattr('n')|list|length }}{{ messages|selectattr('role', 'in', ['user', 'system'])|list|length }}{{ messages|selectattr('role', '==', 'user')|first }}
{{ l|select('odd')|list }}{{ l|reject('odd')|list }}{{ l|select('gt', 1)|list }}{{ [0, 1, '', 'x']|select|list }}{{ [0, 1]|reject|list }}{{ l|select('>', 2)|list }}
{% for role, group in messages|groupby('role') %}{{ role }}:{{ group|length }};{% endfor %}{% for g in messages|groupby(attribute='role') %}{{ g.grouper }}{{ g.list|length }}{% endfor %}
{{ l|unique|list }}{{ ['a', 'A', 'b']|unique|list }}{{ ['a', 'A']|unique(case_sensitive=true)|list }}{{ l|sort }}{{ l|sort(reverse=true) }}{{ ['b', 'A', 'c']|sort }}{{ ['b', 'A', 'c']|sort(case_sensitive=true) }}{{ messages|sort(attribute='role')|map(attribute='role')|list }}
{% for row in range(5)|batch(2) %}{{ row }}{% endfor %}{% for row in range(5)|batch(2, 'x') %}{{ row|list }}{% endfor %}{% for c in range(7)|slice(3) %}{{ c }}{% endfor %}{{ range(3)|list }}{{ range(1, 10, 3)|list }}{{ range(5, 0, -2)|list }}
{{ d|items|list }}{{ d|dictsort }}{{ d|dictsort(true) }}{{ {'b': 1, 'a': 2}|dictsort(by='value') }}{{ {'b': 1, 'a': 2}|dictsort(reverse=true) }}{{ d|length }}{{ d|list }}
{{ '  x '|trim }}|{{ 'xxaxx'|trim('x') }}|{{ '  x '.strip() }}|{{ ' x '.lstrip() }}|{{ ' x '.rstrip() }}|{{ 'xyaxy'.strip('xy') }}{{ 'a..'.rstrip('.') }}{{ '\n a\n'.strip() }}{{ 'a\x1f'.strip() }}|
{{ 'a\nb\n\nc'|indent }}{{ 'a\nb\n\nc'|indent(2, true) }}{{ 'a\nb\n\nc'|indent(2, blank=true) }}{{ 'a\nb'|indent(width=3, first=true) }}{{ 'a\nb\n'|indent('> ') }}|
{{ l|first }}{{ l|last }}{{ s|first }}{{ s|last }}{{ []|first }}{{ l|length }}{{ s|count }}{{ l|sum }}{{ l|min }}{{ l|max }}{{ messages|sum(attribute='zz') if false }}{{ [[1, 2], [3]]|sum(start=[]) }}
{{ s|upper }}{{ s|lower }}{{ 'hello wOrld'|capitalize }}{{ "it's a-test x"|title }}{{ 'aXbX'|replace('X', 'y') }}{{ 'aXbX'|replace('X', 'y', 1) }}{{ 'éA'|upper }}
{{ '3'|int }}{{ 'x'|int }}{{ 'x'|int(7) }}{{ '0x1f'|int(0, 16) }}{{ 3.9|int }}{{ '3.7'|int }}{{ '2.5'|float }}{{ 'x'|float }}{{ 2|float }}{{ 2.5|round }}{{ 3.5|round }}{{ 2.567|round(2) }}{{ 2.5|round(0, 'floor') }}{{ 2.1|round(method='ceil') }}{{ -3|abs }}{{ 42|string }}{{ 1.0|string }}{{ none|string }}{{ true|string }}
{{ 'x%sy%d'|format('A', 3) }}{{ '%.2f'|format(1.005) }}{{ '%(a)s'|format(a=1) }}{{ '{} {}'.format(1, 'b') }}{{ '{1}{0}'.format('a', 'b') }}{{ '{x:>5}|{y:<5}|{z:^5}|'.format(x=1, y='b', z='c') }}{{ '{:05.1f}'.format(2.55) }}{{ '{:,}'.format(1234567) }}{{ '{!r}'.format('a') if false }}
{{ '<a href="x">\'&'|e }}{{ '<b>'|escape }}{{ '<b>'|safe }}{{ '<b>'|safe|string }}{{ ('<b>'|safe) ~ '<i>' }}{{ '<b>'|forceescape }}
{{ d|tojson }}{{ d|tojson(indent=2) }}{{ 'é"\n<&>'|tojson }}{{ 'é'|tojson(ensure_ascii=true) }}{{ d|tojson(sort_keys=true) }}{{ d|tojson(separators=(',', ':')) }}{{ [1, none, true, 1.0, 'x']|tojson }}{{ {1: 2, none: 3}|tojson }}{{ d|tojson(indent=none) }}{{ [[], {}]|tojson(indent=1) }}{{ d.items()|list|tojson }}{{ messages|tojson(indent=4) }}{{ range(3)|list|tojson }}{{ 10000000000000000000000|tojson }}{{ l[1:]|tojson }}{{ l|tojson(indent='--') }}{{ l|tojson(false, 1) }}
{{ 'a b  c'.split() }}{{ 'a,b,c'.split(',') }}{{ 'a,b,c'.split(',', 1) }}{{ 'a b c'.split(maxsplit=1) }}{{ ' a  b  c '.split(none, 1) }}{{ 'a,b,c'.rsplit(',', 1) }}{{ 'a b c '.rsplit(none, 1) }}{{ ''.split() }}{{ ''.split(',') }}{{ 'a</think>b'.split('</think>')[-1] }}{{ 'a</think>b'.split('</think>')|last }}
{{ 'abc'.startswith('a') }}{{ 'abc'.endswith('bc') }}{{ 'abc'.startswith(('x', 'a')) }}{{ 'abc'.startswith('b', 1) }}{{ 'abc'.endswith('b', 0, 2) }}{{ 'abcb'.find('b') }}{{ 'abcb'.rfind('b') }}{{ 'abc'.find('z') }}{{ 'abcb'.index('b', 2) }}{{ 'ab'.find('') }}{{ 'éab'.find('b') }}{{ 'abab'.count('ab') }}{{ 'aaa'.replace('a', 'b', 2) }}{{ 'a'.replace('', '-') }}
{{ "it's a test".title() }}{{ 'hello World'.capitalize() }}{{ 'aB'.swapcase() }}{{ 'ß'.casefold() }}{{ 'AbC'.lower() }}{{ 'AbC'.upper() }}{{ 'a1'.isalnum() }}{{ 'a'.isalpha() }}{{ '12'.isdigit() }}{{ '12'.isdecimal() }}{{ '½'.isnumeric() }}{{ ' '.isspace() }}{{ 'A'.isupper() }}{{ 'a'.islower() }}{{ 'a_1'.isidentifier() }}{{ 'aé'.isascii() }}
{{ ','.join(['a', 'b']) }}{{ 'a\nb\r\nc'.splitlines() }}{{ 'a\nb\n'.splitlines(true) }}{{ 'a=b=c'.partition('=') }}{{ 'a=b=c'.rpartition('=') }}{{ 'abc'.partition('z') }}{{ 'prefix-x'.removeprefix('prefix-') }}{{ 'x.jinja'.removesuffix('.jinja') }}
{{ 'a'.ljust(3, '.') }}{{ 'a'.rjust(3) }}{{ 'abc'.center(8, '*') }}{{ 'ab'.center(5, '*') }}{{ '-5'.zfill(4) }}{{ 'a\tb'.expandtabs(4) }}{{ 'a'|center(5) }}|
{{ d.get('b') }}{{ d.get('zz') }}{{ d.get('zz', 'dflt') }}{{ d['a']['c'] }}{{ d.a.c[2] }}{{ d.keys()|list }}{{ d.values()|list }}{{ d['zz'] is defined }}{{ 'a' in d.keys() }}{{ d.items()|first }}{{ {'items': 1}.items()|list }}{{ {'get': 1}['get'] }}{{ d.copy() }}
{{ [1, [2, 'x'], {'a': none}] }}{{ {'k': 'v', 'n': [1]} }}{{ {} }}{{ [] }}{{ {'a': 1}.a }}{{ [1, 2][0] }}{{ {'a': 1, **{'b': 2}} if false }}{{ "it's" }}{{ ["it's", 'q"q', 'both\'"', '\n\t\\', 'é\u200b\x07'] }}
{{ 1.0 }}{{ 0.1 + 0.2 }}{{ 1e20 }}{{ 1e-7 }}{{ 1_000 }}{{ 100000000000000000000 }}{{ true }}{{ none }}{{ True }}{{ None }}{{ [true, none] }}
{{ dict(a=1, b=2) }}{{ dict(d, z=1)|length }}{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{% set j = joiner(';') %}{{ j() }}{{ j() }}
{% if messages and messages[0]['role'] == 'system' %}sys{% elif n %}n{% else %}none{% endif %}{% if l %}t{% endif %}{% if [] %}t{% else %}f{% endif %}{% if 0 or '' or {} %}t{% else %}f{% endif %}
{%- if true -%}   a   {%- endif -%}   b
  {%- if true +%}\n a{% endif %}\n  {% if true %}\nb\n  {% endif %}\nc\n   {#- c -#}   d {{- ' e ' -}} f\n
{% raw %}{{ x }}{% y %}{% endraw %}{# comment {{ x }} #}{{ '{{' }}{{ "{%" }}
{% generation %}a{{ n }}{% endgeneration %}{% for m in messages %}{%- generation -%} {{ m.role }} {%- endgeneration -%}{{ loop.index }}{% endfor %}
{% with a = 1, b = 2 %}{{ a }}{{ b }}{% endwith %}{{ a }}{% with %}{% set q = 1 %}{{ q }}{% endwith %}{{ q }}
{% set x = 1 %}{% for i in l %}{% set x = i %}{% endfor %}{{ x }}{% if true %}{% set x = 5 %}{% endif %}{{ x }}
{{ strftime_now('%Y-%m-%d %H') }}{{ strftime_now('%d %b %Y %A %B %j %p %%') }}
{{ raise_exception('no ' ~ n) }}
{{ messages[0].content|trim ~ ('x' if true else 'y')|upper }}{{ (1, 2) + (3,) }}{{ [1] + [2] }}{{ l + [9] }}{{ 'a' 'b' }}{{ "a" + 'b' }}
{{ l == [3, 1, 2, 2] }}{{ d == {} }}{{ (1, 2) == (1, 2) }}{{ [1] == (1,) }}{{ 'a' == "a" }}{{ none == false }}{{ 1 == true }}{{ '1' == 1 }}{{ 1 != 2 }}{{ none != none }}
{{ messages[0]['content'] is string and messages[0]['content'] is not mapping }}{{ not (true and false) or false }}{{ true and 'x' }}{{ '' or none or 'z' }}{{ 0 and 1 }}
{{ l.index(2) }}{{ l.count(2) }}{{ (1, 2, 2).count(2) }}{{ 5 .__class__ if false }}
{{ 'a b c'|wordcount }}{{ 'hello world foo'|truncate(8) }}{{ 'x'|pprint }}{{ 'a b&c/d'|urlencode }}{{ '<b>x</b>'|striptags }}
{{ {'a': 1}.items()|map('join', '=')|join('&') }}{{ l|map('abs')|sum }}{{ messages|map(attribute='content')|map('trim')|map('length')|list }}{{ [['a', 1]]|map('first')|list }}{{ [{'x': {'y': 1}}]|map(attribute='x.y')|list }}{{ [[1, 2]]|map(attribute=1)|list }}
{% for a, b in [(1, 2), (3, 4)] %}{{ a }}{{ b }}{% endfor %}{% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}{% for x in 'abc' %}{{ x }}{% endfor %}{% for i in range(3)|reverse %}{{ i }}{% endfor %}{{ 'abc'|reverse }}{{ l|reverse|list }}
{{ (messages|last).role }}{{ (messages|first)['role'] }}{{ messages[-1]['flag'] }}{{ messages[1]['tags']|join('/') }}{{ messages|length > 2 }}{{ messages[0].role in ['system', 'developer'] }}
{{ f is float }}{{ f|int }}{{ f * 2 }}{{ n * f }}{{ -n }}{{ n|abs }}{{ 10 // 4.0 }}{{ 5 % 2.5 }}{{ 2 ** 0.5 }}
{{ ''.join(l|map('string')) }}{{ d|tojson|length }}{{ (d|tojson)[:5] }}{{ s.split('-')|select|list }}{{ s.split('-')|reject('equalto', '')|join }}
{% set _ = 1 %}{{ _ }}{% set a = {'x': [1, 2]} %}{{ a.x[0] }}{{ a['x']|length }}{% set m = messages[1] %}{{ m.tags[0] }}
{{ 1 if messages is defined and messages is not none }}{{ (none or {}).get('x') }}{{ ({'a': none}).a is none }}{{ messages[2].none is none }}
{{ d is mapping and 'b' in d and d.b is number }}{{ 'x' in none if false }}{{ [1, 2] in [[1, 2]] }}{{ 'a' in ('a', 'b') }}
{{ '\u00e9\x41\t\'\"' }}{{ 'a\\nb' }}{{ "tab\tx" }}{{ 'q' "r" }}
{% for m in messages %}{% if loop.first and m.role == 'system' %}{% set sys = m.content %}{% continue %}{% endif %}{{ loop.index0 }}{{ sys }}{% endfor %}
{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined else 'none' }}{{ loop.nextitem.role if not loop.last else 'end' }};{% endfor %}
""".strip("\n").split("\n")
FEATURES = [source.replace("\\n", "\n") if source.startswith("  {%-") else source for source in FEATURES]
