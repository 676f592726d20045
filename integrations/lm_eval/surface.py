"""What we touch of lm-evaluation-harness, and where."""

from guided_decode.integrations.host_surface import Name, Surface, called, overridden

_MAIN = "integrations/lm_eval/__main__.py"
_MODEL = "integrations/lm_eval/model.py"
_REGISTRATION = "integrations/lm_eval/registration.py"
_HF = "lm_eval.models.huggingface.HFLM"

SURFACE = Surface(
    package="lm_eval",
    distributions=("lm-eval", "lm_eval"),
    read_in="0.4.13",
    holds_in=(),
    names=(
        Name("lm_eval._cli.HarnessCLI", _MAIN, why="its command"),
        Name("lm_eval._cli.HarnessCLI.parse_args", _MAIN, takes=called()),
        Name("lm_eval._cli.HarnessCLI.execute", _MAIN, takes=called("args")),
        Name("lm_eval.utils.setup_logging", _MAIN, takes=called()),
        Name("lm_eval.models", _REGISTRATION, why="fills the registry when it is imported"),
        Name("lm_eval.api.registry.model_registry", _REGISTRATION),
        Name(
            "lm_eval.api.registry.Registry.register",
            _REGISTRATION,
            takes=called(by_name=("target",), any_name=False),
        ),
        Name("lm_eval.models.huggingface.HFLM", _MODEL, has=("model", "tokenizer")),
        Name(f"{_HF}.__init__", _MODEL, takes=called("pretrained", by_name=("add_bos_token",))),
        Name(
            f"{_HF}._model_generate",
            _MODEL,
            takes=called("context", "max_length", "stop", any_name=True),
            why="its other keywords are those of `generate`",
        ),
        Name(f"{_HF}.loglikelihood_rolling", _MODEL, takes=overridden("requests", "disable_tqdm")),
        Name(f"{_HF}.get_model_info", _MODEL, takes=called()),
    ),
)
