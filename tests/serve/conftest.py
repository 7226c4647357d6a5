"""The chat page is there for every test of this room that asks for it."""

from chat_page import open_page, page, site

__all__ = ["open_page", "page", "site"]
