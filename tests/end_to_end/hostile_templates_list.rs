//! Templates that overflow the stack, never end, or fill the memory where nothing bounds them.

/// Names and sources.
pub fn templates() -> Vec<(&'static str, String)> {
    let mut all: Vec<(&'static str, String)> =
        GROWING.iter().map(|(name, source)| (*name, source.to_string())).collect();
    all.extend(long_expressions());
    all.extend(deep_blocks());
    all
}

/// What grows while it is rendered.
const GROWING: &[(&str, &str)] = &[
    ("nested ranges", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
    (
        "nested ranges that write",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    ),
    ("huge range", "{{ range(10**12)|list }}"),
    ("huge negative range", "{{ range(0, -(10**12), -1)|list }}"),
    ("ranges multiplied", "{{ (range(99999)|list * 99999)|length }}{{ (range(99999)|list * 99999)|list }}"),
    ("wide json indent", "{{ [1]|tojson(indent=10**9) }}"),
    ("wider json indent", "{{ [1]|tojson(indent=10**18) }}"),
    ("long json indent", "{{ [[[[1]]]]|tojson(indent='x' * 50000000) }}"),
    ("many json separators", "{{ (range(99999)|list)|tojson(separators=('x' * 100000, ':')) }}"),
    ("wide format", "{{ '{:>1000000000}'.format(1) }}"),
    ("wider format", "{{ '{:>99999999999999999999}'.format(1) }}"),
    ("many wide formats", "{{ ('{0:>99999}' * 9999).format(1) }}"),
    ("precise format", "{{ '{:.1000000000f}'.format(1.5) }}"),
    ("wide printf", "{{ '%1000000000d'|format(1) }}"),
    ("precise printf", "{{ '%.1000000000f'|format(1.5) }}"),
    ("string multiplied", "{{ 'x' * 10**9 }}"),
    ("string multiplied twice", "{{ 'x' * 99999 * 99999 }}"),
    ("string multiplied by a huge number", "{{ 'x' * 10**30 }}"),
    (
        "string doubled",
        "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    ),
    (
        "string doubled by +",
        "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    ),
    (
        "string doubled by a block",
        "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    ),
    (
        "string doubled by join",
        "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s]|join %}{% endfor %}",
    ),
    (
        "string doubled by str.join",
        "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = ns.s.join(['a', 'b', 'c']) %}{% endfor %}",
    ),
    (
        "string doubled by replace",
        "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = ns.s|replace('x', 'xx') %}{% endfor %}",
    ),
    (
        "string doubled by str.replace",
        "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = ns.s.replace('x', 'xx') %}{% endfor %}",
    ),
    (
        "string doubled by format",
        "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = '{0}{0}'.format(ns.s) %}{% endfor %}",
    ),
    (
        "string doubled by printf",
        "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = '%s%s'|format(ns.s, ns.s) %}{% endfor %}",
    ),
    (
        "string doubled by escaping",
        "{% set ns = namespace(s='&<') %}{% for i in range(99) %}{% set ns.s = ns.s|forceescape %}{{ ns.s|length }} {% endfor %}",
    ),
    (
        "string doubled by repr",
        "{% set ns = namespace(s='\\\\') %}{% for i in range(99) %}{% set ns.s = [ns.s]|string %}{% endfor %}",
    ),
    (
        "string doubled by json",
        "{% set ns = namespace(s='\"') %}{% for i in range(99) %}{% set ns.s = ns.s|tojson %}{% endfor %}",
    ),
    (
        "string doubled by a macro",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% else %}x{% endif %}{% endmacro %}{{ m(90) }}",
    ),
    ("center filter", "{{ 'x'|center(10**9) }}"),
    ("center", "{{ 'x'.center(10**9) }}"),
    ("ljust", "{{ 'x'.ljust(10**9) }}"),
    ("rjust", "{{ 'x'.rjust(10**18) }}"),
    ("zfill", "{{ 'x'.zfill(10**9) }}"),
    ("expandtabs", "{{ '\\t\\t'.expandtabs(10**9) }}"),
    ("indent", "{{ 'x\\ny'|indent(10**9) }}"),
    ("indent by a text", "{{ ('\\n' * 99999)|indent('x' * 99999) }}"),
    ("batch with a fill", "{{ [1]|batch(10**9, 0)|list }}"),
    (
        "batch of nothing",
        "{{ range(99999)|batch(1)|list|batch(1)|list|batch(1)|list|string|length }}{% for i in range(99999) %}{{ range(99999)|batch(1)|list|length }}{% endfor %}",
    ),
    ("slice", "{{ [1]|slice(10**9)|list }}"),
    ("join of a range", "{{ range(99999)|join('x' * 99999) }}"),
    ("str.join of a range", "{{ ('x' * 99999).join(range(99999)|map('string')) }}"),
    ("replace of nothing", "{{ ('x' * 99999).replace('', 'y' * 99999) }}"),
    ("replace filter", "{{ ('x' * 99999)|replace('x', 'y' * 99999) }}"),
    (
        "list doubled",
        "{% set ns = namespace(l=[1, 2]) %}{% for i in range(99) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l|length }}{{ ns.l|list|length }}",
    ),
    (
        "list doubled in place",
        "{% set ns = namespace(l=[1, 2]) %}{% for i in range(99) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    ),
    (
        "list doubled and written as json",
        "{% set ns = namespace(l=[1, 2]) %}{% for i in range(40) %}{% set ns.l = {'a': ns.l, 'b': ns.l} %}{% endfor %}{{ ns.l|tojson }}",
    ),
    (
        "lists doubled and compared",
        "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
    ),
    (
        "mapping grown",
        "{% set ns = namespace(d={}) %}{% for i in range(99999) %}{% set ns.d = dict(ns.d, **{'a' ~ i: i}) %}{% endfor %}",
    ),
    (
        "list nested by a namespace",
        "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% for j in range(99) %}{% set ns.l = [ns.l] %}{% endfor %}{% endfor %}",
    ),
    (
        "mapping nested by a namespace",
        "{% set ns = namespace(l={}) %}{% for i in range(99999) %}{% set ns.l = {'a': ns.l} %}{% endfor %}{{ ns.l }}",
    ),
    (
        "tuple nested by a namespace",
        "{% set ns = namespace(l=()) %}{% for i in range(99999) %}{% set ns.l = ns.l, %}{% endfor %}{{ ns.l }}",
    ),
    (
        "list nested by batch",
        "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = [ns.l]|batch(1)|list %}{% endfor %}",
    ),
    (
        "list nested by two namespaces",
        "{% set a = namespace(l=[]) %}{% set b = namespace(l=[]) %}{% for i in range(99999) %}{% set a.l = [b.l] %}{% set b.l = [a.l] %}{% endfor %}",
    ),
    ("namespace in itself", "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}"),
    ("namespace in itself as json", "{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns|tojson }}"),
    (
        "namespaces in each other",
        "{% set a = namespace() %}{% set b = namespace() %}{% set a.x = b %}{% set b.x = a %}{{ a == b }}",
    ),
    (
        "namespace in itself by a mapping",
        "{% set ns = namespace() %}{% set d = {'a': ns} %}{% set ns.a = d %}{{ {ns: 1} }}",
    ),
    (
        "namespace in a new one",
        "{% set ns = namespace() %}{% set ns.a = namespace(b=ns) %}{{ ns == ns.a }}{{ ns }}",
    ),
    (
        "namespaces nested",
        "{% set ns = namespace(a=1) %}{% for i in range(99999) %}{% set ns.a = namespace(a=ns.a) %}{% endfor %}{{ ns }}",
    ),
    ("macro without end", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    (
        "macros without end",
        "{% macro a(x) %}{{ b([x]) }}{% endmacro %}{% macro b(x) %}{{ a([x]) }}{% endmacro %}{{ a(1) }}",
    ),
    (
        "caller without end",
        "{% macro m() %}{{ caller() }}{% endmacro %}{% macro r() %}{% call m() %}{{ r() }}{% endcall %}{% endmacro %}{{ r() }}",
    ),
    ("recursive loop without end", "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}"),
    ("recursive loop that grows", "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}"),
    ("sorts", "{% for i in range(99999) %}{{ range(99999)|sort(reverse=true)|first }}{% endfor %}"),
    (
        "lookups in a long list",
        "{% set l = range(99999)|list %}{% for i in range(99999) %}{% if -1 in l %}{% endif %}{% endfor %}",
    ),
    (
        "index in a long list",
        "{% set l = range(99999)|list %}{% for i in range(99999) %}{{ l.count(5) }}{% endfor %}",
    ),
    ("unique", "{% for i in range(99999) %}{{ range(99999)|unique|list|length }}{% endfor %}"),
    (
        "groupby",
        "{% for i in range(99999) %}{{ range(99999)|map('string')|groupby('x')|length }}{% endfor %}",
    ),
    (
        "long strings compared",
        "{% set a = 'x' * 20000000 %}{% set b = a ~ 'y' %}{% set a = a ~ 'z' %}{% for i in range(99999) %}{% for j in range(99) %}{% if a == b %}{% endif %}{% endfor %}{% endfor %}",
    ),
    (
        "last characters of a long string",
        "{% set a = 'é' * 20000000 %}{% for i in range(99999) %}{% for j in range(99) %}{% if a[-1] %}{% endif %}{% endfor %}{% endfor %}",
    ),
    (
        "methods of a long string",
        "{% set a = 'x' * 20000000 %}{% for i in range(99999) %}{{ a.count('y') }}{% endfor %}",
    ),
    (
        "long string as a key",
        "{% set a = 'é' * 20000000 %}{% for i in range(99999) %}{% for j in range(99) %}{% if {}[a] %}{% endif %}{% if {a: 1} %}{% endif %}{% endfor %}{% endfor %}",
    ),
    ("split of a long string", "{% for i in range(99) %}{{ ('x ' * 9999999).split()|length }}{% endfor %}"),
    ("power", "{{ 10 ** 10 ** 10 }}{{ 2 ** 999999999 }}"),
    ("map of maps", "{{ range(99999)|map('string')|map('center', 99999)|list|length }}"),
    ("title of a long string", "{% for i in range(9999) %}{{ ('x' * 9999999)|title|length }}{% endfor %}"),
    ("truncate", "{{ 'x' * 99999999 |truncate(10**18) }}{{ ('x' * 99999999)|truncate(3) * 10**9 }}"),
    (
        "cycler",
        "{% set c = cycler(*range(99999)) %}{% for i in range(99999) %}{% for j in range(99999) %}{% set x = c.next() %}{% endfor %}{% endfor %}",
    ),
    ("printed values", "{% set l = range(99999)|list %}{% for i in range(99999) %}{{ l }}{% endfor %}"),
    ("urlencode", "{{ ('é' * 99999999)|urlencode }}"),
    (
        "dictsort",
        "{% set d = {'a': range(99999)|list} %}{% for i in range(99999) %}{{ d|dictsort }}{% endfor %}",
    ),
    (
        "reverse",
        "{% for i in range(99999) %}{{ range(99999)|reverse|list|length }}{{ (range(99999)|list)[::-1]|list|length }}{% endfor %}",
    ),
    ("sum of lists", "{{ range(99999)|map('string')|map('list')|sum(start=[])|length }}"),
];

/// Expressions that nest as deep as they are long.
fn long_expressions() -> Vec<(&'static str, String)> {
    let chain = |start: &str, link: &str| "{{ ".to_string() + start + &link.repeat(100_000) + " }}";
    let nest = |open: &str, close: &str| {
        "{{ ".to_string() + &open.repeat(100_000) + "1" + &close.repeat(100_000) + " }}"
    };
    let short = |start: &str, link: &str| "{{ ".to_string() + start + &link.repeat(3_900) + " }}";
    vec![
        ("sum", chain("1", "+1")),
        ("sum of names", chain("a", "+a")),
        ("concatenation", chain("'a'", "~'a'")),
        ("attributes", chain("a", ".b")),
        ("subscripts", chain("a", "[0]")),
        ("calls", chain("a", "()")),
        ("filters", chain("1", "|abs")),
        ("tests", chain("1", " is none")),
        ("comparisons", chain("1", "<1")),
        ("powers", chain("1", "**1")),
        ("conditions", chain("1", " if 1 else 1")),
        ("alternatives", chain("1", " or 1")),
        ("not", "{{ ".to_string() + &"not ".repeat(100_000) + "1 }}"),
        ("minus", "{{ ".to_string() + &"-".repeat(100_000) + "1 }}"),
        ("parentheses", nest("(", ")")),
        ("brackets", nest("[", "]")),
        ("braces", nest("{1:", "}")),
        ("calls in calls", nest("f(", ")")),
        ("open brackets", "{{ ".to_string() + &"[".repeat(100_000)),
        ("sum within the limit", short("1", "+1")),
        ("sum of names within the limit", short("n", "+n")),
        ("attributes within the limit", short("a", ".b")),
        ("filters within the limit", short("x", "|abs")),
        ("not within the limit", "{{ ".to_string() + &"not ".repeat(7_900) + "x.y.z }}"),
        ("minus within the limit", "{{ ".to_string() + &"-".repeat(7_900) + "x.y.z }}"),
        ("conditions within the limit", "{{ x.y.z".to_string() + &" if 0 else 1".repeat(1_900) + " }}"),
        ("long source", "x".repeat(3 << 20)),
        ("many tags", "{{ 1 }}".repeat(200_000)),
        ("many empty tags", "{{}}".repeat(200_000)),
    ]
}

/// Blocks within blocks.
fn deep_blocks() -> Vec<(&'static str, String)> {
    let blocks = |open: &str, close: &str, count: usize| open.repeat(count) + &close.repeat(count);
    vec![
        ("ifs", blocks("{% if 1 %}", "{% endif %}", 9_000)),
        ("fors", blocks("{% for i in [1] %}", "{% endfor %}", 6_000)),
        ("withs", blocks("{% with a = [a] %}", "{% endwith %}", 4_000)),
        ("filters", blocks("{% filter upper %}", "{% endfilter %}", 9_000)),
        ("elifs", "{% if x.y.z %}".to_string() + &"{% elif 0 %}".repeat(15_000) + "{{ x.y.z }}{% endif %}"),
        ("sets", "{% set x = [x] %}".repeat(6_000) + "{{ x }}"),
        ("sets of tuples", "{% set x = x, %}".repeat(6_000) + "{{ x }}"),
        (
            "with of many names",
            "{% with ".to_string()
                + &"x = [[[[x]]]], ".repeat(500)
                + "y = x %}{{ x == y }}{{ {x: y} }}{{ x }}{% endwith %}",
        ),
        (
            "macro that nests its argument",
            format!(
                "{{% macro m(x, n) %}}{{{{ m({}x{}, n) }}}}{{% endmacro %}}{{{{ m(1, 1) }}}}",
                "[".repeat(60),
                "]".repeat(60)
            ),
        ),
        ("generation blocks", blocks("{% generation %}", "{% endgeneration %}", 9_000)),
    ]
}
