"""Markdown as HTML that is safe to put into a page, whoever wrote it.

Three walls: the renderer escapes all HTML in the text, a sanitiser lets only a list of elements through, and
the page's policy (`guard.py`) runs no script but our own files.
"""

import re
from functools import lru_cache
from html import escape
from typing import Any

import nh3
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

_ELEMENTS = {
    *("p", "br", "hr", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol", "li"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "a", "table", "thead", "tbody", "tr", "th", "td", "span", "div"),
}
_ATTRIBUTES = {
    "a": {"href", "title"},
    "ol": {"start"},
    "span": {"class"},
    "code": {"class"},
    "pre": {"class", "tabindex"},
    "div": {"class", "data-language"},
}
MOST_HIGHLIGHTED = 5_000
"""Characters of code in one text; what is beyond stays plain."""
LANGUAGES = {
    *("bash", "c", "c++", "cpp", "css", "diff", "go", "html", "ini", "javascript", "js", "json", "kotlin"),
    *("lua", "make", "py", "python", "r", "ruby", "rust", "sh", "shell", "sql", "swift", "toml", "ts"),
    *("typescript", "xml", "yaml"),
}
"""Those of pygments' languages that are tested against texts made to take for ever: a regular expression
that goes astray holds up the whole process.
"""
_ENDLESS = re.compile(r"\s{100}|[^\n]{1000}")
"""What no code has, and what most regular expressions go astray in: some take the square of its length."""


def render(text: str) -> str:
    """HTML of a text in Markdown. Images become links: a page fetches nothing that a text names."""
    html = _renderer().render(text)
    return nh3.clean(
        html,
        tags=_ELEMENTS,
        attributes=_ATTRIBUTES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
    )


@lru_cache(maxsize=1)
def _renderer() -> MarkdownIt:
    found = MarkdownIt("commonmark", {"html": False, "breaks": True})
    found.enable(["table", "strikethrough"])
    found.add_render_rule("image", _image)
    found.add_render_rule("fence", _fence)
    found.add_render_rule("code_block", _fence)
    return found


def _image(_: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    source = str(token.attrs.get("src", ""))
    return f'<a href="{escape(source)}">🖼 {escape(token.content or source)}</a>'


def _fence(_: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    language = token.info.split()[0] if token.info.strip() else ""
    env["highlighted"] = env.get("highlighted", 0) + len(token.content)
    is_short = env["highlighted"] <= MOST_HIGHLIGHTED
    code = _highlight(token.content, language) if is_short else escape(token.content)
    # It can have the focus, so that it can be scrolled by keyboard.
    inside = f'<pre tabindex="0"><code>{code}</code></pre>'
    return f'<div class="code" data-language="{escape(language)}">{inside}</div>\n'


def _highlight(code: str, language: str) -> str:
    if language.lower() not in LANGUAGES or _ENDLESS.search(code):
        return escape(code)
    return highlight(code, get_lexer_by_name(language, stripnl=False), HtmlFormatter(nowrap=True))
