"""Responses that can be continued by their id: in memory, within a bound, until the server ends.

Each holds its own turn alone and the id of the one before it. What was used longest ago goes first;
using a response counts for all the turns that it continues.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass

from ..errors import ApiError
from .items import Json, kind_of

MAX_STORED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Stored:
    """A response as it was sent, and the items that it answered."""

    response: Json
    items: list[Json]
    size: int


class ResponseStore:
    """Keeps responses within `max_bytes` of JSON; for the event loop's thread alone."""

    def __init__(self, max_bytes: int = MAX_STORED_BYTES) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._found: OrderedDict[str, Stored] = OrderedDict()
        self._items: dict[str, Json] = {}  # of answers, by their ids

    def put(self, response: Json, items: list[Json]) -> None:
        """Keep a response that is over."""
        size = len(json.dumps([response, items], ensure_ascii=False).encode())
        self._found[response["id"]] = Stored(response, items, size)
        self._items |= {item["id"]: item for item in response["output"]}
        self.nbytes += size
        while self.nbytes > self.max_bytes:
            self._forget(next(iter(self._found)))

    def get(self, name: str) -> Json:
        """Return a response.

        Raises:
            ApiError: there is none of that name.
        """
        if name not in self._found:
            raise ApiError(404, f"there is no response {name[:100]!r}; {_KEPT}.")
        return self._found[name].response

    def delete(self, name: str) -> None:
        """Forget a response.

        Raises:
            ApiError: there is none of that name.
        """
        self.get(name)
        self._forget(name)

    def conversation(self, name: str | None) -> list[Json]:
        """Return the items of a response and of all it continues, oldest first.

        Raises:
            ApiError: one of them is not there.
        """
        chain: list[str] = []
        while name is not None:
            if name not in self._found:
                raise ApiError(
                    400,
                    f"previous_response_id: there is no response {name[:100]!r}; {_KEPT}. Send the "
                    "whole conversation as input.",
                    param="previous_response_id",
                    code="previous_response_not_found",
                )
            chain.append(name)
            name = self._found[name].response["previous_response_id"]
        items: list[Json] = []
        for one in reversed(chain):
            self._found.move_to_end(one)
            items += [*self._found[one].items, *self._found[one].response["output"]]
        return items

    def referred(self, item: Json, place: int) -> Json:
        """Return an item of a request, or the one that it refers to.

        Raises:
            ApiError: that one is not there.
        """
        if kind_of(item, ("input", place)) != "item_reference":
            return item
        name = item.get("id")
        if name not in self._items:
            raise ApiError(
                400,
                f"input.{place}: there is no item {str(name)[:100]!r}; {_KEPT}. Send the item "
                "itself.",
                param="input",
                code="item_not_found",
            )
        return self._items[name]

    def _forget(self, name: str) -> None:
        stored = self._found.pop(name)
        self.nbytes -= stored.size
        for item in stored.response["output"]:
            self._items.pop(item["id"], None)


_KEPT = (
    "this server keeps responses in memory alone, unless `store` is false, the oldest not for long"
)
