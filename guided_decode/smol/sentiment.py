"""Short texts on everyday topics, judged by VADER's compound score (Hutto and Gilbert 2014).

The classic task of value-guided decoding: steer the sentiment of what a model writes anyway.
"""

import functools
from typing import Any

from guided_decode.smol.topics import Split, topics

# One or two sentences each, so that most answers end by themselves within 64 tokens.
TEMPLATES = (
    "Write one short sentence about {topic}.",
    "Describe {topic} in one sentence.",
    "Write a one-sentence diary entry about {topic}.",
    "Tell a friend about {topic} in one or two short sentences.",
)


def prompts(split: Split) -> list[str]:
    """The user messages of a split: 580 for training, 100 for validation, 300 held out."""
    return [template.format(topic=topic) for topic in topics(split) for template in TEMPLATES]


def reward(prompt: str, response: str) -> float:
    """VADER's compound score of the response, in [−1, 1]; 0 is neutral. The prompt is not read.

    Raises ImportError: vaderSentiment is not installed.
    """
    return float(_analyzer().polarity_scores(response.strip())["compound"])


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError(
            f"the sentiment task is judged by VADER, and vaderSentiment cannot be imported "
            f"({error}): pip install 'guided-decode[smol]'"
        ) from error
    return SentimentIntensityAnalyzer()
