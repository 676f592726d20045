"""What a step read of rows whose clients asked for values: handed to the store."""

from collections.abc import Collection, Mapping, Sequence
from weakref import WeakKeyDictionary

from guided_decode.integrations.vllm.client_values.records import record
from guided_decode.integrations.vllm.client_values.store import ValueStore
from guided_decode.integrations.vllm.client_values.texts import HandleText
from guided_decode.integrations.vllm.rows import LiveRow
from guided_decode.prefix import PrefixHandle
from guided_decode.scorer import Scorer


class ShownRows:
    """The rows of an engine that somebody wants to see."""

    def __init__(self, store: ValueStore) -> None:
        self._store = store
        self._texts: WeakKeyDictionary[PrefixHandle, HandleText] = WeakKeyDictionary()

    @staticmethod
    def unread(
        rows: Sequence[LiveRow], guided: Collection[int], scorer: Scorer | None
    ) -> list[LiveRow]:
        """Those of the rows whose V is still to be read.

        A response that is over needs none. What guidance asked the scorer for in vain, or would be
        refused, failed there.

        Args:
            rows: that have a name.
            guided: ids of the rows that were guided in this step.
            scorer: guides; None where nothing does.
        """
        missing = [row for row in rows if _value(row) is None and not row.is_over]
        if scorer is None:
            return missing
        return [
            row
            for row in missing
            if id(row) not in guided
            or not (row.trail.asked or scorer.refusal(row.history, 0) is not None)
        ]

    def keep(
        self,
        rows: Sequence[LiveRow],
        values: Mapping[int, float],
        guided: Collection[int],
        ended: Collection[int],
    ) -> None:
        """Keeps what is known of the step.

        Args:
            rows: that have a name.
            values: V by the rows' ids, where it was read for this alone.
            guided: ids of the rows that were guided in this step.
            ended: ids of those that it ends: a sibling of the same text may know more.
        """
        for row in rows:
            name = row.request.values_id
            assert name is not None
            value = _value(row)
            advantages = row.trail.advantages if id(row) in guided else {}
            known = values.get(id(row)) if value is None else value
            final = row.samples_for_sure and id(row) not in ended
            self._store.add(name, record(self._text(row), known, advantages, final=final))

    def _text(self, row: LiveRow) -> bytes:
        """The digest of a row's text; behind drafts of its request's, which may be long, no more
        than these are read."""
        main = row if row.main is None else row.main
        text = self._texts.setdefault(main.history, HandleText()).text(main.history)
        if row is not main:
            text = text.copy()
            text.extend(row.history.tokens[len(main.history) :])
        return text.digest()


def _value(row: LiveRow) -> float | None:
    return row.trail.at(row.history, len(row.history))
