"""Markdown to nodes, whole and in pieces: which nodes, that pieces change nothing, and that nothing runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from .conftest import PATIENCE_MS
from .scripted import ScriptedServer

# Written to the page at the ends that are given, as an answer would be; gives the markup that came of it.
DRAW = """async ([text, ends]) => {
    const { MarkdownWriter } = await import("/page/markdown.js");
    const root = document.createElement("div");
    const writer = new MarkdownWriter(root);
    let from = 0;
    for (const end of [...ends, text.length]) { writer.write(text.slice(from, end)); from = end; }
    writer.end();
    return root.innerHTML;
}"""


@pytest.fixture(scope="module")
def modules(browser: Browser, module_server: ScriptedServer) -> Iterator[Page]:
    """A document of the server's in which modules of the page can be loaded, and nothing else is."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{module_server.url}page/icon.svg")
    page.goto("about:blank")
    page.route("**/empty", lambda route: route.fulfill(body="", content_type="text/html"))
    page.goto(f"{module_server.url}empty")
    yield page
    page.close()


def draw(page: Page, text: str, ends: tuple[int, ...] = ()) -> str:
    return page.evaluate(DRAW, [text, list(ends)])


LINK = '<a href="https://a.b/c_d" rel="noopener noreferrer nofollow" target="_blank">'


def code(language: str) -> str:
    label = f"Code, {language}" if language else "Code"
    return f'<pre tabindex="0" role="group" aria-label="{label}" data-language="{language}"><code>'


EXAMPLES = {
    "plain": "<p>plain</p>",
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "**a** *b* _c_ ~~d~~ `e`": "<p><strong>a</strong> <em>b</em> <em>c</em> <del>d</del> <code>e</code></p>",
    "***a*** **b *c* d**": "<p><strong><em>a</em></strong> <strong>b <em>c</em> d</strong></p>",
    "这是**重点**内容": "<p>这是<strong>重点</strong>内容</p>",
    "2*3*4 a_b_c 2 * 3 * 4 x**2**": "<p>2*3*4 a_b_c 2 * 3 * 4 x<strong>2</strong></p>",
    "open **never and *more": "<p>open **never and *more</p>",
    r"\*a\* \(x_1 \cdot y\) \[z\]": r"<p>*a* \(x_1 \cdot y\) \[z\]</p>",
    "``a ` b`` and `c*d*e` *f `*` g*": ("<p><code>a ` b</code> and <code>c*d*e</code> <em>f <code>*</code> g</em></p>"),
    "[x *y*](https://a.b/c_d) ![p](https://a.b/c_d)": f"<p>{LINK}x <em>y</em></a> {LINK}p</a></p>",
    "# One\n### Two ##\ntext": "<h3>One</h3><h5>Two</h5><p>text</p>",
    "#not\n####### not": "<p>#not<br>####### not</p>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "- a\n- b\n  - c\n- d": (
        "<ul><li><span>a</span></li><li><span>b</span><ul><li><span>c</span></li></ul></li><li><span>d</span></li></ul>"
    ),
    "3. a\n\n4. b\n   more\n\n   par\n\nout": (
        '<ol start="3"><li><span>a</span></li><li><span>b<br>more</span><p>par</p></li></ol><p>out</p>'
    ),
    "* a\n1. b": '<ul><li><span>a</span></li></ul><ol start="1"><li><span>b</span></li></ol>',
    "> a\n> b\n\nc": "<blockquote><p>a<br>b</p></blockquote><p>c</p>",
    "```\na\n  b *c*\n\n# d\n```\ne": f"{code('')}a\n  b *c*\n\n# d\n</code></pre><p>e</p>",
    "~~~~\n~~~\n~~~~": f"{code('')}~~~\n</code></pre>",
    "- x\n  ```py\n  a\n    b\n  ```\n- y": (
        f"<ul><li><span>x</span>{code('py')}a\n  b\n</code></pre></li><li><span>y</span></li></ul>"
    ),
    "```\nnever closed": f"{code('')}never closed</code></pre>",
    "|a|b|\n|-|-|\n|*c*|d|e|\n|f|\ng": (
        '<div class="table" tabindex="0" role="group" aria-label="Table"><table><thead>'
        "<tr><th>a</th><th>b</th></tr></thead><tbody>"
        "<tr><td><em>c</em></td><td>d</td><td>e</td></tr><tr><td>f</td><td></td></tr></tbody></table></div><p>g</p>"
    ),
    "|a|b|\nno table": "<p>|a|b|<br>no table</p>",
    "|a|b|\n- c": "<p>|a|b|</p><ul><li><span>c</span></li></ul>",
    "text\n|a|": "<p>text<br>|a|</p>",
    "-": "<p>-</p>",
    "": "",
    "\n\n\n": "",
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_nodes(modules: Page, text: str) -> None:
    assert draw(modules, text) == EXAMPLES[text]


def test_pieces_change_nothing(modules: Page) -> None:
    """Every example, cut at every place, at all places, and joined with the others."""
    program = f"""async (texts) => {{
        const draw = {DRAW};
        const wrong = [];
        for (const text of texts) {{
            const whole = await draw([text, []]);
            const all = [...text].map((_, at) => at);
            for (const ends of [all, ...all.map((at) => [at])])
                if (await draw([text, ends]) !== whole) wrong.push([text, ends.length > 1 ? "all" : ends]);
        }}
        return wrong;
    }}"""
    assert modules.evaluate(program, [*EXAMPLES, "\n\n".join(EXAMPLES)[:800]]) == []


def test_random_texts_in_random_pieces_keep_their_letters(modules: Page) -> None:
    """Of marks and letters at random: pieces change nothing, no letter is lost, and each ends in reasonable time."""
    program = f"""async () => {{
        const draw = {DRAW};
        let state = 7;
        const random = (most) => (state = (state * 1103515245 + 12345) % 2147483648) % most;
        const marks = ["*", "**", "_", "`", "```", "~~", "[", "](", ")", "http://a", "\\n", "\\n\\n", "- ", "1. ", "# ",
            "> ", "|", "|-|", " ", "  ", "\\\\", "x", "y1", "é", "🌙", "<b>", "&amp;"];
        const wrong = [];
        for (let round = 0; round < 400; round++) {{
            const text = Array.from({{length: 1 + random(40)}}, () => marks[random(marks.length)]).join("");
            const ends = Array.from({{length: random(12)}}, () => random(text.length + 1)).sort((a, b) => a - b);
            const whole = await draw([text, []]);
            if (await draw([text, ends]) !== whole) wrong.push([text, ends]);
            const shown = new DOMParser().parseFromString(whole, "text/html").body;
            for (const a of shown.querySelectorAll("a")) a.append(a.href);
            for (const pre of shown.querySelectorAll("pre")) pre.append(pre.dataset.language);
            const letters = (from) => from.replace(/[^xyé🌙]/gu, "").length;
            if (letters(shown.textContent) < letters(text)) wrong.push(["lost", text]);
        }}
        return wrong;
    }}"""
    assert modules.evaluate(program) == []


# Texts that want to become more than text, and how many links are made of them.
HOSTILE = {
    "<img src=x onerror=alert(1)>": 0,
    "<script>alert(1)</script>": 0,
    "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](data:text/html,x) [d](vbscript:x) [e](//evil.example)": 0,
    "[a](java\tscript:alert(1)) [b](&#106;avascript:x) [c](\u0001javascript:x) [d](file:///etc/passwd) [e](/v1)": 0,
    "![x](javascript:alert(1)) ![y](https://evil.example/p.png)": 1,
    "```<img onerror=x>\n<img onerror=x>\n```": 0,
    "|<img onerror=x>|\n|-|\n|<svg onload=x>|": 0,
    '[x](https://a.b" onclick="alert(1)) <a href="javascript:x">y</a>': 0,
    "# <iframe srcdoc=x>\n- <style>*{}</style>\n> <b>": 0,
    "[<img src=x onerror=x>](https://a.b/<script>) [<b>](https://a.b/%3Cscript%3E)": 1,
}


@pytest.mark.parametrize("text", HOSTILE)
def test_markup_of_others_is_text_and_only_web_addresses_are_links(modules: Page, text: str) -> None:
    program = f"""async (text) => {{
        const draw = {DRAW};
        const root = new DOMParser().parseFromString(await draw([text, []]), "text/html").body;
        const allowed = new Set("P BR STRONG EM DEL CODE A H3 UL LI SPAN BLOCKQUOTE PRE DIV TABLE THEAD TBODY TR TH TD"
            .split(" "));
        const names = new Set("href rel target class tabindex role aria-label data-language".split(" "));
        const wrong = [];
        for (const node of root.querySelectorAll("*")) {{
            if (!allowed.has(node.tagName)) wrong.push(node.tagName);
            for (const name of node.getAttributeNames())
                if (!names.has(name)) wrong.push(name);
            if (node.tagName === "A" && !/^https?:$/.test(node.protocol)) wrong.push(node.href);
        }}
        return wrong;
    }}"""
    assert modules.evaluate(program, text) == []
    assert draw(modules, text).count("<a ") == HOSTILE[text]


@pytest.mark.parametrize(
    "unit", ("*a ", "**a", "_a_b", "`", "``` ", "[", "[a](", "[[a](http://b)", "~~", "\\", "|a", "> ")
)
def test_no_text_takes_long(modules: Page, unit: str) -> None:
    """What would hang a page, were the work to grow with the square: 60,000 characters in pieces of 60."""
    text = unit * (60_000 // len(unit))
    assert draw(modules, text, tuple(range(60, len(text), 60)))
    assert draw(modules, text.replace(" ", " \n", 500))


def test_finished_nodes_are_left_alone(modules: Page) -> None:
    program = """async () => {
        const { MarkdownWriter } = await import("/page/markdown.js");
        const root = document.createElement("div");
        const writer = new MarkdownWriter(root);
        writer.write("one **two** three\\n\\nfour");
        const [first, second] = root.children;
        const text = second.firstChild;
        const touched = [];
        new MutationObserver((records) => touched.push(...records.map((record) => record.target))).observe(root,
            { subtree: true, childList: true, characterData: true });
        writer.write(" five");
        writer.write(" six\\n\\n- seven");
        await null;
        const kept = second.firstChild.data === "four five six" && root.children[0] === first;
        return [kept, touched.includes(first), text === second.firstChild || text.data];
    }"""
    kept, first_touched, _ = modules.evaluate(program)
    assert kept and not first_touched


def test_plain_words_are_appended_to_the_text_that_is_there(modules: Page) -> None:
    program = """async () => {
        const { MarkdownWriter } = await import("/page/markdown.js");
        const root = document.createElement("div");
        const writer = new MarkdownWriter(root);
        writer.write("**a** some");
        const text = root.firstChild.lastChild;
        writer.write(" more words");
        return text === root.firstChild.lastChild && text.data === " some more words";
    }"""
    assert modules.evaluate(program)


def test_events_of_a_stream_may_be_cut_anywhere(modules: Page) -> None:
    program = r"""async () => {
        const { EventParser } = await import("/page/sse.js");
        const text = ': hello\n\ndata: a\n\ndata:b\r\ndata: c\r\n\r\nid: 1\ndata\n\n\n: ping\rdata:  d\r\rdata: e';
        const wanted = JSON.stringify(["a", "b\nc", "", " d"]);
        const wrong = [];
        for (let at = 0; at <= text.length; at++)
            for (let next = at; next <= text.length; next++) {
                const parser = new EventParser();
                const pieces = [text.slice(0, at), text.slice(at, next), text.slice(next)];
                const found = pieces.flatMap((piece) => parser.push(piece));
                if (JSON.stringify(found) !== wanted) wrong.push([at, next, found]);
            }
        return wrong;
    }"""
    assert modules.evaluate(program) == []
