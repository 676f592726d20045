"""The name by which the harness knows the model."""

NAME = "guided-decode"
_MODEL = "guided_decode.integrations.lm_eval.model:GuidedLM"


def register() -> None:
    """Makes `--model guided-decode` known to the harness of this process; loads no model.

    Raises ImportError: the harness is not installed.
    """
    try:
        # The harness fills its registry when this is imported, and not where it holds something.
        import lm_eval.models  # noqa: F401
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise ImportError(
            "lm-evaluation-harness is not installed: pip install 'guided-decode[lm-eval]'"
        ) from error
    if NAME not in model_registry:
        model_registry.register(NAME, target=_MODEL)
