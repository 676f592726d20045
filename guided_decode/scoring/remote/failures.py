"""What goes wrong between a client and its scorer server."""


class ScorerServerError(ConnectionError):
    """A scorer server that does not answer, or cannot: rows of the call have no scores.

    What a local scorer refuses (a token outside the vocabulary, say) is a ValueError here, too.
    """


class ScorerBusyError(ScorerServerError):
    """The server has as much waiting as it takes; it is up, and the next call may be answered."""
