"""Traces made by hand, for tests of the page: no model, and text that no model would dare."""

from guided_decode import GuidanceConfig
from guided_decode.lab.trace import Run, Step, Trace, TracedPrompt

# Markup, an entity, an end of the data's own element, right-to-left text, controls that turn text
# around, NUL, half a character, what JSON and templates have a meaning for.
HOSTILE = [
    "<script>document.title='run'</script>",
    "</script><img src=x onerror=\"document.title='run'\">",
    "<!--<script>",
    "&lt;b&gt; &amp;",
    " \u05e9\u05dc\u05d5\u05dd \u0627\u0644\u0633\u0644\u0627\u0645",
    "\u202eabc\u202c\u2066x\u2069\u200f",
    "nul\x00 esc\x1b[31m\x7f\x85",
    "\ud800",
    "tab\tline\nend",
    "{{DATA}}{{SCRIPT}}\\u003c\"'`${1}",
    "\U0001f468\u200d\U0001f469 e\u0301 \U000e0041\ufeff\u2028",
]


def step(own=0, k=4, seed=0, outside=False, baseline=0.25):
    """A step of k candidates, of which the response has one or, outside, another token."""
    tokens = tuple(100 + seed * 31 % 50 + i for i in range(k))
    # As long as numbers are.
    odds = tuple(0.4987654 / 2**i for i in range(k))
    guided = tuple(reversed(odds))
    values = tuple(0.0987654 * i - 0.1512345 + 0.0123456 * (seed % 7) for i in range(k))
    gained = tuple(value - baseline for value in values)
    if not outside:
        return Step(tokens, own, False, k, odds, guided, values, gained, baseline)
    return Step(
        (*tokens, 999), k, True, k, (*odds, 1e-6), (*guided, 0.0), (*values, None),
        (*gained, None), baseline,
    )  # fmt: skip


def run(pieces, name="guided", k=4, own=1, guided=True, **more):
    """A response with a text for each token; its other candidates are called other."""
    steps = [step(own, k, seed=i) for i in range(len(pieces))]
    texts = [[f"other{i}" for i in range(k)] for _ in pieces]
    for own_texts, piece in zip(texts, pieces, strict=True):
        own_texts[own] = piece
    ids = [each.tokens[each.chosen] for each in steps]
    after = [0.2123456 + 0.0112345 * i for i in range(len(pieces))]
    return Run(name, ids, pieces, steps, texts, after, guided, **more)


def trace(*prompts, **more):
    settings = {"policy": "policy", "scorer": "critic", "config": GuidanceConfig(top_k=4)} | more
    return Trace(prompts=prompts, **settings)


def hostile():
    """Every place that text can come to has text of the worst kind."""
    worst = "".join(HOSTILE)
    runs = [
        run(HOSTILE, name=HOSTILE[0] + "\u202e", facts={"ended": worst, "finished": True}),
        run([*reversed(HOSTILE)], name=HOSTILE[1], own=0, guided=False),
    ]
    beside = TracedPrompt(worst, [("user", worst), ("assistant", worst)], runs)
    searched = TracedPrompt("", [("user", worst)], runs, method=worst, chosen=1)
    return trace(beside, searched, policy=worst, scorer=worst, decoding={"seed": worst})
