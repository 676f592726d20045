"""Search: methods ask a generator for continuations or next tokens, a judge for values.

A method keeps no engine state. It is a Python generator that yields `Extend`, `Next` and `Judge`
requests and gets their answers, so that it makes the same choices on every engine, many searches
share the engine's batches, and a recorded search can be replayed. `run` answers the requests of one
search, `run_all` those of many.
"""

from guided_decode.search.answers import ANSWERS
from guided_decode.search.budget import Budget, Spent
from guided_decode.search.driver import run, run_all
from guided_decode.search.http_failures import EndpointError, RequestRefused, Retry
from guided_decode.search.judges import CallableJudge, ScorerJudge
from guided_decode.search.local import LocalGenerator, load_generator
from guided_decode.search.method_table import METHODS, Method, find_method
from guided_decode.search.methods.best_of_n import best_of_n
from guided_decode.search.methods.blockwise import Blocks, block_search
from guided_decode.search.methods.mcts_tree import MCTS
from guided_decode.search.methods.ppo_mcts import ppo_mcts
from guided_decode.search.methods.refill import prune_and_refill
from guided_decode.search.methods.segment_rejection import Segments, segment_rejection
from guided_decode.search.methods.smc import sequential_monte_carlo
from guided_decode.search.methods.vote import vote
from guided_decode.search.pooling_connection import connect_judge
from guided_decode.search.pooling_judge import PoolingJudge
from guided_decode.search.requests import (
    Continuation,
    Extend,
    Generator,
    Judge,
    Judged,
    Next,
    NextTokens,
    Sampling,
    TokenGenerator,
)
from guided_decode.search.result import Candidate, SearchResult
from guided_decode.search.servers import ServerGenerator, connect_generator
from guided_decode.search.step_judge import StepJudge
from guided_decode.search.text_judge import TextJudge

__all__ = [
    "ANSWERS",
    "MCTS",
    "METHODS",
    "Blocks",
    "Budget",
    "CallableJudge",
    "Candidate",
    "Continuation",
    "EndpointError",
    "Extend",
    "Generator",
    "Judge",
    "Judged",
    "LocalGenerator",
    "Method",
    "Next",
    "NextTokens",
    "PoolingJudge",
    "RequestRefused",
    "Retry",
    "Sampling",
    "ScorerJudge",
    "SearchResult",
    "Segments",
    "ServerGenerator",
    "Spent",
    "StepJudge",
    "TextJudge",
    "TokenGenerator",
    "best_of_n",
    "block_search",
    "connect_generator",
    "connect_judge",
    "find_method",
    "load_generator",
    "ppo_mcts",
    "prune_and_refill",
    "run",
    "run_all",
    "segment_rejection",
    "sequential_monte_carlo",
    "vote",
]
