"""Libraries that speak on the terminal although nothing is wrong."""

import logging

# torchao, which transformers imports where it is installed, speaks of kernels it has none for.
_TALKERS = ("huggingface_hub", "torchao", "torch.utils._pytree", "bitsandbytes")


def quieten_libraries() -> None:
    """Errors alone are told by those that say more; before they are imported, or after."""
    for talker in _TALKERS:
        logging.getLogger(talker).setLevel(logging.ERROR)
