import re

from monitoring.explanation import render


def item(name: str, status: str, sid: list[int], **more: object) -> dict:
    return {
        "item_id": name,
        "title": f"Title of {name}",
        "tags": ["t<1>"],
        "in_catalogue": True,
        "status": status,
        "sid": sid,
        "log_probs": [-0.5, -1.0],
        "score": -1.5,
        "probability": 0.22,
        "share_of_sid": 1.0,
        **more,
    }


def leaf(code: int, *items: str) -> dict:
    return {"code": code, "p": 0.5, "path_p": 0.25, "children": [], "items": list(items)}


def explanation(**changes: object) -> dict:
    event = {
        "item_id": "old",
        "title": "Old <b>",
        "tags": [],
        "in_catalogue": False,
        "time_ms": 1_767_225_600_000,
        "play_ms": 4_000,
        "duration_ms": 9_000,
        "feedback": ["like"],
    }
    items = [
        item("one", "shown", [1, 2], place=1),
        item("two", "seen", [1, 3], detail="positive"),
        item("three", "taken down", [1, 4]),
        item("four", "excluded", [1, 5]),
        item("five", "not among the best", [1, 6]),
    ]
    top = {
        "code": 1,
        "p": 0.5,
        "path_p": 0.5,
        "items": [],
        "children": [leaf(each["sid"][1], each["item_id"]) for each in items],
    }
    return {
        "user": "<script>u",
        "model_version": "20260101T000000-ab12cd34",
        "time_ms": 1_767_312_000_000,
        "num_items": 10,
        "beam_width": 64,
        "flag": "",
        "static": [7],
        "pathways": [
            {"name": name, "events": [event] * (25 if name == "short" else 0)}
            for name in ("short", "positive", "lifelong")
        ],
        "items": items,
        "tree": {"code": None, "p": 1.0, "path_p": 1.0, "children": [top], "items": []},
        **changes,
    }


def text_of(page: str) -> str:
    return re.sub(r"<[^>]+>", " ", page)


def test_the_page_says_what_is_shown_what_is_not_and_why() -> None:
    page = render(explanation(server="The running server answers the same items."))
    said = " ".join(text_of(page).split())
    assert "seen: positive feedback" in said
    assert "taken down" in said
    assert "excluded" in said
    assert "3 items of the unfiltered beam" in said
    assert "The running server answers the same items." in said
    assert "4 of 9 s" in said
    assert "(not in this version's catalogue)" in said
    assert "2026-01-02 00:00" in said
    assert "5 more" in said


def test_ids_and_titles_are_text_and_nothing_is_loaded() -> None:
    page = render(explanation())
    assert "<script" not in page
    assert "Old &lt;b&gt;" in page
    assert "t&lt;1&gt;" in page
    assert not re.search(r"(src|href)=", page)


def test_a_newcomer_and_an_empty_beam_still_make_a_page() -> None:
    empty = {"code": None, "p": 1.0, "path_p": 1.0, "children": [], "items": []}
    page = render(explanation(flag="cold", items=[], tree=empty, static=[]))
    assert "Nothing is known of this user" in page
    assert "no item of the beam was seen" in page
