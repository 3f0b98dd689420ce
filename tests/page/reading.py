"""What the tests do with the page as a person would: writing, and reading what is in the conversation."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect


def ask(page: Page, text: str) -> None:
    page.locator("#text").fill(text)
    page.locator("#text").press("Enter")


def said(page: Page, text: str) -> Locator:
    return page.get_by_role("main").get_by_text(text)


def last_answer(page: Page) -> Locator:
    return page.get_by_role("article", name="Answer").last


def is_done(page: Page) -> None:
    expect(last_answer(page)).to_have_attribute("aria-busy", "false")
