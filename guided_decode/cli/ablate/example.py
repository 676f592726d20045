"""An ablation's file with a comment on each key, as `guided-decode ablate --init` prints it."""

EXAMPLE = """\
# An ablation for `guided-decode ablate FILE`. It runs as it is, on the models of this package.
# Paths are seen from where the command runs. A list of values of a setting is a grid.

# Where everything goes; the same command goes on from what is there. Or --output DIR.
output: out/ablation

prompts:
  embedded: tiny-tulu        # tiny-tulu or tiny-tulu-lists, with split: held-out or validation; or
  # file: prompts.jsonl      # a chat a line: {"prompt": ..., "answer": ...} or {"messages": ...}
  limit: 20                  # the first so many, after skip; without: all
  # skip: 0
  # raw: true                # prompts are text as it is, not chats

# What a response is worth. kind is one of
#   exact        field: answer, find: final|boxed|number|MODULE:FUNCTION (without: the whole text)
#   numeric      the same, and tolerance: 0.01, relative for what is above 1
#   regex        pattern: 'Answer: {answer}\\b', where {answer} is the line's
#   math-verify  field: answer; needs guided-decode[math]
#   function     function: MODULE:FUNCTION, of prompt and response
#   model        model: a reward model, with what a scorer may have, below
reward:
  kind: numeric
  field: answer

seeds: [0, 1]                # of all draws; what draws nothing runs with the first alone
max_new_tokens: 80           # of the longest response, where a method says nothing else
block: 10                    # prompts of one unit: what is lost at most when the run is killed
parallel: 1                  # units under way at once, of policies on servers

policies:                    # by names of yours; a name alone, or
  sft:
    model: tiny-tulu-sft     # folder, registered name or Hub id
    # device: cuda:0
    # dtype: bfloat16
    # prompt_format: tulu-2
    # trust_remote_code: true
    # endpoint: [http://10.0.0.7:8000, http://10.0.0.8:8000]   # as options of `search`:
    # engine: vllm           # served_model, api_key_env, endpoint_concurrency, engine_args, ...

scorers:
  critic: tiny-tulu-value
  # reward-model:
  #   model: NAME            # folder, registered name, Hub id, tcp:// or http:// address
  #   kind: reward-model     # and every option of `search` that says how a scorer is read:
  #   transform: sigmoid     # reference, bos, terminal, quantization, judge_through_text, ...

# Plain decoding at temperature 1 is there in any case: all is compared with it. Each method runs on
# every policy with every scorer, or on those of its own policies: [sft] and scorers: [critic].
methods:
  - method: plain
    name: greedy             # in tables, in the place of the method's
    temperature: 0
  - method: guide            # single tokens; settings as options of `generate`: preset, rule, ...
    beta: [4, 10]
    top_k: [2, 4]
    # config: guidance.yaml  # what `calibrate --output` wrote, where nothing is said here
  - method: best-of-n        # searches; settings as options of `search --method NAME`
    n: [2, 4]
    # max_policy_tokens: [200, 400]   # budgets of one prompt, and max_scorer_tokens, max_seconds

# Tokens that equal cost and the plot of tokens count: forwarded, where draws share what they have
# in common, as in this package's generator; or drawn, where they share their prompt alone.
counting: forwarded

# Methods at the same tokens of policy and scorer, in multiples of plain's; each method's settings
# are chosen on one half of the prompts and counted on the other.
equal_cost:
  budgets: [2, 4]
  against: best-of-n         # what the others are compared with
"""
