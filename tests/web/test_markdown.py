"""Markdown of any author: nothing but harmless HTML comes of it, and it comes soon."""

import re
import time
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.web.markdown import LANGUAGES, MOST_HIGHLIGHTED, render

PLAIN = "p br hr em strong s code blockquote ul li h1 h2 h3 h4 h5 h6 table thead tbody tr th td"
ALLOWED: dict[str, set[str]] = {name: set() for name in PLAIN.split()} | {
    "a": {"href", "title", "rel"},
    "ol": {"start"},
    "span": {"class"},
    "pre": {"tabindex"},
    "div": {"class", "data-language"},
}
"""Element → attributes; whatever else turns up is a hole."""


class Page(HTMLParser):
    """HTML as a browser splits it up."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_decl(self, decl: str) -> None:
        raise AssertionError(f"a declaration: {decl}")

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"an instruction: {data}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data}")

    @property
    def links(self) -> list[str]:
        return [str(attributes.get("href")) for tag, attributes in self.elements if tag == "a"]

    def has(self, tag: str) -> bool:
        return any(tag == one for one, _ in self.elements)


def checked(text: str) -> Page:
    """What comes of a text, once nothing harmful was found in it."""
    page = Page(render(text))
    for tag, attributes in page.elements:
        assert tag in ALLOWED, tag
        assert attributes.keys() <= ALLOWED[tag], (tag, attributes)
        if "href" in attributes:
            # A browser leaves out control characters and blanks before it looks for a scheme.
            seen = re.sub(r"[\x00-\x20]", "", str(attributes["href"]))
            assert urlsplit(seen).scheme.lower() in {"", "http", "https", "mailto"}, seen
            assert attributes.get("rel") == "noopener noreferrer nofollow"
    return page


ATTACKS = [
    "<script>alert(1)</script>",
    "<SCRIPT SRC=//evil.example/x.js></SCRIPT>",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    '<img src="x" onerror="alert(1)">',
    "<img src=x onerror=alert(1)//",
    "<svg onload=alert(1)>",
    "<svg><script>alert&#40;1&#41;</script></svg>",
    '<svg><a xlink:href="javascript:alert(1)"><text>x</text></a></svg>',
    "<math><mtext></p><mglyph><style></math><img src onerror=alert(1)>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    '<iframe src="javascript:alert(1)"></iframe>',
    "<object data=javascript:alert(1)></object><embed src=javascript:alert(1)>",
    '<form action="javascript:alert(1)"><button>go</button></form>',
    '<a href="javascript:alert(1)">x</a>',
    '<p style="background:url(javascript:alert(1))" onclick=alert(1)>x</p>',
    "<!--><script>alert(1)</script>-->",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<?php alert(1) ?><!DOCTYPE x>",
    "<base href=//evil.example><meta http-equiv=refresh content='0;url=javascript:alert(1)'>",
    "<style>@import '//evil.example/x.css';</style><link rel=stylesheet href=//evil.example>",
    "<textarea><script>alert(1)</script>",
    '<noscript><p title="</noscript><img src=x onerror=alert(1)>">',
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](  javascript:alert(1)  )",
    "[x](<javascript:alert(1)>)",
    "[x](<java\tscript:alert(1)>)",
    "[x](\x01javascript:alert(1))",
    "[x](java&#115;cript:alert(1))",
    "[x](&#x6A&#x61&#x76&#x61&#x73&#x63&#x72&#x69&#x70&#x74&#x3A;alert(1))",
    "[x](javascript&colon;alert(1))",
    "[x](java&Tab;script:alert(1))",
    "[x](java&NewLine;script&colon;alert(1))",
    "[x](javascript%3Aalert(1))",
    "[x](java\\script:alert(1))",
    "[x](vbscript:msgbox(1))",
    "[x](VBSCRIPT&colon;msgbox(1))",
    "[x](file:///etc/passwd)",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "[x](data:image/svg+xml;base64,PHN2Zy8+)",
    "[x](data:image/png;base64,iVBORw0KGgo=)",
    "[x](blob:https://a.example/b) [x](about:blank) [x](intent://x#Intent;end) [x](view-source:x)",
    '[x](https://a.example "title\\" onmouseover=alert(1) x=\\"")',
    "[x](https://a.example 'a\" onmouseover=\"alert(1)')",
    '[x](https://a.example" onmouseover="alert(1))',
    "[x](https://a.example/'onmouseover='alert(1))",
    '[x](<https://a.example/"onmouseover="alert(1)>)',
    "[<img src=x onerror=alert(1)>](https://a.example)",
    "[x][r]\n\n[r]: javascript:alert(1)",
    "[x][r]\n\n[r]: <java\nscript:alert(1)>",
    '[x][r]\n\n[r]: https://a.example "\\"><script>alert(1)</script>"',
    "[x][r]\n\n[r]: data:text/html,<script>alert(1)</script> 'x'",
    "[<script>]: javascript:alert(1)\n\n[<script>]",
    "<javascript:alert(1)>",
    "<vbscript:msgbox(1)>",
    "<data:text/html,<script>alert(1)</script>>",
    '<https://a.example/"onmouseover="alert(1)>',
    "<https://a.example/<script>alert(1)</script>>",
    "![x](javascript:alert(1))",
    '![x" onerror="alert(1)](https://a.example/p.png)',
    "![<script>alert(1)</script>](https://a.example/p.png)",
    '![x](https://a.example/p.png"onerror="alert(1))',
    "![x](data:image/svg+xml,<svg onload=alert(1)>)",
    "[![x](javascript:alert(1))](javascript:alert(2))",
    "[![x](https://a.example/p.png)](vbscript:x)",
    '``` "onmouseover="alert(1)\ncode\n```',
    '```x"><script>alert(1)</script>\ncode\n```',
    "```html\n<script>alert(1)</script></code></pre><script>alert(1)</script>\n```",
    "```js\n</code></pre></div><img src=x onerror=alert(1)>\n```",
    "~~~php'onclick='alert(1)\n<?php ?>\n~~~",
    "    </code></pre><script>alert(1)</script>",
    "`</code><script>alert(1)</script>`",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;alert(1)&#60;/script&#62;",
    "&amp;lt;img src=x onerror=alert(1)&amp;gt;",
    "| <script>alert(1)</script> | b |\n|---|:-:|\n| [x](javascript:alert(1)) | <img src onerror=alert(1)> |",
    "> - 1. > <script>alert(1)</script>",
    "# <script>alert(1)</script>\n<script>\nalert(1)\n===",
    "**<b onmouseover=alert(1)>x</b>** ~~<i onfocus=alert(1) autofocus>~~",
    "a\u2028<script>alert(1)</script>\u0000<script\u0000>alert(1)</script>",
    "\ufeff<script>alert(1)</script>＜script＞alert(1)＜/script＞",
    "\"'><script>alert(String.fromCharCode(88,83,83))</script>",
    "{{constructor.constructor('alert(1)')()}} ${alert(1)} <%= 1 %>",
]


@pytest.mark.parametrize("text", ATTACKS)
def test_no_text_gets_anything_harmful_onto_the_page(text: str) -> None:
    checked(text)
    for around in ("> - {}", "- x\n\n  {}", "1. **{}**", "[{}](https://a.example)", "| a |\n|---|\n| {} |"):
        checked(around.format(text))
    checked("\n\n".join([text, *ATTACKS[::7], text]))


def test_the_check_itself_sees_what_is_harmful() -> None:
    with pytest.raises(AssertionError):
        Page("<!-- x -->")
    found = Page('<svg onload=alert(1)><a href="java&#115;cript:x">')
    assert found.elements == [("svg", {"onload": "alert(1)"}), ("a", {"href": "javascript:x"})]


def test_html_is_shown_as_it_was_written() -> None:
    text = '<script>alert("1")</script> <b>bold</b>'
    assert Page(render(text)).text.strip() == text


SIGNS = [
    *"<>[]()!*_`~|\\&;:#\"'= \t\n\r\x00\x0b\u2028",
    *("](", "![", "```", "\n> ", "\n- ", "\n1. ", "\n    ", "|---|", "&#x6a;", "&Tab;", "\n[r]: ", "[r]"),
    *("javascript:", "data:", "https://[::1", "//a.example", "mailto:", "xn--", "%", "%zz", "\ud83d\ude00"),
    *("<script>", "onerror=", "<img src=x ", "a", "金", "\u202e", "\ufdd0"),
]


@given(st.lists(st.sampled_from(SIGNS), max_size=40).map("".join))
@settings(max_examples=1000)
def test_no_mixture_of_signs_fails_or_gets_through(text: str) -> None:
    checked(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def test_images_become_links() -> None:
    page = checked('![a cat](https://a.example/cat.png "Tom") and ![](https://a.example/b.png)')
    assert not page.has("img")
    assert page.links == ["https://a.example/cat.png", "https://a.example/b.png"]
    assert "a cat" in page.text
    assert "https://a.example/b.png" in page.text


def test_links_stay() -> None:
    text = "[a](https://a.example/?b=1&c=2) <https://b.example> <me@c.example> [d](#e) [f](g/h)"
    assert checked(text).links == [
        "https://a.example/?b=1&c=2",
        "https://b.example",
        "mailto:me@c.example",
        "#e",
        "g/h",
    ]


def test_code_is_coloured() -> None:
    page = checked("```python\ndef f():\n    return '<b>'\n```")
    assert ("div", {"class": "code", "data-language": "python"}) in page.elements
    assert ("span", {"class": "k"}) in page.elements  # pygments' name for keywords
    assert page.text.strip() == "def f():\n    return '<b>'"


@pytest.mark.parametrize("language", ["", "nonsense", "text", "../../etc", "金"])
def test_code_of_other_languages_stays_as_it_is(language: str) -> None:
    page = checked(f"```{language}\nif <x> & y:\n\tz\n```")
    assert page.text == "if <x> & y:\n\tz\n\n"
    assert dict(page.elements)["div"]["data-language"] == language


def test_tables_lists_and_the_rest() -> None:
    table, lists = "| a | b |\n|---|--:|\n| 1 | 2 |", "- x\n  1. y\n     - z"
    page = checked(f"{table}\n\n{lists}\n\n# t\n\n> q\n\n~~s~~ *e* **f**\n\n---\na\nb")
    tags = [tag for tag, _ in page.elements]
    assert tags[:9] == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    assert tags[9:15] == ["ul", "li", "ol", "li", "ul", "li"]
    assert tags[15:] == ["h1", "blockquote", "p", "p", "s", "em", "strong", "hr", "p", "br"]


N = 10_000
LONG = 500_000
"""The most that the server takes."""


def repeated(*pieces: str) -> str:
    """A text as long as can be."""
    piece = "".join(pieces)
    return (piece * (LONG // len(piece) + 1))[:LONG]


PATHOLOGICAL = {
    "brackets": "[" * N + "]" * N,
    "link brackets": "[" * N + "](x)" * N,
    "image brackets": "![" * N + "](x)" * N,
    "open brackets": "[" * LONG,
    "open images": repeated("!["),
    "open links": repeated("[a]("),
    "open titles": repeated('[a](b "'),
    "open references": repeated("[a]["),
    "references": repeated("[a]: b\n"),
    "open definitions": repeated("[a]: <b\n"),
    "many definitions": "".join(f"[{n}]: x\n" for n in range(N)) + "[0]" * N,
    "quotes": ">" * N + "x",
    "quoted lines": ("> " * 50 + "x\n") * 1000,
    "lists": "".join("  " * n + "- x\n" for n in range(500)),
    "list signs": "- " * N + "x",
    "numbers": "1. " * N + "x",
    "lists and quotes": "> - " * N,
    "asterisks": "*" * LONG,
    "open emphasis": repeated("*a "),
    "mixed emphasis": repeated("*a_ "),
    "emphasis of all kinds": repeated("**a __b *c _d ~~e "),
    "odd emphasis": "a**b" + repeated("c* ")[: LONG - 10],
    "underscores": repeated("_a "),
    "tildes": "~" * LONG,
    "backticks": "".join("`" * n + " " for n in range(1, 900)),
    "open code": repeated("`a ``b "),
    "fences": repeated("```\n"),
    "open angles": "<" * LONG,
    "autolinks": repeated("<a:"),
    "comments": repeated("<!--"),
    "entities": repeated("&"),
    "open entities": repeated("&#x41"),
    "backslashes": "\\" * LONG,
    "table rows": "|" * 2000 + "\n" + "|-" * 1999 + "|\n" + "|\n" * 100_000,
    "wide tables": "|a" * 50_000 + "|\n" + "|-" * 50_000 + "|\n" + "|b" * 50_000,
    "tables": repeated("|a|\n|-|\n|b|\n\n"),
    "headings": repeated("# a\n"),
    "underlines": repeated("a\n="),
    "blanks": " " * LONG + "x",
    "lines of blanks": repeated("a" + " " * 500 + "\n"),
    "tabs": "\t" * LONG,
    "lines": "\n" * LONG,
    "words": repeated("word "),
    "one word": "x" * LONG,
    "wide characters": "金" * LONG,
    "links": repeated("[a](b) "),
    "parentheses": "[a](" + "(" * LONG,
    "hosts": "[a](https://" + "金" * 100_000 + ")",
    "odd hosts": repeated("[a](https://[::) "),
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", PATHOLOGICAL)
def test_every_text_is_rendered_soon(kind: str) -> None:
    """In 30 s: a dozen for the worst on two slow cores. What is quadratic takes many minutes."""
    text = PATHOLOGICAL[kind]
    begin = time.monotonic()
    render(text)
    assert time.monotonic() - begin < 30


NASTY = [
    *"aA0 \t\n\"'`\\/*-+=<>()[]{}#$@!?.,:;|&^%~_",
    *(
        "0_",
        "a.",
        "a::",
        '\\"',
        "\\'",
        "/*",
        "//",
        "<!--",
        "<a ",
        "<a b=",
        "</",
        '"""',
        "'''",
        "${",
        "$(",
        "#{",
    ),
    *(
        "<<a\n",
        "<<<",
        "(a",
        "a(",
        "a<",
        "a,",
        "a b ",
        "1.",
        "0x",
        "1e",
        "--",
        "%{",
        "%q",
        "/a",
        "\na=",
        "\n  ",
    ),
    *(
        "a:\n",
        "- a\n",
        "[a]\n",
        "@@",
        "\n+",
        "\n#",
        "~~~",
        "{{",
        "&a",
        "金",
        "a\n\n",
        'r"',
        'f"{',
        "b'",
        "=~ ",
        "=>",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_no_code_takes_long_to_be_coloured(language: str) -> None:
    """As much as may be of what quadratic regular expressions stumble over; exponential ones never end.

    In one line, which is not coloured, and in lines that just are.
    """
    for piece in NASTY:
        for begun in ("", '"', "{"):
            endless = begun + piece * MOST_HIGHLIGHTED
            line = begun + (piece * 1000)[: 97 if piece.isspace() else 990] + "x\n"
            for code in (endless, line * MOST_HIGHLIGHTED):
                code = code[: MOST_HIGHLIGHTED - 10]
                begin = time.monotonic()
                render(f"~~~~~~~~{language}\n{code}\n~~~~~~~~")
                assert time.monotonic() - begin < 10, (language, begun, piece)


def test_only_so_much_code_is_coloured() -> None:
    code = "```python\n" + "x = 1\n" * 100 + "```\n\n"
    pieces = render(code * 100).split('data-language="python"')[1:]
    coloured = ["<span" in piece for piece in pieces]
    n = MOST_HIGHLIGHTED // 600
    assert coloured == [True] * n + [False] * (100 - n)
